package server

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
)

// connections counts the open connections of each pod, of each unit of the node, and of each
// address where that is all that is known at accept, so that nobody can take those of the others.
// admission.go bounds the number of all connections.
type connections struct {
	limit     func() int                // limits.connectionsPerPod
	ours      func(netip.AddrPort) bool // our own, which count for nothing
	look      func(*attest.Peer)        // finds out who is on the other end
	admission                           // of all
}

// connection is what we know of one.
type connection struct {
	peer  *attest.Peer
	look  func() error // finds out who is on the other end, once
	party attest.Party // whom it counts for
	usage *usage       // what that one uses; nil for our own, until that one is known, and where there is no room
	ours  bool
	held
	half
	head

	theirs bool // what is written is another server's answer, and no refusal of net/http's

	issued  issued      // the last token that was issued on it: net/http has one request on a connection at a time
	audited *auditEntry // what the audit trail has of that
}

func newConnections(limit func() int, ours func(netip.AddrPort) bool, look func(*attest.Peer)) *connections {
	return &connections{limit: limit, ours: ours, look: look, admission: newAdmission(maxConnections, maxUnknown)}
}

type connectionKey struct{}

// accept runs between accept() and the first read: both ends are written down now, and the
// connection counts. Who is on the other end is looked up by the connection's own goroutine, before
// it reads a byte: others do not wait for it.
func (x *connections) accept(ctx context.Context, conn net.Conn) context.Context {
	c := new(connection)
	s, ok := conn.(clientConn)
	if ok {
		c = s.connection
	}
	c.conn = conn
	c.peer = attest.Accept(conn)
	c.ours = x.ours(c.peer.Client)
	c.look = sync.OnceValue(func() error { return x.identify(c) })
	if !c.ours && !x.enter(c) {
		c.look = func() error { return io.EOF }
		reset(conn)
	} else if !ok { // nobody else does
		_ = c.look()
	}
	return context.WithValue(ctx, connectionKey{}, c)
}

// identify finds out who is on the other end, and counts the connection for that one. An error
// means that it is to be closed.
func (x *connections) identify(c *connection) error {
	x.look(c.peer)
	c.party = c.peer.Party()
	if c.ours {
		return nil
	}
	// One that does not even read its refusals gets no more of them.
	if n := x.settle(c); n == 0 || n > int64(2*x.limit()) {
		return io.EOF // net/http closes it without a word
	}
	return nil
}

// state is told by net/http what becomes of each connection: twice for each request, so it takes no
// lock then. Active is said once the header of a request is there, and not at its first byte.
func (x *connections) state(conn net.Conn, state http.ConnState) {
	s, ok := conn.(clientConn)
	if !ok {
		return
	}
	c := s.connection
	c.theirs = false // it is written
	asked := state == http.StateActive
	if c.asked.Swap(asked) != asked && c.usage != nil {
		x.answering.Add(map[bool]int64{true: 1, false: -1}[asked])
	}
	if idle := state == http.StateIdle; c.usage != nil && c.idle.Swap(idle) != idle {
		if c.since.Store(time.Now().UnixNano()); idle {
			x.idle.Add(1)
		} else {
			x.idle.Add(-1)
		}
	}
	if state == http.StateClosed || state == http.StateHijacked {
		x.leave(c)
	}
}

// overLimit refuses a connection of somebody who has more than a pod may have.
func (x *connections) overLimit(c *connection) error {
	limit := x.limit()
	if c.usage == nil || c.usage.open.Load() <= int64(limit) {
		return nil
	}
	return refusal{Status: http.StatusServiceUnavailable, Retry: true, Close: true,
		Text: fmt.Sprintf("limits.connectionsPerPod is %d, and %s has %d connections open", limit, c.party,
			c.usage.open.Load()), Label: reasonLimit}
}

// busy returns the number of those that wait for an answer, or have not asked yet.
func (x *connections) busy() int { return x.open() - int(x.idle.Load()) }

// unread reports whether the kernel holds bytes of a request that net/http has not read yet: its
// connection counts as idle.
func (x *connections) unread() (yes bool) {
	x.each(false, func(c *connection) { yes = yes || unreadBytes(c.conn) > 0 })
	return yes
}

// unreadBytes is how many bytes of the client's lie in the kernel.
func unreadBytes(c net.Conn) (n int) {
	s, ok := c.(syscall.Conn)
	if !ok {
		return 0
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return 0
	}
	_ = raw.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.SIOCINQ) })
	return n
}

func connectionOf(ctx context.Context) *connection {
	c, _ := ctx.Value(connectionKey{}).(*connection)
	return c
}
