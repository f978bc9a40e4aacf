package service

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// What mode observe counted is shown as sums.
func TestObservedIsSummed(t *testing.T) {
	dir := t.TempDir()
	state := `{"desired": "installed", "mode": "observe", "listen": "169.254.169.252:988", "since": "2026-01-01T00:00:00Z",
		"standing": {"time": "2026-01-01T00:00:00Z", "good": true}, "observed": [
		{"cgroup": "/kubepods.slice/kubepods-pod11111111_2222_3333_4444_555555555555.slice/cri-containerd-a.scope",
			"connects": 7},
		{"cgroup": "/kubepods/besteffort/podbeefbeef-2222-3333-4444-555555555555/b", "connects": 3, "hostNetwork": true},
		{"cgroup": "", "connects": 2}]}`
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
		if f.GetName() == "gke_metadata_emulator_routing_observed_connects" {
			for _, m := range f.GetMetric() {
				got[m.GetLabel()[0].GetValue()] = m.GetGauge().GetValue()
			}
		}
	}
	if len(got) != 2 || got["pod"] != 9 || got["host"] != 3 {
		t.Errorf("metrics: %v", got)
	}
}
