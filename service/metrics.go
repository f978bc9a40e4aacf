package service

import (
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	dto "github.com/prometheus/client_model/go"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
)

// metrics are what the server itself counts; kube and token register their own. Labels are bounded: the tree's name of
// a place, never the path, and never an address.
type metrics struct {
	registry *prometheus.Registry
	requests *prometheus.CounterVec
	latency  *prometheus.HistogramVec
	reloads  *prometheus.CounterVec
	file     prometheus.Gauge

	strangers atomic.Uint64 // requests of processes that are no pods and have no identity, doctor's among them

	six atomic.Uint64 // requests for anything but `/` that came by IPv6

	mu     sync.RWMutex
	series map[outcome]series
}

func newMetrics(version, runDir string, connections *room) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		series:   map[outcome]series{},
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "gke_metadata_emulator_requests_total",
			Help: "Requests of pods by path in the metadata tree and by status; 499: the client left before the answer.",
		}, []string{"path", "code"}),
		latency: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "gke_metadata_emulator_request_duration_seconds",
			Help:    "Time from the header of a request to its answer, with the wait of unknown pods and with long polls.",
			Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
		}, []string{"path"}),
		reloads: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "gke_metadata_emulator_config_reloads_total",
			Help: "Configurations read anew, by outcome (ok, error).",
		}, []string{"outcome"}),
		file: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "gke_metadata_emulator_config_file_valid",
			Help: "1 if the configuration on disk loads, else 0: then the one before stays in force, and a restart would refuse pods.",
		}),
	}
	m.registry.MustRegister(m.requests, m.latency, m.reloads, m.file,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "gke_metadata_emulator_connections",
			Help: "Open connections of pods.",
		}, func() float64 { return float64(connections.open()) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name:        "gke_metadata_emulator_connections_closed_total",
			Help:        "Connections of pods that were closed since too many were open, by outcome: idle ones that made room, and new ones that found none.",
			ConstLabels: prometheus.Labels{"outcome": "made-room"},
		}, func() float64 { return float64(connections.cut.Load()) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name:        "gke_metadata_emulator_connections_closed_total",
			Help:        "Connections of pods that were closed since too many were open, by outcome: idle ones that made room, and new ones that found none.",
			ConstLabels: prometheus.Labels{"outcome": "no-room"},
		}, func() float64 { return float64(connections.refused.Load()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name:        "gke_metadata_emulator_build_info",
			Help:        "1, labelled with what was built.",
			ConstLabels: prometheus.Labels{"version": version, "goversion": runtime.Version()},
		}, func() float64 { return 1 }),
		ruleState{runDir})
	return m
}

// ruleState tells what the routing commands read back last, out of the file that they leave: a process without capabilities
// cannot read the rules itself.
type ruleState struct{ runDir string }

var (
	rulesGood     = prometheus.NewDesc("gke_metadata_emulator_routing_good", "1 if all that was desired stood when the rules were read back, else 0.", nil, nil)
	rulesReadBack = prometheus.NewDesc("gke_metadata_emulator_routing_read_back_timestamp_seconds", "When the rules were read back.", nil, nil)
	rulesInstalls = prometheus.NewDesc("gke_metadata_emulator_routing_installs_total", "Installations of the rules since the node booted.", nil, nil)
	rulesRepairs  = prometheus.NewDesc("gke_metadata_emulator_routing_repairs_total", "Rules that were found gone and put back, by the layer they are of and what had somebody look.", []string{"layer", "cause"}, nil)
	rulesObserved = prometheus.NewDesc("gke_metadata_emulator_routing_observed_connects", "Connections to the metadata server that mode observe counted, by the network of the client: pod or host.", []string{"network"}, nil)
)

func (ruleState) Describe(c chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{rulesGood, rulesReadBack, rulesInstalls, rulesRepairs, rulesObserved} {
		c <- d
	}
}

func (r ruleState) Collect(c chan<- prometheus.Metric) {
	s, err := routing.ReadState(r.runDir)
	if err != nil || s.Desired == "" {
		return // nothing is known of rules
	}
	good := 0.0
	if s.Standing.Good {
		good = 1
	}
	c <- prometheus.MustNewConstMetric(rulesGood, prometheus.GaugeValue, good)
	c <- prometheus.MustNewConstMetric(rulesReadBack, prometheus.GaugeValue, float64(s.Standing.Time.Unix()))
	c <- prometheus.MustNewConstMetric(rulesInstalls, prometheus.CounterValue, float64(s.Installs))
	if s.Mode == routing.ModeObserve && s.Desired == routing.Installed {
		var pod, host uint64
		for _, o := range s.Observed {
			if o.HostNetwork {
				host += o.Connects
			} else {
				pod += o.Connects
			}
		}
		// No counters: the kernel's table forgets the cgroups that asked longest ago.
		c <- prometheus.MustNewConstMetric(rulesObserved, prometheus.GaugeValue, float64(pod), "pod")
		c <- prometheus.MustNewConstMetric(rulesObserved, prometheus.GaugeValue, float64(host), "host")
	}
	for layer, causes := range s.Repairs {
		for cause, times := range causes {
			c <- prometheus.MustNewConstMetric(rulesRepairs, prometheus.CounterValue, float64(times), layer, cause)
		}
	}
}

func (m *metrics) served(node string, status int, took time.Duration) {
	k := outcome{node, status}
	m.mu.RLock()
	s, ok := m.series[k]
	m.mu.RUnlock()
	if !ok {
		s = series{m.requests.WithLabelValues(node, strconv.Itoa(status)), m.latency.WithLabelValues(node)}
		m.mu.Lock()
		m.series[k] = s
		m.mu.Unlock()
	}
	s.Inc()
	s.Observe(took.Seconds())
}

// asked is how many requests of pods there were for anything but `/`, which our own probes, and doctor's, ask for too.
func (m *metrics) asked() (n uint64) {
	strangers := m.strangers.Load() // first: each of them is counted in the series before
	m.mu.RLock()
	defer m.mu.RUnlock()
	for k, s := range m.series {
		var now dto.Metric
		if k.node != "/" && s.Write(&now) == nil {
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
	node   string
	status int
}
