package server

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/sirupsen/logrus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
)

// paced is a Server that answers ten requests of each party a second.
func paced(t *testing.T) (*Server, context.Context) {
	log := logrus.New()
	log.SetOutput(io.Discard)
	s, ctx := newHandler(t, log)
	active := *s.active.Load()
	active.RequestsPerPod = 10
	s.Activate(&active)
	return s, ctx
}

// joins is another connection, of the party with that address.
func joins(s *Server, address string) *connection {
	c := &connection{peer: new(attest.Peer)}
	c.party.Address = netip.MustParseAddr(address)
	s.connections.enter(c)
	s.connections.settle(c)
	return c
}

func (s *Server) delays(t *testing.T) float64 {
	var m dto.Metric
	if err := s.metrics.delayed.Write(&m); err != nil {
		t.Fatal(err)
	}
	return m.GetCounter().GetValue()
}

// A party that asks faster than it may waits for its turn, loses nothing, and holds nobody else up.
func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, ctx := paced(t)
		ask := func(c *connection) error {
			return s.pace(&request{Request: get169(t, ctx, "/"), connection: c}, nil)
		}
		greedy, start := joins(s, "192.0.2.1"), time.Now()
		var all sync.WaitGroup
		for range 40 {
			all.Go(func() {
				if err := ask(greedy); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		if err := ask(joins(s, "192.0.2.2")); err != nil || time.Since(start) != 0 {
			t.Errorf("another party waited for %v: %v", time.Since(start), err)
		}
		all.Wait()
		if took := time.Since(start).Round(time.Millisecond); took != 3*time.Second || s.delays(t) != 30 {
			t.Errorf("40 requests took %v, and %v waited", took, s.delays(t))
		}

		// Who leaves makes room, and gets no new burst by coming again.
		ctx, leave := context.WithCancel(ctx)
		left := make(chan error)
		go func() { left <- s.pace(&request{Request: get169(t, ctx, "/"), connection: greedy}, nil) }()
		synctest.Wait()
		leave()
		if err := <-left; !errors.Is(err, context.Canceled) {
			t.Errorf("a client that left: %v", err)
		}
		ctx = t.Context()
		s.connections.leave(greedy)
		again, start := joins(s, "192.0.2.1"), time.Now()
		if err := ask(again); err != nil || time.Since(start) == 0 {
			t.Errorf("a client that came again waited for %v: %v", time.Since(start), err)
		}

		// Another configuration is in force at once; the end of the service too.
		active := *s.active.Load()
		active.RequestsPerPod = 1
		s.Activate(&active)
		for range 5 {
			all.Go(func() {
				if err := ask(again); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		start = time.Now()
		s.Drain()
		all.Wait()
		if took := time.Since(start); took != 0 {
			t.Errorf("the end of the service came %v late", took)
		}
	})
}

// Nothing is kept of a party that is gone.
func TestPaceForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, ctx := paced(t)
		parties := func() int {
			s.connections.mu.Lock()
			defer s.connections.mu.Unlock()
			return len(s.connections.parties)
		}
		before := parties()
		for range 3 {
			c := joins(s, "192.0.2.1")
			for range 5 {
				if err := s.pace(&request{Request: get169(t, ctx, "/"), connection: c}, nil); err != nil {
					t.Fatal(err)
				}
			}
			s.connections.leave(c)
		}
		if n := parties(); n != before+1 {
			t.Errorf("%d parties while the last one's requests count", n-before)
		}
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if n := parties(); n != before {
			t.Errorf("%d parties are left", n-before)
		}
	})
}

// A request that waits for a change looks no more often than it may ask, however often something
// changes, and ends in time.
func TestPaceOfLongPolls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, ctx := paced(t)
		looks := 0
		always, never := make(chan struct{}), make(chan struct{})
		close(always)
		active := *s.active.Load()
		active.Superseded = never
		active.Changes = func() <-chan struct{} {
			if looks++; looks > 1000 {
				return never
			}
			return always
		}
		s.Activate(&active)
		now, start := discardResponse(http.Header{}), time.Now()
		s.ServeHTTP(now, get169(t, ctx, accts+"default/email"))
		s.ServeHTTP(discardResponse(http.Header{}), get169(t, ctx,
			accts+"default/email?wait_for_change=true&timeout_sec=3&last_etag="+now["Etag"][0]))
		if took := time.Since(start).Round(time.Second); took != 3*time.Second || looks > 42 || looks < 30 {
			t.Errorf("%d looks in %v", looks, took)
		}
	})
}
