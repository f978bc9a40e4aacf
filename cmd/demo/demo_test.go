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

// TestMain lets this binary be a pod's process too.
func TestMain(m *testing.M) {
	if !isPod() {
		os.Exit(m.Run())
	}
}

// TestDemo is the main job on real input, on both backends: what the README's first command shows.
func TestDemo(t *testing.T) {
	netnstest.Needs(t, "iptables-nft", "iptables-legacy", "nsenter", "ip")
	c, err := netnstest.NewCgroups("", fmt.Sprintf("gme-demo-probe-%d", os.Getpid()))
	if err != nil { // it would fall back to addresses
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
			netnstest.Start(t, "probe") // says so where there is no root
			var out bytes.Buffer
			if err := run(t.Context(), &out, binary, false); err != nil {
				t.Fatalf("%v, after:\n%s", err, &out)
			}
			for _, want := range []string{
				"the access token of reader@my-project.iam.gserviceaccount.com for system:serviceaccount:default:reader",
				"the access token of writer@my-project.iam.gserviceaccount.com for system:serviceaccount:default:writer",
				"the access token of host@my-project.iam.gserviceaccount.com for system:serviceaccount:default:host",
				"born in its network namespace and in its cgroup",
				"by the kernel: ",
				"stranger → 503",
				"as before, byte for byte",
				"reached the cloud's own metadata server: 0",
			} {
				if !strings.Contains(out.String(), want) {
					t.Errorf("no %q in:\n%s", want, &out)
				}
			}
		})
	}
}

// useBackend makes `iptables` that backend's, as the distribution's alternatives do.
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
		if path, err = filepath.EvalSymlinks(path); err != nil { // one binary that goes by the name it is called
			t.Fatal(err)
		}
		if err := os.Symlink(path, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// A missing binary is named, and how to make it.
func TestNoBinary(t *testing.T) {
	var out bytes.Buffer
	if err := run(t.Context(), &out, filepath.Join(t.TempDir(), "absent"), false); err == nil ||
		!strings.Contains(err.Error(), "make build") {
		t.Errorf("%v", err)
	}
}
