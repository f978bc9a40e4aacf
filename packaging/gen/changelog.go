package main

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"time"
)

var heading = regexp.MustCompile(`(?m)^## \[?v?([0-9][^\] ]*)\]? - ([0-9]{4}-[0-9]{2}-[0-9]{2})$`)

// changelog writes the packagers' changelog, an entry for each release, as nfpm reads it, and the
// operators' compressed. The packagers' says only which release it is: the changes are listed once.
func (r release) changelog(file, dir string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var b strings.Builder
	entry := func(version string, date time.Time) {
		fmt.Fprintf(&b, "- semver: %s-1\n  date: %s\n  packager: %s\n  deb: {urgency: medium, distributions: [unstable]}\n "+
			" changes:\n"+
			"  - note: \"Release %s: changelog.gz says what changed.\"\n",
			strings.Replace(version, "-", "~", 1), date.Format(time.RFC3339), maintainer, version)
	}
	entry(r.version, r.date)
	for _, m := range heading.FindAllStringSubmatch(string(text), -1) {
		date, err := time.Parse(time.DateOnly, m[2])
		if err != nil {
			return fmt.Errorf("%s: %s: %w", file, m[0], err)
		}
		if m[1] != r.version {
			entry(m[1], date)
		}
	}
	if err := write(dir, "changelog.yaml", []byte(b.String())); err != nil {
		return err
	}
	return writeGzip(dir, "changelog", text)
}

const maintainer = "gke-metadata-emulator maintainers <maintainers@gke-metadata-emulator.invalid>"
