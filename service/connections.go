package service

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
)

// connections counts the open connections of each pod, of each unit of the node, and of each address where that is all that
// is known at accept, so that nobody can take those of the others.
type connections struct {
	limit func() int                // limits.connectionsPerPod
	ours  func(netip.AddrPort) bool // our own, which count for nothing
	look  func(*attest.Peer)        // finds out who is on the other end

	opened, idle atomic.Int64 // of all; idle are those between two requests

	mu      sync.Mutex
	parties map[attest.Party]*atomic.Int64 // how many each has open
}

// connection is what we know of one.
type connection struct {
	peer  *attest.Peer
	look  func() error  // finds that out, once
	party attest.Party  // whom it counts for
	open  *atomic.Int64 // how many that one has; nil for our own, and until that one is known
	ours  bool
	idle  atomic.Bool

	theirs bool // what is written is another server's answer, and no refusal of net/http's

	toldOf handed   // the last token that was handed out on it: net/http has one request on a connection at a time
	told   *telling // what the audit trail has of that
}

func newConnections(limit func() int, ours func(netip.AddrPort) bool, look func(*attest.Peer)) *connections {
	return &connections{limit: limit, ours: ours, look: look, parties: map[attest.Party]*atomic.Int64{}}
}

type connectionKey struct{}

// accept runs between accept() and the first read: both ends are written down now. Who is on the other one is looked up by the connection's
// own goroutine, before it reads a byte: others do not wait for it.
func (x *connections) accept(ctx context.Context, c net.Conn) context.Context {
	known := new(connection)
	if f, ok := c.(flavouredConn); ok {
		known = f.connection
	}
	known.peer = attest.Accept(c)
	known.ours = x.ours(known.peer.Client)
	if !known.ours {
		x.opened.Add(1)
	}
	known.look = sync.OnceValue(func() error { return x.identify(known) })
	if _, ok := c.(flavouredConn); !ok { // nobody else does
		_ = known.look()
	}
	return context.WithValue(ctx, connectionKey{}, known)
}

// identify finds out who is on the other end, and counts the connection for that one. An error means that it is to be closed.
func (x *connections) identify(known *connection) error {
	x.look(known.peer)
	known.party = known.peer.Party()
	if known.ours {
		return nil
	}
	x.mu.Lock()
	if x.parties[known.party] == nil {
		x.parties[known.party] = new(atomic.Int64)
	}
	known.open = x.parties[known.party]
	n := known.open.Add(1)
	x.mu.Unlock()
	if n > int64(2*x.limit()) { // one that does not even read its refusals gets no more of them
		return io.EOF // net/http closes it without a word
	}
	return nil
}

// state is told by net/http what becomes of each connection: twice for each request, so it takes no lock then.
func (x *connections) state(c net.Conn, state http.ConnState) {
	f, ok := c.(flavouredConn)
	if ok {
		f.connection.theirs = false // it is written
	}
	if !ok || f.connection.peer == nil || f.connection.ours {
		return
	}
	known := f.connection
	if idle := state == http.StateIdle; known.idle.Swap(idle) != idle {
		if idle {
			x.idle.Add(1)
		} else {
			x.idle.Add(-1)
		}
	}
	if state != http.StateClosed && state != http.StateHijacked {
		return
	}
	x.opened.Add(-1)
	if known.open == nil {
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if known.open.Add(-1) == 0 {
		delete(x.parties, known.party)
	}
}

// check refuses a connection of somebody who has more than a pod may have.
func (x *connections) check(known *connection) error {
	limit := x.limit()
	if known.open == nil || known.open.Load() <= int64(limit) {
		return nil
	}
	return refusal{Status: http.StatusServiceUnavailable, Retry: true, Close: true,
		Reason: fmt.Sprintf("limits.connectionsPerPod is %d, and %s has %d connections open", limit, known.party, known.open.Load())}
}

// open returns the number of all open connections.
func (x *connections) open() int { return int(x.opened.Load()) }

// busy returns the number of those that wait for an answer, or have not asked yet.
func (x *connections) busy() int { return int(x.opened.Load() - x.idle.Load()) }

func connectionOf(ctx context.Context) *connection {
	known, _ := ctx.Value(connectionKey{}).(*connection)
	return known
}
