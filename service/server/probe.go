package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
)

// probe asks / of our own listener, as a pod would: READY and the watchdog mean that this was
// answered.
type probe struct {
	client http.Client
	url    string
	from   atomic.Pointer[netip.AddrPort] // its connection's own end
}

// is reports whether a connection comes from the probe. It counts for no limit: else whoever can
// open connections from a loopback address could have the watchdog take us for dead.
func (p *probe) is(client netip.AddrPort) bool {
	from := p.from.Load()
	return from != nil && *from == client
}

func newProbe(l net.Listener) *probe {
	target := addrPortOf(l)
	loopback := net.IPv4(127, 0, 0, 1)
	if target.Addr().Is6() {
		loopback = net.IPv6loopback
	}
	if target.Addr().IsUnspecified() {
		ip, _ := netip.AddrFromSlice(loopback)
		target = netip.AddrPortFrom(ip.Unmap(), target.Port())
	}
	// From a loopback address the kernel sends only to addresses of this node: where `routing
	// install` did not bring ours yet, the probe fails here, and does not ask the network for it.
	p := &probe{url: "http://" + target.String() + "/"}
	dialer := net.Dialer{Timeout: 2 * time.Second, ControlContext: func(_ context.Context, _, _ string,
		c syscall.RawConn) error {
		return p.bind(c, loopback, target.Addr() == routing.MetadataServer().Addr())
	}}
	p.client = http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DialContext: dialer.DialContext,
		DisableKeepAlives: true}}
	return p
}

// bind gives the socket its own end before it connects, so that the server can know it when it
// accepts.
func (p *probe) bind(c syscall.RawConn, loopback net.IP, ours bool) error {
	var err error
	if e := c.Control(func(fd uintptr) {
		var sa unix.Sockaddr = &unix.SockaddrInet4{Addr: [4]byte(loopback.To16()[12:])}
		if loopback.To4() == nil {
			sa = &unix.SockaddrInet6{Addr: [16]byte(loopback)}
		}
		// What this host sends to the metadata server goes to the cloud's, unless it cannot leave
		// the host.
		if ours {
			if err = unix.BindToDevice(int(fd), "lo"); err != nil { // anybody's right since Linux 5.7
				return
			}
		}
		if err = unix.Bind(int(fd), sa); err != nil {
			return
		}
		if sa, err = unix.Getsockname(int(fd)); err != nil {
			return
		}
		var from netip.AddrPort
		switch sa := sa.(type) {
		case *unix.SockaddrInet4:
			from = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
		case *unix.SockaddrInet6:
			from = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
		}
		p.from.Store(&from)
	}); e != nil {
		return e
	}
	return err
}

func (p *probe) ask(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.url, nil)
	if err != nil {
		return err
	}
	res, err := p.client.Do(req)
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("%s is not an address of this node: run `gke-metadata-emulator routing install`, which adds it",
			strings.TrimSuffix(strings.TrimPrefix(p.url, "http://"), "/"))
	}
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	if res.StatusCode != http.StatusOK || res.Header.Get("Metadata-Flavor") != "Google" {
		return fmt.Errorf("%s answered %s: another program listens there", p.url, res.Status)
	}
	return nil
}

// addressHere reports whether a listener at the address can be reached on this node.
func addressHere(a netip.Addr) bool {
	if a.IsUnspecified() {
		return true
	}
	all, err := net.InterfaceAddrs()
	return err != nil || slices.ContainsFunc(all, func(i net.Addr) bool {
		p, err := netip.ParsePrefix(i.String())
		return err == nil && (p.Addr() == a || a.IsLoopback() && p.Masked().Contains(a))
	})
}

func addrPortOf(l net.Listener) netip.AddrPort {
	if a, ok := l.Addr().(*net.TCPAddr); ok {
		ap := a.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return netip.AddrPort{}
}
