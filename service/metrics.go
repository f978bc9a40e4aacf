package service

import (
	"cmp"
	"runtime"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token"
)

// metrics are those of the process and its configuration, and those of each backend, which outlive
// it: no counter falls on a reload.
type metrics struct {
	reloads    *prometheus.CounterVec
	file       prometheus.Gauge
	configured prometheus.Gauge
	loaded     prometheus.Gauge
	loadedAt   prometheus.Gauge

	attest *attest.Metrics
	kube   *kube.Metrics
	token  *token.Metrics
}

func newMetrics(r prometheus.Registerer, o Options) metrics {
	m := metrics{
		reloads: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "gke_metadata_emulator_config_reloads_total",
			Help: "Configurations read anew, by outcome (ok, error).",
		}, []string{"outcome"}),
		file: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "gke_metadata_emulator_config_file_valid",
			Help: "1 if the configuration on disk loads, else 0: then the one before stays in force, and a restart would " +
				"refuse pods.",
		}),
		configured: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "gke_metadata_emulator_configured",
			Help: "1 if a configuration is in force, else 0: then pods are refused.",
		}),
		loaded: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "gke_metadata_emulator_config_last_reload_successful",
			Help: "1 if the configuration came into force when it was last read, at the start or by a reload, else 0.",
		}),
		loadedAt: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "gke_metadata_emulator_config_last_reload_success_timestamp_seconds",
			Help: "When a configuration came into force last; 0: none has.",
		}),
		attest: attest.NewMetrics(r), kube: kube.NewMetrics(r), token: token.NewMetrics(r),
	}
	for _, outcome := range []string{"ok", "error"} {
		m.reloads.WithLabelValues(outcome)
	}
	r.MustRegister(m.reloads, m.file, m.configured, m.loaded, m.loadedAt,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "gke_metadata_emulator_build_info",
			Help: "1, labelled with what was built.",
			ConstLabels: prometheus.Labels{"version": o.Version, "commit": cmp.Or(o.Commit, "unknown"),
				"goversion": runtime.Version()},
		}, func() float64 { return 1 }),
		ruleState{o.RunDir})
	return m
}

// read notes what came of reading the configuration.
func (m metrics) read(err error) {
	if err != nil {
		m.loaded.Set(0)
		return
	}
	m.loaded.Set(1)
	m.loadedAt.SetToCurrentTime()
}

// inForce notes whether there is a configuration.
func (m metrics) inForce(a *activeConfig) {
	if a.Broken != nil {
		m.configured.Set(0)
	} else {
		m.configured.Set(1)
	}
}

// ruleState tells what the routing commands read back last, out of the file that they leave: a
// process without capabilities cannot read the rules itself.
type ruleState struct{ runDir string }

var (
	rulesGood = prometheus.NewDesc("gke_metadata_emulator_routing_good",
		"1 if all that was desired stood when the rules were read back, else 0.", nil, nil)
	rulesReadBack = prometheus.NewDesc("gke_metadata_emulator_routing_read_back_timestamp_seconds",
		"When the rules were read back.", nil, nil)
	rulesInstalls = prometheus.NewDesc("gke_metadata_emulator_routing_installs_total",
		"Installations of the rules since the node booted.", nil, nil)
	rulesRepairs = prometheus.NewDesc("gke_metadata_emulator_routing_repairs_total",
		"Rules that were found gone and put back, by the layer they are of and what had somebody look.",
		[]string{"layer", "cause"}, nil)
	rulesObserved = prometheus.NewDesc("gke_metadata_emulator_routing_observed_connects",
		"Connections to the metadata server that mode observe counted, by the network of the client: pod or host.",
		[]string{"network"}, nil)
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
	s.Repairs.Each(func(layer, cause string, times int) {
		c <- prometheus.MustNewConstMetric(rulesRepairs, prometheus.CounterValue, float64(times), layer, cause)
	})
}
