package token

import (
	"math/rand/v2"
	"time"
)

const (
	// minMintInterval is the shortest time between two mints while a usable token is held (T-05,
	// refresh ahead).
	minMintInterval = 5 * time.Second
	// idTokenLife bounds how long an ID token is served (I-06, ID token cache).
	idTokenLife = 5 * time.Minute
	// minLife is the shortest life of a token that is issued, so that expires_in is never 0 (T-02,
	// form of a token).
	minLife = 2 * time.Second

	refusalTTL     = 5 * time.Second  // a final refusal is cached for that long
	unavailableTTL = time.Second      // a passing error is cached for that long
	maxBackoff     = 40 * time.Second // between background attempts; a minute with its jitter
	// maxRefusedBackoff is maxBackoff after a refusal: 50,000 tokens of a fleet stay below STS's limit
	// of 6,000 requests a minute (G-07, limits of STS).
	maxRefusedBackoff = 7 * time.Minute
	maxRetryAfter     = time.Minute // of Google's Retry-After

	showError           = time.Minute // how long Status shows the error of an entry without a token
	showPrefetchedError = 10 * time.Minute
	unusedTTL           = time.Minute // of entries whose ServiceAccount went out of use or has other annotations
	lifetimesUnasked    = 2           // an entry is refreshed for that many lifetimes after the last request
	maxBackground       = 32          // concurrent mints without a caller
	backgroundCadence   = time.Second
)

// entry is the state of one Request.
type entry struct {
	request Request
	owner   string // whose limits the entry counts against; "" = nobody's

	token       Token     // the last token, or none
	freshUntil  time.Time // until then the token is served at once
	usableUntil time.Time // until then the token is served if no newer one can be had
	lifetime    time.Duration

	call     *call
	failures int       // failed attempts in a row
	retryAt  time.Time // while the token is usable, no attempt is made before
	due      time.Time // of the next background attempt; zero: none

	err      error // of the last attempt, until a mint succeeds
	errAt    time.Time
	errUntil time.Time // until then err is the answer

	asked      time.Time
	prefetched bool
	superseded time.Time // when the ServiceAccount was first seen with other annotations; zero: never
}

func lifetime(t Token) time.Duration { return t.Expires.Sub(t.Minted) }

// share returns the smaller of most and a percentage of the token's lifetime, so that the limits
// also fit a token of one minute.
func share(t Token, most time.Duration, percent int) time.Duration {
	return min(most, lifetime(t)*time.Duration(percent)/100)
}

// freshUntil returns when a caller gets a newer token if one can be had: 7 minutes before the end
// (T-05, refresh ahead). A federated token is the base of other tokens and is not refreshed ahead.
// Its time is earlier than any refresh of the tokens made from it, so each refresh starts from a
// new one.
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
	end := t.Expires.Add(-minLife)
	if r.Audience != "" {
		if old := t.Minted.Add(idTokenLife); old.Before(end) {
			return old
		}
	}
	return end
}

// refreshAt returns the time of the background refresh: 10 minutes before the end, and up to two
// minutes earlier, so that tokens minted together are refreshed apart (T-05, refresh ahead). Zero
// means never.
func refreshAt(r Request, t Token) time.Time {
	if r.federated || r.Audience != "" {
		return time.Time{}
	}
	ahead := share(t, 10*time.Minute, 20)
	return t.Expires.Add(-ahead - jitter(ahead/5))
}

// backoff returns the wait after that many failures: the shortest, doubled each time up to the
// longest, plus up to a half, so that not all nodes come back at once after an outage.
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

// setToken stores a new token.
func (e *entry) setToken(t Token, now time.Time) {
	e.token = t
	e.lifetime = lifetime(t)
	e.freshUntil = freshUntil(e.request, t)
	e.usableUntil = usableUntil(e.request, t)
	e.failures, e.err, e.errAt, e.errUntil = 0, nil, time.Time{}, time.Time{}
	if e.due = refreshAt(e.request, t); !e.due.IsZero() && e.due.Before(now.Add(minMintInterval)) {
		e.due = now.Add(minMintInterval)
	}
}

// dropToken removes the token.
func (e *entry) dropToken() {
	e.token, e.freshUntil, e.usableUntil, e.retryAt, e.due = Token{}, time.Time{}, time.Time{}, time.Time{}, time.Time{}
}

// refuse stores a final refusal, and drops the old token.
func (e *entry) refuse(err error, now time.Time) {
	e.dropToken()
	e.failures = 0
	e.err, e.errAt, e.errUntil = err, now, now.Add(refusalTTL)
}

// fail stores a passing error. Without a usable token the next caller may try again soon. Otherwise
// each wait is longer than the one before.
func (e *entry) fail(err error, least, longest time.Duration, now time.Time) {
	e.failures++
	e.err, e.errAt, e.errUntil = err, now, now.Add(least)
	if now.Before(e.usableUntil) {
		least = max(least, minMintInterval)
	}
	wait := backoff(least, longest, e.failures)
	e.retryAt = now.Add(wait)
	if e.due = (time.Time{}); e.prefetched || e.lifetime > 0 && e.refreshable() {
		e.due = now.Add(wait)
	}
}

func (e *entry) refreshable() bool { return !e.request.federated && e.request.Audience == "" }

// idle reports whether the entry may be dropped. The caller checks for calls in flight and for
// users of the ServiceAccount.
func (e *entry) idle(now time.Time) bool {
	if !e.superseded.IsZero() && now.Sub(e.superseded) >= unusedTTL {
		return true
	}
	if now.Before(e.usableUntil) || !e.due.IsZero() {
		return !e.prefetched && e.refreshable() && now.Sub(e.asked) >= lifetimesUnasked*e.lifetime
	}
	if e.err == nil {
		return true
	}
	show := showError
	if e.prefetched {
		show = showPrefetchedError
	}
	return now.Sub(e.errAt) >= show
}
