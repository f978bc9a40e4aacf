// Command gen makes generated files of the packages: manual pages, completions, changelogs,
// licences, SBOM and tarball.
//
//	gen manual PAGES PROGRAM DIR
//		compresses the manual pages of PAGES, with date and version, and PROGRAM's completions
//	gen changelog FILE DIR
//		writes the changelog in nfpm's form and compressed
//	gen copyright DIR
//		writes the licences of everything that is linked in
//	gen sbom PROGRAM FILE
//		writes CycloneDX from the program's build information
//	gen tar DIR ARCH OUT
//		writes the tarball of an architecture from DIR, for systems without a package
//
// SOURCE_DATE_EPOCH and VERSION come from packaging/build. The same input makes the same bytes.
package main

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

const program = "gke-metadata-emulator"

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "gen: %v\n", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	epoch, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64)
	if err != nil {
		return fmt.Errorf("SOURCE_DATE_EPOCH: %w", err)
	}
	r := release{version: os.Getenv("VERSION"), date: time.Unix(epoch, 0).UTC()}
	if r.version == "" {
		return errors.New("VERSION is not set")
	}
	switch {
	case len(args) == 4 && args[0] == "manual":
		return r.manual(args[1], args[2], args[3])
	case len(args) == 3 && args[0] == "changelog":
		return r.changelog(args[1], args[2])
	case len(args) == 2 && args[0] == "copyright":
		return copyright(args[1])
	case len(args) == 3 && args[0] == "sbom":
		return r.sbom(args[1], args[2])
	case len(args) == 4 && args[0] == "tar":
		return r.tar(args[1], args[2], args[3])
	}
	return errors.New("want manual, changelog, copyright, sbom or tar, and its arguments: see the comment in main.go")
}

// release is what is packaged.
type release struct {
	version string
	date    time.Time
}

func write(dir, name string, text []byte) error {
	return os.WriteFile(filepath.Join(dir, name), text, 0o644)
}

// writeGzip leaves name and time out of the header, as gzip -9n does.
func writeGzip(dir, name string, text []byte) error {
	var b bytes.Buffer
	w, err := gzip.NewWriterLevel(&b, gzip.BestCompression)
	if err != nil {
		return err
	}
	if _, err := w.Write(text); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	return write(dir, name+".gz", b.Bytes())
}
