package service

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// inherited returns the listener that systemd handed over, nil where it handed none.
func inherited() (net.Listener, error) {
	all, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("taking over the listener from systemd: %w", err)
	}
	var one net.Listener
	for _, l := range all {
		switch {
		case l == nil: // a descriptor that is no listener
		case l.Addr().Network() != "tcp" || one != nil:
			return nil, fmt.Errorf("systemd handed over %s %s: the socket unit must have one ListenStream= of TCP", l.Addr().Network(), l.Addr())
		default:
			one = l
		}
	}
	return one, nil
}

// listen binds the address, also before it is there: the listener then waits for `routing install` to bring it, as the
// socket unit's does (FreeBind=).
func listen(ctx context.Context, a netip.AddrPort) (net.Listener, error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if e := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1) }); e != nil {
			return e
		}
		return err
	}}
	l, err := lc.Listen(ctx, "tcp", a.String())
	if err != nil {
		return nil, fmt.Errorf("listen %s: %w (another process there, or no right to the port: start it by its unit, or as root)", a, err)
	}
	return l, nil
}

// probe asks / of our own listener, as a pod would: READY and the watchdog mean that this was answered.
type probe struct {
	client http.Client
	url    string
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
	// From a loopback address the kernel sends only to addresses of this node: where `routing install` did not bring
	// ours yet, the probe fails here, and does not ask the network for it.
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: loopback}, Timeout: 5 * time.Second}
	return &probe{url: "http://" + target.String() + "/", client: http.Client{
		Timeout:   5 * time.Second,
		Transport: &http.Transport{DialContext: dialer.DialContext, DisableKeepAlives: true},
	}}
}

func (p *probe) ask(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.url, nil)
	if err != nil {
		return err
	}
	res, err := p.client.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	if res.StatusCode != http.StatusOK || res.Header.Get("Metadata-Flavor") != "Google" {
		return fmt.Errorf("%s answered %s, and it is not us", p.url, res.Status)
	}
	return nil
}

func addrPortOf(l net.Listener) netip.AddrPort {
	if a, ok := l.Addr().(*net.TCPAddr); ok {
		ap := a.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return netip.AddrPort{}
}
