package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
)

// documents are what people read before they have the program.
func documents(t *testing.T) map[string]string {
	t.Helper()
	texts := map[string]string{}
	for _, pattern := range []string{
		"../../*.md", "../../docs/*.md", "../../test/*.md", "../../.github/*.md", "../../systemd/*", "../../packaging/*.yaml",
	} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %v, %v", pattern, files, err)
		}
		for _, f := range files {
			text, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			texts[strings.TrimPrefix(f, "../../")] = string(text)
		}
	}
	return texts
}

var invocation = regexp.MustCompile("(?m)(?:^|`|=\\+?/usr/bin/|serve by )gke-metadata-emulator((?: [a-z-]+(?:=[^ " +
	"`\n]*)?)*)")

// Docs: each command and flag that a document tells to type is there.
func TestDocsCommands(t *testing.T) {
	found := 0
	for name, text := range documents(t) {
		for _, m := range invocation.FindAllStringSubmatch(text, -1) {
			words := strings.Fields(m[1])
			if len(words) == 0 {
				continue
			}
			found++
			var out, errs bytes.Buffer
			if code := run(append(words, "--help"), &out, &errs); code != 0 {
				t.Errorf("%s: gke-metadata-emulator %s: exit code %d: %s", name, strings.Join(words, " "), code, &errs)
			}
		}
	}
	if found < 10 {
		t.Errorf("only %d commands found: does the pattern still fit?", found)
	}
}

// Docs: each key of the configuration that a document names is there.
func TestDocsKeys(t *testing.T) {
	var keys, groups []string
	for _, k := range config.Keys() {
		keys = append(keys, k.Path)
		if group, _, ok := strings.Cut(k.Path, "."); ok {
			groups = append(groups, group)
		}
	}
	found := 0
	named := regexp.MustCompile("`([a-z][A-Za-z]*)\\.([a-z][A-Za-z]+)(?::[^`]*)?`|`([a-z]+[A-Z][A-Za-z]+)(?::[^`]*)?`")
	for name, text := range documents(t) {
		if name == "CONTRIBUTING.md" {
			continue // it names functions
		}
		for _, m := range named.FindAllStringSubmatch(text, -1) {
			key := m[3]
			if m[1] != "" {
				if !slices.Contains(groups, m[1]) {
					continue // a file or a host
				}
				key = m[1] + "." + m[2]
			}
			if slices.Contains([]string{"hostAliases", "bpfExcludeCIDRsFromNAT"}, key) {
				continue // Kubernetes' and Calico's
			}
			found++
			if !slices.Contains(keys, key) {
				t.Errorf("%s names %s, which is no key of the configuration", name, key)
			}
		}
	}
	if found < 4 {
		t.Errorf("only %d keys found: does the pattern still fit?", found)
	}
}

// Docs: the configurations that they show load.
func TestDocsConfiguration(t *testing.T) {
	found := 0
	for name, text := range documents(t) {
		for _, m := range regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllStringSubmatch(text, -1) {
			file := filepath.Join(t.TempDir(), "config.yaml")
			if err := os.WriteFile(file, []byte(m[1]), 0o600); err != nil {
				t.Fatal(err)
			}
			found++
			if _, err := config.Load(file, nil); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	if found == 0 {
		t.Error("no document shows a configuration")
	}
}

// Docs: a link leads to a document that the packages have too, and to a heading that is there.
func TestDocsLinks(t *testing.T) {
	texts := documents(t)
	link := regexp.MustCompile(`\]\(([^)#\s]*)(?:#([^)\s]*))?\)`)
	found := 0
	for name, text := range texts {
		if !strings.HasSuffix(name, ".md") {
			continue
		}
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			found++
			to := name
			if m[1] != "" {
				to = filepath.Join(filepath.Dir(name), m[1])
			}
			there, known := texts[to]
			if !known {
				t.Errorf("%s links to %s, which is no document", name, to)
			}
			if m[2] != "" && !slices.Contains(anchors(there), m[2]) {
				t.Errorf("%s links to %s#%s, which is no heading", name, to, m[2])
			}
		}
	}
	if found < 40 {
		t.Errorf("only %d links found: does the pattern still fit?", found)
	}
}

// anchors are what GitHub makes of headings.
func anchors(text string) (all []string) {
	for _, m := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(text, -1) {
		words := regexp.MustCompile(`[^a-z0-9 _-]`).ReplaceAllString(strings.ToLower(m[1]), "")
		all = append(all, strings.ReplaceAll(words, " ", "-"))
	}
	return all
}

// Docs: the README is short, and the packages put each document of docs beside it.
func TestDocsAreShipped(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(readme), "\n"); n > 150 {
		t.Errorf("README.md has %d lines, 150 are allowed", n)
	}
	nfpm, err := os.ReadFile("../../nfpm.yaml")
	if err != nil {
		t.Fatal(err)
	}
	const doc = "/usr/share/doc/" + program
	for name, text := range documents(t) {
		line := fmt.Sprintf("- {dst: %s/%s, src: %s,", doc, name, name)
		if strings.HasPrefix(name, "docs/") && !strings.Contains(string(nfpm), line) {
			t.Errorf("nfpm.yaml lacks %s", name)
		}
		for _, path := range regexp.MustCompile(doc+`/[a-z0-9/._-]*[a-z0-9]`).FindAllString(text, -1) {
			if !strings.Contains(string(nfpm), "dst: "+path+",") {
				t.Errorf("%s names %s, which no package has", name, path)
			}
		}
	}
}

// Docs: the files that CONTRIBUTING.md names are there.
func TestDocsPaths(t *testing.T) {
	text, err := os.ReadFile("../../CONTRIBUTING.md")
	if err != nil {
		t.Fatal(err)
	}
	path := regexp.MustCompile(`\b(?:cmd|service|packaging|systemd|docs|test)/[A-Za-z0-9/._-]*[A-Za-z0-9]`)
	paths := path.FindAllString(string(text), -1)
	if len(paths) < 60 {
		t.Errorf("only %d paths found: does the pattern still fit?", len(paths))
	}
	for _, p := range paths {
		if _, err := os.Stat(filepath.Join("../..", p)); err != nil {
			t.Errorf("CONTRIBUTING.md: %v", err)
		}
	}
}

// Docs: the targets of make that documents name are there, and each says what it does.
func TestDocsTargets(t *testing.T) {
	makefile, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range documents(t) {
		for _, m := range regexp.MustCompile("(?m)(?:^|`|\" |=\\S+ )make ([a-z-]+)").FindAllStringSubmatch(text, -1) {
			if !regexp.MustCompile(`(?m)^` + m[1] + `:.*## `).Match(makefile) {
				t.Errorf("%s names make %s, which is no target that make help shows", name, m[1])
			}
		}
	}
}
