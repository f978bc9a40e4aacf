package service

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/dns"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
)

// queries are the sockets at which we are asked for metadata.google.internal: UDP of the listeners'
// addresses and ports, so that no name server of the node has them. systemd holds them, in a socket
// unit of their own: where that cannot be bound, requests are served all the same.
//
// What was handed over is served whatever the configuration says: who is led there the rules say.
type queries struct {
	*dns.Server
	mu    sync.Mutex
	all   []*net.UDPConn
	serve sync.WaitGroup
	over  bool
}

// add serves a socket.
func (q *queries) add(c *net.UDPConn) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.over {
		_ = c.Close()
		return
	}
	q.all = append(q.all, c)
	q.serve.Go(func() { q.Serve(c) })
}

// on reports whether queries to a reach us.
func (q *queries) on(a netip.AddrPort) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.ContainsFunc(q.all, func(c *net.UDPConn) bool {
		at := c.LocalAddr().(*net.UDPAddr).AddrPort()
		return netip.AddrPortFrom(at.Addr().Unmap(), at.Port()) == a
	})
}

// leave closes our descriptors, and returns when nothing is read any more. A query that comes later
// waits in the socket for the next process.
func (q *queries) leave() {
	q.mu.Lock()
	q.over = true
	for _, c := range q.all {
		_ = c.Close()
	}
	q.mu.Unlock()
	q.serve.Wait()
}

// listenDNS has queries answered where the configuration wants it and systemd handed no socket
// over: started by hand, or before the socket unit follows. It is no reason for requests not to be
// served.
func (s *Service) listenDNS(ctx context.Context, c config.Config) {
	if c.DNS != "answer" || routing.NoDNS(c.Routing.Mode) != "" {
		return
	}
	for _, a := range []netip.AddrPort{c.Listen, c.Listen6} {
		if !a.IsValid() || s.queries.on(a) {
			continue
		}
		socket, err := bindUDP(ctx, a)
		if err != nil {
			s.log.WithError(err).Errorf("dns: queries for metadata.google.internal get no answer at UDP %s: systemctl "+
				"daemon-reload && systemctl restart gke-metadata-emulator.socket, or set dns to off", a)
			continue
		}
		s.queries.add(socket)
	}
}

// bindUDP binds the address, also before it is there.
func bindUDP(ctx context.Context, a netip.AddrPort) (*net.UDPConn, error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if e := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1) // counts for IPv6 too
		}); e != nil {
			return e
		}
		return err
	}}
	c, err := lc.ListenPacket(ctx, "udp", a.String())
	if err != nil {
		return nil, err
	}
	socket, ok := c.(*net.UDPConn)
	if !ok {
		return nil, fmt.Errorf("bound %s as %T", a, c)
	}
	return socket, nil
}

// servesIPv6 reports whether requests by IPv6 are served, so that the name has an IPv6 address too.
func (s *Service) servesIPv6() bool {
	now := s.active()
	return now != nil && now.Broken == nil && now.config.Listen6.IsValid() && s.listening.on(now.config.Listen6)
}
