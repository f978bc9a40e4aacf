package token

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// successor is the Cache of the process that comes after c's, and the source that it has.
func successor(t testing.TB, c *Cache) (*Cache, *fakeSource, int) {
	t.Helper()
	s := &fakeSource{lifetime: time.Hour}
	next := NewCache(CacheOptions{Source: s})
	n, err := next.Restore(c.Snapshot())
	if err != nil {
		t.Fatal(err)
	}
	return next, s, n
}

// what one process minted the next one hands out, for as long as the first would have.
func TestR16RestoreGoesOnAsIfNothingHadBeen(t *testing.T) {
	id, federated := IDToken(ana, gana, "https://service"), federatedToken(ana, cloudPlatform)
	other := AccessToken(ana, gana, []string{cloudPlatform + ".read-only"})
	for name, tt := range map[string]struct {
		away time.Duration // between the two processes
		left []Request     // that the second one has
	}{
		"at once":                              {0, []Request{request, other, id, federated}},
		"I-06: ID tokens live for 5 minutes":   {idTokenLife, []Request{request, other, federated}},
		"T-05: old ones are better than none":  {time.Hour - time.Minute, []Request{request, other, federated}},
		"T-02: what is over in a moment is no": {time.Hour - minLife, nil},
		"a node that slept":                    {24 * time.Hour, nil},
		"a clock that was set back":            {-time.Hour, nil},
	} {
		t.Run(name, func(t *testing.T) {
			withoutRun(t, CacheOptions{Source: &fakeSource{lifetime: time.Hour}}, func(t *testing.T, c *Cache) {
				c.Prefetch(request)
				want := map[Request]Token{}
				for _, r := range []Request{request, other, id, federated} {
					want[r] = must(t, c, r)
				}
				snapshot, now := c.Snapshot(), time.Now().Add(tt.away)
				s := &fakeSource{lifetime: time.Hour}
				next := NewCache(CacheOptions{Source: s})
				if n, err := next.restore(snapshot, now); n != len(tt.left) || err != nil {
					t.Fatalf("restored %d, %v; want %d", n, err, len(tt.left))
				}
				for _, r := range tt.left {
					if e := next.entries[r]; e == nil || e.token.Value != want[r].Value || !e.token.Expires.Equal(want[r].Expires) ||
						!e.token.Minted.Equal(want[r].Minted) ||
						e.prefetched != (r == request) || e.asked.IsZero() || e.due.IsZero() == e.refreshable() {
						t.Errorf("%+v: expires %v, asked %v, due %v, prefetched %v", r, e.token, e.asked, e.due, e.prefetched)
					}
				}
				if tt.away == 0 {
					for r := range want {
						if got := must(t, next, r); got.Value != want[r].Value {
							t.Errorf("%+v: another token", r)
						}
					}
					if s.count() != 0 {
						t.Errorf("%d mints", s.count())
					}
				}
			})
		})
	}
}

// The token of the process before is refreshed ahead, and goes with its ServiceAccount's last pod
// (T-05, K-04).
func TestRestoredTokensAreRefreshedAndForgotten(t *testing.T) {
	bob := workload.ServiceAccount{Namespace: "team", Name: "bob"}
	synctest.Test(t, func(t *testing.T) {
		c := NewCache(CacheOptions{Source: &fakeSource{lifetime: time.Hour}})
		must(t, c, request)
		must(t, c, AccessToken(bob, gana, nil))
		later(30 * time.Minute)
		next, s, n := successor(t, c)
		if n != 2 {
			t.Fatalf("restored %d", n)
		}
		ctx, cancel := context.WithCancel(t.Context())
		go func() { _ = next.Run(ctx) }()
		next.Use([]workload.ServiceAccount{ana})
		if held(next, AccessToken(bob, gana, nil)) || !held(next, request) {
			t.Error("K-04: what no pod uses stays, or what a pod uses goes")
		}
		later(25 * time.Minute)
		if s.count() != 1 {
			t.Errorf("T-05: %d mints in the background, want 1", s.count())
		}
		cancel()
		synctest.Wait()
	})
}

func TestSnapshotLeavesOutWhatIsNotToComeBack(t *testing.T) {
	s := &fakeSource{lifetime: time.Hour}
	withoutRun(t, CacheOptions{Source: s}, func(t *testing.T, c *Cache) {
		holds := func(what string, want ...Request) {
			t.Helper()
			all, err := decodeSnapshot(c.Snapshot())
			if err != nil {
				t.Fatal(err)
			}
			var got []Request
			for _, s := range all {
				got = append(got, s.request)
			}
			if !slices.Equal(got, want) {
				t.Errorf("%s: %+v, want %+v", what, got, want)
			}
		}
		holds("nothing yet")
		first := must(t, c, request)
		holds("a token", request)
		c.Forget(request, first)
		holds("one that Google takes no more")

		must(t, c, request)
		later(55 * time.Minute)
		s.become(func(s *fakeSource) { s.err = google("IAM", 403, "PERMISSION_DENIED") })
		if _, err := c.Token(t.Context(), request); err == nil {
			t.Error("no refusal")
		}
		holds("one whose binding is gone")

		s.become(func(s *fakeSource) { s.err = nil })
		later(refusalTTL)
		must(t, c, request)
		later(time.Second)
		changed := AccessToken(ana, workload.Account{GoogleEmail: "other@project.iam.gserviceaccount.com"}, nil)
		s.become(func(s *fakeSource) { s.takes = time.Second })
		go func() { _, _ = c.Token(context.Background(), changed) }()
		later(time.Millisecond)
		holds("one with annotations of the past, while the new one is minted")
		later(time.Second)
		holds("the new one", changed)
		c.Use(nil)
		holds("nobody's")
	})
}

// Two processes' worth of annotations in one snapshot: the newer token's are believed.
func TestRestoreKeepsToOneAccount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old := saved{request: AccessToken(ana, workload.Account{GoogleEmail: "old@project.iam.gserviceaccount.com"}, nil),
			token: Token{Value: "old", Minted: time.Now(), Expires: time.Now().Add(time.Hour)}}
		newer := saved{request: request, token: Token{Value: "new", Minted: time.Now().Add(time.Second),
			Expires: time.Now().Add(time.Hour)}}
		federated := saved{request: federatedToken(ana, cloudPlatform), token: newer.token}
		later(time.Second)
		for _, order := range [][]saved{{old, newer, federated}, {federated, newer, old}} {
			c := NewCache(CacheOptions{})
			n, err := c.Restore(encode(order...))
			if n != 2 || err != nil || !held(c, request) || !held(c, federated.request) {
				t.Errorf("%d, %v, %v", n, err, c.Status())
			}
		}
	})
}

func encode(all ...saved) []byte {
	b := []byte(snapshotForm)
	for _, s := range all {
		b = s.append(b)
	}
	return b
}

func TestRestoreRefuses(t *testing.T) {
	now := time.Now()
	good := saved{request: request, token: Token{Value: "ya29.secret", Minted: now, Expires: now.Add(time.Hour)},
		asked: now}
	with := func(change func(*saved)) []byte {
		s := good
		change(&s)
		return encode(s)
	}
	whole := encode(good)
	cases := map[string][]byte{
		"nothing":               nil,
		"another form":          []byte(strings.Replace(string(whole), "tokens 1", "tokens 2", 1)),
		"the same twice":        encode(good, good),
		"a byte too many":       append(slices.Clone(whole), 0),
		"an unknown flag":       append(append([]byte(snapshotForm), 0x80), whole[len(snapshotForm)+1:]...),
		"too long":              append(slices.Clone(whole), make([]byte, LongestSnapshot)...),
		"no token":              with(func(s *saved) { s.token.Value = "" }),
		"a header in the token": with(func(s *saved) { s.token.Value = "a\r\nSet-Cookie: b" }),
		"never minted":          with(func(s *saved) { s.token.Minted = time.Time{} }),
		"expired when minted":   with(func(s *saved) { s.token.Expires = now }),
		"no end":                with(func(s *saved) { s.token.Expires = now.Add(maxLife + 1) }),
		"the end of time": with(func(s *saved) {
			s.token.Minted, s.token.Expires = time.Unix(0, -1<<63),
				time.Unix(0, 1<<63-1)
		}),
		"nobody's":               with(func(s *saved) { s.request.ServiceAccount = workload.ServiceAccount{} }),
		"no namespace":           with(func(s *saved) { s.request.ServiceAccount.Namespace = "" }),
		"no scopes":              with(func(s *saved) { s.request.Scopes = "" }),
		"scopes as a pod writes": with(func(s *saved) { s.request.Scopes = "b,a" }),
		"scopes and an audience": with(func(s *saved) { s.request.Audience = "x" }),
		"federated for somebody": with(func(s *saved) { s.request.federated = true }),
		"federated, default form": with(func(s *saved) {
			s.request = Request{ServiceAccount: ana, Scopes: defaultScopes,
				federated: true}
		}),
	}
	for i := len(snapshotForm) + 1; i < len(whole); i++ {
		cases[fmt.Sprintf("cut after %d bytes", i)] = whole[:i]
	}
	for i := range len(snapshotForm) {
		cases[fmt.Sprintf("cut after %d bytes", i)] = whole[:i]
	}
	for name, snapshot := range cases {
		c := NewCache(CacheOptions{})
		n, err := c.Restore(snapshot)
		if n != 0 || err == nil || len(c.entries) != 0 {
			t.Errorf("%s: restored %d, %v", name, n, err)
		}
		if err != nil && strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: a token is in the error", name)
		}
	}
	if n, err := NewCache(CacheOptions{}).Restore(whole); n != 1 || err != nil {
		t.Errorf("the one that they are made of: %d, %v", n, err)
	}
}

// What does not fit is left out, those first that nobody asked for in a long time.
func TestSnapshotIsBounded(t *testing.T) {
	c := NewCache(CacheOptions{})
	now := time.Now()
	_, requests := crowd(5000)
	for i, r := range requests {
		e := &entry{request: r, asked: now.Add(-time.Duration(i) * time.Second), prefetched: i == len(requests)-1}
		e.setToken(Token{Value: strings.Repeat("x", 2000), Minted: now, Expires: now.Add(time.Hour)}, now)
		c.entries[r] = e
	}
	snapshot := c.Snapshot()
	if n := len(snapshot); n > LongestSnapshot || n < LongestSnapshot-4096 {
		t.Errorf("%d bytes", n)
	}
	next, _, n := successor(t, c)
	if last := requests[n-2]; !held(next, requests[len(requests)-1]) || !held(next, last) || held(next, requests[n]) {
		t.Errorf("%d restored, and not the right ones", n)
	}
}

func TestChanges(t *testing.T) {
	s := &fakeSource{lifetime: time.Hour}
	withoutRun(t, CacheOptions{Source: s}, func(t *testing.T, c *Cache) {
		step := func(what string, want bool, do func()) {
			t.Helper()
			do()
			synctest.Wait()
			got := false
			select {
			case <-c.Changes():
				got = true
			default:
			}
			if got != want {
				t.Errorf("%s: a change: %v, want %v", what, got, want)
			}
		}
		var minted Token
		step("nothing", false, func() {})
		step("a mint", true, func() { minted = must(t, c, request) })
		step("a hit", false, func() { must(t, c, request) })
		step("prefetched from now on", true, func() { c.Prefetch(request) })
		step("prefetched as ever", false, func() { c.Prefetch(request) })
		step("in use", false, func() { c.Use([]workload.ServiceAccount{ana}) })
		step("forgotten", true, func() { c.Forget(request, minted) })
		step("a mint again", true, func() { must(t, c, request) })
		step("out of use", true, func() { c.Use(nil) })
		s.become(func(s *fakeSource) { s.err = ErrUnavailable })
		step("trouble", false, func() { _, _ = c.Token(t.Context(), request) })
	})
}

// FuzzRestore: whatever lies in the memfd, what is taken over are tokens that can be issued,
// and a snapshot of them holds the same.
func FuzzRestore(f *testing.F) {
	now := time.Unix(1767225600, 0) // the seeds in testdata were written a moment before
	f.Fuzz(func(t *testing.T, b []byte) {
		c := NewCache(CacheOptions{})
		n, err := c.restore(b, now)
		if err != nil && n != 0 || n != len(c.entries) {
			t.Fatalf("%d, %v, with %d entries", n, err, len(c.entries))
		}
		for r, e := range c.entries {
			if !printable(e.token.Value) || !now.Before(e.usableUntil) || e.token.Minted.After(now) ||
				lifetime(e.token) > maxLife || e.request != r || e.asked.After(now) {
				t.Errorf("%+v: %v", r, e.token)
			}
		}
		next := NewCache(CacheOptions{})
		if again, err := next.restore(c.snapshot(now), now); again != n || err != nil {
			t.Fatalf("of %d tokens %d came through: %v", n, again, err)
		}
		same := func(a, b *entry) bool {
			return a.token.Value == b.token.Value && a.token.Minted.Equal(b.token.Minted) &&
				a.token.Expires.Equal(b.token.Expires) &&
				a.asked.Equal(b.asked) && a.prefetched == b.prefetched
		}
		if !maps.EqualFunc(c.entries, next.entries, same) {
			t.Error("the tokens changed on the way")
		}
	})
}

// full is a Cache with n tokens of the length that Google's have.
func full(n int) *Cache {
	c, now := NewCache(CacheOptions{}), time.Now()
	_, requests := crowd(n)
	for _, r := range requests {
		e := &entry{request: r, asked: now, prefetched: true}
		e.setToken(Token{Value: strings.Repeat("x", 1024), Minted: now, Expires: now.Add(time.Hour)}, now)
		c.entries[r] = e
	}
	return c
}

func BenchmarkSnapshot(b *testing.B) {
	for _, n := range []int{100, 500} {
		c := full(n)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				c.Snapshot()
			}
			b.ReportMetric(float64(len(c.Snapshot())), "B/snapshot")
		})
	}
}

func BenchmarkRestore(b *testing.B) {
	for _, n := range []int{100, 500} {
		snapshot := full(n).Snapshot()
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if got, err := NewCache(CacheOptions{}).Restore(snapshot); got != n || err != nil {
					b.Fatal(got, err)
				}
			}
		})
	}
}

// BenchmarkHitBesideSnapshots is BenchmarkHit while somebody takes a snapshot of 500 tokens after
// another, a thousand times as often as the service does.
func BenchmarkHitBesideSnapshots(b *testing.B) {
	c := full(500)
	_, requests := crowd(1)
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	go func() {
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				c.Snapshot()
			case <-ctx.Done():
				return
			}
		}
	}()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Ask(ctx, "pod", requests[0]); err != nil {
			b.Fatal(err)
		}
	}
}
