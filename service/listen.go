package service

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// inherited returns what systemd handed over: the listeners, IPv4's first, and the descriptors that are none.
func inherited() (all []net.Listener, others []*os.File, err error) {
	for _, f := range activation.Files(true) {
		l, err := net.FileListener(f)
		if err != nil {
			others = append(others, f)
			continue
		}
		_ = f.Close() // l has a duplicate
		all = append(all, l)
		if l.Addr().Network() != "tcp" || len(all) > 2 {
			return nil, nil, fmt.Errorf("systemd handed over %s %s: the socket unit must have one ListenStream= of TCP, and one more for listen6", l.Addr().Network(), l.Addr())
		}
	}
	slices.SortStableFunc(all, func(a, b net.Listener) int { return addrPortOf(a).Compare(addrPortOf(b)) })
	return all, others, nil
}

// sortListeners puts the one first that listens where listen says, if there is one.
func sortListeners(all []net.Listener, listen netip.AddrPort) {
	if i := slices.IndexFunc(all, func(l net.Listener) bool { return addrPortOf(l) == listen }); i > 0 {
		all[0], all[i] = all[i], all[0]
	}
}

// metadataServer is where pods ask. We listen there in routing.mode loopback, where it is an address of this node for pods alone: only a
// socket that is transparent may answer from it.
var metadataServer = netip.MustParseAddr("169.254.169.254")

// listen binds the address, also before it is there: the listener then waits for `routing install` to bring it, as the
// socket unit's does (FreeBind=). key is the configuration's, for the error.
func listen(ctx context.Context, key string, a netip.AddrPort) (net.Listener, error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if e := c.Control(func(fd uintptr) {
			if err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1); err == nil && a.Addr() == metadataServer {
				err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1) // needs CAP_NET_ADMIN
			}
		}); e != nil {
			return e
		}
		return err
	}}
	lc.SetMultipathTCP(false) // SO_ORIGINAL_DST is not known of an MPTCP connection; such clients do with TCP
	l, err := lc.Listen(ctx, "tcp", a.String())
	if err != nil {
		return nil, bindError(key, a, err)
	}
	return l, nil
}

// probe asks / of our own listener, as a pod would: READY and the watchdog mean that this was answered.
type probe struct {
	client http.Client
	url    string
	from   atomic.Pointer[netip.AddrPort] // its connection's own end
}

// is reports whether a connection comes from the probe. It counts for no limit: else whoever can open connections from a
// loopback address could have the watchdog take us for dead.
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
	// From a loopback address the kernel sends only to addresses of this node: where `routing install` did not bring
	// ours yet, the probe fails here, and does not ask the network for it.
	p := &probe{url: "http://" + target.String() + "/"}
	dialer := net.Dialer{Timeout: 2 * time.Second, ControlContext: func(_ context.Context, _, _ string, c syscall.RawConn) error {
		return p.bind(c, loopback, target.Addr() == metadataServer)
	}}
	p.client = http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DialContext: dialer.DialContext, DisableKeepAlives: true}}
	return p
}

// bind gives the socket its own end before it connects, so that the server can know it when it accepts.
func (p *probe) bind(c syscall.RawConn, loopback net.IP, ours bool) error {
	var err error
	if e := c.Control(func(fd uintptr) {
		var sa unix.Sockaddr = &unix.SockaddrInet4{Addr: [4]byte(loopback.To16()[12:])}
		if loopback.To4() == nil {
			sa = &unix.SockaddrInet6{Addr: [16]byte(loopback)}
		}
		// What this host sends to the metadata server goes to the cloud's, unless it cannot leave the host.
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
		return fmt.Errorf("%s is not an address of this node: `gke-metadata-emulator routing install` brings it", strings.TrimSuffix(strings.TrimPrefix(p.url, "http://"), "/"))
	}
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	if res.StatusCode != http.StatusOK || res.Header.Get("Metadata-Flavor") != "Google" {
		return fmt.Errorf("%s answered %s, and it is not us", p.url, res.Status)
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

// listening is where we listen.
type listening struct {
	mu     sync.Mutex
	addrs  []netip.AddrPort
	health netip.AddrPort
	all    []net.Listener
	serve  sync.WaitGroup // who accepts
	over   bool
}

// add is called for each listener before it is served; done when nothing is accepted from it any more. Once all were
// left there is no other.
func (l *listening) add(x net.Listener) (done func(), ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over {
		_ = x.Close()
		return nil, false
	}
	l.addrs, l.all = append(l.addrs, addrPortOf(x)), append(l.all, x)
	l.serve.Add(1)
	return l.serve.Done, true
}

// leave closes our descriptors of all listeners and returns when nothing is accepted any more.
func (l *listening) leave() {
	l.mu.Lock()
	l.over = true
	for _, x := range l.all {
		_ = x.Close()
	}
	l.mu.Unlock()
	l.serve.Wait()
}

// on reports whether connections to a reach us.
func (l *listening) on(a netip.AddrPort) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.ContainsFunc(l.addrs, func(b netip.AddrPort) bool {
		return a == b || a.Port() == b.Port() && b.Addr().IsUnspecified()
	})
}

// String names the addresses.
func (l *listening) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var texts []string
	for _, a := range l.addrs {
		texts = append(texts, a.String())
	}
	return strings.Join(texts, " and ")
}
