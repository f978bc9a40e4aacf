package token

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

const (
	mintTimeout = 25 * time.Second // of one mint, with all its steps and retries

	// askerWait bounds how long a caller with a usable old token waits for a newer one. Some clients
	// give up after three seconds (H-21, clients' timeouts).
	askerWait = 2 * time.Second

	// maxEntries bounds the entries of all pods together: those of a pod outlive it, so pods that come
	// and go leave KeysPerPod each. It is enough for 110 pods, as many as a node usually has.
	maxEntries = 8 << 10
)

// CacheOptions configures a Cache.
type CacheOptions struct {
	Source Source

	// MintsPerPod bounds the mints in flight for one pod, and KeysPerPod the entries that are held for
	// it: one more takes the place of its oldest token. 0 means no limit.
	MintsPerPod, KeysPerPod int

	// Terminal reports refusals of the Source that are final, such as a bad annotation, beside those
	// that this package knows. It may be nil.
	Terminal func(error) bool

	Metrics *Metrics // nil: nobody reads what is counted
}

// Cache is a Source in front of a Source. There is one mint in flight per Request. The mint
// continues without its first caller, and every caller waits on a context of its own.
//
// Access tokens are refreshed before they expire (T-05, refresh ahead). The old token is served
// until its end while no newer one can be had. A final refusal drops the old token at once, because
// somebody revoked a binding. Most refusals of STS are not final: STS also refuses when it cannot
// fetch the cluster's keys. ID tokens are served for five minutes (I-06, ID token cache). Refusals
// are cached for a moment.
type Cache struct {
	o       CacheOptions
	metrics cacheMetrics
	changes chan struct{} // of capacity one

	mu         sync.Mutex
	entries    map[Request]*entry
	calls      map[*call]struct{}
	background int                                  // calls without a caller, maxBackground at most
	stopped    bool                                 // Run has returned: no more background mints
	usage      map[string]*usage                    // of each owner, by its name
	used       map[workload.ServiceAccount]struct{} // by live pods (K-04, only accounts in use); nil until Use
}

// call is a mint in flight. token and err are valid once done is closed.
type call struct {
	began      time.Time
	done       chan struct{}
	token      Token
	err        error
	owner      string // whose limits it counts against: a pod's UID or a unit; "" = nobody's
	background bool   // no caller waits for it
}

// usage is what counts against the limits of one owner.
type usage struct{ mints, keys int }

// NewCache returns an empty Cache.
func NewCache(o CacheOptions) *Cache {
	return &Cache{
		o:       o,
		metrics: unread(o.Metrics).cache,
		changes: make(chan struct{}, 1),
		entries: map[Request]*entry{},
		calls:   map[*call]struct{}{},
		usage:   map[string]*usage{},
	}
}

// Token is Ask without limits.
func (c *Cache) Token(ctx context.Context, r Request) (Token, error) { return c.Ask(ctx, "", r) }

// Ask returns a token for r, from the cache or newly minted. A mint counts against the limits of
// the owner, a pod's UID or a unit (*LimitError); a cached token does not. Errors are the Source's,
// or wrap ErrUnavailable when ctx ended first.
func (c *Cache) Ask(ctx context.Context, owner string, r Request) (Token, error) {
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
	return c.slow(ctx, owner, r, e, now)
}

// slow is Ask without a fresh token. The caller holds c.mu, and slow releases it.
func (c *Cache) slow(ctx context.Context, owner string, r Request, e *entry, now time.Time) (Token, error) {
	var old Token
	lastRefreshFailed := false // then a caller gets the old token at once, and does not wait for the next try
	if e != nil {
		if now.Before(e.usableUntil) {
			old, lastRefreshFailed = e.token, e.failures > 0
			if e.call == nil && now.Before(e.retryAt) {
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
	var m *call
	result := c.metrics.coalesced
	if e != nil && e.call != nil {
		m = e.call
	} else {
		if err := c.reserve(owner, e == nil); err != nil {
			c.mu.Unlock()
			c.count(r, c.metrics.limited)
			if old.Value != "" {
				return old, nil
			}
			return Token{}, err
		}
		if e == nil {
			e = c.add(r, owner)
			e.asked = now
		}
		m = c.start(ctx, e, call{owner: owner}, now)
		result = c.metrics.miss
	}
	c.mu.Unlock()
	if lastRefreshFailed {
		c.count(r, c.metrics.stale)
		return old, nil
	}
	c.count(r, result)
	return c.wait(ctx, m, old, r)
}

// wait returns the result of the call. With a usable old token it returns after askerWait from the
// beginning of the call at the latest.
func (c *Cache) wait(ctx context.Context, m *call, old Token, r Request) (Token, error) {
	var enough <-chan time.Time
	if old.Value != "" {
		timer := time.NewTimer(askerWait - time.Since(m.began))
		defer timer.Stop()
		enough = timer.C
	}
	select {
	case <-m.done:
		if m.err == nil {
			return m.token, nil
		}
		if c.terminal(m.err) || !time.Now().Before(usableUntil(r, old)) {
			return Token{}, m.err
		}
	case <-enough:
	case <-ctx.Done():
		if old.Value == "" {
			return Token{}, &lateError{ctx.Err()}
		}
	}
	c.count(r, c.metrics.stale)
	return old, nil
}

// Forget drops t, which Google no longer accepts. The next caller gets another token.
func (c *Cache) Forget(r Request, t Token) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.entries[r]; e != nil && e.token.Value == t.Value {
		e.dropToken()
		c.changed()
	}
}

// Use sets the ServiceAccounts that live pods of this node use. Entries of all others are dropped
// (K-04, only accounts in use).
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
		var m *call
		c.mu.Lock()
		for m = range c.calls {
			break
		}
		c.mu.Unlock()
		if m == nil {
			return
		}
		select {
		case <-m.done:
		case <-ctx.Done():
			return
		}
	}
}

// EntryStatus is the part of an entry that may be shown.
type EntryStatus struct {
	ServiceAccount       string    `json:"serviceAccount"`
	GoogleServiceAccount string    `json:"googleServiceAccount,omitempty"`
	Scopes               string    `json:"scopes,omitempty"`
	Audience             string    `json:"audience,omitempty"`
	Federated            bool      `json:"federated,omitempty"` // the intermediate token of STS
	Prefetched           bool      `json:"prefetched,omitempty"`
	Minted               time.Time `json:"minted,omitzero"`
	Expires              time.Time `json:"expires,omitzero"`
	LastError            string    `json:"lastError,omitempty"`
	LastErrorAt          time.Time `json:"lastErrorAt,omitzero"`
}

// Status returns the entries, sorted, without token values. The access token of an unlinked
// ServiceAccount is the federated token, so both are one entry.
func (c *Cache) Status() []EntryStatus {
	c.mu.Lock()
	shown := map[Request]bool{} // federated tokens that an unlinked ServiceAccount's entry shows
	for r := range c.entries {
		if !r.federated && r.Audience == "" && !r.Account.Linked() {
			shown[federatedToken(r.ServiceAccount, r.Scopes)] = true
		}
	}
	all := make([]EntryStatus, 0, len(c.entries))
	for r, e := range c.entries {
		if shown[r] {
			continue
		}
		s := EntryStatus{
			ServiceAccount:       r.ServiceAccount.String(),
			GoogleServiceAccount: sanitize(r.Account.GoogleEmail),
			Scopes:               sanitize(r.Scopes), // chosen by a pod, shown on a terminal
			Audience:             sanitize(r.Audience),
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

// count counts a pod's request. A request for the intermediate token is no pod's.
func (c *Cache) count(r Request, m prometheus.Counter) {
	if !r.federated {
		m.Inc()
	}
}

// reserve counts a mint, and a new entry, against the owner's limits. c.mu is held.
func (c *Cache) reserve(owner string, entry bool) error {
	if owner == "" {
		return nil
	}
	u := c.usage[owner]
	if u == nil {
		u = &usage{}
	}
	if n := c.o.MintsPerPod; n > 0 && u.mints >= n {
		return &LimitError{"mintsPerPod", n}
	}
	if n := c.o.KeysPerPod; n > 0 && entry && u.keys >= n && !c.dropOldest(owner) {
		return &LimitError{"keysPerPod", n}
	}
	if entry && len(c.entries) >= maxEntries {
		c.dropOldest("")
	}
	u.mints++
	if entry {
		u.keys++
	}
	c.usage[owner] = u
	return nil
}

// dropOldest drops that token of the owner, or of any with "", that nobody has asked for for the
// longest time, and reports whether there was one. Refusals stay: who makes up scopes that Google
// refuses does not have Google asked without end. c.mu is held.
func (c *Cache) dropOldest(owner string) bool {
	var oldest *entry
	for _, e := range c.entries {
		if e.owner == "" || owner != "" && e.owner != owner || e.call != nil || e.token.Value == "" {
			continue
		}
		if oldest == nil || e.asked.Before(oldest.asked) {
			oldest = e
		}
	}
	if oldest == nil {
		return false
	}
	c.drop(oldest)
	return true
}

// release undoes reserve. c.mu is held.
func (c *Cache) release(owner string, mints, keys int) {
	if u := c.usage[owner]; u != nil {
		u.mints -= mints
		u.keys -= keys
		if *u == (usage{}) {
			delete(c.usage, owner)
		}
	}
}
