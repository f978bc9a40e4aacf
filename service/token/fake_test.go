package token

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// fakeSource mints what no Google would, on a bubble's time.
type fakeSource struct {
	mu       sync.Mutex
	lifetime time.Duration // of the tokens
	takes    time.Duration // what a mint takes
	hangs    bool          // a mint takes what its context lets it
	err      error         // what it brings in place of a token

	calls      []time.Time // when each mint began
	minted     []time.Time // when each token came
	busy, most int
}

func (s *fakeSource) Token(ctx context.Context, r Request) (Token, error) {
	s.mu.Lock()
	s.calls = append(s.calls, time.Now())
	s.busy++
	s.most = max(s.most, s.busy)
	n, takes, hangs, err := len(s.calls), s.takes, s.hangs, s.err
	s.mu.Unlock()
	if hangs {
		<-ctx.Done()
		err = ctx.Err()
	} else if takes > 0 {
		select {
		case <-time.After(takes):
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.busy--
	if err != nil {
		return Token{}, err
	}
	now := time.Now()
	s.minted = append(s.minted, now)
	return Token{Value: fmt.Sprintf("value-%d-of-%s", n, r.ServiceAccount), Minted: now, Expires: now.Add(s.lifetime)}, nil
}

// become changes what the source does from now on.
func (s *fakeSource) become(f func(*fakeSource)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(s)
}

func (s *fakeSource) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.calls)
}

// calledSince are the times of the mints that began at t or later.
func (s *fakeSource) calledSince(t time.Time) (since []time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, call := range s.calls {
		if !call.Before(t) {
			since = append(since, call)
		}
	}
	return since
}

// differentSeconds counts them.
func differentSeconds(times []time.Time) int {
	different := map[int64]bool{}
	for _, t := range times {
		different[t.Unix()] = true
	}
	return len(different)
}

// inBubble runs f with a Cache whose Run runs, and looks whether anything is left of it at the end.
func inBubble(t *testing.T, o CacheOptions, f func(t *testing.T, c *Cache)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		c := NewCache(o)
		ctx, cancel := context.WithCancel(t.Context())
		ran := make(chan error)
		go func() { ran <- c.Run(ctx) }()
		defer func() {
			cancel()
			if err := <-ran; err != nil {
				t.Errorf("Run: %v", err)
			}
			c.Drain(context.Background())
			noCalls(t, c)
		}()
		f(t, c)
	})
}

// withoutRun is inBubble with nobody who refreshes ahead.
func withoutRun(t *testing.T, o CacheOptions, f func(t *testing.T, c *Cache)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		c := NewCache(o)
		defer noCalls(t, c)
		defer c.Drain(context.Background())
		f(t, c)
	})
}

func noCalls(t *testing.T, c *Cache) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.calls) != 0 || c.background != 0 {
		t.Errorf("left: %d calls, %d of them in the background", len(c.calls), c.background)
	}
	for uid, b := range c.usage {
		if b.mints != 0 || b.keys < 0 {
			t.Errorf("usage left of %s: %+v", uid, *b)
		}
	}
}

// later lets a bubble's time pass, and everything happen that is due until then.
func later(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

// must asks for a token that is to be had.
func must(t *testing.T, c *Cache, r Request) Token {
	t.Helper()
	got, err := c.Token(t.Context(), r)
	if err != nil {
		t.Fatalf("at %v: %v", time.Now().UTC().Format(time.TimeOnly), err)
	}
	return got
}

// held reports whether there is an entry for r, without asking for it.
func held(c *Cache, r Request) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.entries[r] != nil
}

func mintsAreApart(t *testing.T, calls []time.Time) {
	t.Helper()
	for i := 1; i < len(calls); i++ {
		if d := calls[i].Sub(calls[i-1]); d < minMintInterval {
			t.Errorf("two mints %v apart", d)
		}
	}
}

// crowd are n ServiceAccounts, and a request of each.
func crowd(n int) (sas []workload.ServiceAccount, requests []Request) {
	for i := range n {
		sa := workload.ServiceAccount{Namespace: "team", Name: fmt.Sprintf("sa%d", i)}
		sas = append(sas, sa)
		requests = append(requests, AccessToken(sa, gana, nil))
	}
	return sas, requests
}

// google is a refusal of Google's.
func google(step string, status int, code string) *GoogleError {
	return &GoogleError{Step: step, Status: status, Message: "no", code: code}
}
