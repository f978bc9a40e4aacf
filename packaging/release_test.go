package packaging

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// Every version makes a package that Alpine and Arch Linux take, and one that lies between two
// releases sorts there.
func TestVersions(t *testing.T) {
	t.Parallel()
	need(t, "tar", "zstd")
	root, run := machineOf(t, "GME_TEST_RECIPES")
	place(t, root, "1.pkg.tar.zst", built(t, older, "*.pkg.tar.zst"))
	place(t, root, "4.pkg.tar.zst", built(t, packages, "*.pkg.tar.zst"))
	valid := regexp.MustCompile(`^\d+(\.\d+)*[a-z]?(_(alpha|beta|pre|rc|cvs|svn|git|hg|p)\d*)*-r\d+$`) // apk-package(5)
	for i, v := range []struct{ version, apk string }{
		{"0.9.0+git20260101000000", "0.9.0_git20260101000000-r1"}, // as an untagged checkout has it
		{"1.0.0-rc.1", "1.0.0_rc1-r1"},
	} {
		dir, err := build("..", v.version, "FORMATS=apk archlinux")
		if err != nil {
			t.Fatal(err)
		}
		made := func() (string, error) { return dir, nil }
		info := output(t, "tar", "-xzOf", built(t, made, "*.apk"), ".PKGINFO")
		m := regexp.MustCompile(`(?m)^pkgver = (.*)$`).FindStringSubmatch(info)
		if m == nil || m[1] != v.apk || !valid.MatchString(m[1]) {
			t.Errorf("%s is %q as an apk, want %s", v.version, m, v.apk)
		}
		place(t, root, fmt.Sprintf("%d.pkg.tar.zst", i+2), built(t, made, "*.pkg.tar.zst"))
	}
	run(pacman + `install() { pacman -U -dd --noconfirm --noprogressbar /tmp/$1.pkg.tar.zst; }
for version in 1 2 3 4; do install $version; done >/tmp/said 2>&1 || { cat /tmp/said; exit 1; }
! grep downgrading /tmp/said
install 3 2>&1 | grep 'downgrading package gke-metadata-emulator'`)
}

// The tarball has the program and what a system without a package needs beside it.
func TestTarball(t *testing.T) {
	need(t, "tar", "cmp")
	dir := t.TempDir()
	output(t, "tar", "-C", dir, "-xpzf", built(t, packages, "*.tar.gz"))
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Fatalf("%v, %v", entries, err)
	}
	dir = filepath.Join(dir, entries[0].Name())
	pkg := unpacked(t)
	for name, same := range map[string]string{
		program: filepath.Join(pkg, "usr/bin", program), "copyright": filepath.Join(pkg, "usr/share/doc", program,
			"copyright"),
		"LICENSE": "../LICENSE", "README.md": "../README.md", "config.yaml": "config.yaml",
		"examples/config-reference.yaml": "examples/config-reference.yaml",
		"man/" + program + ".5.gz":       filepath.Join(pkg, "usr/share/man/man5", program+".5.gz"),
	} {
		output(t, "cmp", filepath.Join(dir, name), same)
	}
	output(t, "diff", "-r", "../systemd", filepath.Join(dir, "systemd"))
	if got := output(t, filepath.Join(dir, program), "version"); !strings.Contains(got, "1.0.0") {
		t.Errorf("it is %q", got)
	}
	if info, err := os.Stat(filepath.Join(dir, "systemd/generator")); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("the generator: %v, %v", info, err)
	}
}

// keyring makes a key that is thrown away, and returns the environment that signs by it, and its
// public half.
func keyring(t *testing.T) (env []string, public string) {
	t.Helper()
	need(t, "gpg", "gpg-agent", "gpgconf", "gpgv")
	home, err := os.MkdirTemp("/tmp", "gpg") // an agent's socket has to have a short name
	if err != nil {
		t.Fatal(err)
	}
	env = []string{"GNUPGHOME=" + home, "GPG_KEY=test@example.invalid"}
	gpg := func(name string, args ...string) {
		cmd := exec.Command(name, args...)
		cmd.Env = append(os.Environ(), env...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s %v: %v\n%s", name, args, err, out)
		}
	}
	t.Cleanup(func() { gpg("gpgconf", "--kill", "all"); os.RemoveAll(home) })
	gpg("gpg", "--batch", "--quiet", "--passphrase", "", "--quick-generate-key",
		"test@example.invalid", "rsa2048", "sign", "never")
	public = filepath.Join(home, "public.gpg")
	gpg("gpg", "--batch", "--quiet", "--output", public, "--export", "test@example.invalid")
	return env, public
}

// With a key SHA256SUMS has a signature; without one there is none that could be taken for one.
func TestSignature(t *testing.T) {
	t.Parallel()
	env, public := keyring(t)
	unsigned, err := packages()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(unsigned, "SHA256SUMS.asc")); !os.IsNotExist(err) {
		t.Errorf("without a key: SHA256SUMS.asc: %v", err)
	}
	signed, err := build("..", "1.0.0", append(env, "FORMATS=apk")...)
	if err != nil {
		t.Fatal(err)
	}
	sums := filepath.Join(signed, "SHA256SUMS")
	output(t, "gpgv", "--keyring", public, sums+".asc", sums)
	if err := os.WriteFile(sums, []byte("0000  other\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "gpgv", "--keyring", public, sums+".asc",
		sums).CombinedOutput(); err == nil {
		t.Errorf("other checksums are vouched for too:\n%s", out)
	}
	if _, err := build("..", "1.0.0", append(env, "FORMATS=apk", "GPG_KEY=nobody@example.invalid")...); err == nil {
		t.Error("a key that is not there signed, or was passed over")
	}
}

// repositories makes them of both releases, in a folder, from packages that were put beside each
// other in this order.
func repositories(t *testing.T, env []string, releases ...func() (string, error)) string {
	t.Helper()
	need(t, "apt-ftparchive", "createrepo_c")
	from := t.TempDir()
	for _, release := range releases {
		for _, pattern := range []string{"*.deb", "*.rpm"} {
			output(t, "cp", built(t, release, pattern), from)
		}
	}
	to := filepath.Join(t.TempDir(), "repo")
	cmd := exec.CommandContext(t.Context(), "./repo", from, to)
	cmd.Env = append(append(os.Environ(), "SOURCE_DATE_EPOCH=1700000000", "GPG_KEY="), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("packaging/repo: %v\n%s", err, out)
	}
	return to
}

// The same packages make the same repositories. A key adds signatures, and changes nothing else.
func TestRepositoriesAreReproducible(t *testing.T) {
	t.Parallel()
	need(t, "diff")
	env, _ := keyring(t)
	one, two := repositories(t, nil, older, packages), repositories(t, env, packages, older)
	out, _ := exec.CommandContext(t.Context(), "diff", "-rq", one, two).CombinedOutput()
	var added []string
	for line := range strings.Lines(string(out)) {
		_, name, found := strings.Cut(strings.TrimSpace(line), ": ")
		if !found || !strings.HasPrefix(line, "Only in "+two) {
			t.Errorf("two repositories: %s", line)
		}
		added = append(added, name)
	}
	slices.Sort(added)
	if want := []string{"InRelease", "Release.gpg", program + ".asc", "repomd.xml.asc"}; !slices.Equal(added, want) {
		t.Errorf("a key adds %v, want %v", added, want)
	}
}

// hosted puts signed repositories into a machine, as if a company had them on a file system that
// all machines share.
func hosted(t *testing.T, root string) {
	t.Helper()
	env, _ := keyring(t)
	repo := repositories(t, env, older, packages)
	output(t, "cp", "-r", repo, filepath.Join(root, "srv/repo"))
	output(t, "chmod", "-R", "a+rX", filepath.Join(root, "srv/repo"))
}

// apt installs and upgrades from it, and takes no index that was changed after it was signed.
func TestRepositoryOfApt(t *testing.T) {
	t.Parallel()
	root, run := machine(t)
	hosted(t, root)
	run(`rm -rf /etc/apt/sources.list /etc/apt/sources.list.d/*
mkdir -p /etc/apt/keyrings; cp /srv/repo/gke-metadata-emulator.asc /etc/apt/keyrings/
cd /etc/apt/sources.list.d
echo 'deb [signed-by=/etc/apt/keyrings/gke-metadata-emulator.asc] file:///srv/repo/deb stable main' >gke-metadata-emulator.list
apt-get update --error-on=any
apt-get -y install gke-metadata-emulator=0.9.0-1
apt-get -y upgrade
` + enabled + `gke-metadata-emulator version | grep 1.0.0
cd /srv/repo/deb/dists/stable/main/binary-*
sed -i s/0.9.0/0.9.1/ Packages; rm Packages.gz
rm -rf /var/lib/apt/lists/*
! apt-get update --error-on=any >/tmp/said 2>&1
grep -q 'unexpected size\|Hash Sum' /tmp/said`)
}

// So does dnf. What the rpm requires is there, and Debian's.
func TestRepositoryOfDnf(t *testing.T) {
	t.Parallel()
	root, run := machineOf(t, "GME_TEST_RECIPES")
	hosted(t, root)
	const provided = "name: stand-in\narch: noarch\nversion: 1.0.0\n" +
		"provides: [ca-certificates, iptables, systemd, /bin/sh]\n"
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "nfpm.yaml"), []byte(provided), 0o644); err != nil {
		t.Fatal(err)
	}
	output(t, "go", "run", "github.com/goreleaser/nfpm/v2/cmd/nfpm@v2.45.2", "package",
		"--config", filepath.Join(dir, "nfpm.yaml"), "--packager", "rpm", "--target", dir)
	place(t, root, "stand-in.rpm", built(t, func() (string, error) { return dir, nil }, "*.rpm"))
	const dnf = "dnf -y --releasever=9 --disablerepo='*' --enablerepo=gke-metadata-emulator "
	run(`rpm --ignoreos -i /tmp/stand-in.rpm
mkdir -p /etc/yum.repos.d /etc/sysconfig
cat >/etc/yum.repos.d/gke-metadata-emulator.repo <<END
[gke-metadata-emulator]
name=gke-metadata-emulator
baseurl=file:///srv/repo/rpm
repo_gpgcheck=1
gpgcheck=0
gpgkey=file:///srv/repo/gke-metadata-emulator.asc
END
` + dnf + "install gke-metadata-emulator-0.9.0\n" + dnf + "upgrade\n" + enabled +
		`gke-metadata-emulator version | grep 1.0.0
sed -i s/1700000000/1700000001/ /srv/repo/rpm/repodata/repomd.xml
` + "! " + dnf + "--refresh reinstall gke-metadata-emulator >/tmp/said 2>&1\ngrep -q 'Bad GPG signature' /tmp/said")
}
