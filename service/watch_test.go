package service

import (
	"maps"
	"os"
	"path/filepath"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// The watcher has no port of its own: what it counts is in the file that it leaves, and the service
// shows it.
func TestRepairsAreShown(t *testing.T) {
	dir := t.TempDir()
	state := `{"desired": "installed", "installs": 5, "standing": {"time": "2026-01-01T00:00:00Z", "good": true},
		"repairs": {"iptables": {"nftables": 3, "sweep": 1}, "ip-rule": {"ip-rule": 2}}}`
	if err := os.WriteFile(filepath.Join(dir, "routing.json"), []byte(state), 0o600); err != nil {
		t.Fatal(err)
	}
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(ruleState{dir})
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		if f.GetName() != "gke_metadata_emulator_routing_repairs_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			labels := m.GetLabel() // in the order of their names
			name := labels[1].GetName() + "=" + labels[1].GetValue() + " " + labels[0].GetName() + "=" + labels[0].GetValue()
			if n := m.GetCounter().GetValue(); n > 0 { // the others are there from the start
				got[name] = n
			}
		}
	}
	want := map[string]float64{"layer=iptables cause=nftables": 3, "layer=iptables cause=sweep": 1,
		"layer=ip-rule cause=ip-rule": 2}
	if !maps.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
