package main

import (
	"bytes"
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
	for _, pattern := range []string{"../../*.md", "../../systemd/*", "../../packaging/*.yaml"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %v, %v", pattern, files, err)
		}
		for _, f := range files {
			text, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			texts[filepath.Base(f)] = string(text)
		}
	}
	return texts
}

var invocation = regexp.MustCompile("(?m)(?:^|`|=\\+?/usr/bin/|serve by )gke-metadata-emulator((?: [a-z-]+(?:=[^ `\n]*)?)*)")

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
