package server

import (
	"time"

	"golang.org/x/time/rate"
)

// pace returns when the request's party may have an answer, by limits.requestsPerPod: who asks
// faster waits in its own connection, and nothing is refused or lost. The wait holds nothing that
// others need. It ends early at over, and when the service stops. An error says that the client
// left.
func (s *Server) pace(req *request, over <-chan struct{}) error {
	if req.usage == nil || req.usage.requests == nil { // our own connection
		return nil
	}
	l := req.usage.requests
	if n := s.requestLimit(); l.Burst() != n { // the configuration changed
		l.SetBurst(n)
		l.SetLimit(rate.Limit(n))
	}
	if l.Allow() {
		return nil
	}
	s.metrics.delayed.Inc()
	turn := l.Reserve()
	t := time.NewTimer(turn.Delay())
	defer t.Stop()
	select {
	case <-t.C:
	case <-over:
		turn.Cancel()
	case <-s.draining:
	case <-req.Context().Done():
		turn.Cancel()
		return req.Context().Err()
	}
	return nil
}
