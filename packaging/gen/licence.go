package main

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// linked is a module that is in the program, with the licences that its linked packages are under.
type linked struct {
	path, version string
	// of each licence and notice file from the linked packages up to the module's root, by its path in
	// the module
	texts map[string]string
}

var licenceFile = regexp.MustCompile(`(?i)^(licen[cs]e|copying|notice)[^/]*$`)

// linkedModules asks go for the packages of the program; GOOS is linux, and both architectures link
// the same modules.
func linkedModules() ([]linked, error) {
	cmd := exec.Command("go", "list", "-deps", "-f", "{{with .Module}}{{.Path}}|{{.Version}}|{{.Dir}}|{{$.Dir}}{{end}}",
		"./cmd/"+program)
	cmd.Env = append(os.Environ(), "GOOS=linux", "CGO_ENABLED=0")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	goroot, err := exec.Command("go", "env", "GOROOT", "GOVERSION").Output()
	if err != nil {
		return nil, fmt.Errorf("go env: %w", err)
	}
	std := strings.Fields(string(goroot))
	lines := append(strings.Fields(string(out)), fmt.Sprintf("std|%s|%s|%[2]s", strings.TrimPrefix(std[1], "go"), std[0]))
	modules := map[string]linked{}
	for _, line := range lines {
		f := strings.Split(line, "|")
		m, known := modules[f[0]]
		if !known {
			m = linked{path: f[0], version: f[1], texts: map[string]string{}}
			modules[f[0]] = m
		}
		for dir := f[3]; len(dir) >= len(f[2]); dir = filepath.Dir(dir) {
			files, err := os.ReadDir(dir)
			if err != nil {
				return nil, err
			}
			for _, file := range files {
				name, _ := filepath.Rel(f[2], filepath.Join(dir, file.Name()))
				if file.IsDir() || !licenceFile.MatchString(file.Name()) || strings.HasSuffix(file.Name(), ".go") ||
					m.texts[name] != "" {
					continue
				}
				text, err := os.ReadFile(filepath.Join(dir, file.Name()))
				if err != nil {
					return nil, err
				}
				m.texts[name] = string(text)
			}
		}
	}
	var all []linked
	for _, name := range slices.Sorted(maps.Keys(modules)) {
		if modules[name].licences() == nil {
			return nil, fmt.Errorf("%s: no licence that gen knows in %v: read it, and teach licencesOf", name,
				slices.Sorted(maps.Keys(modules[name].texts)))
		}
		all = append(all, modules[name])
	}
	return all, nil
}

// licences are SPDX's names, sorted.
func (m linked) licences() []string {
	set := map[string]bool{}
	for _, text := range m.texts {
		for _, l := range licencesOf(text) {
			set[l] = true
		}
	}
	return slices.Sorted(maps.Keys(set))
}

func licencesOf(text string) (names []string) {
	words := strings.Join(strings.Fields(text), " ")
	has := func(s string) bool { return strings.Contains(words, s) }
	if has("Apache License, Version 2.0") || has("Apache License Version 2.0") {
		names = append(names, "Apache-2.0")
	}
	if has("Permission is hereby granted, free of charge") {
		names = append(names, "MIT")
	}
	if has("Permission to use, copy, modify, and") && has("distribute this software for any purpose with or without fee") {
		names = append(names, "ISC")
	}
	if has("Redistribution and use in source and binary forms") {
		if has("Neither the name") || has("The names of its contributors may not") ||
			has("may be used to endorse or promote") {
			names = append(names, "BSD-3-Clause")
		} else {
			names = append(names, "BSD-2-Clause")
		}
	}
	return names
}

// debian is what Debian calls them.
func debian(licences []string) string {
	return strings.ReplaceAll(strings.Join(licences, " and "), "MIT", "Expat")
}

var holder = regexp.MustCompile(`(?mi)^[ #*/]*(?:copyright (?:\(c\)|©|[0-9]{4})|\(c\) [0-9]{4}|© [0-9]{4}).*$`)

// copyright writes Debian's machine-readable form. Apache's text is referred to, as Debian wants
// it; all others are given.
func copyright(dir string) error {
	modules, err := linkedModules()
	if err != nil {
		return err
	}
	const own = "github.com/" + program + "/" + program
	var b bytes.Buffer
	fmt.Fprintf(&b, "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\nUpstream-Name: "+
		"%s\nSource: https://%s\n"+
		"Comment: the program is linked statically; Files names the Go modules that are in it.\n", program, own)
	for _, m := range modules {
		if m.path == own {
			fmt.Fprintf(&b, "\nFiles: *\nCopyright: the authors of %s\nLicense: Apache-2.0\n", program)
		}
	}
	for _, m := range modules {
		if m.path == own {
			continue
		}
		var holders, texts, notices []string
		for _, name := range slices.Sorted(maps.Keys(m.texts)) {
			text := m.texts[name]
			for _, h := range holder.FindAllString(text, -1) {
				h = strings.Trim(h, " #*/\t\r")
				if !strings.Contains(h, "[yyyy]") && !strings.Contains(h, "{yyyy}") && !slices.Contains(holders, h) {
					holders = append(holders, h)
				}
			}
			switch {
			case strings.HasPrefix(strings.ToLower(filepath.Base(name)), "notice"):
				notices = append(notices, text)
			case strings.Contains(text, "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION"): // Apache's, whole
			default:
				texts = append(texts, text)
			}
		}
		if holders == nil {
			holders = []string{"the authors of " + m.path}
		}
		if len(texts) == 0 {
			texts = []string{"The Apache License, Version 2.0; on Debian systems its text is in " +
				"/usr/share/common-licenses/Apache-2.0."}
		}
		fmt.Fprintf(&b, "\nFiles: %s/*\nCopyright: %s\nLicense: %s\n", m.path, strings.Join(holders, "\n "),
			debian(m.licences()))
		b.WriteString(indent(strings.Join(texts, "\n\n")))
		fmt.Fprintf(&b, "Comment: version %s\n", m.version)
		b.WriteString(indent(strings.Join(notices, "\n\n")))
	}
	b.WriteString("\nLicense: Apache-2.0\n" + indent("The Apache License, Version 2.0; on Debian systems its text is in "+
		"/usr/share/common-licenses/Apache-2.0."))
	return write(dir, "copyright", b.Bytes())
}

// indent makes a text the rest of a field.
func indent(text string) string {
	var b strings.Builder
	for line := range strings.Lines(strings.TrimSpace(text)) {
		if line = strings.TrimRight(line, " \t\r\n\f"); line == "" {
			line = "."
		}
		b.WriteString(" " + strings.ReplaceAll(line, "\t", "    ") + "\n")
	}
	if b.String() == " .\n" {
		return ""
	}
	return b.String()
}
