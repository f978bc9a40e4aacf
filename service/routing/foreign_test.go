package routing

import (
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"

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
