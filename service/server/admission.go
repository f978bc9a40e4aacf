package server

import (
	"cmp"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
)

// `/` is answered without knowing the client, and limits.connectionsPerPod counts by address where
// the kernel says no more: whoever can make up addresses opens connections without end. So there is
// a bound for all together, and a part of it for clients that nobody vouches for. Where it is
// reached, connections that wait for no answer are closed for a new one; and where all wait, since
// pods within their limits can fill it with long polls, some of the party that has most.
const (
	maxConnections = 10_000 // they cost 220 MB, of MemoryHigh=384M; LimitNOFILE=65536 has room for them
	maxUnknown     = 2_000  // of them, for clients that are an address and nothing else

	maxHealth = 64 // connections of healthListen; Prometheus and a probe use one each
)

// admission bounds the connections that are open at once.
type admission struct {
	most, mostUnknown int
	vouched           func(*attest.Peer) bool // whether a client is known to be a pod or a unit; nil: none is
	requests          func() int              // limits.requestsPerPod; nil: there is no limit

	idle      atomic.Int64 // connections between two requests
	answering atomic.Int64 // connections whose request is being answered
	evicted   atomic.Int64 // connections that were closed for others
	refused   atomic.Int64 // connections that found no room

	mu      sync.Mutex
	all     map[*connection]bool    // and whether somebody vouches for the client
	unknown int                     // how many are of clients for which nobody does
	parties map[attest.Party]*usage // what each uses
}

// usage is what one party uses. It outlives the party's last connection until its requests count no
// more, so that a client which connects anew has no new burst.
type usage struct {
	open     atomic.Int64  // connections
	requests *rate.Limiter // nil: there is no limit
	dropping bool          // a timer looks whether it can be dropped; admission.mu holds it
}

// held is what admission knows of a connection.
type held struct {
	conn    net.Conn
	vouched atomic.Bool  // somebody vouches for the client
	idle    atomic.Bool  // it is between two requests
	asked   atomic.Bool  // a request came in whole, and is being answered
	since   atomic.Int64 // when it was accepted, or one of these changed: Unix time in ns
}

func newAdmission(most, unknown int) admission {
	return admission{most: most, mostUnknown: unknown, all: map[*connection]bool{},
		parties: map[attest.Party]*usage{}}
}

// enter counts a connection of which nobody knows yet whose it is. It returns false if there is no
// room for it.
func (a *admission) enter(c *connection) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.all) >= a.most && !a.evict(false) {
		a.refused.Add(1)
		return false
	}
	c.since.Store(time.Now().UnixNano())
	a.all[c] = true // until settle says otherwise
	return true
}

// settle counts a connection that entered for its party, and returns how many that one has now; 0
// if there is no room for it.
func (a *admission) settle(c *connection) int64 {
	vouched := a.vouched != nil && a.vouched(c.peer)
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, open := a.all[c]; !open {
		return 0
	}
	if !vouched && a.unknown >= a.mostUnknown && !a.evict(true) {
		a.refused.Add(1)
		delete(a.all, c)
		return 0
	}
	c.vouched.Store(vouched)
	a.all[c] = vouched
	if !vouched {
		a.unknown++
	}
	if a.parties[c.party] == nil {
		u := new(usage)
		if a.requests != nil {
			u.requests = rate.NewLimiter(rate.Limit(a.requests()), a.requests())
		}
		a.parties[c.party] = u
	}
	c.usage = a.parties[c.party]
	return c.usage.open.Add(1)
}

// vouch notes that the client was attested: its connection is not an unknown one any more.
func (a *admission) vouch(c *connection) {
	if c.vouched.Load() || c.usage == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if vouched, open := a.all[c]; open && !vouched {
		a.all[c] = true
		a.unknown--
		c.vouched.Store(true)
	}
}

// leave counts a connection no more. It can be called again.
func (a *admission) leave(c *connection) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.forget(c)
}

// forget is called with a.mu held.
func (a *admission) forget(c *connection) {
	vouched, open := a.all[c]
	if !open {
		return
	}
	delete(a.all, c)
	if !vouched {
		a.unknown--
	}
	if c.usage != nil && c.usage.open.Add(-1) == 0 {
		a.drop(c.party, c.usage)
	}
}

// drop forgets a party that has no connection, once its bucket is full again: that takes a second.
// It is called with a.mu held.
func (a *admission) drop(p attest.Party, u *usage) {
	switch {
	case u.dropping || u.open.Load() > 0:
	case u.requests == nil || u.requests.Tokens() >= float64(u.requests.Burst()):
		delete(a.parties, p)
	default:
		u.dropping = true
		time.AfterFunc(time.Second, func() {
			a.mu.Lock()
			defer a.mu.Unlock()
			u.dropping = false
			a.drop(p, u)
		})
	}
}

// evict closes connections that wait for no answer: those of unknown clients first, then those
// of the party that has most, then those that have waited longest. Where all wait for an answer, it
// closes connections of the party that has most. It closes an eighth of them, so that the next
// newcomers need no search. It is called with a.mu held.
func (a *admission) evict(unknownOnly bool) bool {
	victims := a.waiting(unknownOnly, false)
	if len(victims) == 0 && !unknownOnly {
		all := a.waiting(false, true)
		victims = slices.DeleteFunc(all, func(v victim) bool { return v.usage != all[0].usage })
	}
	victims = victims[:(len(victims)+7)/8]
	for _, v := range victims {
		a.evicted.Add(1)
		a.forget(v.connection)
		reset(v.conn)
	}
	return len(victims) > 0
}

// victim is a connection that may be closed, with what decides when.
type victim struct {
	*connection
	vouched     bool
	open, since int64
}

// waiting returns the connections that wait for an answer, or those that do not; the first to be
// closed stands first.
func (a *admission) waiting(unknownOnly, asked bool) []victim {
	var all []victim
	for c, vouched := range a.all {
		if c.usage != nil && c.asked.Load() == asked && !(unknownOnly && vouched) { // the others are being looked up
			all = append(all, victim{c, vouched, c.usage.open.Load(), c.since.Load()})
		}
	}
	slices.SortFunc(all, func(a, b victim) int {
		if !asked && a.vouched != b.vouched { // a client that waits for an answer may be vouched for by that
			return map[bool]int{false: -1, true: 1}[a.vouched]
		}
		return cmp.Or(cmp.Compare(b.open, a.open), cmp.Compare(a.since, b.since))
	})
	return all
}

// open returns the number of open connections.
func (a *admission) open() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.all)
}

// each calls f for the connections whose request is being answered, or for the others.
func (a *admission) each(asked bool, f func(*connection)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for c := range a.all {
		if c.asked.Load() == asked {
			f(c)
		}
	}
}
