package server

import (
	"cmp"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
)

// `/` is answered without knowing the client, and limits.connectionsPerPod counts by address where
// the kernel says no more: whoever can make up addresses opens connections without end. So there is
// a bound for all together, and a part of it for clients that nobody vouches for. Where it is
// reached, connections that wait for no answer are closed for a new one.
const (
	maxConnections = 10_000 // they cost 220 MB, of MemoryHigh=384M; LimitNOFILE=65536 has room for them
	maxUnknown     = 2_000  // of them, for clients that are an address and nothing else

	maxHealth = 64 // connections of healthListen; Prometheus and a probe use one each
)

// room bounds the connections that are open at once.
type room struct {
	most, mostUnknown int
	// where every connection waits for an answer, close the one that waits longest
	cutAnswered bool
	vouched     func(*attest.Peer) bool // whether a client is known to be a pod or a unit; nil: none is

	idle      atomic.Int64 // connections between two requests
	answering atomic.Int64 // connections whose request is being answered
	cut       atomic.Int64 // connections that were closed for others
	refused   atomic.Int64 // connections that found no room

	mu      sync.Mutex
	all     map[*connection]bool           // and whether somebody vouches for the client
	unknown int                            // how many are of clients for which nobody does
	parties map[attest.Party]*atomic.Int64 // how many each has open
}

// held is what room knows of a connection.
type held struct {
	conn  net.Conn
	known atomic.Bool  // somebody vouches for the client
	idle  atomic.Bool  // it is between two requests
	asked atomic.Bool  // a request came in whole, and is being answered
	since atomic.Int64 // when it was accepted, or one of these changed: Unix time in ns
}

func newRoom(most, unknown int) room {
	return room{most: most, mostUnknown: unknown, all: map[*connection]bool{}, parties: map[attest.Party]*atomic.Int64{}}
}

// enter counts a connection of which nobody knows yet whose it is. It returns false if there is no
// room for it.
func (r *room) enter(c *connection) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.all) >= r.most && !r.makeRoom(false) {
		r.refused.Add(1)
		return false
	}
	c.since.Store(time.Now().UnixNano())
	r.all[c] = true // until settle says otherwise
	return true
}

// settle counts a connection that entered for its party, and returns how many that one has now; 0
// if there is no room for it.
func (r *room) settle(c *connection) int64 {
	known := r.vouched != nil && r.vouched(c.peer)
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, open := r.all[c]; !open {
		return 0
	}
	if !known && r.unknown >= r.mostUnknown && !r.makeRoom(true) {
		r.refused.Add(1)
		delete(r.all, c)
		return 0
	}
	c.known.Store(known)
	r.all[c] = known
	if !known {
		r.unknown++
	}
	if r.parties[c.party] == nil {
		r.parties[c.party] = new(atomic.Int64)
	}
	c.open = r.parties[c.party]
	return c.open.Add(1)
}

// know notes that the client was attested: its connection is not an unknown one any more.
func (r *room) know(c *connection) {
	if c.known.Load() || c.open == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if known, open := r.all[c]; open && !known {
		r.all[c] = true
		r.unknown--
		c.known.Store(true)
	}
}

// leave counts a connection no more. It can be called again.
func (r *room) leave(c *connection) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.forget(c)
}

// forget is called with r.mu held.
func (r *room) forget(c *connection) {
	known, open := r.all[c]
	if !open {
		return
	}
	delete(r.all, c)
	if !known {
		r.unknown--
	}
	if c.open != nil && c.open.Add(-1) == 0 {
		delete(r.parties, c.party)
	}
}

// makeRoom closes connections that wait for no answer: those of unknown clients first, then those
// of whoever has most, then those that have waited longest. It closes an eighth of them, so that
// the next newcomers need no search. It is called with r.mu held.
func (r *room) makeRoom(unknownOnly bool) bool {
	victims := r.waiting(unknownOnly, false)
	if n := len(victims); n > 0 {
		victims = victims[:(n+7)/8]
	} else if r.cutAnswered {
		victims = r.waiting(unknownOnly, true)
		victims = victims[:min(1, len(victims))]
	}
	for _, v := range victims {
		r.cut.Add(1)
		r.forget(v.connection)
		reset(v.conn)
	}
	return len(victims) > 0
}

// victim is a connection that may be closed, with what decides when.
type victim struct {
	*connection
	known       bool
	open, since int64
}

// waiting returns the connections that wait for an answer, or those that do not; the first to be
// closed stands first.
func (r *room) waiting(unknownOnly, asked bool) []victim {
	var all []victim
	for c, known := range r.all {
		if c.open != nil && c.asked.Load() == asked && !(unknownOnly && known) { // the others are being looked up
			all = append(all, victim{c, known, c.open.Load(), c.since.Load()})
		}
	}
	slices.SortFunc(all, func(a, b victim) int {
		if a.known != b.known {
			return map[bool]int{false: -1, true: 1}[a.known]
		}
		return cmp.Or(cmp.Compare(b.open, a.open), cmp.Compare(a.since, b.since))
	})
	return all
}

// open returns the number of open connections.
func (r *room) open() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.all)
}

// each calls f for the connections whose request is being answered, or for the others.
func (r *room) each(asked bool, f func(*connection)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for c := range r.all {
		if c.asked.Load() == asked {
			f(c)
		}
	}
}
