package routing

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// Who holds an address, as the kernel sees it: a socket on every address of a family does, one on
// every address of the other family only where it takes IPv4 too.
func TestListener(t *testing.T) {
	for _, c := range []struct{ network, listens, wanted, at string }{
		{"tcp4", "127.0.0.1", "127.0.0.1", "127.0.0.1"},
		{"tcp4", "127.0.0.1", "127.0.0.2", ""},
		{"tcp4", "0.0.0.0", "127.0.0.1", "0.0.0.0"},
		{"tcp4", "0.0.0.0", "[::1]", ""},
		{"tcp6", "[::]", "127.0.0.1", ""}, // Go's tcp6 is IPV6_V6ONLY
		{"tcp6", "[::]", "[::1]", "[::]"},
		{"tcp", "[::]", "127.0.0.1", "[::]"},
	} {
		l, err := net.Listen(c.network, c.listens+":0")
		if err != nil && strings.Contains(c.listens, ":") {
			netnstest.Lacks(t, err)
		} else if err != nil {
			t.Fatal(err)
		}
		port := l.Addr().(*net.TCPAddr).AddrPort().Port()
		wanted := netip.AddrPortFrom(netip.MustParseAddr(strings.Trim(c.wanted, "[]")), port)
		by := Listener(wanted)
		switch got := by.At.Addr().String(); {
		case c.at == "" && by.At.IsValid():
			t.Errorf("%+v holds %s", by, wanted)
		case c.at != "" && (got != strings.Trim(c.at, "[]") || by.PID != strconv.Itoa(os.Getpid()) || !by.Own):
			t.Errorf("%s: %+v", wanted, by)
		}
		// What holds an address is what the kernel lets nobody else listen on.
		second, err := net.Listen("tcp", wanted.String())
		if (err != nil) != by.At.IsValid() {
			t.Errorf("%s while another socket listens on %s: %v", wanted, l.Addr(), err)
		}
		if err == nil {
			_ = second.Close()
		}
		_ = l.Close()
	}
}

// TestQueryListener: who has UDP of an address. Two sockets can have one port, where both allow it
// (SO_REUSEADDR): that of the very address gets the packets.
func TestQueryListener(t *testing.T) {
	reuse := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		if e := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		}); e != nil {
			return e
		}
		return err
	}}
	every, err := reuse.ListenPacket(t.Context(), "udp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer every.Close()
	port := every.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	at := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)
	by := QueryListener(at)
	if by.At.String() != fmt.Sprintf("0.0.0.0:%d", port) || by.PID != strconv.Itoa(os.Getpid()) || !by.HoldsFrom(at) {
		t.Errorf("a socket on every address: %+v", by)
	}
	one, err := reuse.ListenPacket(t.Context(), "udp4", at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer one.Close()
	if by := QueryListener(at); by.At != at || !by.Own || by.HoldsFrom(at) {
		t.Errorf("a socket on the very address beside it: %+v", by)
	}
}

// TestOwnProgram: our own program is a file and not a path, which another mount namespace may have
// for another file.
func TestOwnProgram(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		netnstest.Lacks(t, errors.New("a mount namespace needs root"))
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(t.TempDir(), "other")
	program, err := os.ReadFile(self)
	if err == nil {
		err = os.WriteFile(other, program, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	for file, own := range map[string]bool{self: true, other: false} {
		at := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), freePort(t))
		cmd := exec.CommandContext(t.Context(), "unshare", "-m", "sh", "-c", `mount --bind "$1" "$2" && exec "$2"`,
			"sh", file, self)
		cmd.Env = append(os.Environ(), "ROUTING_TEST_ROLE=listen", "ROUTING_TEST_ARG="+at.String())
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		if line, err := bufio.NewReader(out).ReadString('\n'); line != "listening <nil>\n" {
			t.Errorf("%q, %v", line, err)
		}
		if by := Listener(at); by.At != at || by.Own != own || by.Exe != self {
			t.Errorf("%s at the path of this program: %+v, want Own %v", file, by, own)
		}
		_ = in.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
}

// freePort is one at which nothing listened a moment ago.
func freePort(t *testing.T) uint16 {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).AddrPort().Port()
}

// TestOwnCgroup: the service is known by its unit, too, whose file an upgrade has replaced.
func TestOwnCgroup(t *testing.T) {
	for cgroups, want := range map[string]bool{
		"0::/system.slice/gke-metadata-emulator.service\n":                                       true,
		"12:memory:/\n1:name=systemd:/system.slice/gke-metadata-emulator.service\n0::/\n":        true,
		"12:memory:/system.slice/gke-metadata-emulator.service\n1:name=systemd:/\n0::/\n":        false,
		"0::/system.slice/gke-metadata-emulator.service/a\n":                                     false,
		"0::/kubepods.slice/cri-containerd-2.scope/system.slice/gke-metadata-emulator.service\n": false,
		"0::/../system.slice/gke-metadata-emulator.service\n":                                    false,
		"0::/system.slice/nginx.service\n":                                                       false,
		"":                                                                                       false,
	} {
		if got := ownCgroup(cgroups); got != want {
			t.Errorf("%q: %v", cgroups, got)
		}
	}
}

func TestHolderText(t *testing.T) {
	for want, l := range map[string]ListenedBy{
		"a process that cannot be seen from here": {},
		"nginx (process 7, nginx.service)":        {PID: "7", Exe: "/usr/sbin/nginx (deleted)", Unit: "nginx.service"},
		"n?x (process 7)":                         {PID: "7", Exe: "/tmp/n\nx"},
	} {
		if got := l.String(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestUnitOf(t *testing.T) {
	for cgroups, want := range map[string]string{
		"0::/system.slice/nginx.service\n":                                             "nginx.service",
		"0::/system.slice/system-nginx.slice/nginx@a.service/worker\n":                 "nginx@a.service",
		"0::/user.slice/user-1000.slice/user@1000.service/app.slice/dev.service\n":     "dev.service",
		"0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-2.scope\n":              "cri-containerd-2.scope",
		"12:memory:/other.service\n1:name=systemd:/system.slice/nginx.service\n0::/\n": "nginx.service",
		"1:name=systemd:/system.slice/nginx.service\n0::/system.slice/nginx.service\n": "nginx.service",
		"1:name=systemd:/\n0::/\n":                                                     "",
		"":                                                                             "",
	} {
		if got := unitOf(cgroups); got != want {
			t.Errorf("%q: %q, want %q", cgroups, got, want)
		}
	}
}
