package dns

import (
	"errors"
	"hash/maphash"
	"net"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"golang.org/x/time/rate"
)

const (
	// buckets bound the memory of the rate limit, whatever source addresses packets have. Clients
	// share them by a hash that nobody can guess.
	buckets = 1024
	// One look-up of a client is ten queries with a search list of four domains, and 64 programs of a
	// pod may start at once.
	perSecond = 200
	burst     = 1000

	longestQuery = 4096 // longer ones are cut, and then malformed
)

// Options are what a Server needs.
type Options struct {
	IPv6       func() bool // whether the metadata server is served by IPv6 too
	Log        logrus.FieldLogger
	Registerer prometheus.Registerer
}

// Server answers on sockets. It writes to nobody who did not ask, and keeps nothing about clients
// but how often they ask.
type Server struct {
	Options
	seed    maphash.Seed
	limits  [buckets]*rate.Limiter
	queries map[Outcome]prometheus.Counter
}

// New returns a Server and registers its metric.
func New(o Options) *Server {
	s := &Server{Options: o, seed: maphash.MakeSeed(), queries: map[Outcome]prometheus.Counter{}}
	for i := range s.limits {
		s.limits[i] = rate.NewLimiter(perSecond, burst)
	}
	counters := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "gke_metadata_emulator_dns_queries_total",
		Help: "DNS queries that pods sent for metadata.google.internal, by outcome: address, empty, nxdomain, refused, " +
			"malformed, limited.",
	}, []string{"outcome"})
	for _, outcome := range Outcomes {
		s.queries[outcome] = counters.WithLabelValues(string(outcome))
	}
	o.Registerer.MustRegister(counters)
	return s
}

// Serve answers what arrives on the socket until that is closed. An error of one packet is no
// reason to leave the others without an answer.
func (s *Server) Serve(c *net.UDPConn) {
	query := make([]byte, longestQuery)
	logged := ""
	for {
		n, from, err := c.ReadFromUDPAddrPort(query)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			if text := err.Error(); text != logged {
				logged = text
				s.Log.WithError(err).Warn("dns: a query cannot be read")
			}
			time.Sleep(10 * time.Millisecond) // such as ENOMEM: it must not use the processor
			continue
		}
		if answer := s.answer(query[:n], from.Addr()); answer != nil {
			_, _ = c.WriteToUDPAddrPort(answer, from) // a client that has gone, or asks again
		}
	}
}

// answer is that to one client, nil if it gets none.
func (s *Server) answer(query []byte, from netip.Addr) []byte {
	if !s.limits[maphash.Comparable(s.seed, from.Unmap())%buckets].Allow() {
		s.queries[Limited].Inc()
		return nil
	}
	answer, outcome := Answer(query, s.IPv6())
	s.queries[outcome].Inc()
	return answer
}
