package server

import (
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/metadata"
)

// metrics are what the server counts. Labels are bounded: a path of the tree, in which an account
// is `*`, never the path that was asked for, and never an address.
type metrics struct {
	requests *prometheus.CounterVec
	refused  *prometheus.CounterVec
	latency  *prometheus.HistogramVec

	strangers atomic.Uint64 // requests of processes that are no pods and have no identity, doctor's among them

	delayed prometheus.Counter

	ipv6 atomic.Uint64 // requests for anything but `/` that came by IPv6

	mu     sync.RWMutex
	series map[outcome]series
}

func newMetrics(r prometheus.Registerer, connections *admission) *metrics {
	m := &metrics{
		series: map[outcome]series{},
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "gke_metadata_emulator_requests_total",
			Help: "Requests of pods by path in the metadata tree and by status; 499: the client left before the answer.",
		}, []string{"path", "code"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "gke_metadata_emulator_requests_refused_total",
			Help: "Requests of pods that were not answered with what they asked for, by reason.",
		}, []string{"reason"}),
		latency: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "gke_metadata_emulator_request_duration_seconds",
			Help: "Time from the header of a request to its answer, with the wait of unknown pods, that for " +
				"limits.requestsPerPod, and with long polls.",
			Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
		}, []string{"path"}),
		delayed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "gke_metadata_emulator_requests_delayed_total",
			Help: "Requests of pods, and looks for a change that wait_for_change has, that waited for limits.requestsPerPod.",
		}),
	}
	for _, r := range everyReason() {
		m.refused.WithLabelValues(r)
	}
	const closedHelp = "Connections of pods that were closed since too many were open, by outcome: those that made room " +
		"(idle ones, or else those of the client that has most), and new ones that found none."
	r.MustRegister(m.requests, m.refused, m.latency, m.delayed,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "gke_metadata_emulator_connections",
			Help: "Open connections of pods.",
		}, func() float64 { return float64(connections.open()) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name:        "gke_metadata_emulator_connections_closed_total",
			Help:        closedHelp,
			ConstLabels: prometheus.Labels{"outcome": "made-room"},
		}, func() float64 { return float64(connections.evicted.Load()) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name:        "gke_metadata_emulator_connections_closed_total",
			Help:        closedHelp,
			ConstLabels: prometheus.Labels{"outcome": "no-room"},
		}, func() float64 { return float64(connections.refused.Load()) }))
	return m
}

// passthroughPath is the path of requests that another cloud's server answers.
const passthroughPath = "passthrough"

// expect makes the counters of the tree's paths, so that a rate over time sees the first request.
// Of the statuses there are those that a pod may have to do without its token for.
func (m *metrics) expect(tree *metadata.Tree) {
	for _, path := range append(tree.Labels(), metadata.Unknown, passthroughPath) {
		for _, status := range []int{http.StatusOK, http.StatusForbidden, http.StatusNotFound,
			http.StatusServiceUnavailable} {
			m.requests.WithLabelValues(path, strconv.Itoa(status))
		}
	}
}

func (m *metrics) served(path string, status int, took time.Duration) {
	k := outcome{path, status}
	m.mu.RLock()
	s, ok := m.series[k]
	m.mu.RUnlock()
	if !ok {
		s = series{m.requests.WithLabelValues(path, strconv.Itoa(status)), m.latency.WithLabelValues(path)}
		m.mu.Lock()
		m.series[k] = s
		m.mu.Unlock()
	}
	s.Inc()
	s.Observe(took.Seconds())
}

// asked is how many requests of pods there were for anything but `/`, which our own probes, and
// doctor's, ask for too.
func (m *metrics) asked() (n uint64) {
	strangers := m.strangers.Load() // first: each of them is counted in the series before
	m.mu.RLock()
	defer m.mu.RUnlock()
	for k, s := range m.series {
		var now dto.Metric
		if k.path != "/" && s.Write(&now) == nil {
			n += uint64(now.GetCounter().GetValue())
		}
	}
	return n - strangers
}

// series are found by outcome: to have the vectors hash labels costs more than to count.
type series struct {
	prometheus.Counter
	prometheus.Observer
}

type outcome struct {
	path   string
	status int
}
