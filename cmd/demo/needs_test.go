package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// TestNeeds: without its prerequisites the demo prints one line, and makes nothing.
func TestNeeds(t *testing.T) {
	if os.Geteuid() != 0 {
		netnstest.Lacks(t, netnstest.ErrNeedsRoot)
	}
	dir, err := os.MkdirTemp("", "demo") // t.TempDir is hidden from other users on some machines
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(dir, "demo")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", binary, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	tools := filepath.Join(dir, "tools")
	if err := os.Mkdir(tools, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tool := range []string{"ip", "iptables", "nsenter", "mount", "unshare", "sh"} {
		path, err := exec.LookPath(tool)
		if err != nil {
			netnstest.Lacks(t, err)
		}
		if err := os.Symlink(path, filepath.Join(tools, tool)); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name, path, want string
		args             []string
		nobody           bool
	}{
		{name: "privileges", path: os.Getenv("PATH"), nobody: true,
			want: "CAP_SYS_ADMIN, CAP_SYS_PTRACE: run `make demo` as root"},
		{name: "tools", path: dir, want: "this machine has no ip, iptables, nsenter, mount, unshare, sh in $PATH"},
		{name: "curl", path: tools, args: []string{"--keep"}, want: "this machine has no curl in $PATH"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), binary, append(c.args, "--emulator", binary)...)
			cmd.Env = []string{"PATH=" + c.path}
			if c.nobody {
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
			}
			out, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if text := string(out); !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.HasPrefix(text, "demo: ") ||
				!strings.Contains(text, c.want) || strings.Count(text, "\n") != 1 {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
	all := uint64(1)<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_RAW | 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_SYS_PTRACE
	if err := needs(all&^(1<<unix.CAP_NET_ADMIN), false); err == nil || !strings.Contains(err.Error(),
		"lacks CAP_NET_ADMIN: ") {
		t.Errorf("in a container without NET_ADMIN: %v", err)
	}
	if err := needs(all, false); err != nil {
		t.Errorf("with all of it: %v", err)
	}
}
