package googletest

import (
	"maps"
	"net/http"
	"strconv"
	"time"
)

// Method is one of the server's three methods.
type Method string

const (
	Exchange            Method = "token"
	GenerateAccessToken Method = "generateAccessToken"
	GenerateIDToken     Method = "generateIdToken"
)

// Methods are all of them.
var Methods = []Method{Exchange, GenerateAccessToken, GenerateIDToken}

// Fault is what goes wrong with a method. Latency applies alone or before another fault. Of the
// other faults the first that is set applies.
type Fault struct {
	Times   int // number of requests; 0: all until Heal
	Latency time.Duration

	Drop     bool   // the connection is cut without an answer
	Truncate bool   // half of the right answer, then the connection is cut
	Status   int    // this status instead of an answer, in Google's form
	Message  string // with Status: the message
	Body     string // with Status: this body. "%TOKEN%" in it becomes the secret of the request
	Header   http.Header

	RetryAfter time.Duration // with Status
}

// Break sets the method's fault, in place of any other.
func (s *Server) Break(m Method, f Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults[m] = &f
}

// Heal ends all faults.
func (s *Server) Heal() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.faults)
}

// called counts a request, and returns the fault that applies to it.
func (s *Server) called(m Method) Fault {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls[m]++
	f := s.faults[m]
	if f == nil {
		return Fault{}
	}
	if f.Times > 0 {
		if f.Times--; f.Times == 0 {
			delete(s.faults, m)
		}
	}
	return *f
}

func (f Fault) response(m Method) response {
	header := http.Header{}
	maps.Copy(header, f.Header)
	if f.RetryAfter > 0 {
		header.Set("Retry-After", strconv.Itoa(int(f.RetryAfter.Seconds())))
	}
	r := response{status: f.Status, header: header}
	message := f.Message
	if message == "" {
		message = http.StatusText(f.Status)
	}
	switch {
	case f.Body != "":
		r.raw = f.Body
	case m == Exchange:
		r.body = map[string]string{"error": "fault", "error_description": message}
	default:
		r.body = iamError(f.Status, iamStatus(f.Status), message).body
	}
	return r
}

// iamStatus is google.rpc.Code's name for an HTTP status.
func iamStatus(code int) string {
	switch code {
	case http.StatusBadRequest:
		return "INVALID_ARGUMENT"
	case http.StatusUnauthorized:
		return "UNAUTHENTICATED"
	case http.StatusForbidden:
		return "PERMISSION_DENIED"
	case http.StatusNotFound:
		return "NOT_FOUND"
	case http.StatusTooManyRequests:
		return "RESOURCE_EXHAUSTED"
	case http.StatusServiceUnavailable:
		return "UNAVAILABLE"
	case http.StatusGatewayTimeout:
		return "DEADLINE_EXCEEDED"
	}
	return "INTERNAL"
}
