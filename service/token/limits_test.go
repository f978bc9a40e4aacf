package token

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// limited asks for the pod, and wants it to be over the limit.
func limited(t *testing.T, c *Cache, podUID string, r Request, limit string, value int) {
	t.Helper()
	_, err := c.Ask(t.Context(), podUID, r)
	var over *LimitError
	if !errors.As(err, &over) || *over != (LimitError{limit, value}) {
		t.Errorf("error %v, want one of limits.%s", err, limit)
	} else if !strings.Contains(err.Error(), fmt.Sprintf("limits.%s (%d)", limit, value)) {
		t.Errorf("%q does not name the limit", err)
	}
}

func ask(t *testing.T, c *Cache, podUID string, r Request) {
	t.Helper()
	if _, err := c.Ask(t.Context(), podUID, r); err != nil {
		t.Errorf("%s asks: %v", podUID, err)
	}
}

func audience(i int) Request { return IDToken(ana, gana, fmt.Sprintf("https://service%d", i)) }

func TestMintsPerPod(t *testing.T) {
	s := &fakeSource{lifetime: time.Hour}
	inBubble(t, CacheOptions{Source: s, MintsPerPod: 2}, func(t *testing.T, c *Cache) {
		ask(t, c, "pod", request)
		s.become(func(s *fakeSource) { s.takes = 10 * time.Second })
		var g sync.WaitGroup
		for i := range 2 {
			g.Go(func() { ask(t, c, "pod", audience(i)) })
		}
		later(time.Second)
		limited(t, c, "pod", audience(2), "mintsPerPod", 2)
		ask(t, c, "pod", request)                          // what is cached costs nothing,
		g.Go(func() { ask(t, c, "pod", audience(1)) })     // nor does what is under way anyhow;
		g.Go(func() { ask(t, c, "another", audience(2)) }) // another pod has limits of its own,
		g.Go(func() { ask(t, c, "", audience(3)) })        // and nobody has none
		g.Wait()
		ask(t, c, "pod", audience(4))
		if n := s.count(); n != 6 {
			t.Errorf("%d mints, want 6", n)
		}
	})
}

func TestOverALimitTheOldTokenServes(t *testing.T) {
	s := &fakeSource{lifetime: time.Hour}
	withoutRun(t, CacheOptions{Source: s, MintsPerPod: 1}, func(t *testing.T, c *Cache) {
		ask(t, c, "pod", request)
		later(55 * time.Minute)
		s.become(func(s *fakeSource) { s.hangs = true })
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, _ = c.Ask(ctx, "pod", audience(1))
		ask(t, c, "pod", request)
	})
}

func TestKeysPerPod(t *testing.T) {
	s := &fakeSource{lifetime: time.Hour}
	inBubble(t, CacheOptions{Source: s, KeysPerPod: 3}, func(t *testing.T, c *Cache) {
		for i := range 3 {
			ask(t, c, "pod", audience(i))
		}
		later(time.Second)
		ask(t, c, "pod", audience(0))
		ask(t, c, "pod", audience(2))
		ask(t, c, "pod", audience(3)) // in the place of 1, which nobody asked for again
		if n := s.count(); n != 4 || len(c.Status()) != 3 || c.usage["pod"].keys != 3 {
			t.Errorf("%d mints and %d tokens, want 4 and 3", n, len(c.Status()))
		}
		for _, i := range []int{0, 2, 3} {
			ask(t, c, "pod", audience(i))
		}
		ask(t, c, "another", audience(4))
		ask(t, c, "pod", audience(4)) // which another pays for
		if n := s.count(); n != 5 || len(c.Status()) != 4 {
			t.Errorf("%d mints and %d tokens, want 5 and 4", n, len(c.Status()))
		}
		for i := range 100 { // more and more, and no more are held
			ask(t, c, "pod", audience(10+i))
		}
		if n := len(c.Status()); n != 4 || c.usage["pod"].keys != 3 {
			t.Errorf("%d tokens and %d keys, want 4 and 3", n, c.usage["pod"].keys)
		}
	})
}

// A token that is being minted is nobody's place.
func TestKeysInFlight(t *testing.T) {
	s := &fakeSource{lifetime: time.Hour, takes: time.Second}
	inBubble(t, CacheOptions{Source: s, KeysPerPod: 2}, func(t *testing.T, c *Cache) {
		var g sync.WaitGroup
		for i := range 2 {
			g.Go(func() { ask(t, c, "pod", audience(i)) })
		}
		synctest.Wait()
		limited(t, c, "pod", audience(2), "keysPerPod", 2)
		g.Wait()
		ask(t, c, "pod", audience(2))
	})
}

// A pod that makes up scopes which Google refuses holds keys for as long as the refusals are shown.
func TestKeysOfRefusals(t *testing.T) {
	s := &fakeSource{err: google("IAM", 400, "INVALID_ARGUMENT")}
	inBubble(t, CacheOptions{Source: s, KeysPerPod: 2}, func(t *testing.T, c *Cache) {
		for i := range 2 {
			_, _ = c.Ask(t.Context(), "pod", audience(i))
		}
		limited(t, c, "pod", audience(2), "keysPerPod", 2)
		later(showError + time.Second)
		if n := len(c.Status()); n != 0 || len(c.usage) != 0 {
			t.Errorf("%d entries and %d usages are left", n, len(c.usage))
		}
	})
}

func TestK04OnlyWhatLivePodsUseIsHeld(t *testing.T) {
	s := &fakeSource{lifetime: time.Hour}
	bob := workload.ServiceAccount{Namespace: "team", Name: "bob"}
	inBubble(t, CacheOptions{Source: s, KeysPerPod: 10}, func(t *testing.T, c *Cache) {
		c.Use([]workload.ServiceAccount{ana, bob})
		c.Prefetch(request)
		ask(t, c, "pod", AccessToken(bob, gana, nil))
		ask(t, c, "pod", IDToken(bob, gana, "x"))
		must(t, c, federatedToken(bob, cloudPlatform))
		c.Use([]workload.ServiceAccount{ana})
		if status := c.Status(); len(status) != 1 || status[0].ServiceAccount != ana.String() {
			t.Errorf("held: %+v", status)
		}
		if len(c.usage) != 0 {
			t.Errorf("%d usages are left", len(c.usage))
		}

		// A pod that goes while its mint is under way still gets its token, and nothing is held.
		s.become(func(s *fakeSource) { s.takes = time.Second })
		var g sync.WaitGroup
		g.Go(func() { ask(t, c, "pod", AccessToken(bob, gana, nil)) })
		later(500 * time.Millisecond)
		c.Use([]workload.ServiceAccount{ana})
		g.Wait()
		if n := len(c.Status()); n != 1 || len(c.usage) != 0 {
			t.Errorf("%d entries and %d usages are left", n, len(c.usage))
		}

		// Who asks before Use has heard of its ServiceAccount gets a token, which is held for a minute in
		// case it does.
		ask(t, c, "pod", AccessToken(bob, gana, nil))
		later(unusedTTL - 2*time.Second) // of which the mint took one
		if !held(c, AccessToken(bob, gana, nil)) {
			t.Error("gone too early")
		}
		later(2 * time.Second)
		if held(c, AccessToken(bob, gana, nil)) {
			t.Error("held for a ServiceAccount that no live pod uses")
		}
		c.Use(nil)
		later(time.Second)
		if n := len(c.Status()); n != 0 {
			t.Errorf("%d entries are left of a node without pods", n)
		}
	})
}

// A pod that holds all the keys it may still gets newer tokens for them.
func TestAKeyIsPaidForOnce(t *testing.T) {
	s := &fakeSource{lifetime: time.Hour}
	withoutRun(t, CacheOptions{Source: s, KeysPerPod: 1}, func(t *testing.T, c *Cache) {
		ask(t, c, "pod", request)
		later(2 * time.Hour)
		ask(t, c, "pod", request)
		if n := s.count(); n != 2 {
			t.Errorf("%d mints, want 2", n)
		}
	})
}

// Pods that come and go do not leave their tokens behind without end: the one that nobody has asked
// for for the longest time makes room. Tokens that count for no pod stay.
func TestEntriesOfAllPodsAreBounded(t *testing.T) {
	s := &fakeSource{lifetime: time.Hour}
	withoutRun(t, CacheOptions{Source: s, KeysPerPod: 64}, func(t *testing.T, c *Cache) {
		must(t, c, request)
		later(time.Second)
		ask(t, c, "first pod", audience(0))
		later(time.Second)
		for i := 1; len(c.entries) < maxEntries; i++ { // as asks would, which take longer
			e := &entry{request: audience(i), owner: fmt.Sprint("pod ", i/64), asked: time.Now()}
			e.setToken(Token{Value: "value", Minted: time.Now(), Expires: time.Now().Add(time.Hour)}, time.Now())
			c.entries[e.request] = e
			c.usage[e.owner] = &usage{keys: 64}
		}
		ask(t, c, "last pod", audience(maxEntries))
		if n := len(c.entries); n > maxEntries {
			t.Errorf("%d entries", n)
		}
		if held(c, audience(0)) || !held(c, request) || !held(c, audience(maxEntries)) {
			t.Error("it was not the oldest entry of a pod that made room")
		}
		if c.usage["first pod"] != nil {
			t.Error("a key that was dropped still counts")
		}
	})
}
