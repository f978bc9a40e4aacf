package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// TestMain lets this binary run as a pod's process.
func TestMain(m *testing.M) {
	if !isPod() {
		os.Exit(m.Run())
	}
}

// TestDemo runs the whole demo, the README's first command, on both backends.
func TestDemo(t *testing.T) {
	netnstest.Needs(t, "iptables-nft", "iptables-legacy", "nsenter", "ip")
	c, err := netnstest.NewCgroups("", fmt.Sprintf("gme-demo-probe-%d", os.Getpid()))
	if err != nil { // the demo would attest by address
		netnstest.Lacks(t, err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(t.TempDir(), "gke-metadata-emulator")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-race", "-o", binary,
		"../gke-metadata-emulator").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	for _, backend := range []string{"nft", "legacy"} {
		t.Run(backend, func(t *testing.T) {
			useBackend(t, backend)
			netnstest.Start(t, "probe") // skips without root
			var out bytes.Buffer
			if err := run(t.Context(), &out, binary, false); err != nil {
				t.Fatalf("%v, after:\n%s", err, &out)
			}
			for _, want := range []string{
				"an access token of reader@my-project.iam.gserviceaccount.com for system:serviceaccount:default:reader",
				"an access token of writer@my-project.iam.gserviceaccount.com for system:serviceaccount:default:writer",
				"an access token of host@my-project.iam.gserviceaccount.com for system:serviceaccount:default:host",
				"starts in a network namespace and a cgroup of its own",
				"by the kernel: ",
				"stranger → 503",
				"as before, byte for byte",
				"reached the cloud's metadata server: 0",
			} {
				if !strings.Contains(out.String(), want) {
					t.Errorf("no %q in:\n%s", want, &out)
				}
			}
		})
	}
}

// useBackend selects the backend of `iptables`, as the distribution's alternatives do.
func useBackend(t *testing.T, backend string) {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"iptables", "iptables-restore", "iptables-save", "ip6tables", "ip6tables-restore",
		"ip6tables-save"} {
		family, verb, _ := strings.Cut(name, "-")
		real := family + "-" + backend
		if verb != "" {
			real += "-" + verb
		}
		path, err := exec.LookPath(real)
		if err != nil {
			t.Fatal(err)
		}
		if path, err = filepath.EvalSymlinks(path); err != nil { // one binary that behaves by its name
			t.Fatal(err)
		}
		if err := os.Symlink(path, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// TestNoBinary: the error names the missing binary and the command that builds it.
func TestNoBinary(t *testing.T) {
	var out bytes.Buffer
	if err := run(t.Context(), &out, filepath.Join(t.TempDir(), "absent"), false); err == nil ||
		!strings.Contains(err.Error(), "make build") {
		t.Errorf("%v", err)
	}
}
