package doctor

import (
	"os"
	"regexp"
	"slices"
	"testing"
)

const troubleshootingPage = "../../docs/troubleshooting.md"

// Docs: docs/troubleshooting.md says of each check of doctor what to do, and of no other.
func TestDocsDoctor(t *testing.T) {
	page, err := os.ReadFile(troubleshootingPage)
	if err != nil {
		t.Fatal(err)
	}
	var names, told []string
	for _, c := range checks {
		names = append(names, c.name)
	}
	for _, m := range regexp.MustCompile("(?m)^### ([a-z0-9]+)$").FindAllStringSubmatch(string(page), -1) {
		told = append(told, m[1])
	}
	if !slices.Equal(names, told) {
		t.Errorf("%s has sections for the checks\n%q\nand doctor has\n%q", troubleshootingPage, told, names)
	}
}
