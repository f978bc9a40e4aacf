package doctor

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const troubleshootingPage = "../../docs/troubleshooting.md"

// Docs: docs/troubleshooting.md says of each check of doctor what to do, and of no other.
func TestDocsDoctor(t *testing.T) {
	page, err := os.ReadFile(troubleshootingPage)
	if err != nil {
		t.Fatal(err)
	}
	var names, documented []string
	for _, c := range checks {
		names = append(names, c.name)
	}
	for _, m := range regexp.MustCompile("(?m)^### ([a-z0-9]+)$").FindAllStringSubmatch(string(page), -1) {
		documented = append(documented, m[1])
	}
	if !slices.Equal(names, documented) {
		t.Errorf("%s has sections for the checks\n%q\nand doctor has\n%q", troubleshootingPage, documented, names)
	}
}

// Docs: what docs/troubleshooting.md quotes of doctor's lines and of answers to pods is what the
// code says.
func TestDocsQuoteTheCode(t *testing.T) {
	page, err := os.ReadFile(troubleshootingPage)
	if err != nil {
		t.Fatal(err)
	}
	var code strings.Builder
	for _, pattern := range []string{"../*.go", "../*/*.go"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			if text, err := os.ReadFile(file); err == nil && !strings.HasSuffix(file, "_test.go") {
				code.Write(text)
			}
		}
	}
	said := regexp.MustCompile(`" \+\n\s*"`).ReplaceAllString(code.String(), "") // literals on several lines
	const google = "Unable to generate access token; "
	said = strings.NewReplacer(`\"`, `"`, "Unable to generate %s; %s returned", google+"STS returned "+google+
		"IAM returned").Replace(said)

	refused, checks, _ := strings.Cut(string(page), "\n## Routing install failed")
	_, refused, _ = strings.Cut(refused, "\n## A pod is refused")
	_, checks, found := strings.Cut(checks, "\n## Checks of doctor")
	if !found {
		t.Fatal("the page has other sections")
	}
	var quoted []string
	for _, row := range regexp.MustCompile(`(?m)^\| [45]\d\d[^|]*`).FindAllString(refused, -1) {
		for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(row, -1) {
			quoted = append(quoted, m[1])
		}
	}
	for _, m := range regexp.MustCompile(`"([^"]+)"`).FindAllStringSubmatch(checks, -1) {
		quoted = append(quoted, m[1])
	}
	if len(quoted) < 40 {
		t.Errorf("only %d texts: is this test looking where it should?", len(quoted))
	}
	for _, text := range quoted {
		// …, N and CHAIN stand for what differs from case to case.
		for _, part := range regexp.MustCompile(`…|\bN\b|\bCHAIN\b`).Split(strings.Join(strings.Fields(text), " "), -1) {
			if part = strings.Trim(part, " ,:."); part != "" && !strings.Contains(said, part) {
				t.Errorf("%s quotes %q, and no code says %q", troubleshootingPage, text, part)
			}
		}
	}
}
