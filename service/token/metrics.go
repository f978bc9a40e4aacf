package token

import (
	"context"
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// register returns c, or the same collector of an earlier Google or Cache, so that counters
// continue after a reload.
func register[C prometheus.Collector](r prometheus.Registerer, c C) C {
	if r == nil {
		r = prometheus.NewRegistry()
	}
	err := r.Register(c)
	var already prometheus.AlreadyRegisteredError
	if errors.As(err, &already) {
		if old, ok := already.ExistingCollector.(C); ok {
			return old
		}
	}
	return c
}

// The steps of a mint, as labels.
const (
	stepTokenRequest = "token_request"
	stepSTS          = "sts"
	stepIAM          = "iam"
)

type mintMetrics struct {
	duration *prometheus.HistogramVec
	outcome  *prometheus.CounterVec
}

func newMintMetrics(r prometheus.Registerer) mintMetrics {
	return mintMetrics{
		duration: register(r, prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "gke_metadata_emulator_mint_duration_seconds",
			Help:    "Duration of a step of a mint, with its retries.",
			Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 25},
		}, []string{"step"})),
		outcome: register(r, prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "gke_metadata_emulator_mint_steps_total",
			Help: "Steps of mints by outcome: ok, refused (final), unavailable (will be tried again), abandoned.",
		}, []string{"step", "outcome"})),
	}
}

func (m mintMetrics) observe(step string, since time.Time, err error) {
	m.duration.WithLabelValues(step).Observe(time.Since(since).Seconds())
	outcome := "ok"
	var refusal *GoogleError
	switch {
	case err == nil:
	case errors.Is(err, context.Canceled):
		outcome = "abandoned"
	case errors.Is(err, ErrUnavailable), errors.Is(err, context.DeadlineExceeded):
		outcome = "unavailable"
	case errors.As(err, &refusal):
		outcome = "refused"
	case step == stepTokenRequest:
		outcome = "refused"
	}
	m.outcome.WithLabelValues(step, outcome).Inc()
}

type cacheMetrics struct {
	hit, miss, coalesced, stale, negative, limited prometheus.Counter
}

func newCacheMetrics(r prometheus.Registerer) cacheMetrics {
	requests := register(r, prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "gke_metadata_emulator_token_cache_requests_total",
		Help: "Requests of pods for tokens by result: hit, miss (started a mint), coalesced (joined a mint in flight), " +
			"stale (got the old token), negative (got a cached refusal), limited.",
	}, []string{"result"}))
	return cacheMetrics{
		hit:       requests.WithLabelValues("hit"),
		miss:      requests.WithLabelValues("miss"),
		coalesced: requests.WithLabelValues("coalesced"),
		stale:     requests.WithLabelValues("stale"),
		negative:  requests.WithLabelValues("negative"),
		limited:   requests.WithLabelValues("limited"),
	}
}

var entriesDesc = prometheus.NewDesc(
	"gke_metadata_emulator_token_cache_entries",
	"Tokens and refusals in the cache.",
	nil,
	nil,
)

// Describe and Collect make a Cache the prometheus.Collector of its own gauge.
func (c *Cache) Describe(to chan<- *prometheus.Desc) { to <- entriesDesc }

// Collect sends how many entries there are now.
func (c *Cache) Collect(to chan<- prometheus.Metric) {
	c.mu.Lock()
	n := len(c.entries)
	c.mu.Unlock()
	to <- prometheus.MustNewConstMetric(entriesDesc, prometheus.GaugeValue, float64(n))
}
