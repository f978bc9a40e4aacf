package token

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

func TestT05RefreshAhead(t *testing.T) {
	for _, c := range []struct {
		lifetime, ahead time.Duration // ahead: min(10 minutes, 20 %)
		least           time.Duration // that an asker finds left: 7 minutes, or half of what lives shorter
	}{
		{12 * time.Hour, 10 * time.Minute, 7 * time.Minute},
		{time.Hour, 10 * time.Minute, 7 * time.Minute},
		{20 * time.Minute, 4 * time.Minute, 7 * time.Minute},
		{time.Minute, 12 * time.Second, 30 * time.Second},
	} {
		t.Run(c.lifetime.String(), func(t *testing.T) {
			s := &fakeSource{lifetime: c.lifetime}
			inBubble(t, CacheOptions{Source: s}, func(t *testing.T, cache *Cache) {
				cache.Prefetch(request)
				later(4 * c.lifetime)
				calls := s.calledSince(time.Time{})
				if len(calls) < 4 {
					t.Fatalf("%d mints in four lifetimes", len(calls))
				}
				mintsAreApart(t, calls)
				for i := 1; i < len(calls); i++ {
					left := c.lifetime - calls[i].Sub(calls[i-1])
					if left > c.ahead+c.ahead/5 || left <= c.ahead-backgroundCadence {
						t.Errorf("refreshed with %v left, want %v and up to a fifth more", left, c.ahead)
					}
				}
				for range 400 {
					if left := time.Until(must(t, cache, request).Expires); left <= c.least {
						t.Fatalf("issued with %v left", left)
					}
					later(c.lifetime / 100)
				}
				mintsAreApart(t, s.calledSince(time.Time{}))
			})
		})
	}
}

func TestT05AVeryShortTokenDoesNotSpin(t *testing.T) {
	for _, lifetime := range []time.Duration{time.Second, 5 * time.Second, 15 * time.Second} {
		s := &fakeSource{lifetime: lifetime}
		inBubble(t, CacheOptions{Source: s}, func(t *testing.T, c *Cache) {
			c.Prefetch(request)
			later(time.Minute)
			mintsAreApart(t, s.calledSince(time.Time{}))
		})
	}
}

func TestT05TokensMintedTogetherPart(t *testing.T) {
	s := &fakeSource{lifetime: time.Hour}
	inBubble(t, CacheOptions{Source: s}, func(t *testing.T, c *Cache) {
		_, requests := crowd(100)
		began := time.Now()
		c.Prefetch(requests...)
		later(time.Minute)
		if n := s.count(); n != 100 || differentSeconds(s.calledSince(began)) != 1 {
			t.Fatalf("%d mints, not all of them together", n)
		}
		later(50 * time.Minute)
		again := s.calledSince(began.Add(time.Minute))
		if n := differentSeconds(again); len(again) != 100 || n < 40 {
			t.Errorf("%d refreshes in %d different seconds, want 100 in 40 or more", len(again), n)
		}
	})
}

func TestT05WhoAsksWithLittleLeftWaitsForANewerOne(t *testing.T) {
	s := &fakeSource{lifetime: time.Hour, takes: time.Second}
	withoutRun(t, CacheOptions{Source: s}, func(t *testing.T, c *Cache) {
		old := must(t, c, request)
		later(53*time.Minute - time.Millisecond)
		if must(t, c, request) != old {
			t.Error("not from the cache, with more than 7 minutes left")
		}
		later(time.Millisecond)
		var g sync.WaitGroup
		for range 3 { // who comes while it is under way, too
			g.Go(func() {
				if got := must(t, c, request); got == old {
					t.Error("the old token, though a newer one could be had")
				}
			})
			later(200 * time.Millisecond)
		}
		g.Wait()
		if n := s.count(); n != 2 {
			t.Errorf("%d mints, want 2", n)
		}
	})
}

var passing = map[string]error{
	"network":                fmt.Errorf("STS: %w", ErrUnavailable),
	"429":                    google("STS", 429, ""),
	"503 of IAM":             google("IAM", 503, "UNAVAILABLE"),
	"G-05 issuer unreadable": google("STS", 400, "invalid_grant"),
	"provider disabled":      google("STS", 400, "invalid_target"),
	"a proxy's 403":          google("IAM", 403, ""),
	"API server away":        errors.New("away"),
}

func TestTheOldTokenServesWhileGoogleIsAway(t *testing.T) {
	for name, err := range passing {
		t.Run(name, func(t *testing.T) {
			s := &fakeSource{lifetime: time.Hour}
			inBubble(t, CacheOptions{Source: s}, func(t *testing.T, c *Cache) {
				old := must(t, c, request)
				later(47 * time.Minute)
				away := time.Now()
				s.become(func(s *fakeSource) { s.err = err })
				for time.Until(old.Expires) > minLife {
					began := time.Now()
					if got := must(t, c, request); got != old || !began.Equal(time.Now()) {
						t.Fatalf("%v after %v, want the old one at once", got, time.Since(began))
					}
					later(500 * time.Millisecond)
				}
				if _, got := c.Token(t.Context(), request); !errors.Is(got, err) {
					t.Errorf("error %v, want the source's", got)
				}
				calls := s.calledSince(away)
				mintsAreApart(t, calls[:len(calls)-1]) // the last is the asker's own
				least := 10
				if _, longest := retryWaits(err); longest == maxRefusedBackoff {
					least = 6
				}
				if n := len(calls); n < least || n > 30 {
					t.Errorf("%d attempts in about ten minutes", n)
				}
			})
		})
	}
}

func TestRecovery(t *testing.T) {
	for name, err := range passing {
		for _, outage := range []time.Duration{12 * time.Minute, 2 * time.Hour} { // before the old token's end, and after
			t.Run(fmt.Sprint(name, " ", outage), func(t *testing.T) {
				s := &fakeSource{lifetime: time.Hour}
				inBubble(t, CacheOptions{Source: s}, func(t *testing.T, c *Cache) {
					c.Prefetch(request)
					later(47 * time.Minute)
					s.become(func(s *fakeSource) { s.err = err })
					later(outage)
					s.become(func(s *fakeSource) { s.err = nil })
					n := s.count()
					_, within := retryWaits(err)
					within += within/2 + time.Second // with its jitter
					later(within)
					if s.count() != n+1 {
						t.Fatalf("%d mints in %v after the outage, want 1", s.count()-n, within)
					}
					if left := time.Until(must(t, c, request).Expires); left < time.Hour-within || s.count() != n+1 {
						t.Errorf("%v left", left)
					}
				})
			})
		}
	}
}

func TestAFinalRefusalTakesTheOldTokenAway(t *testing.T) {
	annotation := errors.New("the annotation is no good")
	for name, err := range map[string]error{
		"T-07 binding revoked":   google("IAM", 403, "PERMISSION_DENIED"),
		"T-07 account deleted":   google("IAM", 404, "NOT_FOUND"),
		"attribute condition":    google("STS", 400, "unauthorized_client"),
		"K-00 a bad annotation":  fmt.Errorf("reading: %w", annotation),
		"the annotation changed": ErrAccountChanged,
	} {
		t.Run(name, func(t *testing.T) {
			s := &fakeSource{lifetime: time.Hour}
			terminal := func(err error) bool { return errors.Is(err, annotation) }
			inBubble(t, CacheOptions{Source: s, Terminal: terminal}, func(t *testing.T, c *Cache) {
				must(t, c, request)
				later(47 * time.Minute)
				s.become(func(s *fakeSource) { s.err = err })
				later(4 * time.Minute)
				if n := s.count(); n != 2 {
					t.Errorf("%d mints, want the first and one refresh", n)
				}
				if _, got := c.Token(t.Context(), request); !errors.Is(got, err) {
					t.Errorf("error %v, want the refusal", got)
				}
				s.become(func(s *fakeSource) { s.err = nil }) // bound again
				later(refusalTTL)
				must(t, c, request)
			})
		})
	}
	t.Run("an asker's own mint", func(t *testing.T) {
		s := &fakeSource{lifetime: time.Hour}
		withoutRun(t, CacheOptions{Source: s}, func(t *testing.T, c *Cache) {
			must(t, c, request)
			later(55 * time.Minute)
			refusal := google("IAM", 403, "PERMISSION_DENIED")
			s.become(func(s *fakeSource) { s.err = refusal })
			if _, err := c.Token(t.Context(), request); !errors.Is(err, refusal) {
				t.Errorf("error %v, want the refusal", err)
			}
		})
	})
}

func TestTokensNobodyAsksForGo(t *testing.T) {
	s := &fakeSource{lifetime: time.Hour}
	inBubble(t, CacheOptions{Source: s}, func(t *testing.T, c *Cache) {
		sas, requests := crowd(1)
		c.Use(append(sas, ana))
		c.Prefetch(requests...)
		must(t, c, request)
		later(2*time.Hour - time.Second)
		if !held(c, request) || s.count() != 2*3 {
			t.Errorf("%d mints, want 6: the tokens are kept fresh for two lifetimes", s.count())
		}
		later(2 * time.Second)
		if held(c, request) {
			t.Error("an entry that nobody has asked for in two lifetimes is held")
		}
		later(8 * time.Hour)
		n := s.count()
		if n < 15 || n > 16 {
			t.Errorf("%d mints", n)
		}
		if left := time.Until(must(t, c, requests[0]).Expires); left < 9*time.Minute || s.count() != n {
			t.Errorf("what was fetched ahead is not fresh after ten hours: %v left", left)
		}
	})
}

func TestPrefetch(t *testing.T) {
	t.Run("is bounded and costs once", func(t *testing.T) {
		s := &fakeSource{lifetime: time.Hour, takes: time.Second}
		inBubble(t, CacheOptions{Source: s}, func(t *testing.T, c *Cache) {
			sas, requests := crowd(100)
			c.Use(sas)
			for range 5 {
				c.Prefetch(requests...)
			}
			later(4 * time.Second) // 100 in four rounds of at most 32
			c.Prefetch(requests...)
			later(time.Minute)
			if s.count() != 100 || s.most != maxBackground {
				t.Errorf("%d mints, %d at once; want 100 and %d", s.count(), s.most, maxBackground)
			}
			for _, r := range requests {
				must(t, c, r)
			}
			if s.count() != 100 {
				t.Error("what was fetched ahead is minted again")
			}
		})
	})
	t.Run("tries again after an outage, spread", func(t *testing.T) {
		s := &fakeSource{lifetime: time.Hour, err: ErrUnavailable}
		inBubble(t, CacheOptions{Source: s}, func(t *testing.T, c *Cache) {
			_, requests := crowd(100)
			c.Prefetch(requests...)
			later(10 * time.Minute)
			if n := s.count(); n < 10*100 || n > 25*100 {
				t.Errorf("%d attempts for 100 tokens in ten minutes", n)
			}
			s.become(func(s *fakeSource) { s.err = nil })
			later(61 * time.Second)
			if n := differentSeconds(s.minted); len(s.minted) != 100 || n < 20 {
				t.Errorf("%d tokens in %d different seconds, want 100 in 20 or more", len(s.minted), n)
			}
		})
	})
	t.Run("waits as long as Google says, within reason", func(t *testing.T) {
		away := google("STS", 503, "")
		away.RetryAfter = time.Hour
		s := &fakeSource{lifetime: time.Hour, err: away}
		inBubble(t, CacheOptions{Source: s}, func(t *testing.T, c *Cache) {
			c.Prefetch(request)
			later(10 * time.Minute)
			if n := s.count(); n < 6 || n > 10 {
				t.Errorf("%d attempts in ten minutes, want one in 60 to 90 s", n)
			}
		})
	})
	t.Run("takes a refusal for an answer", func(t *testing.T) {
		s := &fakeSource{err: google("IAM", 403, "PERMISSION_DENIED")}
		inBubble(t, CacheOptions{Source: s}, func(t *testing.T, c *Cache) {
			for range 5 {
				c.Prefetch(request)
				later(time.Minute)
			}
			if n := s.count(); n != 1 {
				t.Errorf("%d mints, want 1", n)
			}
			if status := c.Status(); len(status) != 1 || !strings.Contains(status[0].LastError, "403") {
				t.Errorf("status does not show it: %+v", status)
			}
			later(showPrefetchedError)
			if n := len(c.Status()); n != 0 {
				t.Errorf("%d entries", n)
			}
		})
	})
}

func TestAnnotationsChange(t *testing.T) {
	before, after := AccessToken(ana, gana, nil),
		AccessToken(ana, workload.Account{GoogleEmail: "other@project.iam.gserviceaccount.com"}, nil)
	s := &fakeSource{lifetime: time.Hour}
	inBubble(t, CacheOptions{Source: s}, func(t *testing.T, c *Cache) {
		c.Prefetch(before)
		must(t, c, IDToken(ana, gana, "x"))
		must(t, c, federatedToken(ana, defaultScopes))
		later(time.Second)
		must(t, c, after)
		if status := c.Status(); len(status) != 2 || !held(c, after) || !held(c, federatedToken(ana, defaultScopes)) {
			t.Errorf("held beside the new one and the federated one: %+v", status)
		}
		s.become(func(s *fakeSource) { s.err = ErrUnavailable })
		if _, err := c.Token(t.Context(), before); err == nil { // changed back, and Google away
			t.Error("a token without a mint")
		}
		later(unusedTTL)
		if held(c, after) {
			t.Error("still held a minute after the annotations changed")
		}
	})
}

// A mint that read the annotations before they changed and lands late does not take the place of
// the newer one.
func TestAnnotationsChangeDuringAMint(t *testing.T) {
	before, after := AccessToken(ana, gana, nil),
		AccessToken(ana, workload.Account{GoogleEmail: "other@project.iam.gserviceaccount.com"}, nil)
	s := &fakeSource{lifetime: time.Hour, takes: 10 * time.Second}
	inBubble(t, CacheOptions{Source: s}, func(t *testing.T, c *Cache) {
		c.Prefetch(before)
		later(time.Second)
		s.become(func(s *fakeSource) { s.takes = time.Second })
		must(t, c, after)
		later(30 * time.Second)
		if !held(c, after) || !held(c, before) {
			t.Error("one of two that landed together is gone at once")
		}
		later(unusedTTL)
		if !held(c, after) || held(c, before) {
			t.Error("the older is held, or the newer is not")
		}
	})
}

// sts is Google without a network, for a bubble.
type sts struct {
	lifetime time.Duration
	mu       sync.Mutex
	calls    int
	away     bool
}

func (s *sts) RoundTrip(r *http.Request) (*http.Response, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls++
	if s.away {
		return nil, errors.New("no route to host")
	}
	body := fmt.Sprintf(`{"access_token":"token%d","expires_in":%d}`, s.calls, int(s.lifetime.Seconds()))
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(body)),
		Request: r}, nil
}

func (s *sts) asked() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls
}

// A token of an unlinked ServiceAccount comes out of another entry of the same cache, which must
// not give the old one back.
func TestT08TheTokenOfAnUnlinkedServiceAccountIsRefreshed(t *testing.T) {
	unlinked := AccessToken(ana, workload.Account{}, nil)
	for _, lifetime := range []time.Duration{time.Hour, 10 * time.Minute, time.Minute} {
		t.Run(lifetime.String(), func(t *testing.T) {
			s := &sts{lifetime: lifetime}
			g, err := NewGoogle(GoogleOptions{Audience: testAudience, STSURL: "https://sts/v1/token",
				HTTPClient: &http.Client{Transport: s}, Kubernetes: newCluster()})
			if err != nil {
				t.Fatal(err)
			}
			inBubble(t, CacheOptions{Source: g}, func(t *testing.T, c *Cache) {
				g.Federated = c
				c.Prefetch(unlinked)
				later(4 * lifetime)
				if n := s.asked(); n < 4 || n > 6 {
					t.Errorf("%d exchanges in four lifetimes", n)
				}
				for range 400 {
					if left := time.Until(must(t, c, unlinked).Expires); left <= min(7*time.Minute, lifetime/2) {
						t.Fatalf("issued with %v left", left)
					}
					later(lifetime / 100)
				}
				old := must(t, c, unlinked)
				s.mu.Lock()
				s.away, s.calls = true, 0
				s.mu.Unlock()
				for time.Until(old.Expires) > minLife {
					old = must(t, c, unlinked)
					later(time.Second)
				}
				if n, most := s.asked(), 3*attempts*(4+int(lifetime/time.Minute)); n == 0 || n > most {
					t.Errorf("%d requests to an STS that is away, want at most %d", n, most)
				}
				if _, err := c.Token(t.Context(), unlinked); !errors.Is(err, ErrUnavailable) {
					t.Errorf("error %v, want ErrUnavailable", err)
				}
			})
		})
	}
}

// Sets of scopes that a pod of an unlinked ServiceAccount makes up count against its own limit,
// with all that is held because of them.
func TestT08ScopesOfAnUnlinkedServiceAccountAreBounded(t *testing.T) {
	g, err := NewGoogle(GoogleOptions{Audience: testAudience, STSURL: "https://sts/v1/token",
		HTTPClient: &http.Client{Transport: &sts{lifetime: time.Hour}}, Kubernetes: newCluster()})
	if err != nil {
		t.Fatal(err)
	}
	withoutRun(t, CacheOptions{Source: g, KeysPerPod: 4}, func(t *testing.T, c *Cache) {
		g.Federated = c
		for i := range 100 {
			ask(t, c, "pod", AccessToken(ana, workload.Account{}, []string{fmt.Sprint("https://scope/", i)}))
		}
		ask(t, c, "pod", AccessToken(ana, workload.Account{}, nil))
		if n := len(c.entries); n > 4+1 {
			t.Errorf("%d entries are held because of one pod, whose limit is 4", n)
		}
	})
}
