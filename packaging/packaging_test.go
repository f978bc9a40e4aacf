// Package packaging is tests: of what the packages hold, of their scripts, and of a machine's life
// with them.
package packaging

import (
	"bytes"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
)

const program = "gke-metadata-emulator"

// The packages are built once for all tests, of two releases.
var (
	scratch  string
	packages = sync.OnceValues(func() (string, error) { return build("..", "1.0.0") })
	older    = sync.OnceValues(func() (string, error) {
		tree := filepath.Join(scratch, "older")
		if out, err := exec.Command("bed/older", tree).CombinedOutput(); err != nil {
			return "", fmt.Errorf("bed/older: %w\n%s", err, out)
		}
		// xz takes most of a build's processor time, and what is upgraded may be compressed by anything.
		if err := rewrite(filepath.Join(tree, "nfpm.yaml"), "compression: xz", "compression: gzip"); err != nil {
			return "", err
		}
		return build(tree, "0.9.0", "FORMATS=deb rpm archlinux")
	})
)

// rewrite replaces a text in a file, which has to hold it.
func rewrite(file, old, text string) error {
	was, err := os.ReadFile(file)
	if err == nil && !bytes.Contains(was, []byte(old)) {
		err = fmt.Errorf("%s holds no %q", file, old)
	}
	if err != nil {
		return err
	}
	return os.WriteFile(file, bytes.ReplaceAll(was, []byte(old), []byte(text)), 0o644)
}

// mounted is in the environment of a process whose mounts are its own: those of [machine] end with
// it, whatever ends it.
const mounted = "GME_TEST_MOUNTED"

func TestMain(m *testing.M) {
	if os.Geteuid() == 0 && os.Getenv(mounted) == "" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), mounted+"=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
		runtime.LockOSThread() // Pdeathsig is of the thread
		err := cmd.Run()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(max(cmd.ProcessState.ExitCode(), -cmd.ProcessState.ExitCode())) // -1: a signal ended it
	}
	dir, err := os.MkdirTemp("", "packaging")
	if err == nil {
		err = os.Chmod(dir, 0o755) // lintian and rpmlint run as nobody
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	scratch = dir
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

func build(tree, version string, env ...string) (string, error) {
	out, err := os.MkdirTemp(scratch, "")
	if err != nil {
		return "", err
	}
	if err := os.Chmod(out, 0o755); err != nil {
		return "", err
	}
	cmd := exec.Command(filepath.Join(tree, "packaging/build"), out, runtime.GOARCH)
	cmd.Env = append(os.Environ(), "VERSION=v"+version, "SOURCE_DATE_EPOCH=1700000000",
		"COMMIT=0123456789abcdef0123456789abcdef01234567", // the other checkout is none of git's
		"FORMATS=deb rpm apk archlinux tar", "GPG_KEY=")
	cmd.Env = append(cmd.Env, env...)
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("packaging/build: %w\n%s", err, text)
	}
	return out, nil
}

// built returns the one package of that kind.
func built(t *testing.T, made func() (string, error), pattern string) string {
	t.Helper()
	dir, err := made()
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil || len(files) != 1 {
		t.Fatalf("%s: %v, %v", pattern, files, err)
	}
	return files[0]
}

// lacking skips a test that cannot run here; CI has to have what is lacking.
func lacking(t *testing.T, reason string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(reason)
	}
	t.Skip(reason)
}

func need(t *testing.T, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			lacking(t, "there is no "+tool+": .ci/deps installs it")
		}
	}
}

func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			out = append(out, exit.Stderr...)
		}
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// unpacked returns the deb's files in a folder, which all tests share and none changes.
func unpacked(t *testing.T) string {
	t.Helper()
	need(t, "dpkg-deb")
	deb := built(t, packages, "*.deb")
	unpackOnce.Do(func() { output(t, "dpkg-deb", "-x", deb, filepath.Join(scratch, "unpacked")) })
	return filepath.Join(scratch, "unpacked")
}

var unpackOnce sync.Once

// Scripts are short enough to be read before they are run as root.
func TestScripts(t *testing.T) {
	scripts, err := filepath.Glob("scripts/*.sh")
	if err != nil || len(scripts) != 3 {
		t.Fatalf("%v, %v", scripts, err)
	}
	for _, s := range scripts {
		text, err := os.ReadFile(s)
		if err != nil {
			t.Fatal(err)
		}
		if n := bytes.Count(text, []byte("\n")); n > 20 {
			t.Errorf("%s has %d lines, 20 are allowed", s, n)
		}
	}
	need(t, "shellcheck")
	if out, err := exec.CommandContext(t.Context(), "shellcheck", append(scripts, "build",
		"repo")...).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// Every file of systemd/ is in the packages, where systemd looks for it.
func TestUnits(t *testing.T) {
	nfpm, err := os.ReadFile("../nfpm.yaml")
	if err != nil {
		t.Fatal(err)
	}
	units, err := filepath.Glob("../systemd/*")
	if err != nil || len(units) == 0 {
		t.Fatalf("%v, %v", units, err)
	}
	installed := regexp.MustCompile(`(?m)^# (?:Opt-in\. )?Installed as (/usr/\S+)`)
	for _, unit := range units {
		name := filepath.Base(unit)
		text, err := os.ReadFile(unit)
		if err != nil {
			t.Fatal(err)
		}
		dst := "/usr/lib/systemd/system/" + name
		if m := installed.FindSubmatch(text); m != nil {
			dst = string(m[1])
		} else if !strings.HasPrefix(name, program) {
			dst = "/usr/share/doc/" + program + "/examples/" + name // for who opts in
		}
		mode := "0644"
		if bytes.HasPrefix(text, []byte("#!")) { // the generator is a program
			mode = "0755"
		}
		line := fmt.Sprintf("- {dst: %s, src: systemd/%s, file_info: {mode: %s}}\n", dst, name, mode)
		if !strings.Contains(string(nfpm), line) {
			t.Errorf("nfpm.yaml lacks\n%s", line)
		}
	}
}

// deb and rpm hold the same, but for what has another place there.
func TestContents(t *testing.T) {
	need(t, "dpkg-deb", "rpm")
	deb := built(t, packages, "*.deb")
	var files []string
	for line := range strings.Lines(output(t, "dpkg-deb", "-c", deb)) {
		f := strings.Fields(line)
		if len(f) != 6 {
			t.Fatalf("what is %q?", line)
		}
		mode, owner, name := f[0], f[1], strings.TrimPrefix(f[5], ".")
		want := "-rw-r--r--"
		switch {
		case strings.HasSuffix(name, "/"):
			want = "drwxr-xr-x"
		case strings.HasPrefix(name, "/usr/bin/"), strings.HasPrefix(name, "/usr/lib/systemd/system-generators/"):
			want = "-rwxr-xr-x"
		}
		if mode != want || owner != "root/root" && owner != "0/0" {
			t.Errorf("%s: %s %s, want %s root", name, mode, owner, want)
		}
		if f[2] == "0" && want[0] == '-' {
			t.Errorf("%s is empty", name)
		}
		if want[0] == '-' {
			files = append(files, name)
		}
	}
	for _, want := range []string{
		"/usr/bin/" + program, "/usr/lib/systemd/system/" + program + ".service",
		"/etc/" + program + "/config.yaml", "/etc/default/" + program,
		"/usr/share/man/man8/" + program + ".8.gz", "/usr/share/man/man5/" + program + ".5.gz",
		"/usr/share/bash-completion/completions/" + program, "/usr/share/zsh/vendor-completions/_" + program,
		"/usr/share/fish/vendor_completions.d/" + program + ".fish",
		"/usr/share/doc/" + program + "/copyright", "/usr/share/doc/" + program + "/changelog.gz",
		"/usr/share/doc/" + program + "/changelog.Debian.gz",
		"/usr/share/doc/" + program + "/rbac.yaml", "/usr/share/doc/" + program + "/rbac-dedicated.yaml",
		"/usr/share/doc/" + program + "/examples/config.yaml",
	} {
		if !slices.Contains(files, want) {
			t.Errorf("the deb lacks %s", want)
		}
	}
	conffiles := "/etc/" + program + "/config.yaml\n/etc/default/" + program + "\n"
	if got := output(t, "dpkg-deb", "-I", deb, "conffiles"); sorted(got) != sorted(conffiles) {
		t.Errorf("conffiles of the deb:\n%s", got)
	}
	depends := output(t, "dpkg-deb", "-f", deb, "Depends")
	for _, want := range []string{"ca-certificates", "iptables", "systemd"} {
		if !slices.Contains(strings.Split(strings.TrimSpace(depends), ", "), want) {
			t.Errorf("the deb depends on %q, and not on %s", depends, want)
		}
	}
	info, err := os.Stat(deb)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the deb has %.2f MB", float64(info.Size())/1e6)
	if info.Size() > 8.25e6 {
		t.Errorf("the deb has %d bytes, 8.25 MB are allowed", info.Size())
	}

	rpm := built(t, packages, "*.rpm")
	query := func(flags string) string { return output(t, "rpm", "--dbpath", t.TempDir(), flags, rpm) }
	here := strings.NewReplacer("/etc/default/", "/etc/sysconfig/", "/vendor-completions/", "/site-functions/")
	var want []string
	for _, f := range files {
		if !strings.Contains(f, "changelog.Debian") && !strings.Contains(f, "lintian") {
			want = append(want, here.Replace(f))
		}
	}
	want = append(want, "/etc/"+program, "/usr/share/doc/"+program, "/usr/share/doc/"+program+"/docs",
		"/usr/share/doc/"+program+"/examples", "/usr/share/doc/"+program+"/monitoring",
		"/usr/share/doc/"+program+"/recipes", "/usr/share/doc/"+program+"/recipes/ansible",
		"/usr/share/doc/"+program+"/recipes/ansible/roles",
		"/usr/share/doc/"+program+"/recipes/ansible/roles/gke_metadata_emulator",
		"/usr/share/doc/"+program+"/recipes/ansible/roles/gke_metadata_emulator/defaults",
		"/usr/share/doc/"+program+"/recipes/ansible/roles/gke_metadata_emulator/tasks",
		"/usr/share/licenses/"+program, "/usr/share/licenses/"+program+"/LICENSE",
		"/usr/share/fish", "/usr/share/fish/vendor_completions.d", "/usr/share/zsh", "/usr/share/zsh/site-functions")
	if got := query("-qpl"); sorted(got) != sorted(strings.Join(want, "\n")) {
		t.Errorf("the rpm holds\n%s\nand the deb\n%s", sorted(got), sorted(strings.Join(want, "\n")))
	}
	if got := query("-qpR"); !strings.Contains("\n"+got, "\nca-certificates\n") {
		t.Errorf("the rpm requires\n%s", got)
	}
	if got := query("-qpc"); sorted(got) != sorted(here.Replace(conffiles)) {
		t.Errorf("configuration files of the rpm:\n%s", got)
	}
}

func sorted(lines string) string {
	l := strings.Split(strings.TrimSpace(lines), "\n")
	slices.Sort(l)
	return strings.Join(l, "\n")
}

// Another checkout, with other modes and times, makes the same bytes.
func TestReproducible(t *testing.T) {
	t.Parallel()
	need(t, "git", "cp")
	first, err := packages()
	if err != nil {
		t.Fatal(err)
	}
	tree := filepath.Join(t.TempDir(), "elsewhere")
	files := strings.Split(strings.TrimSuffix(output(t, "git", "-C", "..", "ls-files", "-z", "--cached", "--others",
		"--exclude-standard"), "\x00"), "\x00")
	for _, f := range files {
		if strings.HasSuffix(f, ".test") {
			continue
		}
		to := filepath.Join(tree, f)
		if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := exec.CommandContext(t.Context(), "cp", "-P", filepath.Join("..", f), to).Run(); err != nil {
			continue // deleted, and not committed yet
		}
		if info, err := os.Lstat(to); err == nil && info.Mode().IsRegular() {
			_ = os.Chmod(to, info.Mode()&0o700)
		}
	}
	second, err := build(tree, "1.0.0")
	if err != nil {
		t.Fatal(err)
	}
	sums := output(t, "cat", filepath.Join(first, "SHA256SUMS"))
	if again := output(t, "cat", filepath.Join(second, "SHA256SUMS")); sums != again {
		t.Errorf("two builds:\n%s\n%s", sums, again)
	}
	cmd := exec.CommandContext(t.Context(), "sha256sum", "--check", "--strict", "SHA256SUMS")
	cmd.Dir = first
	if out, err := cmd.CombinedOutput(); err != nil || strings.Count(sums, "\n") != 6 {
		t.Errorf("SHA256SUMS: %v\n%s", err, out)
	}
}

// The SBOM, the licences and the package's licence field speak of the modules that the linker put
// in.
func TestSBOMAndCopyright(t *testing.T) {
	root := unpacked(t)
	info, err := buildinfo.ReadFile(filepath.Join(root, "usr/bin", program))
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(built(t, packages, "*.cdx.json"))
	if err != nil {
		t.Fatal(err)
	}
	var bom struct {
		BOMFormat, SpecVersion string
		Components             []struct {
			Name, Version, PURL string
			Licenses            []struct{ Expression string }
		}
	}
	if err := json.Unmarshal(text, &bom); err != nil || bom.BOMFormat != "CycloneDX" {
		t.Fatalf("%v, %q", err, bom.BOMFormat)
	}
	copyright, err := os.ReadFile(filepath.Join(root, "usr/share/doc", program, "copyright"))
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	licences := []string{"Apache-2.0"}
	for _, c := range bom.Components {
		got[c.Name] = c.Version
		if len(c.Licenses) != 1 || c.Licenses[0].Expression == "" {
			t.Errorf("%s has no licence", c.Name)
			continue
		}
		licences = append(licences, strings.Split(c.Licenses[0].Expression, " AND ")...)
		if !strings.Contains(string(copyright), "\nFiles: "+c.Name+"/*\n") {
			t.Errorf("copyright does not speak of %s", c.Name)
		}
	}
	if got["std"] != strings.TrimPrefix(info.GoVersion, "go") || len(got) != len(info.Deps)+1 {
		t.Errorf("%d components, the program has %d modules and %s", len(got), len(info.Deps), info.GoVersion)
	}
	for _, d := range info.Deps {
		if got[d.Path] != d.Version {
			t.Errorf("%s: the SBOM says %q, the program has %s", d.Path, got[d.Path], d.Version)
		}
	}
	slices.Sort(licences)
	nfpm, err := os.ReadFile("../nfpm.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if want := "\nlicense: " + strings.Join(slices.Compact(licences), " AND ") +
		" "; !strings.Contains(string(nfpm), want) {
		t.Errorf("nfpm.yaml: want %q", want)
	}
}

// lint runs a checker as nobody: rpmlint as root unpacks nfpm's packages onto /.
func lint(t *testing.T, name string, args ...string) {
	t.Helper()
	need(t, name)
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = scratch // a checkout may lie where nobody may not enter
	cmd.Env = append(os.Environ(), "HOME=/nonexistent", "TMPDIR=/tmp")
	if os.Geteuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	if out, err := cmd.CombinedOutput(); err != nil || bytes.Contains(out, []byte("W: ")) {
		t.Errorf("%s: %v\n%s", name, err, out)
	}
}

func TestLintian(t *testing.T) {
	t.Parallel()
	lint(t, "lintian", "--fail-on", "error,warning", "--tag-display-limit", "0", built(t, packages, "*.deb"))
}

func TestRpmlint(t *testing.T) {
	t.Parallel()
	rules, err := os.ReadFile("lint/rpmlint.toml")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(scratch, "rpmlint.toml") // a checkout may lie where nobody may not read
	if err := os.WriteFile(file, rules, 0o644); err != nil {
		t.Fatal(err)
	}
	if out := built(t, packages, "*.rpm"); !t.Failed() {
		lint(t, "rpmlint", "-c", file, out)
	}
}
