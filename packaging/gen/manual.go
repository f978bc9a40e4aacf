package main

import (
	"bytes"
	"fmt"
	"os/exec"
	"strings"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
)

// manual writes section 8 for the program and each of its commands, section 5 for the configuration, and the completions.
func (r release) manual(binary, dir string) error {
	root, err := ask(binary)
	if err != nil {
		return err
	}
	if err := writeGzip(dir, program+".8", r.programPage(root)); err != nil {
		return err
	}
	for _, c := range root.commands {
		if err := writeGzip(dir, program+"-"+c.last()+".8", r.commandPage(c)); err != nil {
			return err
		}
	}
	if err := writeGzip(dir, program+".5", r.configurationPage()); err != nil {
		return err
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		out, err := exec.Command(binary, "completion", shell).Output()
		if err != nil {
			return fmt.Errorf("completion %s: %w", shell, err)
		}
		if err := write(dir, "completion."+shell, out); err != nil {
			return err
		}
	}
	return nil
}

// page is roff.
type page struct{ bytes.Buffer }

var escaper = strings.NewReplacer(`\`, `\e`, "-", `\-`, "'", `\(aq`, "`", `\(ga`, "^", `\(ha`, "~", `\(ti`)

func escape(s string) string {
	s = escaper.Replace(s)
	if strings.HasPrefix(s, ".") {
		s = `\&` + s
	}
	return s
}

func (r release) page(name, section, short string) *page {
	p := &page{}
	p.macro("TH", strings.ToUpper(name), section, r.date.Format("2006-01-02"), program+" "+r.version, "System administration")
	p.section("NAME")
	fmt.Fprintf(p, "%s \\- %s\n", escape(name), escape(short))
	return p
}

func (p *page) macro(name string, args ...string) {
	p.WriteString("." + name)
	for _, a := range args {
		p.WriteString(` "` + strings.ReplaceAll(escape(a), `"`, `\(dq`) + `"`)
	}
	p.WriteByte('\n')
}

func (p *page) section(title string) { p.macro("SH", title) }

func (p *page) text(s string) {
	for line := range strings.Lines(s) {
		if line = strings.TrimRight(line, "\n"); line == "" {
			p.WriteString(".PP\n")
			continue
		}
		p.WriteString(escape(line) + "\n")
	}
}

// item is a term in bold, with an argument in italics, and what it means.
func (p *page) item(term, argument, meaning string) {
	p.WriteString(".TP\n\\fB" + escape(term) + "\\fR")
	if argument != "" {
		p.WriteString(" \\fI" + escape(argument) + "\\fR")
	}
	p.WriteString("\n" + escape(meaning) + "\n")
}

func (p *page) flags(flags []flag) {
	for _, f := range flags {
		term := "--" + f.long
		if f.short != "" {
			term = "-" + f.short + ", " + term
		}
		p.item(term, f.value, f.usage)
	}
}

// references are in bold, as man links them.
func (p *page) references(names ...string) {
	p.section("SEE ALSO")
	for i, n := range names {
		name, section, _ := strings.Cut(n, "(")
		end := ","
		if i == len(names)-1 {
			end = ""
		}
		fmt.Fprintf(p, ".BR %s (%s%s\n", escape(name), section, end)
	}
}

func (r release) programPage(root command) []byte {
	p := r.page(program, "8", "Google credentials for every pod of this node")
	p.section("SYNOPSIS")
	fmt.Fprintf(p, "\\fB%s\\fR \\fIcommand\\fR [\\fIflags\\fR]\n", escape(program))
	p.section("DESCRIPTION")
	p.text(root.text)
	p.section("COMMANDS")
	see := []string{program + "(5)"}
	for _, c := range root.commands {
		if len(c.commands) == 0 {
			p.item(c.last(), "", c.short())
		}
		for _, sub := range c.commands {
			p.item(strings.Join(sub.path, " "), "", sub.short())
		}
		see = append(see, program+"-"+c.last()+"(8)")
	}
	p.section("OPTIONS")
	p.flags(root.flags)
	p.section("EXIT STATUS")
	p.item("0", "", "It went well.")
	p.item("1", "", "It did not; standard error says why.")
	p.item("2", "", "The command line is wrong.")
	p.item("78", "", "The configuration is missing or broken.")
	p.section("FILES")
	p.item(config.DefaultFile, "", "The configuration.")
	p.item("/etc/default/"+program+", /etc/sysconfig/"+program, "", "Flags for the service, where Debian and where Red Hat keep them.")
	p.item("/usr/share/doc/"+program, "", "What Google and the cluster have to be told (README.md), what it protects from and what not (SECURITY.md), RBAC manifests, examples.")
	p.references(see...)
	return p.Bytes()
}

func (r release) commandPage(c command) []byte {
	p := r.page(program+"-"+c.last(), "8", c.short())
	subs := c.commands
	if len(subs) == 0 {
		subs = []command{c}
	}
	shared, own := common(subs)
	p.section("SYNOPSIS")
	for i, s := range subs {
		if i > 0 {
			p.WriteString(".br\n")
		}
		fmt.Fprintf(p, "\\fB%s\\fR [\\fIflags\\fR]\n", escape(s.name()))
	}
	p.section("DESCRIPTION")
	p.text(c.text)
	if len(c.commands) > 0 {
		p.section("COMMANDS")
		for i, s := range subs {
			p.macro("SS", s.name())
			p.text(s.text)
			p.flags(own[i])
		}
		p.section("OPTIONS OF EACH")
	} else {
		p.section("OPTIONS")
	}
	p.flags(shared)
	p.references(program+"(5)", program+"(8)")
	return p.Bytes()
}

func (r release) configurationPage() []byte {
	p := r.page(program, "5", "configuration of "+program)
	p.section("DESCRIPTION")
	p.text(config.DefaultFile + ` is YAML. Two keys have to be set: workloadIdentityProvider and projectID.
An empty value stands for the default, and an unknown key is an error. Keys with a dot are nested: routing.mode is mode below routing.

A missing or broken file is a state: pods are answered 503 with the reason until it is mended. A change is taken over
without a restart, by systemctl reload ` + program + `.

Each key is a flag as well, which wins over the file: google.stsURL is --google-sts-url.`)
	p.section("KEYS")
	for _, k := range config.Keys() {
		meaning := k.Usage
		if k.Values != nil {
			meaning += ": " + strings.Join(k.Values, ", ")
		}
		if k.Default != "" {
			meaning += " (default " + k.Default + ")"
		}
		p.item(k.Path, k.Type(), meaning)
	}
	p.section("EXAMPLE")
	p.WriteString(".EX\n")
	p.text("workloadIdentityProvider: projects/123456789012/locations/global/workloadIdentityPools/my-pool/providers/my-cluster\nprojectID: my-project\n")
	p.WriteString(".EE\n")
	p.references(program+"(8)", program+"-config(8)")
	return p.Bytes()
}
