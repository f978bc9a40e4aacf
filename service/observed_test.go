package service

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
)

// What mode observe counted is shown by the name of the pod where that is known, and as sums.
func TestObservedIsShown(t *testing.T) {
	dir := t.TempDir()
	state := `{"desired": "installed", "mode": "observe", "listen": "169.254.169.252:988", "since": "2026-01-01T00:00:00Z",
		"standing": {"time": "2026-01-01T00:00:00Z", "good": true}, "observed": [
		{"cgroup": "/kubepods.slice/kubepods-pod11111111_2222_3333_4444_555555555555.slice/cri-containerd-a.scope", "connects": 7},
		{"cgroup": "/kubepods/besteffort/podbeefbeef-2222-3333-4444-555555555555/b", "connects": 3, "hostNetwork": true},
		{"cgroup": "", "connects": 2}]}`
	if err := os.WriteFile(filepath.Join(dir, "routing.json"), []byte(state), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := routing.ReadState(dir)
	if err != nil {
		t.Fatal(err)
	}
	var text bytes.Buffer
	status := Status{Routing: &s, Cluster: &kube.Status{Pods: []kube.PodStatus{{Namespace: "default", Name: "reader", UID: "11111111-2222-3333-4444-555555555555"}}}}
	if err := status.Text(&text, time.Date(2026, 1, 1, 0, 1, 0, 0, time.UTC)); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"mode observe: nothing is redirected", `
OBSERVED: 3
CONNECTS  NETWORK  WHO
7         pod      default/reader
3         host     /kubepods/besteffort/podbeefbeef-2222-3333-4444-555555555555/b
2         pod      a cgroup that is gone
`} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("%s\ndoes not say %s", text.String(), want)
		}
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
