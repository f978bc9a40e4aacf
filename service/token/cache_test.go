package token

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

var request = AccessToken(ana, gana, nil)

func TestOneMintForAHundredAskers(t *testing.T) {
	s := &fakeSource{lifetime: time.Hour, takes: 2 * time.Second}
	inBubble(t, CacheOptions{Source: s}, func(t *testing.T, c *Cache) {
		var g sync.WaitGroup
		for i := range 100 {
			g.Go(func() {
				ctx, cancel := t.Context(), func() {}
				if i%2 == 0 {
					ctx, cancel = context.WithTimeout(ctx, time.Second)
				}
				defer cancel()
				began := time.Now()
				got, err := c.Token(ctx, request)
				switch took := time.Since(began); {
				case i%2 == 0 && (!errors.Is(err, ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) ||
					took != time.Second):
					t.Errorf("left early: %v after %v", err, took)
				case i%2 == 1 && (err != nil || got.Value != "value-1-of-team/ana" || took != 2*time.Second):
					t.Errorf("stayed: %v, %v after %v", got, err, took)
				}
			})
		}
		g.Wait()
		must(t, c, request)
		if n := s.count(); n != 1 {
			t.Errorf("%d mints, want 1", n)
		}
	})
}

func TestAMintOutlivesWhoAskedFirst(t *testing.T) {
	s := &fakeSource{lifetime: time.Hour, takes: 2 * time.Second}
	inBubble(t, CacheOptions{Source: s}, func(t *testing.T, c *Cache) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := c.Token(ctx, request); !errors.Is(err, ErrUnavailable) {
			t.Fatalf("error %v, want ErrUnavailable", err)
		}
		later(time.Second)
		must(t, c, request)
		if n := s.count(); n != 1 {
			t.Errorf("%d mints, want 1", n)
		}
	})
}

// G-07, E-28: all three ways to ask for the usual scopes get the token that was fetched ahead.
func TestG07UsualScopesShareThePrefetchedToken(t *testing.T) {
	s := &fakeSource{lifetime: time.Hour}
	inBubble(t, CacheOptions{Source: s}, func(t *testing.T, c *Cache) {
		c.Prefetch(AccessToken(ana, gana, nil))
		later(time.Second)
		for _, scopes := range [][]string{nil, {""}, {cloudPlatform}, {cloudPlatform + "," + userinfoEmail},
			{userinfoEmail, cloudPlatform}, {cloudPlatform + ", " + cloudPlatform}} {
			must(t, c, AccessToken(ana, gana, scopes))
		}
		if n := s.count(); n != 1 {
			t.Errorf("%d mints, want 1", n)
		}
	})
}

func TestABlackHole(t *testing.T) {
	t.Run("without an old token", func(t *testing.T) {
		s := &fakeSource{hangs: true}
		inBubble(t, CacheOptions{Source: s}, func(t *testing.T, c *Cache) {
			began := time.Now()
			if _, err := c.Token(t.Context(), request); !errors.Is(err, ErrUnavailable) { // T-09
				t.Errorf("error %v, want ErrUnavailable", err)
			}
			if took := time.Since(began); took != mintTimeout {
				t.Errorf("took %v, want %v", took, mintTimeout)
			}
		})
	})
	t.Run("H-21 with one", func(t *testing.T) {
		s := &fakeSource{lifetime: time.Hour}
		withoutRun(t, CacheOptions{Source: s}, func(t *testing.T, c *Cache) {
			old := must(t, c, request)
			later(55 * time.Minute)
			s.become(func(s *fakeSource) { s.hangs = true })
			hole := time.Now()
			costs := func(want time.Duration) {
				t.Helper()
				began := time.Now()
				if got := must(t, c, request); got != old {
					t.Errorf("got %v, want the old token", got)
				}
				if took := time.Since(began); took != want {
					t.Errorf("took %v, want %v", took, want)
				}
			}
			var g sync.WaitGroup
			g.Go(func() { costs(askerWait) })
			later(500 * time.Millisecond)
			costs(askerWait - 500*time.Millisecond) // the same two seconds
			g.Wait()
			for time.Since(hole) < 3*time.Minute {
				costs(0)
				later(100 * time.Millisecond)
			}
			calls := s.calledSince(hole)
			if len(calls) < 2 || len(calls) > 6 {
				t.Errorf("%d mints in three minutes", len(calls))
			}
			for i := 1; i < len(calls); i++ {
				if d := calls[i].Sub(calls[i-1]); d < mintTimeout+minMintInterval {
					t.Errorf("two mints %v apart", d)
				}
			}
		})
	})
}

func TestRefusalsAreRemembered(t *testing.T) {
	mend := errors.New("the annotation is no good")
	wait := func(status int, d time.Duration) error {
		e := google("STS", status, "")
		e.RetryAfter = d
		return e
	}
	for _, c := range []struct {
		name string
		err  error
		kept time.Duration
	}{
		{"IAM 403", google("IAM", 403, "PERMISSION_DENIED"), 5 * time.Second},
		{"IAM 404", google("IAM", 404, "NOT_FOUND"), 5 * time.Second},
		{"STS 400", google("STS", 400, "invalid_grant"), 5 * time.Second},
		{"bad annotation", fmt.Errorf("minting: %w", mend), 5 * time.Second},
		{"away", fmt.Errorf("STS: %w", ErrUnavailable), time.Second},
		{"API server away", errors.New("away"), time.Second},
		{"429", wait(429, 0), time.Second},
		{"429 with Retry-After", wait(429, 30*time.Second), 30 * time.Second},
		{"503 with a Retry-After beyond reason", wait(503, time.Hour), time.Minute},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := &fakeSource{err: c.err}
			terminal := func(err error) bool { return errors.Is(err, mend) }
			inBubble(t, CacheOptions{Source: s, Terminal: terminal}, func(t *testing.T, cache *Cache) {
				for i, wait := range []time.Duration{0, c.kept - time.Millisecond, time.Millisecond} {
					later(wait)
					if _, err := cache.Token(t.Context(), request); !errors.Is(err, c.err) {
						t.Fatalf("error %v, want the source's", err)
					}
					if want := []int{1, 1, 2}[i]; s.count() != want {
						t.Errorf("%d mints, want %d", s.count(), want)
					}
				}
			})
		})
	}
}

func TestErrAccountChangedIsNotRemembered(t *testing.T) {
	s := &fakeSource{lifetime: time.Hour, err: fmt.Errorf("minting: %w", ErrAccountChanged)}
	inBubble(t, CacheOptions{Source: s, KeysPerPod: 1}, func(t *testing.T, c *Cache) {
		if _, err := c.Ask(t.Context(), "pod", request); !errors.Is(err, ErrAccountChanged) {
			t.Errorf("error %v, want ErrAccountChanged", err)
		}
		if n := len(c.Status()); n != 0 {
			t.Errorf("%d entries", n)
		}
		s.become(func(s *fakeSource) { s.err = nil })
		// its key is free again
		if _, err := c.Ask(t.Context(), "pod", AccessToken(ana, workload.Account{}, nil)); err != nil {
			t.Error(err)
		}
	})
}

func TestI06IDTokensAreNeverOld(t *testing.T) {
	id := IDToken(ana, gana, "https://service")
	for _, c := range []struct{ lifetime, served time.Duration }{
		{time.Hour, idTokenLife},
		{3 * time.Minute, 3*time.Minute - minLife},
	} {
		t.Run(c.lifetime.String(), func(t *testing.T) {
			s := &fakeSource{lifetime: c.lifetime}
			inBubble(t, CacheOptions{Source: s}, func(t *testing.T, cache *Cache) {
				first := must(t, cache, id)
				later(c.served - time.Millisecond)
				if must(t, cache, id) != first {
					t.Error("not from the cache")
				}
				later(time.Millisecond)
				if must(t, cache, id) == first {
					t.Errorf("an ID token of %v from the cache", c.served)
				}
				later(c.served)
				s.become(func(s *fakeSource) { s.err = ErrUnavailable })
				if _, err := cache.Token(t.Context(), id); !errors.Is(err, ErrUnavailable) {
					t.Errorf("%v, want no token rather than an old one", err)
				}
				n := s.count()
				later(time.Hour)
				if s.count() != n {
					t.Error("refreshed ahead")
				}
				if held(cache, id) {
					t.Error("the entry is still there")
				}
			})
		})
	}
}

func TestForget(t *testing.T) {
	s := &fakeSource{lifetime: time.Hour}
	inBubble(t, CacheOptions{Source: s}, func(t *testing.T, c *Cache) {
		first := must(t, c, request)
		c.Forget(request, Token{Value: "another"})
		c.Forget(AccessToken(ana, workload.Account{}, nil), first)
		if must(t, c, request) != first {
			t.Error("forgot a token that was not meant")
		}
		c.Forget(request, first)
		second := must(t, c, request)
		if second == first {
			t.Error("served a token that Google no longer takes")
		}
		c.Forget(request, first) // too late
		if must(t, c, request) != second {
			t.Error("forgot the newer one")
		}
	})
}

func TestDrainLeavesWithItsContext(t *testing.T) {
	s := &fakeSource{hangs: true}
	inBubble(t, CacheOptions{Source: s}, func(t *testing.T, c *Cache) {
		c.Prefetch(request, IDToken(ana, gana, "x"))
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		c.Drain(ctx)
		if took := time.Since(began); took != 3*time.Second {
			t.Errorf("took %v, want 3s", took)
		}
		c.Drain(context.Background())
		if took := time.Since(began); took != mintTimeout {
			t.Errorf("took %v, want %v", took, mintTimeout)
		}
	})
}

func TestNothingIsMintedInTheBackgroundAfterRun(t *testing.T) {
	s := &fakeSource{lifetime: time.Hour}
	synctest.Test(t, func(t *testing.T) {
		c := NewCache(CacheOptions{Source: s})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		began := time.Now()
		if err := c.Run(ctx); err != nil || time.Since(began) != time.Minute {
			t.Errorf("Run: %v after %v", err, time.Since(began))
		}
		c.Prefetch(request)
		later(time.Minute)
		if s.count() != 0 {
			t.Error("minted ahead while the service stops")
		}
		must(t, c, request) // who asks still gets one: no request is lost in a drain
	})
}

func TestStatus(t *testing.T) {
	s := &fakeSource{lifetime: time.Hour}
	inBubble(t, CacheOptions{Source: s}, func(t *testing.T, c *Cache) {
		bob := workload.ServiceAccount{Namespace: "team", Name: "bob"}
		must(t, c, AccessToken(bob, workload.Account{}, []string{"https://www.googleapis.com/auth/\x1b[2Jdrive"}))
		c.Prefetch(request)
		later(time.Second)
		must(t, c, federatedToken(bob, defaultScopes))
		s.become(func(s *fakeSource) { s.err = google("IAM", http.StatusForbidden, "PERMISSION_DENIED") })
		_, _ = c.Token(t.Context(), IDToken(ana, gana, "https://service"))
		raw, err := json.MarshalIndent(c.Status(), "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		const want = `[
  {
    "serviceAccount": "team/ana",
    "googleServiceAccount": "ana@project.iam.gserviceaccount.com",
    "scopes": "https://www.googleapis.com/auth/cloud-platform https://www.googleapis.com/auth/userinfo.email",
    "prefetched": true,
    "minted": "2000-01-01T00:00:00Z",
    "expires": "2000-01-01T01:00:00Z"
  },
  {
    "serviceAccount": "team/ana",
    "googleServiceAccount": "ana@project.iam.gserviceaccount.com",
    "audience": "https://service",
    "lastError": "Unable to generate access token; IAM returned 403 Forbidden: no",
    "lastErrorAt": "2000-01-01T00:00:01Z"
  },
  {
    "serviceAccount": "team/bob",
    "scopes": "https://www.googleapis.com/auth/[2Jdrive",
    "minted": "2000-01-01T00:00:00Z",
    "expires": "2000-01-01T01:00:00Z"
  },
  {
    "serviceAccount": "team/bob",
    "scopes": "https://www.googleapis.com/auth/cloud-platform",
    "federated": true,
    "minted": "2000-01-01T00:00:01Z",
    "expires": "2000-01-01T01:00:01Z"
  }
]`
		got := strings.ReplaceAll(string(raw), time.Now().Format("Z07:00"), "Z")
		if got != want {
			t.Errorf("status\n%s\nwant\n%s", got, want)
		}
		if strings.Contains(got, "value") {
			t.Error("shows a value")
		}
	})
}

func TestAHitAllocatesNothing(t *testing.T) {
	c := NewCache(CacheOptions{Source: &fakeSource{lifetime: time.Hour}, MintsPerPod: 1, KeysPerPod: 1})
	ctx := t.Context()
	if _, err := c.Ask(ctx, "pod", request); err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(100, func() { _, _ = c.Ask(ctx, "pod", request) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
