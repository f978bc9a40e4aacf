package main

import (
	"debug/buildinfo"
	"encoding/json"
	"fmt"
	"os"
	"strings"
)

// component is CycloneDX's, as much of it as there is to say.
type component struct {
	Type       string     `json:"type"`
	Ref        string     `json:"bom-ref"`
	Name       string     `json:"name"`
	Version    string     `json:"version"`
	Licences   []licence  `json:"licenses,omitempty"`
	PURL       string     `json:"purl"`
	Properties []property `json:"properties,omitempty"`
}

type licence struct {
	Expression string `json:"expression"`
}

type property struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

type dependency struct {
	Ref  string   `json:"ref"`
	Deps []string `json:"dependsOn,omitempty"`
}

type bom struct {
	Format   string `json:"bomFormat"`
	Spec     string `json:"specVersion"`
	Version  int    `json:"version"`
	Metadata struct {
		Timestamp string    `json:"timestamp"`
		Component component `json:"component"`
	} `json:"metadata"`
	Components   []component  `json:"components"`
	Dependencies []dependency `json:"dependencies"`
}

// sbom says which modules are in a program, by what the linker wrote into it, with the checksums of
// go.sum.
func (r release) sbom(binary, file string) error {
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		return err
	}
	modules, err := linkedModules()
	if err != nil {
		return err
	}
	licences := map[string][]licence{}
	for _, m := range modules {
		licences[m.path] = []licence{{strings.Join(m.licences(), " AND ")}}
	}
	var b bom
	b.Format, b.Spec, b.Version = "CycloneDX", "1.6", 1
	b.Metadata.Timestamp = r.date.Format("2006-01-02T15:04:05Z")
	b.Metadata.Component = module("application", info.Main.Path, r.version, "", licences)
	for _, s := range info.Settings {
		switch s.Key {
		case "GOOS", "GOARCH", "CGO_ENABLED", "-ldflags", "-trimpath":
			b.Metadata.Component.Properties = append(b.Metadata.Component.Properties, property{"go:build:" + s.Key, s.Value})
		}
	}
	b.Components = append(b.Components, module("library", "std", strings.TrimPrefix(info.GoVersion, "go"), "", licences))
	for _, d := range info.Deps {
		if d.Replace != nil {
			d = d.Replace
		}
		if licences[d.Path] == nil {
			return fmt.Errorf("%s is in %s, and go list does not know it", d.Path, binary)
		}
		b.Components = append(b.Components, module("library", d.Path, d.Version, d.Sum, licences))
	}
	main := dependency{Ref: b.Metadata.Component.Ref}
	for _, c := range b.Components {
		main.Deps = append(main.Deps, c.Ref)
	}
	b.Dependencies = []dependency{main}
	text, err := json.MarshalIndent(b, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}

func module(kind, path, version, sum string, licences map[string][]licence) component {
	purl := "pkg:golang/" + path + "@" + strings.ReplaceAll(version, "+", "%2B")
	c := component{Type: kind, Ref: purl, Name: path, Version: version, Licences: licences[path], PURL: purl}
	if sum != "" {
		c.Properties = []property{{"go:sum", sum}}
	}
	return c
}
