package packaging

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
)

// Every page renders without a warning, and says of each command and of its own flags what --help
// says; the keys are in section 5.
func TestManual(t *testing.T) {
	t.Parallel()
	need(t, "man")
	root := unpacked(t)
	binary := filepath.Join(root, "usr/bin", program)
	pages := map[string]string{}
	files, err := filepath.Glob(filepath.Join(root, "usr/share/man/man*/*.gz"))
	if err != nil || len(files) < 6 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, f := range files {
		cmd := exec.CommandContext(t.Context(), "man", "--warnings", "--encoding=UTF-8", "--no-hyphenation",
			"--no-justification", "--local-file", f)
		var out, errs bytes.Buffer
		cmd.Env = append(os.Environ(), "MANWIDTH=1000", "LC_ALL=C.UTF-8", "MAN_KEEP_FORMATTING=", "GROFF_NO_SGR=1")
		cmd.Stdout, cmd.Stderr = &out, &errs
		if err := cmd.Run(); err != nil || errs.Len() > 0 {
			t.Errorf("%s: %v: %s", filepath.Base(f), err, &errs)
		}
		pages[strings.TrimSuffix(filepath.Base(f), ".gz")] = plain(out.String())
	}
	flags := regexp.MustCompile(`(?m)^ +(?:-[a-z], )?--([a-z0-9-]+)\S*(?: \S+)? {2,}(\S.*)$`)
	subs := regexp.MustCompile(`(?m)^  ([a-z-]+) {2,}\S.*$`)
	keys := map[string]bool{}
	for _, k := range config.Keys() {
		keys[k.Flag()] = true
	}
	compared, left := 0, 0
	var compare func(path ...string)
	compare = func(path ...string) {
		help := output(t, binary, append(slices.Clone(path), "--help")...)
		name := strings.Join(append([]string{program}, path...), "-") + ".8"
		text, usage, _ := strings.Cut(help, "\nUsage:\n")
		if !strings.Contains(pages[name], plain(text)) {
			t.Errorf("%s does not say %q", name, plain(text))
		}
		for _, m := range flags.FindAllStringSubmatch(usage, -1) {
			usage, _, _ := strings.Cut(m[2], " (default ")
			said := strings.Contains(pages[name], "--"+m[1]) && strings.Contains(pages[name], plain(usage))
			switch {
			case m[1] == "help", m[1] == "version":
			case keys[m[1]]: // section 5 has them
				if left++; said || !strings.Contains(pages[name], program+"(5)") {
					t.Errorf("%s should refer to section 5 for --%s", name, m[1])
				}
			default:
				if compared++; !said {
					t.Errorf("%s does not say that --%s is %q", name, m[1], m[2])
				}
			}
		}
		list, _, _ := strings.Cut(usage, "Flags:\n")
		if _, list, found := strings.Cut(list, "Available Commands:\n"); found {
			for _, m := range subs.FindAllStringSubmatch(list, -1) {
				if m[1] != "help" {
					compare(append(slices.Clone(path), m[1])...)
				}
			}
		}
	}
	compare()
	if compared < 10 || left < 7*len(config.Keys()) {
		t.Errorf("only %d flags compared, and %d found in section 5", compared, left)
	}
	for _, k := range config.Keys() {
		for _, want := range []string{k.Path, k.Usage, k.Default} {
			if !strings.Contains(pages[program+".5"], plain(want)) {
				t.Errorf("%s.5 does not say of %s %q", program, k.Path, want)
			}
		}
	}
}

// plain is a text in which only words count.
func plain(s string) string {
	s = regexp.MustCompile(`.\x08`).ReplaceAllString(s, "")
	s = strings.NewReplacer("’", "'", "‘", "'", "“", `"`, "”", `"`).Replace(s)
	return strings.Join(strings.Fields(s), " ")
}

// What a shell completes is what there is.
func TestCompletions(t *testing.T) {
	t.Parallel()
	root := unpacked(t)
	for shell, file := range map[string]string{
		"bash": "bash-completion/completions/" + program, "zsh": "zsh/vendor-completions/_" + program,
		"fish": "fish/vendor_completions.d/" + program + ".fish",
	} {
		file = filepath.Join(root, "usr/share", file)
		if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
			continue
		}
		if _, err := exec.LookPath(shell); err != nil {
			t.Logf("%s is not checked by a %s: there is none", file, shell)
			continue
		}
		if out, err := exec.CommandContext(t.Context(), shell, "-n", file).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", shell, err, out)
		}
	}
	got := output(t, filepath.Join(root, "usr/bin", program), "__complete", "routing", "")
	for _, want := range []string{"check\t", "install\t", "remove\t", "show\t"} {
		if !strings.Contains(got, want) {
			t.Errorf("after routing a shell proposes %q", got)
		}
	}
}
