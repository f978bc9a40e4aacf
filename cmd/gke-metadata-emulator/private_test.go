package main

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// Tokens are in the memory of the service, which another process of its user cannot read.
func TestMemoryIsPrivate(t *testing.T) {
	if os.Geteuid() != 0 {
		netnstest.Lacks(t, netnstest.ErrNeedsRoot)
	}
	dir, err := os.MkdirTemp("", "private") // one that its user can enter
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path, err := exec.LookPath(program)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	own := filepath.Join(dir, "gke-metadata-emulator")
	if err := errors.Join(os.WriteFile(own, text, 0o755), os.Chmod(own, 0o755), os.Chown(dir, 65534, 65534)); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	file, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	url := "http://" + l.Addr().String()
	l.Close() // the descriptor goes on listening, as systemd's does
	asUser := func(cmd *exec.Cmd) *exec.Cmd {
		cmd.Dir, cmd.SysProcAttr = dir, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534},
			Pdeathsig: syscall.SIGKILL}
		return cmd
	}
	serve := asUser(exec.CommandContext(t.Context(), "sh", "-c", `LISTEN_PID=$$ exec "$0" serve --config absent.yaml`,
		own))
	serve.Env = append(os.Environ(), "LISTEN_FDS=1", "GKE_METADATA_EMULATOR_RUN="+dir)
	serve.ExtraFiles = []*os.File{file}
	if err := serve.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = serve.Process.Kill(), serve.Wait() }()
	for end := time.Now().Add(10 * time.Second); ; {
		if r, err := http.Get(url); err == nil {
			_ = r.Body.Close()
			break
		} else if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"mem", "environ"} {
		out, err := asUser(exec.CommandContext(t.Context(), "head", "-c", "1",
			fmt.Sprintf("/proc/%d/%s", serve.Process.Pid, name))).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "Permission denied") {
			t.Errorf("%s can be read by its user: %v: %s", name, err, out)
		}
	}
}
