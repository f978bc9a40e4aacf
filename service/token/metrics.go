package token

import (
	"context"
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics are what Google and Cache count. They outlive each of the two: a reload makes others.
type Metrics struct {
	mints mintMetrics
	cache cacheMetrics
}

// NewMetrics registers the metrics. It is to be called once for each Registerer.
func NewMetrics(r prometheus.Registerer) *Metrics {
	return &Metrics{newMintMetrics(r), newCacheMetrics(r)}
}

// unread returns m, or metrics that nobody reads where there are none.
func unread(m *Metrics) *Metrics {
	if m == nil {
		return NewMetrics(prometheus.NewRegistry())
	}
	return m
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
	m := mintMetrics{
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "gke_metadata_emulator_mint_duration_seconds",
			Help:    "Duration of a step of a mint, with its retries.",
			Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 25},
		}, []string{"step"}),
		outcome: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "gke_metadata_emulator_mint_steps_total",
			Help: "Steps of mints by outcome: ok, refused (final), unavailable (will be tried again), abandoned.",
		}, []string{"step", "outcome"}),
	}
	for _, step := range []string{stepTokenRequest, stepSTS, stepIAM} {
		m.duration.WithLabelValues(step)
		for _, outcome := range []string{"ok", "refused", "unavailable", "abandoned"} {
			m.outcome.WithLabelValues(step, outcome)
		}
	}
	r.MustRegister(m.duration, m.outcome)
	return m
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
	requests := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "gke_metadata_emulator_token_cache_requests_total",
		Help: "Requests of pods for tokens by result: hit, miss (started a mint), coalesced (joined a mint in flight), " +
			"stale (got the old token), negative (got a cached refusal), limited.",
	}, []string{"result"})
	r.MustRegister(requests)
	return cacheMetrics{
		hit:       requests.WithLabelValues("hit"),
		miss:      requests.WithLabelValues("miss"),
		coalesced: requests.WithLabelValues("coalesced"),
		stale:     requests.WithLabelValues("stale"),
		negative:  requests.WithLabelValues("negative"),
		limited:   requests.WithLabelValues("limited"),
	}
}

var (
	entriesDesc = prometheus.NewDesc("gke_metadata_emulator_token_cache_entries",
		"Tokens and refusals in the cache.", nil, nil)
	expiryDesc = prometheus.NewDesc("gke_metadata_emulator_token_earliest_expiry_timestamp_seconds",
		"When the first access token expires of those that are kept fresh for pods; absent while there are none. It is "+
			"in the past if a token could not be replaced.", nil, nil)
)

// Describe and Collect make a Cache the prometheus.Collector of its own gauges.
func (c *Cache) Describe(to chan<- *prometheus.Desc) { to <- entriesDesc; to <- expiryDesc }

// Collect sends how many entries there are now, and when the first token expires.
func (c *Cache) Collect(to chan<- prometheus.Metric) {
	c.mu.Lock()
	n := len(c.entries)
	var first time.Time
	for _, e := range c.entries {
		if at := e.token.Expires; e.refreshable() && !at.IsZero() && (first.IsZero() || at.Before(first)) {
			first = at
		}
	}
	c.mu.Unlock()
	if !first.IsZero() {
		to <- prometheus.MustNewConstMetric(expiryDesc, prometheus.GaugeValue, float64(first.Unix()))
	}
	to <- prometheus.MustNewConstMetric(entriesDesc, prometheus.GaugeValue, float64(n))
}
