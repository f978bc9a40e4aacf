package kube

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics are what Clusters count. They outlive each Cluster: a reload makes another one.
type Metrics struct{ requests *prometheus.CounterVec }

// NewMetrics registers the metrics. It is to be called once for each Registerer.
func NewMetrics(r prometheus.Registerer) *Metrics {
	m := &Metrics{prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "gke_metadata_emulator_kube_requests_total",
		Help: "Requests to the Kubernetes API by verb, resource and status code (error: no answer).",
	}, []string{"verb", "resource", "code"})}
	for _, k := range calls {
		for _, code := range []string{k.done(), "401", "403", "404", "429", "500", "503", "error"} {
			m.requests.WithLabelValues(k.verb, k.resource, code)
		}
	}
	r.MustRegister(m.requests)
	return m
}

var (
	podsDesc = prometheus.NewDesc("gke_metadata_emulator_pods", "Live pods of this node in the index.", nil, nil)
	ageDesc  = prometheus.NewDesc("gke_metadata_emulator_pod_watch_age_seconds",
		"Seconds since the last answer of the Kubernetes API about pods; 0 while a watch is open, -1 before the "+
			"first answer.", nil, nil)
	expiryDesc = prometheus.NewDesc("gke_metadata_emulator_node_credential_expiry_timestamp_seconds",
		"When the client certificate that the Kubernetes API is asked with expires; absent where there is none.", nil, nil)
)

// Describe and Collect make a Cluster the prometheus.Collector of its own gauges.
func (c *Cluster) Describe(to chan<- *prometheus.Desc) {
	to <- podsDesc
	to <- ageDesc
	to <- expiryDesc
}

// Collect sends what is known now.
func (c *Cluster) Collect(to chan<- prometheus.Metric) {
	to <- prometheus.MustNewConstMetric(podsDesc, prometheus.GaugeValue, float64(len(c.pods.current.Load().pods)))
	to <- prometheus.MustNewConstMetric(ageDesc, prometheus.GaugeValue, c.watchAge())
	c.mu.Lock()
	expires := c.expires
	c.mu.Unlock()
	if !expires.IsZero() {
		to <- prometheus.MustNewConstMetric(expiryDesc, prometheus.GaugeValue, float64(expires.Unix()))
	}
}

func (c *Cluster) watchAge() float64 {
	t := c.pods.touched.Load()
	switch {
	case c.pods.watching.Load():
		return 0
	case t == 0:
		return -1
	}
	return time.Since(time.Unix(0, t)).Seconds()
}

func (c *Cluster) count(k call, code string) {
	c.metrics.requests.WithLabelValues(k.verb, k.resource, code).Inc()
}
