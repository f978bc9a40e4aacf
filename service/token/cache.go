package token

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

const (
	mintTimeout = 25 * time.Second // of one mint, with all its steps and retries

	// patience is how long an asker waits for a newer token while the old one would do: some clients give up after
	// three seconds (H-21).
	patience = 2 * time.Second
)

// CacheOptions says what the Cache stands in front of.
type CacheOptions struct {
	Source Source

	// MintsPerPod and KeysPerPod bound what one pod can make the Cache do: mints in flight, and entries that it caused
	// and that are still held. 0 is no limit.
	MintsPerPod, KeysPerPod int

	// Terminal tells refusals of the Source that are final (an annotation that is no good) from troubles that pass, beside
	// those that this package knows. It may be nil.
	Terminal func(error) bool

	Registerer prometheus.Registerer // may be nil
}

// Cache is a Source in front of a Source. There is one mint in flight per Request; it outlives who asked for it first,
// and everybody waits for it on a context of their own.
//
// Access tokens are refreshed ahead (T-05); the old one is served while a newer cannot be had, to its end. A final
// refusal takes the old token away at once: whoever revoked a binding means it. Most of STS's refusals are not final in
// that sense: it refuses too when it cannot fetch the cluster's keys. ID tokens are served for five minutes and never
// longer (I-06). Refusals are remembered for a moment.
type Cache struct {
	o       CacheOptions
	metrics cacheMetrics
	changes chan struct{} // holds one

	mu         sync.Mutex
	entries    map[Request]*entry
	flights    map[*flight]struct{}
	background int                                  // flights that nobody asked for, of which there are maxBackground at most
	stopped    bool                                 // Run is over, and so is minting in the background
	pods       map[string]*book                     // by UID: what the entries and flights that a pod caused add up to
	used       map[workload.ServiceAccount]struct{} // by live pods (K-04); nil until Use
}

// flight is a mint under way. token and err stand once done is closed.
type flight struct {
	began      time.Time
	done       chan struct{}
	token      Token
	err        error
	podUID     string // who is charged with it, or ""
	background bool   // nobody asked for it
}

// book is what a pod is charged with.
type book struct{ mints, keys int }

// NewCache returns an empty Cache.
func NewCache(o CacheOptions) *Cache {
	return &Cache{
		o:       o,
		metrics: newCacheMetrics(o.Registerer),
		changes: make(chan struct{}, 1),
		entries: map[Request]*entry{},
		flights: map[*flight]struct{}{},
		pods:    map[string]*book{},
	}
}

// Token is Ask with nobody charged.
func (c *Cache) Token(ctx context.Context, r Request) (Token, error) { return c.Ask(ctx, "", r) }

// Ask returns a token for r, from the cache or a new one. A mint is charged to the limits of the pod (*LimitError), or of whoever
// else goes by that name; what is cached never. Errors are the Source's, or wrap ErrUnavailable when ctx ended first.
func (c *Cache) Ask(ctx context.Context, podUID string, r Request) (Token, error) {
	now := time.Now()
	c.mu.Lock()
	e := c.entries[r]
	if e != nil {
		e.asked = now
		if now.Before(e.freshUntil) {
			t := e.token
			c.mu.Unlock()
			c.count(r, c.metrics.hit)
			return t, nil
		}
	}
	return c.slow(ctx, podUID, r, e, now)
}

// slow is Ask without a fresh token. It is called with c.mu held and releases it.
func (c *Cache) slow(ctx context.Context, podUID string, r Request, e *entry, now time.Time) (Token, error) {
	var old Token
	vain := false // a newer one was tried for and could not be had: who asks while it is tried for again does not wait
	if e != nil {
		if now.Before(e.usableUntil) {
			old, vain = e.token, e.failures > 0
			if e.flight == nil && now.Before(e.retryAt) {
				c.mu.Unlock()
				c.count(r, c.metrics.stale)
				return old, nil
			}
		} else if e.err != nil && now.Before(e.errUntil) {
			err := e.err
			c.mu.Unlock()
			c.count(r, c.metrics.negative)
			return Token{}, err
		}
	}
	var f *flight
	result := c.metrics.coalesced
	if e != nil && e.flight != nil {
		f = e.flight
	} else {
		if err := c.charge(podUID, e == nil); err != nil {
			c.mu.Unlock()
			c.count(r, c.metrics.limited)
			if old.Value != "" {
				return old, nil
			}
			return Token{}, err
		}
		if e == nil {
			e = c.add(r, podUID)
			e.asked = now
		}
		f = c.launch(ctx, e, flight{podUID: podUID}, now)
		result = c.metrics.miss
	}
	c.mu.Unlock()
	if vain {
		c.count(r, c.metrics.stale)
		return old, nil
	}
	c.count(r, result)
	return c.wait(ctx, f, old, r)
}

// wait returns what the flight brings. While there is an old token that would do, it is not waited for longer than
// patience from its beginning.
func (c *Cache) wait(ctx context.Context, f *flight, old Token, r Request) (Token, error) {
	var enough <-chan time.Time
	if old.Value != "" {
		timer := time.NewTimer(patience - time.Since(f.began))
		defer timer.Stop()
		enough = timer.C
	}
	select {
	case <-f.done:
		if f.err == nil {
			return f.token, nil
		}
		if c.terminal(f.err) || !time.Now().Before(usableUntil(r, old)) {
			return Token{}, f.err
		}
	case <-enough:
	case <-ctx.Done():
		if old.Value == "" {
			return Token{}, fmt.Errorf("%w in time: %w", ErrUnavailable, ctx.Err())
		}
	}
	c.count(r, c.metrics.stale)
	return old, nil
}

// Forget drops t, of which Google says that it is no longer good: the next who asks gets another.
func (c *Cache) Forget(r Request, t Token) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.entries[r]; e != nil && e.token.Value == t.Value {
		e.lose()
		c.changed()
	}
}

// Use names the ServiceAccounts that live pods of this node use now. Whatever is held for others goes (K-04).
func (c *Cache) Use(sas []workload.ServiceAccount) {
	used := make(map[workload.ServiceAccount]struct{}, len(sas))
	for _, sa := range sas {
		used[sa] = struct{}{}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.used = used
	for _, e := range c.entries {
		if _, ok := used[e.request.ServiceAccount]; !ok {
			c.drop(e)
		}
	}
}

// Drain returns when no mint is in flight, or when ctx is done.
func (c *Cache) Drain(ctx context.Context) {
	for {
		var f *flight
		c.mu.Lock()
		for f = range c.flights {
			break
		}
		c.mu.Unlock()
		if f == nil {
			return
		}
		select {
		case <-f.done:
		case <-ctx.Done():
			return
		}
	}
}

// EntryStatus tells of an entry what may be told.
type EntryStatus struct {
	ServiceAccount       string    `json:"serviceAccount"`
	GoogleServiceAccount string    `json:"googleServiceAccount,omitempty"`
	Scopes               string    `json:"scopes,omitempty"`
	Audience             string    `json:"audience,omitempty"`
	Federated            bool      `json:"federated,omitempty"` // the intermediate token
	Prefetched           bool      `json:"prefetched,omitempty"`
	Minted               time.Time `json:"minted,omitzero"`
	Expires              time.Time `json:"expires,omitzero"`
	LastError            string    `json:"lastError,omitempty"`
	LastErrorAt          time.Time `json:"lastErrorAt,omitzero"`
}

// Status returns what is held, sorted, without the values.
func (c *Cache) Status() []EntryStatus {
	c.mu.Lock()
	all := make([]EntryStatus, 0, len(c.entries))
	for r, e := range c.entries {
		s := EntryStatus{
			ServiceAccount:       r.ServiceAccount.String(),
			GoogleServiceAccount: clean(r.Account.GoogleEmail),
			Scopes:               clean(r.Scopes), // a pod's words, for somebody's terminal
			Audience:             clean(r.Audience),
			Federated:            r.federated,
			Prefetched:           e.prefetched,
			Minted:               e.token.Minted,
			Expires:              e.token.Expires,
		}
		if e.err != nil {
			s.LastError, s.LastErrorAt = e.err.Error(), e.errAt
		}
		all = append(all, s)
	}
	c.mu.Unlock()
	slices.SortFunc(all, func(a, b EntryStatus) int {
		for _, d := range []int{
			strings.Compare(a.ServiceAccount, b.ServiceAccount), strings.Compare(a.GoogleServiceAccount, b.GoogleServiceAccount),
			strings.Compare(a.Audience, b.Audience), strings.Compare(a.Scopes, b.Scopes), a.Minted.Compare(b.Minted),
		} {
			if d != 0 {
				return d
			}
		}
		return 0
	})
	return all
}

// count counts a request of a pod; the intermediate token is nobody's.
func (c *Cache) count(r Request, m prometheus.Counter) {
	if !r.federated {
		m.Inc()
	}
}

// charge books a mint, and a new entry if there is to be one, on the pod. c.mu is held.
func (c *Cache) charge(podUID string, entry bool) error {
	if podUID == "" {
		return nil
	}
	b := c.pods[podUID]
	if b == nil {
		b = &book{}
	}
	if n := c.o.MintsPerPod; n > 0 && b.mints >= n {
		return &LimitError{"mintsPerPod", n}
	}
	if n := c.o.KeysPerPod; n > 0 && entry && b.keys >= n {
		return &LimitError{"keysPerPod", n}
	}
	b.mints++
	if entry {
		b.keys++
	}
	c.pods[podUID] = b
	return nil
}

// release undoes a charge. c.mu is held.
func (c *Cache) release(podUID string, mints, keys int) {
	if b := c.pods[podUID]; b != nil {
		b.mints -= mints
		b.keys -= keys
		if *b == (book{}) {
			delete(c.pods, podUID)
		}
	}
}
