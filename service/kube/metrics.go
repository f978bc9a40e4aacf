package kube

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct{ requests *prometheus.CounterVec }

func (c *Cluster) register(r prometheus.Registerer) metrics {
	if r == nil {
		r = prometheus.NewRegistry()
	}
	m := metrics{prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "gke_metadata_emulator_kube_requests_total",
		Help: "Requests to the Kubernetes API by verb, resource and status code (error: no answer).",
	}, []string{"verb", "resource", "code"})}
	r.MustRegister(m.requests,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "gke_metadata_emulator_pods",
			Help: "Live pods of this node in the index.",
		}, func() float64 { return float64(len(c.pods.current.Load().pods)) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "gke_metadata_emulator_pod_watch_age_seconds",
			Help: "Seconds since the last answer of the Kubernetes API about pods; 0 while a watch is open, -1 before the " +
				"first answer.",
		}, c.watchAge))
	return m
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
