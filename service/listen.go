package service

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// inherited returns what systemd handed over: the listeners, IPv4's first, the sockets for DNS
// queries, and the descriptors that are neither.
func inherited() (all []net.Listener, queries []*net.UDPConn, others []*os.File, err error) {
	for _, f := range activation.Files(true) {
		if c, err := net.FilePacketConn(f); err == nil {
			if udp, ok := c.(*net.UDPConn); ok {
				_ = f.Close() // udp has a duplicate
				queries = append(queries, udp)
				continue
			}
			_ = c.Close()
		}
		l, err := net.FileListener(f)
		if err != nil {
			others = append(others, f)
			continue
		}
		_ = f.Close() // l has a duplicate
		all = append(all, l)
		if l.Addr().Network() != "tcp" || len(all) > 2 {
			return nil, nil, nil, fmt.Errorf("systemd passed a socket that is not expected: %s %s: the socket unit needs "+
				"one ListenStream= of TCP, and one more for listen6", l.Addr().Network(), l.Addr())
		}
	}
	slices.SortStableFunc(all, func(a, b net.Listener) int { return addrPortOf(a).Compare(addrPortOf(b)) })
	return all, queries, others, nil
}

// sortListeners puts the one first that listens where listen says, if there is one.
func sortListeners(all []net.Listener, listen netip.AddrPort) {
	if i := slices.IndexFunc(all, func(l net.Listener) bool { return addrPortOf(l) == listen }); i > 0 {
		all[0], all[i] = all[i], all[0]
	}
}

// metadataServer is where pods ask. We listen there in routing.mode loopback, where it is an
// address of this node for pods alone: only a socket that is transparent may answer from it.
var metadataServer = netip.MustParseAddr("169.254.169.254")

// listen binds the address, also before it is there: the listener then waits for `routing install`
// to bring it, as the socket unit's does (FreeBind=). key is the configuration's, for the error.
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

// add is called for each listener before it is served; done when nothing is accepted from it any
// more. Once all were left there is no other.
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
