package attest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// client is a process that does what it is told.
type client struct {
	t     testing.TB
	cmd   *exec.Cmd
	in    io.Writer
	out   *bufio.Reader
	group string
}

// client starts a process in the cgroup and the namespace.
func (b *testNode) client(cgroup string, ns *netnstest.NS) *client {
	b.t.Helper()
	cmd := self(context.Background(), "client")
	in, err := cmd.StdinPipe()
	if err != nil {
		b.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.t.Fatal(err)
	}
	cmd.ExtraFiles = []*os.File{b.mount}
	c := b.place(cmd, cgroup, ns)
	c.in, c.out = in, bufio.NewReader(out)
	return c
}

// place starts the command in the cgroup and the namespace.
func (b *testNode) place(cmd *exec.Cmd, cgroup string, ns *netnstest.NS) *client {
	b.t.Helper()
	dir, err := os.Open(b.cgroups + b.cgroup(cgroup))
	if err != nil {
		b.t.Fatal(err)
	}
	defer dir.Close()
	cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
	b.start(ns, cmd)
	b.t.Cleanup(func() { kill(cmd) })
	return &client{t: b.t, cmd: cmd, group: cgroup}
}

// do has the client do something, and returns what it says.
func (c *client) do(format string, args ...any) string {
	c.t.Helper()
	answer, err := c.try(format, args...)
	if err != nil {
		c.t.Fatal(err)
	}
	return answer
}

func (c *client) try(format string, args ...any) (string, error) {
	line := fmt.Sprintf(format, args...)
	if _, err := fmt.Fprintln(c.in, line); err != nil {
		return "", fmt.Errorf("%s: %w", line, err)
	}
	defer time.AfterFunc(20*time.Second, func() { _ = c.cmd.Process.Kill() }).Stop()
	answer, err := c.out.ReadString('\n')
	answer = strings.TrimSpace(answer)
	if err != nil || !strings.HasPrefix(answer, "ok") {
		return "", fmt.Errorf("%s: %w: %s", line, errors.Join(err, errors.New("the client failed")), answer)
	}
	return strings.TrimSpace(strings.TrimPrefix(answer, "ok")), nil
}

// answer is what the client says later to something that it did in two steps.
func (c *client) answer() string {
	c.t.Helper()
	defer time.AfterFunc(20*time.Second, func() { _ = c.cmd.Process.Kill() }).Stop()
	answer, err := c.out.ReadString('\n')
	rest, ok := strings.CutPrefix(strings.TrimSpace(answer), "ok")
	if err != nil || !ok {
		c.t.Fatalf("the client failed: %v: %s", err, answer)
	}
	return strings.TrimSpace(rest)
}

// seenByClients is a cgroup's directory in a client's process.
func (b *testNode) seenByClients(path string) string {
	return strings.Replace(b.cgroups, fmt.Sprintf("/fd/%d/", b.mount.Fd()), "/fd/3/", 1) + path
}
