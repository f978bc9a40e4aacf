package service

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
)

// scrape returns all metrics of ours, by name.
func (b *testNode) scrape(t *testing.T) map[string]*dto.MetricFamily {
	t.Helper()
	families, err := b.gather().Gather()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]*dto.MetricFamily{}
	for _, f := range families {
		if strings.HasPrefix(f.GetName(), "gke_") {
			all[strings.TrimPrefix(f.GetName(), "gke_metadata_emulator_")] = f
		}
	}
	return all
}

// gauge returns the value of a gauge without labels, and whether it is there.
func (b *testNode) gauge(t *testing.T, name string) (float64, bool) {
	t.Helper()
	f := b.scrape(t)[name]
	if f == nil {
		return 0, false
	}
	return f.Metric[0].GetGauge().GetValue(), true
}

// `promtool check metrics` finds nothing.
func TestMetricsLint(t *testing.T) {
	b := newTestNode(t)
	b.ready(t)
	b.ask(t, linked, http.MethodGet, accts+"default/token", "")
	var all []*dto.MetricFamily
	for _, f := range b.scrape(t) {
		all = append(all, f)
	}
	if len(all) < 15 {
		t.Fatalf("only %d metrics", len(all))
	}
	problems, err := promlint.NewWithMetricFamilies(all).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

// Each counter is there before there is anything to count, with its labels: increase() does not see
// the step from nothing to 1.
func TestCountersFromTheStart(t *testing.T) {
	b := newWorld(t)
	b.configure(t, "prefetch: none")
	b.start(t)
	b.ready(t)
	if err := os.WriteFile(filepath.Join(b.options.RunDir, "routing.json"), []byte(`{"desired": "installed",
		"mode": "iptables", "since": "2026-01-01T00:00:00Z", "standing": {"time": "2026-01-01T00:00:00Z", "good": true},
		"repairs": {"iptables": {"nftables": 3}}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	there := b.scrape(t)
	for _, r := range []*prometheus.Registry{b.registry, b.active().gauges} {
		described := make(chan *prometheus.Desc)
		go func() { r.Describe(described); close(described) }()
		for d := range described {
			m := describedMetric.FindStringSubmatch(d.String())
			if name := strings.TrimPrefix(m[1], "gke_metadata_emulator_"); strings.HasSuffix(name, "_total") &&
				!strings.HasPrefix(name, "go_") && !strings.HasPrefix(name, "process_") && there[name] == nil {
				t.Errorf("%s is not there yet", name)
			}
		}
	}
	before := series(there)
	for _, c := range []struct {
		series string
		want   float64
	}{
		{`routing_repairs_total cause="ip-rule" layer="ip-rule"`, 0},
		{`routing_repairs_total cause="nftables" layer="iptables"`, 3},
		{`config_reloads_total outcome="error"`, 0},
		{`mint_steps_total outcome="refused" step="iam"`, 0},
		{`attestations_total asker="nobody" evidence="none"`, 0},
		{`attest_lookups_total outcome="error"`, 0},
		{`requests_total code="503" path="instance/service-accounts/*/token"`, 0},
		{`requests_total code="404" path="unknown"`, 0},
		{`requests_refused_total reason="google-refused"`, 0},
		{`kube_requests_total code="403" resource="serviceaccounts/token" verb="create"`, 0},
	} {
		if n, ok := before[c.series]; !ok || n != c.want {
			t.Errorf("%s: %v, %v, want %v", c.series, n, ok, c.want)
		}
	}
	// What is counted from then on has no series of its own.
	for _, address := range []string{linked, unlinked, denied, hostile, missing, "127.0.0.99"} {
		b.ask(t, address, http.MethodGet, accts+"default/token", "")
		b.ask(t, address, http.MethodGet, "/computeMetadata/v1/nonsense", "")
	}
	for s := range series(b.scrape(t)) {
		if _, ok := before[s]; !ok && !strings.Contains(s, `code="400"`) {
			t.Errorf("%s was not there at the start", s)
		}
	}
	routing.Repairs(nil).Each(func(layer, cause string, _ int) {
		if _, ok := before[fmt.Sprintf("routing_repairs_total cause=%q layer=%q", cause, layer)]; !ok {
			t.Errorf("repairs of %s after %s are not there", layer, cause)
		}
	})
}

// series returns the counters, by name and labels.
func series(families map[string]*dto.MetricFamily) map[string]float64 {
	all := map[string]float64{}
	for name, f := range families {
		for _, m := range f.Metric {
			text := name
			for _, l := range m.Label {
				text += fmt.Sprintf(" %s=%q", l.GetName(), l.GetValue())
			}
			if m.Counter != nil {
				all[text] = m.Counter.GetValue()
			}
		}
	}
	return all
}

// What an operator watches beside requests: whether there is a configuration, since when, and what
// expires when.
func TestMetricsOfState(t *testing.T) {
	b := newTestNode(t)
	b.ready(t)
	b.ask(t, linked, http.MethodGet, accts+"default/token", "")
	is := func(name string, ok func(float64) bool) {
		t.Helper()
		if v, there := b.gauge(t, name); !there || !ok(v) {
			t.Errorf("%s: %v, %v", name, v, there)
		}
	}
	one, zero := func(v float64) bool { return v == 1 }, func(v float64) bool { return v == 0 }
	recent := func(v float64) bool { return time.Since(time.Unix(int64(v), 0)) < time.Hour }
	later := func(v float64) bool { return time.Until(time.Unix(int64(v), 0)) > time.Minute }
	is("configured", one)
	is("config_last_reload_successful", one)
	is("config_last_reload_success_timestamp_seconds", recent)
	is("node_credential_expiry_timestamp_seconds", later)
	b.eventually(t, "a token is held",
		func() bool { _, ok := b.gauge(t, "token_earliest_expiry_timestamp_seconds"); return ok })
	is("token_earliest_expiry_timestamp_seconds", later)
	if built := b.scrape(t)["build_info"].String(); !strings.Contains(built, `"commit"`) ||
		!strings.Contains(built, `"c0ffee"`) {
		t.Error(built)
	}

	good, err := os.ReadFile(filepath.Join(b.dir, "config.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	b.write(t, "config.yaml", "projectID: [")
	b.hangUp()
	b.eventually(t, "the reload failed",
		func() bool { v, _ := b.gauge(t, "config_last_reload_successful"); return v == 0 })
	is("configured", one) // the one before is in force
	b.write(t, "config.yaml", string(good))
	b.hangUp()
	b.eventually(t, "it is read", func() bool { v, _ := b.gauge(t, "config_last_reload_successful"); return v == 1 })

	b.metrics.inForce(brokenConfig(errors.New("gone")))
	is("configured", zero)
}

// Refusals are counted by what is to be looked at.
func TestRefusalsByReason(t *testing.T) {
	b := newTestNode(t)
	b.ready(t)
	count := func(reason string) float64 { return b.counted(t, "requests_refused_total", reason) }
	for _, c := range []struct{ address, path, header, reason string }{
		{linked, accts + "default/token", "X-Forwarded-For: 192.0.2.1", "request"},
		{linked, "/computeMetadata/v1/nonsense", "", "not-found"},
		{unlinked, accts + "default/identity?audience=a", "", "not-linked"},
		{linked, accts + "default/identity", "", "request"},
		{denied, accts + "default/token", "", "google-refused"},
		{hostile, accts + "default/token", "", "annotation"},
		{"127.0.0.99", accts + "default/token", "", "no-pod"},
	} {
		before := count(c.reason)
		if res := b.ask(t, c.address, http.MethodGet, c.path, c.header); res.StatusCode < 400 {
			t.Errorf("%s from %s: %d", c.path, c.address, res.StatusCode)
		}
		b.eventually(t, c.path+" from "+c.address+" counts as "+c.reason, func() bool { return count(c.reason) == before+1 })
	}
}
