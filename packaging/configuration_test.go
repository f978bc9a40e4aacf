package packaging

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
)

// The shipped configuration names the keys that have to be set. With these filled in it loads, and
// so does the example.
func TestConfiguration(t *testing.T) {
	text, err := os.ReadFile("config.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if lines := regexp.MustCompile(`(?m)^[^#\n].*$`).FindAll(text, -1); lines != nil {
		t.Errorf("config.yaml sets what later releases may have other defaults for: %q", lines)
	}
	const key = "workloadIdentityProvider: projects/"
	filled := strings.NewReplacer("#"+key+"NUMBER/locations/global/workloadIdentityPools/POOL/providers/PROVIDER",
		key+"1/locations/global/workloadIdentityPools/my-pool/providers/my-cluster",
		"#projectID: PROJECT", "projectID: my-project").Replace(string(text))
	file := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(file, []byte(filled), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{file, "examples/config.yaml"} {
		if _, err := config.Load(f, nil); err != nil {
			t.Error(err)
		}
	}
}

// The reference is documentation, made of the table of keys.
func TestConfigurationReference(t *testing.T) {
	const file = "examples/config-reference.yaml"
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(file, []byte(config.Reference()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if string(text) != config.Reference() {
		t.Errorf("%s is not config.Reference(): UPDATE_GOLDEN=1 go test ./packaging", file)
	}
}

// Files that operators edit never change again. Where a release ships another, dpkg asks each
// operator who edited it, and an unattended upgrade stops there with the units not restarted. Do
// not update these checksums.
func TestConfigurationFilesNeverChange(t *testing.T) {
	for file, want := range map[string]string{
		"config.yaml": "1bc73e0068857bc4fd5ecea93c2679658ef5c0b2bbb1393d78d36321f95b4d93",
		"flags":       "513162c3bfae816c9b43db1363656ef57ea625a69d0001df19997695d4c913cd",
	} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprintf("%x", sha256.Sum256(text)); got != want {
			t.Errorf("%s has the checksum %s, and shipped with %s: put it back", file, got, want)
		}
	}
	nfpm, err := os.ReadFile("../nfpm.yaml")
	if err != nil {
		t.Fatal(err)
	}
	shipped := regexp.MustCompile(`(?m)^- \{dst: (/etc/\S+), src: packaging/(\S+), type: (\S+),`)
	for _, m := range shipped.FindAllStringSubmatch(string(nfpm), -1) {
		if m[2] != "config.yaml" && m[2] != "flags" || m[3] != "config|noreplace" {
			t.Errorf("nfpm.yaml: %s comes from %s as %s: no checksum holds it, or an upgrade replaces it", m[1], m[2], m[3])
		}
	}
}

// A release before this one had another default and did not know a key. Files that the operator
// edited stay as they are over an upgrade, a downgrade and another upgrade that nobody attends, and
// nothing lies beside them.
const (
	edit = `mkdir -p /etc/default /etc/sysconfig
for f in /etc/gke-metadata-emulator/config.yaml $flags; do echo '# mine' >>$f; done
before=$(cat /etc/gke-metadata-emulator/* $flags | sha256sum)
`
	unchanged = `test "$(cat /etc/gke-metadata-emulator/* $flags | sha256sum)" = "$before"
test "$(echo /etc/gke-metadata-emulator/* $flags*)" = "/etc/gke-metadata-emulator/config.yaml $flags"
`
)

func TestUpgradeOfEditedDeb(t *testing.T) {
	t.Parallel()
	root, run := machine(t)
	place(t, root, "new.deb", built(t, packages, "*.deb"))
	place(t, root, "old.deb", built(t, older, "*.deb"))
	const install = "apt-get -y --allow-downgrades install "
	run("flags=/etc/default/gke-metadata-emulator\n" + install + "/tmp/old.deb </dev/null\n" + edit +
		install + "/tmp/new.deb </dev/null\n" + unchanged + "gke-metadata-emulator version | grep 1.0.0\n" +
		install + "/tmp/old.deb </dev/null\n" + unchanged + install + "/tmp/new.deb </dev/null\n" + unchanged)
}

func TestUpgradeOfEditedRPM(t *testing.T) {
	t.Parallel()
	root, run := machine(t)
	place(t, root, "new.rpm", built(t, packages, "*.rpm"))
	place(t, root, "old.rpm", built(t, older, "*.rpm"))
	const rpm = "rpm --nodeps --ignoreos -U --oldpackage /tmp/"
	run("flags=/etc/sysconfig/gke-metadata-emulator\n" + rpm + "old.rpm\n" + edit + rpm + "new.rpm\n" + unchanged +
		"gke-metadata-emulator version | grep 1.0.0\n" + rpm + "old.rpm\n" + unchanged + rpm + "new.rpm\n" + unchanged)
}

// pacman is a script's lines that make a machine Arch's, as far as its packages need it.
const pacman = `ln -sf bash /bin/sh
printf '[options]\nArchitecture = auto\nSigLevel = Never\n' >/etc/pacman.conf
mkdir -p /var/lib/pacman
`

// Arch Linux calls such files backups.
func TestUpgradeOfEditedArch(t *testing.T) {
	t.Parallel()
	root, run := machineOf(t, "GME_TEST_RECIPES")
	place(t, root, "new.pkg.tar.zst", built(t, packages, "*.pkg.tar.zst"))
	place(t, root, "old.pkg.tar.zst", built(t, older, "*.pkg.tar.zst"))
	const install = "pacman -U -dd --noconfirm --noprogressbar /tmp/"
	run(pacman + "flags=/etc/default/gke-metadata-emulator\n" + install + "old.pkg.tar.zst\n" + enabled + edit +
		install + "new.pkg.tar.zst\n" + unchanged +
		"gke-metadata-emulator version | grep 1.0.0\n" + install + "old.pkg.tar.zst\n" + unchanged +
		install + "new.pkg.tar.zst\n" + unchanged +
		"pacman -Rdd --noconfirm --noprogressbar gke-metadata-emulator\n" + disabled)
}

// apk asks nobody: what was edited below /etc stays, whatever the package says. Debian has no apk
// to try it with, so this holds only that the files lie there.
func TestConfigurationOfApk(t *testing.T) {
	t.Parallel()
	need(t, "tar", "gzip")
	list := output(t, "tar", "-tzf", built(t, packages, "*.apk"))
	for _, want := range []string{"etc/" + program + "/config.yaml", "etc/default/" + program} {
		if !strings.Contains("\n"+list, "\n"+want+"\n") {
			t.Errorf("the apk lacks %s:\n%s", want, list)
		}
	}
}
