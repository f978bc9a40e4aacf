package packaging

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
)

// What is in recipes/ is in the packages.
func TestRecipesArePackaged(t *testing.T) {
	root := filepath.Join(unpacked(t), "usr/share/doc", program)
	out, err := exec.CommandContext(t.Context(), "diff", "-r", "recipes", filepath.Join(root, "recipes")).CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// builder is a machine with the tools of image builders, without a running systemd, and with the
// recipes and the deb in /tmp.
func builder(t *testing.T) (root string, run func(script string) string) {
	t.Helper()
	root, run = machineOf(t, "GME_TEST_RECIPES")
	if out, err := exec.CommandContext(t.Context(), "cp", "-r", "recipes",
		filepath.Join(root, "tmp")).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	place(t, root, "new.deb", built(t, packages, "*.deb"))
	return root, run
}

// gated is a script's line: kubelet waits as systemd/kubelet-wait.conf has it.
func gated(t *testing.T) string {
	t.Helper()
	return fmt.Sprintf("grep -qxF %q /etc/systemd/system/kubelet.service.d/10-gke-metadata-emulator.conf\n", gate(t))
}

func gate(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../systemd/kubelet-wait.conf")
	if err != nil {
		t.Fatal(err)
	}
	line := regexp.MustCompile(`(?m)^ExecStartPre=.*$`).Find(text)
	if line == nil {
		t.Fatal("kubelet-wait.conf has no ExecStartPre=")
	}
	return string(line)
}

// The shell provisioner, run in a chroot of an image without lists of packages.
func TestRecipeProvision(t *testing.T) {
	t.Parallel()
	root, run := machine(t)
	place(t, root, "new.deb", built(t, packages, "*.deb"))
	place(t, root, "provision.sh", "recipes/provision.sh")
	place(t, root, "mine.yaml", "examples/config.yaml")
	place(t, root, "broken.yaml", "recipes/cloud-init.yaml")
	const provision = "sh /tmp/provision.sh /tmp/new.deb"
	run("KUBELET=kubelet.service " + provision + "\n" + enabled + quiet + gated(t) +
		"! gke-metadata-emulator config check")
	run(provision + " /tmp/mine.yaml\ngke-metadata-emulator config check\n" + enabled + quiet)
	run("! " + provision + " /tmp/broken.yaml\n! sh /tmp/provision.sh /tmp/mine.yaml\ngke-metadata-emulator config check")
	run(`preset=/etc/systemd/system-preset/00-test.preset unit=gke-metadata-emulator-attest.service
mkdir -p ${preset%/*}; echo "disable $unit" >$preset; systemctl disable $unit
! ` + provision + ` 2>/tmp/said
grep "^provision.sh: $unit is not enabled: " /tmp/said`)
}

// Without arguments, or with such as cannot be, each says in one line what it wants.
func TestRecipesWithoutArguments(t *testing.T) {
	for script, want := range map[string]string{
		"recipes/provision.sh": "PACKAGE [CONFIG]", "recipes/sysext": "DEB OUT", "./build": "OUT ARCH",
		"./repo":     "PACKAGES OUT",
		"bed/rootfs": "DIR [recipes|vm]", "bed/older": "DIR", "bed/scratch": "PID",
	} {
		out, err := exec.CommandContext(t.Context(), script).CombinedOutput()
		var exit *exec.ExitError
		if text := string(out); !errors.As(err, &exit) || exit.ExitCode() != 64 ||
			!strings.HasPrefix(text, "usage: ") || !strings.Contains(text, want) || strings.Count(text, "\n") != 1 {
			t.Errorf("%s: %v\n%s", script, err, out)
		}
	}
	for script, args := range map[string][]string{"recipes/provision.sh": {"/nowhere.deb"},
		"recipes/sysext": {"/nowhere.deb", "/nowhere"}} {
		out, err := exec.CommandContext(t.Context(), script, args...).CombinedOutput()
		if text := string(out); err == nil || !strings.Contains(text, "/nowhere.deb cannot be read: name a deb") ||
			strings.Count(text, "\n") != 1 {
			t.Errorf("%s %v: %v\n%s", script, args, err, out)
		}
	}
}

// The role, as somebody runs it on a machine or in a chroot; then once more, when nothing is left
// to be done.
func TestRecipeAnsible(t *testing.T) {
	t.Parallel()
	_, run := builder(t)
	play(t, run, "/tmp/recipes/ansible/playbook.yml", "-e gke_metadata_emulator_package=/tmp/new.deb")
	run(enabled + quiet + "! gke-metadata-emulator config check\ntest ! -e /etc/systemd/system/kubelet.service.d")
	play(t, run, "/tmp/recipes/ansible/playbook.yml",
		"-e gke_metadata_emulator_package=/tmp/new.deb -e gke_metadata_emulator_gates=kubelet.service "+
			`-e '{"gke_metadata_emulator_config": {"workloadIdentityProvider": `+
			`"projects/1/locations/global/workloadIdentityPools/my-pool/providers/my-cluster", "projectID": "my-project", `+
			`"routing": {"excludeInterfaces": ["docker0"]}}}'`)
	run("gke-metadata-emulator config check\ngke-metadata-emulator config show | grep -x '  excludeInterfaces: " +
		"\\[docker0\\]'\n" + enabled + quiet + gated(t))
}

const playing = `mkdir -p /dev/shm; mount -t tmpfs tmpfs /dev/shm
export LC_ALL=C.UTF-8
ansible-playbook -i localhost, -c local `

// play runs a playbook in the machine that run runs scripts in, twice: the second time changes
// nothing.
func play(t *testing.T, run func(string) string, playbook, args string) {
	t.Helper()
	cmd := playing + playbook + " " + args
	recap := regexp.MustCompile(`ok=\d+ +changed=(\d+) +unreachable=0 +failed=0`)
	first := recap.FindStringSubmatch(run(cmd))
	if first == nil || first[1] == "0" {
		t.Errorf("the first time: %q", first)
	}
	text := run(cmd)
	if again := recap.FindStringSubmatch(text); again == nil || again[1] != "0" {
		t.Errorf("the second time: %q\n%s", again, text)
	}
}

// Image-builder's node.yml includes the roles that a variable names, and hands ansible_user_vars to
// ansible-playbook.
func TestRecipeImageBuilder(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("recipes/image-builder.json")
	if err != nil {
		t.Fatal(err)
	}
	var v map[string]string
	if err := json.Unmarshal(text, &v); err != nil {
		t.Fatal(err)
	}
	root, run := builder(t)
	vars := regexp.MustCompile(`/path/to/\S+[.]deb`).ReplaceAllLiteralString(v["ansible_user_vars"], "/tmp/new.deb")
	if vars == v["ansible_user_vars"] {
		t.Errorf("where is the package in %q?", vars)
	}
	node := "- hosts: all\n  become: true\n  tasks:\n    - ansible.builtin.include_role:\n        name: \"{{ role }}\"\n" +
		"      loop: \"{{ node_custom_roles_post.split() }}\"\n      loop_control:\n        loop_var: role\n"
	if err := os.WriteFile(filepath.Join(root, "tmp/recipes/ansible/node.yml"), []byte(node), 0o644); err != nil {
		t.Fatal(err)
	}
	run(fmt.Sprintf(playing+"/tmp/recipes/ansible/node.yml --extra-vars node_custom_roles_post=%q --extra-vars %q",
		v["node_custom_roles_post"], vars))
	run(enabled + quiet + gated(t))
}

// cloud-init finds nothing wrong with it, and writes a configuration that loads.
func TestRecipeCloudInit(t *testing.T) {
	t.Parallel()
	root, run := builder(t)
	run("dpkg -i /tmp/new.deb\ncloud-init schema --config-file /tmp/recipes/cloud-init.yaml\n" +
		"cloud-init --file /tmp/recipes/cloud-init.yaml single --name write_files --frequency always\n" +
		"gke-metadata-emulator config check; stat -c '%U %a' /etc/gke-metadata-emulator/config.yaml | grep -x 'root 644'")
	if c, err := config.Load(filepath.Join(root, "etc/gke-metadata-emulator/config.yaml"), nil); err != nil ||
		c.Project.ID != "my-project" {
		t.Errorf("%+v, %v", c.Project.ID, err)
	}
}

// Packer bakes a machine that it reaches by SSH: the chroot, in a network of its own.
func TestRecipePacker(t *testing.T) {
	t.Parallel()
	_, run := builder(t)
	text := run(`ip link set lo up; mkdir -p /run/sshd /dev/shm; mount -t tmpfs tmpfs /dev/shm
mkdir -p -m 700 /root/.ssh; ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/key; cp /root/.ssh/key.pub /root/.ssh/authorized_keys
/usr/sbin/sshd -o ListenAddress=127.0.0.1
export HOME=/root CHECKPOINT_DISABLE=1
set -- -var package=/tmp/new.deb -var kubelet=kubelet.service -var host=127.0.0.1 -var key=/root/.ssh/key /tmp/recipes/node.pkr.hcl
packer validate "$@"
packer build -color=false "$@"
test ! -e /tmp/provision.sh
` + enabled + gated(t))
	if !strings.Contains(text, "Builds finished") {
		t.Errorf("packer says\n%s", text)
	}
}

// What is written on a Flatcar node is a configuration that loads, and kubelet waits as elsewhere.
func TestRecipeFlatcar(t *testing.T) {
	text, err := os.ReadFile("recipes/flatcar.bu")
	if err != nil {
		t.Fatal(err)
	}
	var bu struct {
		Variant string
		Storage struct {
			Files []struct {
				Path     string
				Contents struct{ Source, Inline string }
			}
		}
		Systemd struct {
			Units []struct{ Dropins []struct{ Contents string } }
		}
	}
	if err := yaml.Unmarshal(text, &bu); err != nil || bu.Variant != "flatcar" {
		t.Fatalf("%q, %v", bu.Variant, err)
	}
	written := map[string]string{}
	for _, f := range bu.Storage.Files {
		written[f.Path] = f.Contents.Source + f.Contents.Inline
	}
	if !strings.HasSuffix(written["/etc/extensions/"+program+".raw"], program+".raw") {
		t.Errorf("no extension: %v", written)
	}
	file := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(file, []byte(written["/etc/"+program+"/config.yaml"]), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := config.Load(file, nil); err != nil {
		t.Error(err)
	}
	// the binary comes later
	want := strings.Replace(gate(t), "-e /usr/bin/"+program, "-e /etc/extensions/"+program+".raw", 1)
	if !strings.Contains(bu.Systemd.Units[0].Dropins[0].Contents, want+"\n") {
		t.Errorf("kubelet does not wait: %q", bu.Systemd.Units[0].Dropins[0].Contents)
	}
}

// The extension holds what the package does below /usr, and nothing outside of it; what it does in
// a machine is for packaging/bed/recipes.
func TestRecipeSysext(t *testing.T) {
	t.Parallel()
	need(t, "mksquashfs", "unsquashfs", "dpkg-deb")
	var sums []string
	dir := t.TempDir()
	for _, out := range []string{"one", "two"} {
		output(t, "recipes/sysext", built(t, packages, "*.deb"), filepath.Join(dir, out))
		sums = append(sums, strings.Fields(output(t, "sha256sum", filepath.Join(dir, out, program+".raw")))[0])
	}
	if sums[0] != sums[1] {
		t.Error("the same package makes another image")
	}
	image := filepath.Join(dir, "tree")
	output(t, "unsquashfs", "-no-progress", "-d", image, filepath.Join(dir, "one", program+".raw"))
	if top, err := filepath.Glob(filepath.Join(image, "*")); err != nil || len(top) != 1 ||
		filepath.Base(top[0]) != "usr" {
		t.Errorf("%v, %v", top, err)
	}
	pkg := unpacked(t)
	for _, part := range []string{"usr/bin", "usr/lib/systemd/system", "usr/lib/sysusers.d", "usr/lib/modules-load.d"} {
		files, err := filepath.Glob(filepath.Join(pkg, part, "*"))
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %v, %v", part, files, err)
		}
		for _, f := range files {
			output(t, "cmp", f, filepath.Join(image, part, filepath.Base(f)))
		}
	}
	// What the package enables, the extension wants.
	unit, err := os.ReadFile(filepath.Join(image, "usr/lib/systemd/system", program+"-extension.service"))
	if err != nil {
		t.Fatal(err)
	}
	preset, err := os.ReadFile("../systemd/preset")
	if err != nil {
		t.Fatal(err)
	}
	wanted := strings.Fields(regexp.MustCompile(`(?m)^Wants=(.*)$`).FindStringSubmatch(string(unit))[1])
	var enables []string
	for _, m := range regexp.MustCompile(`(?m)^enable (\S+)$`).FindAllStringSubmatch(string(preset), -1) {
		enables = append(enables, m[1])
	}
	if sorted(strings.Join(wanted, "\n")) != sorted(strings.Join(enables, "\n")) {
		t.Errorf("the extension has Wants=%v, the preset enables %v", wanted, enables)
	}
}
