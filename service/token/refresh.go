package token

import (
	"context"
	"errors"
	"fmt"
	"time"
)

var errNoNewer = fmt.Errorf("%w: the new token does not expire later than the cached one", ErrUnavailable)

// Run refreshes tokens and drops idle entries until ctx is done. It returns nil.
func (c *Cache) Run(ctx context.Context) error {
	tick := time.NewTicker(backgroundCadence)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			c.mu.Lock()
			c.stopped = true
			c.mu.Unlock()
			return nil
		case now := <-tick.C:
			c.mu.Lock()
			c.dropIdle(now)
			c.startDue(now)
			c.mu.Unlock()
		}
	}
}

// Prefetch mints the tokens in the background, a bounded number at once, and keeps them fresh while
// their ServiceAccounts are in use. It returns at once. A token that is cached, in flight or was
// refused a moment ago is not minted again. After a passing error Run tries again. The caller calls
// Use first.
func (c *Cache) Prefetch(requests ...Request) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range requests {
		e := c.entries[r]
		if e == nil {
			e = c.add(r, "")
		}
		if !e.prefetched {
			e.prefetched = true
			c.changed()
		}
		if e.call == nil && e.due.IsZero() && !now.Before(e.usableUntil) && (e.err == nil || !c.terminal(e.err)) {
			e.due = now
			if e.err != nil {
				e.due = e.errUntil
			}
		}
	}
	c.startDue(now)
}

// add makes an entry, which counts against the owner's limits. It marks entries of the same
// ServiceAccount with other annotations as superseded. c.mu is held.
func (c *Cache) add(r Request, owner string) *entry {
	e := &entry{request: r, owner: owner}
	c.others(r, func(o *entry) {
		if o.superseded.IsZero() {
			o.superseded = time.Now()
			c.changed()
		}
	})
	c.entries[r] = e
	return e
}

// others calls f for the entries of r's ServiceAccount with another Account. c.mu is held.
func (c *Cache) others(r Request, f func(*entry)) {
	if r.federated {
		return
	}
	for o, e := range c.entries {
		if o.ServiceAccount == r.ServiceAccount && !o.federated && o.Account != r.Account {
			f(e)
		}
	}
}

// drop removes an entry and frees its key. A mint in flight for the entry continues for its
// callers. c.mu is held.
func (c *Cache) drop(e *entry) {
	delete(c.entries, e.request)
	c.changed()
	c.release(e.owner, 0, 1)
}

// start begins a mint, which continues when ctx ends. c.mu is held.
func (c *Cache) start(ctx context.Context, e *entry, plan call, now time.Time) *call {
	m := &plan
	m.began, m.done = now, make(chan struct{})
	c.calls[m] = struct{}{}
	e.call = m
	e.due = time.Time{}
	e.retryAt = now.Add(minMintInterval)
	go func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), mintTimeout)
		defer cancel()
		m.token, m.err = c.o.Source.Token(ctx, e.request)
		if errors.Is(m.err, context.DeadlineExceeded) && !errors.Is(m.err, ErrUnavailable) {
			m.err = &lateError{m.err}
		}
		c.finish(e, m)
	}()
	return m
}

// finish stores the outcome of a mint and wakes its callers.
func (c *Cache) finish(e *entry, m *call) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	defer close(m.done)
	delete(c.calls, m)
	c.release(m.owner, 1, 0)
	e.call = nil
	if c.entries[e.request] == e { // otherwise the entry was dropped meanwhile
		c.store(e, m, now)
	}
	if m.background {
		c.background--
		c.startDue(now)
	}
}

// store stores the outcome of a mint in its entry. c.mu is held.
func (c *Cache) store(e *entry, m *call, now time.Time) {
	switch {
	case m.err == nil && now.Before(e.usableUntil) && !m.token.Expires.After(e.token.Expires):
		// STS was unavailable, and its old token was used (T-08, unlinked accounts).
		e.fail(errNoNewer, minMintInterval, maxBackoff, now)
	case m.err == nil:
		e.setToken(m.token, now)
		c.changed()
		e.superseded = time.Time{}
		c.others(e.request, func(o *entry) {
			switch {
			case !o.token.Minted.Before(m.began): // both read the annotations just now; o's may be the newer ones
				e.superseded = now
			case o.call == nil:
				c.drop(o)
			}
		})
	case errors.Is(m.err, ErrAccountChanged):
		c.drop(e) // the caller asks again with the new annotations, which may change back
	case c.terminal(m.err):
		e.refuse(m.err, now)
		c.changed()
	default:
		least, longest := retryWaits(m.err)
		e.fail(m.err, least, longest, now)
	}
}

// retryWaits returns the shortest and the longest wait before the next attempt after err. Google's
// Retry-After counts up to maxRetryAfter.
func retryWaits(err error) (least, longest time.Duration) {
	var refusal *GoogleError
	switch {
	case !errors.As(err, &refusal):
		return unavailableTTL, maxBackoff
	case refusal.Temporary():
		return max(unavailableTTL, min(refusal.RetryAfter, maxRetryAfter)), maxBackoff
	}
	return refusalTTL, maxRefusedBackoff
}

// terminal reports whether another attempt would bring the same refusal. Then an old token is not
// served.
func (c *Cache) terminal(err error) bool {
	var refusal *GoogleError
	return errors.Is(err, ErrAccountChanged) ||
		errors.As(err, &refusal) && refusal.final() ||
		c.o.Terminal != nil && c.o.Terminal(err)
}

// startDue starts the mints that are due, up to maxBackground. c.mu is held.
func (c *Cache) startDue(now time.Time) {
	for _, e := range c.entries {
		if c.stopped || c.background >= maxBackground {
			return
		}
		if e.call != nil || e.due.IsZero() || now.Before(e.due) {
			continue
		}
		c.background++
		c.start(context.Background(), e, call{background: true}, now)
	}
}

// dropIdle drops entries that are no longer needed. c.mu is held.
func (c *Cache) dropIdle(now time.Time) {
	for r, e := range c.entries {
		if e.call != nil {
			continue
		}
		if _, ok := c.used[r.ServiceAccount]; c.used != nil && !ok && now.Sub(e.asked) >= unusedTTL || e.idle(now) {
			c.drop(e)
		}
	}
}
