package config

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// YAML returns the resolved configuration. Load reads it as the same Config.
func (c Config) YAML() string {
	r := raw{Config: c, impersonateUnlinked: c.ImpersonateUnlinked != "",
		provider: strings.TrimPrefix(c.WorkloadIdentity.Audience, iamDomain)}
	return r.yaml(func(Key) string { return "" })
}

// Reference returns a configuration file with every key, its meaning and its default. It is valid
// once workloadIdentityProvider and projectID are set.
func Reference() string {
	r := defaults()
	return "# The configuration of gke-metadata-emulator: every key with its default.\n" +
		"# Set workloadIdentityProvider and projectID; an empty value stands for the default, and an unknown key is an " +
		"error.\n" +
		r.yaml(func(k Key) string {
			comment := "# " + k.Usage
			if k.Values != nil {
				comment += " (" + strings.Join(k.Values, ", ") + ")"
			}
			return comment
		})
}

func (r *raw) yaml(comment func(Key) string) string {
	var b strings.Builder
	group := ""
	for _, k := range keys {
		in, name, nested := strings.Cut(k.Path, ".")
		indent := ""
		if !nested {
			in, name = "", in
		} else {
			indent = "  "
		}
		text := comment(k)
		if text != "" && (in == "" || in != group) {
			b.WriteByte('\n')
		}
		if in != group && in != "" {
			b.WriteString(in + ":\n")
		}
		group = in
		if text != "" {
			b.WriteString(indent + text + "\n")
		}
		b.WriteString(indent + name + ":" + show(k.field(r), indent) + "\n")
	}
	return b.String()
}

// show writes a setting as it is written after the colon of its key.
func show(field any, indent string) string {
	list := func(texts []string) string {
		for i, t := range texts {
			texts[i] = scalar(t)
		}
		return " [" + strings.Join(texts, ", ") + "]"
	}
	switch f := field.(type) {
	case *string:
		return " " + scalar(*f)
	case *bool:
		return " " + strconv.FormatBool(*f)
	case *int:
		return " " + strconv.Itoa(*f)
	case *time.Duration:
		return " " + duration(*f)
	case *netip.AddrPort:
		if !f.IsValid() {
			return ` ""`
		}
		return " " + scalar(f.String())
	case *[]string:
		return list(slices.Clone(*f))
	case *[]netip.AddrPort:
		var texts []string
		for _, a := range *f {
			texts = append(texts, a.String())
		}
		return list(texts)
	case *[]HostIdentity:
		return showIdentities(*f, indent)
	case *map[string]string:
		if len(*f) == 0 {
			return " {}"
		}
		var b strings.Builder
		for _, name := range slices.Sorted(maps.Keys(*f)) {
			b.WriteString("\n" + indent + "  " + scalar(name) + ": " + scalar((*f)[name]))
		}
		return b.String()
	}
	panic(fmt.Sprintf("config: a setting of type %T", field)) // a fault of the table fails every test
}

// scalar quotes a text only where YAML would read it differently.
func scalar(s string) string {
	n := yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: s}
	if strings.ContainsAny(s, "\n\r\t\u0085\u2028\u2029") {
		n.Style = yaml.DoubleQuotedStyle // on one line
	}
	out, err := yaml.Marshal(&n)
	if err != nil {
		return strconv.Quote(s) // not reached with the grammar of the keys
	}
	return strings.TrimSuffix(string(out), "\n")
}

// duration is Duration.String without zeros at its end: 1h, not 1h0m0s.
func duration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}
