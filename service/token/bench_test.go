package token

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
)

func BenchmarkHit(b *testing.B) {
	c := NewCache(CacheOptions{Source: &fakeSource{lifetime: time.Hour}, MintsPerPod: 16, KeysPerPod: 64})
	ctx := b.Context()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Ask(ctx, "pod", request); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkHitParallel(b *testing.B) {
	c := NewCache(CacheOptions{Source: &fakeSource{lifetime: time.Hour}, MintsPerPod: 16, KeysPerPod: 64})
	ctx := b.Context()
	b.ReportAllocs()
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			if _, err := c.Ask(ctx, "pod", request); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

// far is a Google that takes 50 ms to answer, and linked ServiceAccounts.
func far(t testing.TB, n int) (*world, []Request) {
	t.Helper()
	w := newWorld(t)
	for _, m := range googletest.Methods {
		w.google.Break(m, googletest.Fault{Latency: 50 * time.Millisecond})
	}
	var requests []Request
	for i := range n {
		sa, a := w.linked("team", fmt.Sprintf("sa%d", i))
		requests = append(requests, AccessToken(sa, a, nil))
	}
	return w, requests
}

// G-07: one exchange and one impersonation each, whatever else asks meanwhile.
func TestG07AHundredServiceAccounts(t *testing.T) {
	w, requests := far(t, 100)
	w.cache.Prefetch(requests...)
	for _, r := range requests[:20] {
		if _, err := w.cache.Token(t.Context(), r); err != nil {
			t.Error(err)
		}
	}
	w.cache.Prefetch(requests...)
	w.cache.Drain(t.Context())
	for _, r := range requests {
		got, err := w.cache.Token(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		if issued, _ := w.google.Lookup(got.Value); issued.Subject != r.ServiceAccount.Subject() ||
			issued.Email != r.Account.GoogleEmail {
			t.Errorf("%s got the token of %+v", r.ServiceAccount, issued)
		}
	}
	w.calls(t, 100, 100, 0)
}

// BenchmarkReady is how long a node with 100 ServiceAccounts takes until all their tokens are
// there, 50 ms from Google.
func BenchmarkReady(b *testing.B) {
	for b.Loop() {
		b.StopTimer()
		w, requests := far(b, 100)
		b.StartTimer()
		w.cache.Prefetch(requests...)
		w.cache.Drain(context.Background())
		b.StopTimer()
		if n, m := w.google.Calls(googletest.Exchange), w.google.Calls(googletest.GenerateAccessToken); n != 100 || m != 100 {
			b.Errorf("%d exchanges and %d impersonations, want 100 of each", n, m)
		}
		w.google.Close()
		b.StartTimer()
	}
}
