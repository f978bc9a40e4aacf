package main

import (
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const contract = "../../docs/contract.md"

var (
	contractID  = regexp.MustCompile(`\b(?:[ACEGHIKNRTU]-[0-9]{2}b?|C-(?:GO-[0-9]|[A-Z]{2,}))\b`)
	contractRow = regexp.MustCompile(`(?m)^\| ((?:[A-Z]-[0-9]{2}b?|C-[A-Z0-9-]+)) \|`)
)

// Docs: every rule that the tree cites by an ID is defined in the contract, once.
func TestDocsContract(t *testing.T) {
	text, err := os.ReadFile(contract)
	if err != nil {
		t.Fatal(err)
	}
	defined := map[string]bool{}
	for _, m := range contractRow.FindAllStringSubmatch(string(text), -1) {
		if defined[m[1]] {
			t.Errorf("docs/contract.md defines %s twice", m[1])
		}
		defined[m[1]] = true
	}
	for id, file := range cited(t) {
		if !defined[id] {
			t.Errorf("%s cites %s, which docs/contract.md does not define", file, id)
		}
	}
}

// cited returns the IDs that the tree's files cite, each with one of the files.
func cited(t *testing.T) map[string]string {
	t.Helper()
	list := exec.CommandContext(t.Context(), "git", "ls-files", "--cached", "--others", "--exclude-standard")
	list.Dir = "../.."
	out, err := list.Output()
	if err != nil {
		t.Fatalf("git ls-files: %v", err)
	}
	files := strings.Fields(string(out))
	files = slices.DeleteFunc(files, func(f string) bool {
		return strings.Contains(f, "/testdata/fuzz/") || strings.HasSuffix(f, ".sum")
	})
	ids := map[string]string{}
	for _, f := range files {
		text, err := os.ReadFile("../../" + f)
		if err != nil {
			continue // deleted, and not committed yet
		}
		for _, id := range contractID.FindAllString(string(text), -1) {
			ids[id] = f
		}
	}
	if len(ids) < 100 {
		t.Fatalf("only %d IDs found: does the pattern still fit?", len(ids))
	}
	return ids
}
