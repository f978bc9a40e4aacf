package main

import (
	"bytes"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// TestServeAnswersDNS: what systemd hands over for DNS queries is served, without a configuration
// too, and a query that comes between two processes is answered by the second.
func TestServeAnswersDNS(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	u, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	listener, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	queries, err := u.File()
	if err != nil {
		t.Fatal(err)
	}
	defer queries.Close()
	start := func() (stop func()) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, program, "serve", "--config",
			filepath.Join(dir, "absent.yaml"))
		cmd.Env = append(os.Environ(), "LISTEN_FDS=2", "GKE_METADATA_EMULATOR_RUN="+dir)
		cmd.ExtraFiles = []*os.File{queries, listener} // in whatever order
		var log bytes.Buffer
		cmd.Stdout, cmd.Stderr = &log, &log
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return func() {
			t.Helper()
			_ = cmd.Process.Signal(syscall.SIGTERM)
			if err := cmd.Wait(); err != nil {
				t.Errorf("after SIGTERM: %v\n%s", err, &log)
			}
		}
	}
	c, err := net.Dial("udp", u.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ask := func() {
		t.Helper()
		m := dnsmessage.Message{Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName("metadata.google.internal."),
			Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}}
		b, err := m.Pack()
		if err == nil {
			_, err = c.Write(b)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	answered := func() {
		t.Helper()
		if err := c.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 512)
		n, err := c.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		var m dnsmessage.Message
		if err := m.Unpack(b[:n]); err != nil || len(m.Answers) != 1 {
			t.Fatalf("%+v, %v", m, err)
		}
		a, ok := m.Answers[0].Body.(*dnsmessage.AResource)
		if !ok || netip.AddrFrom4(a.A).String() != "169.254.169.254" {
			t.Errorf("%+v", m.Answers)
		}
	}
	stop := start()
	ask()
	answered()
	stop()
	ask()
	stop = start()
	answered()
	stop()
}
