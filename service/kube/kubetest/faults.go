package kubetest

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Fault is something that goes wrong with matching requests.
type Fault struct {
	Verb, Resource string          // "" = any; for example "create", "serviceaccounts/token"
	Latency        time.Duration   // before anything else happens
	Hold           <-chan struct{} // nothing happens until it is closed
	Code           int             // answer this status instead: 410, 429, 500, 503, …
	Message        string          // of that status; "" = one of ours
	RetryAfter     int             // seconds, with 429 and 503
	Truncate       bool            // cut the body in half
	Abort          bool            // end the stream without an answer
	Times          int             // 0 = until cleared
}

// Inject switches a fault on and returns what switches it off. The oldest that matches a request
// applies to it.
func (s *Server) Inject(f Fault) (clear func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := &f
	s.faults = append(s.faults, p)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.faults = slices.DeleteFunc(s.faults, func(g *Fault) bool { return g == p })
	}
}

// faultFor is called with s.mu held.
func (s *Server) faultFor(q *request) *Fault {
	for i, f := range s.faults {
		if (f.Verb != "" && f.Verb != q.verb) || (f.Resource != "" && f.Resource != q.kind()) {
			continue
		}
		if f.Times > 0 {
			if f.Times--; f.Times == 0 {
				s.faults = slices.Delete(s.faults, i, i+1)
			}
		}
		c := *f
		return &c
	}
	return nil
}

// apply does what the fault says and reports whether the request goes on.
func (f *Fault) apply(stopped, asked context.Context, a *answerer) bool {
	if f.Latency > 0 {
		t := time.NewTimer(f.Latency)
		defer t.Stop()
		select {
		case <-t.C:
		case <-asked.Done():
			return false
		case <-stopped.Done():
			return false
		}
	}
	if f.Hold != nil {
		select {
		case <-f.Hold:
		case <-asked.Done():
			return false
		case <-stopped.Done():
			return false
		}
	}
	a.truncate = f.Truncate
	switch {
	case f.Abort:
		panic(http.ErrAbortHandler) // net/http's way to reset a stream
	case f.Code != 0:
		a.fail(f.status())
		return false
	}
	return true
}

func (f *Fault) status() error {
	st := metav1.Status{Status: metav1.StatusFailure, Code: int32(f.Code),
		Message: fmt.Sprintf("kubetest: injected %d", f.Code),
		Details: &metav1.StatusDetails{RetryAfterSeconds: int32(f.RetryAfter)}}
	if f.Message != "" {
		st.Message = f.Message
	}
	switch f.Code {
	case http.StatusForbidden:
		st.Reason = metav1.StatusReasonForbidden
	case http.StatusUnauthorized:
		st.Reason = metav1.StatusReasonUnauthorized
	case http.StatusGone:
		st.Reason = metav1.StatusReasonExpired
	case http.StatusTooManyRequests:
		st.Reason = metav1.StatusReasonTooManyRequests
	case http.StatusInternalServerError:
		st.Reason = metav1.StatusReasonInternalError
	case http.StatusServiceUnavailable:
		st.Reason = metav1.StatusReasonServiceUnavailable
	case http.StatusGatewayTimeout:
		st.Reason = metav1.StatusReasonTimeout
	}
	return &apierrors.StatusError{ErrStatus: st}
}

// Refuse makes the server unreachable: every connection is closed, and so is every new one. The
// listener stays, so the port is kept.
func (s *Server) Refuse() { s.listener.set(true) }

// Accept ends Refuse.
func (s *Server) Accept() { s.listener.set(false) }

// gate is a listener that can be shut.
type gate struct {
	net.Listener
	mu   sync.Mutex
	shut bool
	open map[net.Conn]struct{}
}

func (g *gate) Accept() (net.Conn, error) {
	for {
		c, err := g.Listener.Accept()
		if err != nil {
			return nil, err
		}
		g.mu.Lock()
		if g.shut {
			g.mu.Unlock()
			reset(c)
			continue
		}
		t := &tracked{Conn: c, gate: g}
		g.open[t] = struct{}{}
		g.mu.Unlock()
		return t, nil
	}
}

func (g *gate) set(shut bool) {
	g.mu.Lock()
	g.shut = shut
	g.mu.Unlock()
	if shut {
		g.closeAll()
	}
}

func (g *gate) closeAll() {
	g.mu.Lock()
	var cs []net.Conn
	for c := range g.open {
		cs = append(cs, c)
	}
	g.mu.Unlock()
	for _, c := range cs {
		reset(c.(*tracked).Conn)
	}
}

// reset answers with RST, as a port does that nobody listens on.
func reset(c net.Conn) {
	if t, is := c.(*net.TCPConn); is {
		_ = t.SetLinger(0) // worst case it is a FIN
	}
	_ = c.Close() // it may be closed already
}

type tracked struct {
	net.Conn
	gate *gate
}

func (t *tracked) Close() error {
	t.gate.mu.Lock()
	delete(t.gate.open, t)
	t.gate.mu.Unlock()
	return t.Conn.Close()
}
