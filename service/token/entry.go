package token

import (
	"math/rand/v2"
	"time"
)

const (
	leastApart = 5 * time.Second // between two mints of a token that is there (T-05)
	idLife     = 5 * time.Minute // an ID token is served for that long (I-06)
	margin     = 2 * time.Second // of life that a token has at least when it is handed out, so that expires_in is never 0 (T-02)

	keepRefusal     = 5 * time.Second  // a terminal refusal is the answer for that long,
	keepUnavailable = time.Second      // trouble that passes for that long
	longestBackoff  = 40 * time.Second // between attempts in the background; a minute with its jitter
	longestRefused  = 7 * time.Minute  // the same after a refusal: 50,000 tokens of a fleet stay below STS's 6,000 a minute (G-07)
	longestAsked    = time.Minute      // of what Google's Retry-After asks for

	showRefusal       = time.Minute // what is left of an entry that has no token is shown by Status for that long
	showPrefetched    = 10 * time.Minute
	outliveUse        = time.Minute // entries of ServiceAccounts that went out of use, or whose annotations changed
	lifetimesUnasked  = 2           // an entry is refreshed for that many lifetimes after the last who asked
	maxBackground     = 32          // mints at once that nobody waits for
	backgroundCadence = time.Second
)

// entry is what is known for one Request.
type entry struct {
	request Request
	payer   string // the pod that is charged with it, or ""

	token       Token     // none, or the last
	freshUntil  time.Time // handed out without a thought
	usableUntil time.Time // handed out when there is no newer one to be had
	lifetime    time.Duration

	flight   *flight
	failures int       // attempts in a row that brought nothing
	retryAt  time.Time // no attempt before, while there is a token that would do
	due      time.Time // of the next attempt in the background; zero: none

	err      error // the last, until a mint succeeds
	errAt    time.Time
	errUntil time.Time // it is the answer that long

	asked      time.Time
	prefetched bool
	superseded time.Time // when the ServiceAccount was first seen with other annotations; zero: not
}

func lifetime(t Token) time.Duration { return t.Expires.Sub(t.Minted) }

// share returns the smaller of most and a percentage of the token's lifetime: a token of a minute has rules of its own.
func share(t Token, most time.Duration, percent int) time.Duration {
	return min(most, lifetime(t)*time.Duration(percent)/100)
}

// freshUntil returns when an asker is to get a newer token if one can be had: 7 minutes before the end (T-05). A
// federated token is what others are made from and is not refreshed ahead; who wants one at the time of a refresh has to
// get a new one, so that is earlier than any refresh begins.
func freshUntil(r Request, t Token) time.Time {
	switch {
	case r.Audience != "":
		return usableUntil(r, t)
	case r.federated:
		return t.Expires.Add(-share(t, 15*time.Minute, 60))
	}
	return t.Expires.Add(-share(t, 7*time.Minute, 50))
}

func usableUntil(r Request, t Token) time.Time {
	end := t.Expires.Add(-margin)
	if r.Audience != "" {
		if old := t.Minted.Add(idLife); old.Before(end) {
			return old
		}
	}
	return end
}

// refreshAt returns when to get the next token in the background: 10 minutes before the end, and up to two minutes
// earlier, so that tokens that were minted together part (T-05). Zero: never.
func refreshAt(r Request, t Token) time.Time {
	if r.federated || r.Audience != "" {
		return time.Time{}
	}
	ahead := share(t, 10*time.Minute, 20)
	return t.Expires.Add(-ahead - jitter(ahead/5))
}

// backoff is the wait after that many failures: the shortest, doubled each time up to the longest, and up to a half more, so
// that after an outage not everybody comes at once.
func backoff(shortest, longest time.Duration, failures int) time.Duration {
	d := shortest
	for i := 1; i < failures && d < longest; i++ {
		d *= 2
	}
	d = max(shortest, min(d, longest))
	return d + jitter(d/2)
}

func jitter(most time.Duration) time.Duration {
	if most <= 0 {
		return 0
	}
	return rand.N(most)
}

// take notes a new token.
func (e *entry) take(t Token, now time.Time) {
	e.token = t
	e.lifetime = lifetime(t)
	e.freshUntil = freshUntil(e.request, t)
	e.usableUntil = usableUntil(e.request, t)
	e.failures, e.err, e.errAt, e.errUntil = 0, nil, time.Time{}, time.Time{}
	if e.due = refreshAt(e.request, t); !e.due.IsZero() && e.due.Before(now.Add(leastApart)) {
		e.due = now.Add(leastApart)
	}
}

// lose takes the token away.
func (e *entry) lose() {
	e.token, e.freshUntil, e.usableUntil, e.retryAt, e.due = Token{}, time.Time{}, time.Time{}, time.Time{}, time.Time{}
}

// refuse notes a terminal refusal: the old token goes too.
func (e *entry) refuse(err error, now time.Time) {
	e.lose()
	e.failures = 0
	e.err, e.errAt, e.errUntil = err, now, now.Add(keepRefusal)
}

// fail notes trouble that passes. Who wants the token without there being an old one may try again soon; all others wait
// longer each time.
func (e *entry) fail(err error, least, longest time.Duration, now time.Time) {
	e.failures++
	e.err, e.errAt, e.errUntil = err, now, now.Add(least)
	if now.Before(e.usableUntil) {
		least = max(least, leastApart)
	}
	wait := backoff(least, longest, e.failures)
	e.retryAt = now.Add(wait)
	if e.due = (time.Time{}); e.prefetched || e.lifetime > 0 && e.refreshable() {
		e.due = now.Add(wait)
	}
}

func (e *entry) refreshable() bool { return !e.request.federated && e.request.Audience == "" }

// idle reports whether the entry is of no more use at now; the caller looks at flights and at who uses the
// ServiceAccount.
func (e *entry) idle(now time.Time) bool {
	if !e.superseded.IsZero() && now.Sub(e.superseded) >= outliveUse {
		return true
	}
	if now.Before(e.usableUntil) || !e.due.IsZero() {
		return !e.prefetched && e.refreshable() && now.Sub(e.asked) >= lifetimesUnasked*e.lifetime
	}
	if e.err == nil {
		return true
	}
	show := showRefusal
	if e.prefetched {
		show = showPrefetched
	}
	return now.Sub(e.errAt) >= show
}
