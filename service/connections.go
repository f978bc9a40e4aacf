package service

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
)

// connections counts the open connections of each client address, so that one pod cannot take those of the others.
type connections struct {
	limit func() int                // limits.connectionsPerPod
	ours  func(netip.AddrPort) bool // our own, which count for nothing

	mu    sync.Mutex
	peers map[net.Conn]*attest.Peer
	idle  map[net.Conn]bool // kept alive, between two requests
	count map[netip.Addr]int
}

func newConnections(limit func() int, ours func(netip.AddrPort) bool) *connections {
	return &connections{limit: limit, ours: ours, peers: map[net.Conn]*attest.Peer{}, idle: map[net.Conn]bool{}, count: map[netip.Addr]int{}}
}

type peerKey struct{}

// accept runs between accept() and the first read: who is on the other end is written down now.
func (x *connections) accept(ctx context.Context, c net.Conn) context.Context {
	p := attest.Accept(c)
	ctx = context.WithValue(ctx, peerKey{}, p)
	if x.ours(p.Client) {
		return ctx
	}
	x.mu.Lock()
	x.peers[c] = p
	x.count[p.Client.Addr()]++
	n := x.count[p.Client.Addr()]
	x.mu.Unlock()
	if n > 2*x.limit() { // one that does not even read its refusals gets no more of them
		_ = c.Close()
	}
	return ctx
}

// state is told by net/http what becomes of each connection.
func (x *connections) state(c net.Conn, state http.ConnState) {
	x.mu.Lock()
	defer x.mu.Unlock()
	switch state {
	case http.StateIdle:
		if x.peers[c] != nil {
			x.idle[c] = true
		}
		return
	case http.StateActive:
		delete(x.idle, c)
		return
	case http.StateNew:
		return
	}
	delete(x.idle, c)
	p, ok := x.peers[c]
	if !ok {
		return
	}
	delete(x.peers, c)
	if addr := p.Client.Addr(); x.count[addr] > 1 {
		x.count[addr]--
	} else {
		delete(x.count, addr)
	}
}

// check refuses p where its address has more connections than a pod may have.
func (x *connections) check(p *attest.Peer) error {
	if x.ours(p.Client) {
		return nil
	}
	x.mu.Lock()
	n := x.count[p.Client.Addr()]
	x.mu.Unlock()
	limit := x.limit()
	if n <= limit {
		return nil
	}
	return refusal{Status: http.StatusServiceUnavailable, Retry: true, Close: true,
		Reason: fmt.Sprintf("limits.connectionsPerPod is %d, and %s has %d connections open", limit, p.Client.Addr(), n)}
}

// open returns the number of all open connections.
func (x *connections) open() int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return len(x.peers)
}

// busy returns the number of those that wait for an answer, or have not asked yet.
func (x *connections) busy() int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return len(x.peers) - len(x.idle)
}

func peerOf(ctx context.Context) *attest.Peer {
	p, _ := ctx.Value(peerKey{}).(*attest.Peer)
	return p
}
