package packaging

import (
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// machine is a Debian root of the test's own, without a running systemd, as image builders have it.
// It has a network of its own too, so that nothing which is done in it can reach the rules of the
// machine that runs the test.
func machine(t *testing.T) (root string, run func(script string) string) {
	t.Helper()
	return machineOf(t, "GME_TEST_ROOTFS")
}

// machineOf makes one of the tree that this variable of the environment names.
func machineOf(t *testing.T, variable string) (root string, run func(script string) string) {
	t.Helper()
	if os.Geteuid() != 0 {
		lacking(t, "a chroot needs root")
	}
	tree := os.Getenv(variable)
	if tree == "" {
		lacking(t, variable+" names no minimal Debian, a tarball or a folder: `make test` makes one with "+
			"packaging/bed/rootfs")
	}
	need(t, "tar", "zstd", "unshare", "chroot")
	root = t.TempDir()
	if err := overlay(t, tree, root); err != nil {
		unpack := exec.CommandContext(t.Context(), "tar", "-C", root, "--numeric-owner", "-xf", tree)
		if info, err := os.Stat(tree); err == nil && info.IsDir() {
			unpack = exec.CommandContext(t.Context(), "cp", "-a", tree+"/.", root)
		}
		if out, err := unpack.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	if _, err := os.Stat(filepath.Join(root, "usr/bin/systemctl")); err != nil || root == "/" {
		t.Fatalf("%s is no Debian with systemd: %v", tree, err)
	}
	return root, func(script string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "unshare", "--mount", "--propagation=private", "--net", "--ipc", "--pid",
			"--fork", "--kill-child", "--",
			"sh", "-euc", `mount -t proc proc "$1/proc"; mount --bind /dev/null "$1/dev/null"; exec chroot "$1" sh -exc "$2"`,
			"sh", root, script)
		cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive"}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if strings.Contains(string(out), "Failed to") || strings.Contains(string(out), "not found") {
			t.Errorf("this went wrong in silence:\n%s", out)
		}
		return string(out)
	}
}

// overlay has root show the tree, and keeps what is written there elsewhere: copies of all trees
// take many seconds of processor time. An error says that the tree is no folder, or that overlayfs
// cannot be mounted here.
func overlay(t *testing.T, tree, root string) error {
	t.Helper()
	upper, work := t.TempDir(), t.TempDir() // of one file system, as overlayfs wants them
	options := "lowerdir=" + tree + ",upperdir=" + upper + ",workdir=" + work
	if err := syscall.Mount("overlay", root, "overlay", 0, options); err != nil {
		return err
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(root, 0); err != nil {
			t.Error(err)
		}
	})
	return nil
}

// place puts packages where the machine finds them.
func place(t *testing.T, root, name, file string) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "tmp", name), text, 0o644); err != nil {
		t.Fatal(err)
	}
}

// files is all that is in a root, and what of it: type, mode, owner, content. Logs, the packagers'
// own data and the backups and locks of whoever edits the list of users are left out.
func files(t *testing.T, root string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(path, root)
		switch name {
		case "/proc", "/sys", "/tmp", "/var/lib/dpkg", "/var/lib/rpm", "/var/log", "/var/cache", "/root":
			return filepath.SkipDir
		case "/etc/passwd-", "/etc/shadow-", "/etc/group-", "/etc/gshadow-", "/etc/.pwd.lock", "/etc/subuid-", "/etc/subgid-":
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		what := info.Mode().String()
		if s, ok := info.Sys().(*syscall.Stat_t); ok {
			what += fmt.Sprintf(" %d:%d", s.Uid, s.Gid)
		}
		switch {
		case info.Mode().IsRegular():
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			defer f.Close()
			h := sha256.New()
			if _, err := io.Copy(h, f); err != nil {
				return err
			}
			what += fmt.Sprintf(" %x", h.Sum(nil))
		case info.Mode()&fs.ModeSymlink != 0:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			what += " " + to
		}
		all[name] = what
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// requireUnchanged reports what is left behind, missing or changed.
func requireUnchanged(t *testing.T, before, after map[string]string, but ...string) {
	t.Helper()
	names := map[string]bool{}
	for n := range before {
		names[n] = true
	}
	for n := range after {
		names[n] = true
	}
	for _, n := range slices.Sorted(maps.Keys(names)) {
		if before[n] != after[n] && !slices.Contains(but, n) {
			t.Errorf("%s was %q and is %q", n, before[n], after[n])
		}
	}
}

// enabled are scripts' lines: every unit that can be enabled is, or none is.
const (
	enabled = `for u in $(cd /usr/lib/systemd/system && grep -ls '^.Install' gke-metadata-emulator*); do systemctl is-enabled $u; done
test -n "$(find /etc/systemd/system -name 'gke-metadata-emulator*')"
`
	disabled = `test -z "$(find /etc/systemd/system -name 'gke-metadata-emulator*')"
`
	disable = "systemctl disable $(cd /usr/lib/systemd/system && grep -ls '^.Install' gke-metadata-emulator*)\n"
	kept    = "grep -qx '# mine' /etc/gke-metadata-emulator/config.yaml\n"
	quiet   = "test ! -e /run/gke-metadata-emulator; test ! -e /run/systemd/system\n" // nothing was started
)

// A life of the deb in an image that is being built: units are enabled and not started, an
// operator's choices survive upgrade and downgrade, and a purge leaves nothing.
func TestLifeOfDeb(t *testing.T) {
	t.Parallel()
	root, run := machine(t)
	before := files(t, root)
	place(t, root, "new.deb", built(t, packages, "*.deb"))
	place(t, root, "old.deb", built(t, older, "*.deb"))

	run("dpkg -i /tmp/old.deb\n" + enabled + quiet)
	run("dpkg -i /tmp/new.deb\n" + enabled + `test "$(gke-metadata-emulator version | cut -d' ' -f2)" = 1.0.0`)
	run(disable + "echo '# mine' >>/etc/gke-metadata-emulator/config.yaml\ndpkg -i /tmp/old.deb\n" + disabled + kept)
	run("dpkg -i /tmp/new.deb\n" + disabled + kept)
	run("dpkg -r gke-metadata-emulator\n" + disabled + kept +
		"test ! -e /usr/bin/gke-metadata-emulator; test ! -e /var/lib/gke-metadata-emulator")
	run("dpkg -i /tmp/new.deb\n" + enabled + kept)
	run("touch /etc/gke-metadata-emulator/other.json\ndpkg -P gke-metadata-emulator\n" + disabled)
	requireUnchanged(t, before, files(t, root))
}

// A purge takes along what recipes and operators put beside the package's files, and what is
// others' stays. Where nobody can remove users, since there is no package passwd, it says so and
// succeeds.
func TestPurge(t *testing.T) {
	t.Parallel()
	root, run := machine(t)
	place(t, root, "new.deb", built(t, packages, "*.deb"))
	place(t, root, "provision.sh", "recipes/provision.sh")
	before := files(t, root)
	run(`etc=/etc/systemd/system
mkdir -p $etc/other.service.d $etc/k3s.service.d
echo '[Service]' | tee $etc/other.service.d/10-other.conf >$etc/k3s.service.d/20-mine.conf
for kubelet in kubelet.service k3s.service; do KUBELET=$kubelet sh /tmp/provision.sh /tmp/new.deb; done
mkdir $etc/gke-metadata-emulator-routing.service.d
echo '[Service]' >$etc/gke-metadata-emulator-routing.service.d/10-ebpf.conf
dpkg -r gke-metadata-emulator
test -e $etc/kubelet.service.d/10-gke-metadata-emulator.conf
dpkg -P gke-metadata-emulator
test -e $etc/other.service.d/10-other.conf
test "$(ls $etc/k3s.service.d)" = 20-mine.conf
rm -r $etc/other.service.d $etc/k3s.service.d`)
	requireUnchanged(t, before, files(t, root), "/var/lib/apt/lists/auxfiles")
	run(`dpkg -i /tmp/new.deb
rm /usr/sbin/userdel /usr/sbin/groupdel
dpkg -P gke-metadata-emulator 2>/tmp/said
grep 'user and group gke-metadata-emulator stay: ' /tmp/said
getent passwd gke-metadata-emulator
test ! -e /etc/gke-metadata-emulator`)
}

// A life of the rpm. Red Hat's packages leave their users behind, and so does this one.
func TestLifeOfRPM(t *testing.T) {
	t.Parallel()
	root, run := machine(t)
	if _, err := os.Stat(filepath.Join(root, "usr/bin/rpm")); err != nil {
		lacking(t, "there is no rpm in GME_TEST_ROOTFS: packaging/bed/rootfs has it")
	}
	// its database; what Red Hat's filesystem.rpm has
	run("rpm -qa; mkdir -p /etc/sysconfig /usr/share/licenses /usr/share/man/man5 /usr/share/man/man8")
	before := files(t, root)
	place(t, root, "new.rpm", built(t, packages, "*.rpm"))
	place(t, root, "old.rpm", built(t, older, "*.rpm"))

	const rpm = "rpm --nodeps --ignoreos " // iptables and systemd are there, and Debian's
	run(rpm + "-i /tmp/old.rpm\n" + enabled + quiet)
	run(rpm + "-U /tmp/new.rpm\n" + enabled + "rpm -V --nodeps gke-metadata-emulator")
	run(disable + rpm + "-U --oldpackage /tmp/old.rpm\n" + disabled)
	run(rpm + "-U /tmp/new.rpm\n" + disabled)
	run("rpm --nodeps -e gke-metadata-emulator\n" + disabled)
	requireUnchanged(t, before, files(t, root), "/etc/passwd", "/etc/group", "/etc/shadow", "/etc/gshadow")
}

// Scripts know no unit by its name: those of this version are enabled, also if there are none.
func TestLifeWithoutUnits(t *testing.T) {
	t.Parallel()
	root, run := machine(t)
	place(t, root, "new.deb", built(t, packages, "*.deb"))
	before := files(t, root)
	run("dpkg -i --path-exclude='/usr/lib/systemd/system/*' /tmp/new.deb\n" + disabled + "dpkg -P gke-metadata-emulator")
	after := files(t, root)
	requireUnchanged(t, before, after)
}
