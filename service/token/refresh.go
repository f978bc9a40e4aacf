package token

import (
	"context"
	"errors"
	"fmt"
	"time"
)

var errNoNewer = fmt.Errorf("%w: the token that came is no newer than the one that is held", ErrUnavailable)

// Run refreshes tokens ahead and drops what is of no more use, until ctx is done. It returns nil.
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
			c.sweep(now)
			c.pump(now)
			c.mu.Unlock()
		}
	}
}

// Prefetch mints the tokens ahead, in parallel and bounded, and keeps them fresh while their ServiceAccounts are in use.
// It returns at once. What is there, or under way, or was refused a while ago, costs nothing. Where the minting fails
// for a reason that passes, Run tries again. Use is to be called first.
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
		if e.flight == nil && e.due.IsZero() && !now.Before(e.usableUntil) && (e.err == nil || !c.terminal(e.err)) {
			e.due = now
			if e.err != nil {
				e.due = e.errUntil
			}
		}
	}
	c.pump(now)
}

// add makes an entry, which the pod pays for. Entries of the same ServiceAccount with other annotations are on their way
// out. c.mu is held.
func (c *Cache) add(r Request, payer string) *entry {
	e := &entry{request: r, payer: payer}
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

// drop takes an entry out and frees its key. A mint that is in flight for it goes on, for those who wait. c.mu is held.
func (c *Cache) drop(e *entry) {
	delete(c.entries, e.request)
	c.changed()
	c.release(e.payer, 0, 1)
}

// launch starts a mint, which outlives ctx. c.mu is held.
func (c *Cache) launch(ctx context.Context, e *entry, plan flight, now time.Time) *flight {
	f := &plan
	f.began, f.done = now, make(chan struct{})
	c.flights[f] = struct{}{}
	e.flight = f
	e.due = time.Time{}
	e.retryAt = now.Add(leastApart)
	go func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), mintTimeout)
		defer cancel()
		f.token, f.err = c.o.Source.Token(ctx, e.request)
		if errors.Is(f.err, context.DeadlineExceeded) && !errors.Is(f.err, ErrUnavailable) {
			f.err = fmt.Errorf("%w: %w", ErrUnavailable, f.err)
		}
		c.land(e, f)
	}()
	return f
}

// land notes what a mint brought.
func (c *Cache) land(e *entry, f *flight) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	defer close(f.done)
	delete(c.flights, f)
	c.release(f.podUID, 1, 0)
	e.flight = nil
	if c.entries[e.request] == e { // else dropped meanwhile
		c.note(e, f, now)
	}
	if f.background {
		c.background--
		c.pump(now)
	}
}

func (c *Cache) note(e *entry, f *flight, now time.Time) {
	switch {
	case f.err == nil && now.Before(e.usableUntil) && !f.token.Expires.After(e.token.Expires):
		e.fail(errNoNewer, leastApart, longestBackoff, now) // STS was away, and its old token came (T-08)
	case f.err == nil:
		e.take(f.token, now)
		c.changed()
		e.superseded = time.Time{}
		c.others(e.request, func(o *entry) {
			switch {
			case !o.token.Minted.Before(f.began): // both have just read the annotations, and it may be o's that are right
				e.superseded = now
			case o.flight == nil:
				c.drop(o)
			}
		})
	case errors.Is(f.err, ErrAccountChanged):
		c.drop(e) // the asker asks again, and the annotations may change back
	case c.terminal(f.err):
		e.refuse(f.err, now)
		c.changed()
	default:
		least, longest := waits(f.err)
		e.fail(f.err, least, longest, now)
	}
}

// waits is how long not to ask again after err, at least and at most: as Google says, within reason; a moment after a
// refusal, and then longer and longer.
func waits(err error) (least, longest time.Duration) {
	var refusal *GoogleError
	switch {
	case !errors.As(err, &refusal):
		return keepUnavailable, longestBackoff
	case refusal.Temporary():
		return max(keepUnavailable, min(refusal.RetryAfter, longestAsked)), longestBackoff
	}
	return keepRefusal, longestRefused
}

// terminal reports whether asking again would bring the same refusal, so that an old token is not served any more.
func (c *Cache) terminal(err error) bool {
	var refusal *GoogleError
	return errors.Is(err, ErrAccountChanged) ||
		errors.As(err, &refusal) && refusal.final() ||
		c.o.Terminal != nil && c.o.Terminal(err)
}

// pump starts the mints that are due, as many as may run in the background. c.mu is held.
func (c *Cache) pump(now time.Time) {
	for _, e := range c.entries {
		if c.stopped || c.background >= maxBackground {
			return
		}
		if e.flight != nil || e.due.IsZero() || now.Before(e.due) {
			continue
		}
		c.background++
		c.launch(context.Background(), e, flight{background: true}, now)
	}
}

// sweep drops what is of no more use. c.mu is held.
func (c *Cache) sweep(now time.Time) {
	for r, e := range c.entries {
		if e.flight != nil {
			continue
		}
		if _, ok := c.used[r.ServiceAccount]; c.used != nil && !ok && now.Sub(e.asked) >= outliveUse || e.idle(now) {
			c.drop(e)
		}
	}
}
