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

	"github.com/cpuguy83/go-md2man/v2/md2man"
	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
	"github.com/spf13/pflag"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
)

// The manual pages are made here, of the tree of commands, and lie in packaging/man. So neither
// cobra/doc nor what it needs is in the program. packaging/gen puts in date and version.
const manDir = "../../packaging/man"

const (
	optionsAreKeys = `# CONFIGURATION
Each key of **gke-metadata-emulator(5)** is an option as well, and wins over the file: google.stsURL is
**--google-sts-url**.
`
	exitStatus = `# EXIT STATUS

**0**
: Success.

**1**
: Failure. Standard error says why.

**2**
: The command line is wrong.

**78**
: The configuration is missing or broken.
`
)

// sections are what a page has and --help has not, in Markdown, by the name of the page.
var sections = map[string]string{
	program: exitStatus + `# FILES

**/etc/gke-metadata-emulator/config.yaml**
: The configuration, **gke-metadata-emulator(5)**.

**/etc/default/gke-metadata-emulator**, **/etc/sysconfig/gke-metadata-emulator**
: Options of the service and of its routing steps, on Debian and on Red Hat.

**/run/gke-metadata-emulator/routing.json**
: What was installed last, what stood when it was read back, and how often it was repaired. Root writes it.

**/run/gke-metadata-emulator/serve/status.sock**
: What **gke-metadata-emulator-status(8)** asks. Root and the group gke-metadata-emulator may.

**/run/gke-metadata-emulator/credential/kubeconfig**
: The copy of kubelet's credential, for the group gke-metadata-emulator.

**/usr/share/doc/gke-metadata-emulator**
: README.md, SECURITY.md, docs, RBAC manifests, examples, recipes for node images.

# UNITS

**gke-metadata-emulator.socket**
: Holds the listener, so that a restart of the service refuses no connection.

**gke-metadata-emulator-dns.socket**
: Holds the sockets for DNS queries, with **dns: answer**.

**gke-metadata-emulator.service**
: Installs the rules, serves, and removes the rules when it is stopped for good. Runs without any capability.

**gke-metadata-emulator-routing.service**
: Watches the rules and puts back what others flush.

**gke-metadata-emulator-attest.service**
: Opens a socket in each network namespace of the node, for the service to ask the kernel about clients.

**gke-metadata-emulator-credential.path**, **gke-metadata-emulator-credential.service**
: Copy kubelet's credential for the service, whenever it rotates.

**gke-metadata-emulator-reload.path**, **gke-metadata-emulator-reload.service**
: Reload the service when the configuration changes.
`,
	program + "-serve": optionsAreKeys + `# SIGNALS

**SIGHUP**
: The configuration is read anew. One that does not load changes nothing.

**SIGTERM**, **SIGINT**
: What is in flight is answered, for 5 seconds at most, and the process ends.

# UNITS

**gke-metadata-emulator.service** runs it, with the listener of **gke-metadata-emulator.socket**.

# FILES

**/run/gke-metadata-emulator/serve/status.sock**
: The socket that **gke-metadata-emulator-status(8)** asks.
`,
	program + "-attest": `# SIGNALS

**SIGTERM**, **SIGINT**
: The process ends. The service keeps the sockets that it was given.

# UNITS

**gke-metadata-emulator-attest.service** runs it.
`,
	program + "-doctor":       optionsAreKeys + exitStatus,
	program + "-config-check": optionsAreKeys,
	program + "-config-show":  optionsAreKeys,
	program + "-routing-install": optionsAreKeys + `# UNITS
**gke-metadata-emulator.service** runs it before the service starts, and at each reload.
`,
	program + "-routing-check":   optionsAreKeys,
	program + "-routing-show":    optionsAreKeys,
	program + "-routing-observe": optionsAreKeys,
	program + "-routing-remove": optionsAreKeys + `# UNITS
**gke-metadata-emulator.service** runs it with **--on-stop** when it has stopped.
`,
	program + "-routing-watch": optionsAreKeys + `# SIGNALS

**SIGHUP**
: The configuration is read anew, and the rules are looked at. A configuration that does not load changes nothing.

**SIGTERM**, **SIGINT**
: The process ends. The rules stay.

# UNITS

**gke-metadata-emulator-routing.service** runs it.
`,
	program + "-status": `# FILES

**/run/gke-metadata-emulator/serve/status.sock**
: The socket that is asked. Root and the group gke-metadata-emulator may.
`,
}

// Docs: the manual pages in packaging/man are what the program says of itself.
func TestDocsManual(t *testing.T) {
	pages := map[string]string{program + ".5": configurationPage()}
	root := rootCommand()
	keepFromManual(root)
	dir := t.TempDir()
	header := &doc.GenManHeader{Section: "8", Source: program + " @VERSION@", Manual: "System administration"}
	if err := doc.GenManTree(root, header, dir); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.8"))
	if err != nil || len(files) < 10 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		name := filepath.Base(f)
		more := sections[strings.TrimSuffix(name, ".8")]
		if name == program+".8" {
			more = "# COMMANDS\n\n" + commandList(root) + more
		}
		pages[name] = finish(string(text), more)
	}
	for name := range sections {
		if _, found := pages[name+".8"]; !found {
			t.Errorf("sections has %s, which is no page", name)
		}
	}
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.MkdirAll(manDir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range pages {
		golden(t, filepath.Join(manDir, name), text)
	}
	there, err := filepath.Glob(filepath.Join(manDir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range there {
		if _, made := pages[filepath.Base(f)]; !made {
			t.Errorf("%s is of no command: remove it", f)
		}
	}
}

// keepFromManual leaves out the options that are keys of the configuration, which are in section 5,
// and the history.
func keepFromManual(c *cobra.Command) {
	c.DisableAutoGenTag = true
	c.Flags().VisitAll(func(f *pflag.Flag) {
		if _, key := f.Value.(*setting); key {
			f.Hidden = true
		}
	})
	c.InitDefaultHelpFlag()
	c.Flags().Lookup("help").Hidden = true
	for _, sub := range c.Commands() {
		keepFromManual(sub)
	}
}

// commandList says of each command that does something what it does.
func commandList(c *cobra.Command) (list string) {
	for _, sub := range c.Commands() {
		switch {
		case !sub.IsAvailableCommand():
		case sub.HasAvailableSubCommands():
			list += commandList(sub)
		default:
			list += fmt.Sprintf("**%s**\n: %s.\n\n", strings.TrimPrefix(sub.CommandPath(), program+" "), sub.Short)
		}
	}
	return list
}

var (
	titleLine = regexp.MustCompile(`(?m)^\.TH ("[^"]*") ("[^"]*") "[^"]*" (.*)$`)
	seeAlso   = regexp.MustCompile(`(?m)^\.SH SEE ALSO$`)
)

// finish puts more sections in front of the last one, and says where the page comes from.
func finish(page, more string) string {
	titled := md2man.Render([]byte("% \"page\" \"8\"\n\n" + more)) // a title keeps headings small
	_, more, _ = strings.Cut(string(titled), "\n.TH ")
	_, more, _ = strings.Cut(more, "\n")
	page = strings.Replace(page, "\n.SH EXAMPLE\n", "\n.SH EXAMPLES\n", 1)
	page = strings.ReplaceAll(page, "OPTIONS INHERITED FROM PARENT COMMANDS", "OPTIONS OF EACH COMMAND")
	at := seeAlso.FindStringIndex(page)
	if at == nil {
		page += ".SH SEE ALSO\n\\fB" + program + "(8)\\fP, \\fB" + program + "(5)\\fP\n"
		at = seeAlso.FindStringIndex(page)
	} else if !strings.Contains(page[at[1]:], "(5)") {
		page = strings.TrimRight(page, "\n") + ", \\fB" + program + "(5)\\fP\n"
	}
	page = page[:at[0]] + strings.TrimLeft(more, "\n") + page[at[0]:]
	page = titleLine.ReplaceAllString(page, `.TH $1 $2 "@DATE@" $3`)
	return ".\\\" Generated by \"make golden\": edit cmd/gke-metadata-emulator.\n" + strings.TrimRight(page, "\n") + "\n"
}

// text keeps Markdown from seeing more in a text than a text.
var text = strings.NewReplacer("*", `\*`, "_", `\_`, "[", `\[`, "]", `\]`, "<", `\<`, ">", `\>`, "`", "\\`")

func configurationPage() string {
	var b bytes.Buffer
	fmt.Fprintf(&b, `%% "%s" "5" "" "%s @VERSION@" "File formats"
# NAME
%s - configuration of %[2]s

# SYNOPSIS
**%[4]s**

# DESCRIPTION
The file is YAML. Two keys have to be set: workloadIdentityProvider and projectID. An empty value stands for the
default. An unknown key is an error. Keys with a dot are nested: routing.mode is mode below routing.

A missing or broken file is a state: pods are answered 503 with the reason until it is mended. A change is taken over
without a restart, by **systemctl reload gke-metadata-emulator**.

Each key is an option of the commands as well, which wins over the file: google.stsURL is **--google-sts-url**.

# KEYS
`, strings.ToUpper(program), program, program, config.DefaultFile)
	for _, k := range config.Keys() {
		meaning := k.Usage
		if k.Values != nil {
			meaning += ": " + strings.Join(k.Values, ", ")
		}
		if k.Default != "" {
			meaning += " (default " + k.Default + ")"
		}
		fmt.Fprintf(&b, "**%s** (%s)\n: %s\n\n", k.Path, k.Type(), text.Replace(meaning))
	}
	b.WriteString("# EXAMPLES\n```\nworkloadIdentityProvider: " +
		"projects/123456789012/locations/global/workloadIdentityPools/my-pool/providers/my-cluster\n" +
		"projectID: my-project\n```\n\n# FILES\n\n**/usr/share/doc/gke-metadata-emulator/docs/configuration.md**\n" +
		": The same, with an example of each key.\n\n# SEE ALSO\n" +
		"**gke-metadata-emulator(8)**, **gke-metadata-emulator-config-check(8)**, (5)\n")
	page := finish(string(md2man.Render(b.Bytes())), "")
	return strings.Replace(page, ", (5)", "", 1)
}

// Docs: a unit names a manual page that is there.
func TestDocsUnits(t *testing.T) {
	units, err := filepath.Glob("../../systemd/" + program + "*")
	if err != nil || len(units) < 6 {
		t.Fatalf("%v, %v", units, err)
	}
	named := regexp.MustCompile(`man:([a-z-]+)\((\d)\)`)
	for _, u := range units {
		text, err := os.ReadFile(u)
		if err != nil {
			t.Fatal(err)
		}
		documentation := slices.Collect(strings.Lines(string(text)))
		documentation = slices.DeleteFunc(documentation, func(l string) bool {
			return !strings.HasPrefix(l, "Documentation=")
		})
		pages := named.FindAllStringSubmatch(strings.Join(documentation, " "), -1)
		if len(pages) == 0 {
			t.Errorf("%s has no Documentation=man:PAGE(SECTION)", filepath.Base(u))
		}
		for _, p := range pages {
			if _, err := os.Stat(filepath.Join(manDir, p[1]+"."+p[2])); err != nil {
				t.Errorf("%s: %v", filepath.Base(u), err)
			}
		}
	}
}
