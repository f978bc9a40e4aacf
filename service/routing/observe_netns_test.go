package routing

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
)

// TestObserve: it counts, and nobody notices.
func TestObserve(t *testing.T) {
	t.Parallel()
	b := newBPFNode(t, newTestNode(t, "iptables-nft"))
	b.plan.Mode, b.plan.BPFDir, b.plan.CgroupRoot = ModeObserve, filepath.Join(b.bpffs, "gme"), b.cgroups
	observed := func() []Observation {
		t.Helper()
		var all []Observation
		b.must(b.Do(func() (err error) { all, err = Observed(b.plan); return err }))
		return all
	}
	before, programs := b.ruleset(), b.attachedText(t)
	if _, err := Observed(b.plan); !errors.Is(err, fault.ErrMissing) {
		t.Errorf("%v, want ErrMissing", err)
	}
	b.install(b.plan)
	b.requireOK(b.plan)
	for _, line := range only(lines(b.ruleset()), lines(before)) {
		if !strings.Contains(line, "169.254.169.252") { // the listen address, and its route
			t.Errorf("it changed something: %s", line)
		}
	}
	gone := filepath.Join(b.cgroups, "kubepods.slice", "gone")
	b.must(os.Mkdir(gone, 0o755))
	b.answersIn("kubepods.slice/gone", b.pod, "169.254.169.254:80", cloud)
	b.must(os.Remove(gone))
	for range 3 {
		b.answersIn(podCgroup, b.pod, "169.254.169.254:80", cloud)
	}
	b.answersIn(podCgroup, b.pod, "169.254.169.254:53", cloud) // not of interest
	for range 2 {
		b.answersIn(podCgroup, b.NS, "169.254.169.254:80", cloud)
	}
	b.answersIn("system.slice", b.NS, "169.254.169.254:80", cloud) // the node's own
	want := []Observation{{"/" + podCgroup, false, 3}, {"/" + podCgroup, true, 2}, {"", false, 1}}
	if got := observed(); !slices.Equal(got, want) {
		t.Errorf("observed %+v, want %+v", got, want)
	}
	b.install(b.plan) // a restart goes on counting
	w := b.watch(b.plan, time.Hour)
	if got := w.state().Observed; !slices.Equal(got, want) {
		t.Errorf("published %+v, want %+v", got, want)
	}
	was := w.state().Repairs.Total()
	b.must(os.Remove(filepath.Join(b.plan.BPFDir, ModeObserve, "counts")))
	b.must(os.Remove(filepath.Join(b.plan.BPFDir, ModeObserve, "connect4_link")))
	w.until("a repair", func() bool { s := w.state(); return s.Repairs.Total() > was && s.Standing.Good })
	w.end()
	b.requireOK(b.plan)
	b.answersIn(podCgroup, b.pod, "169.254.169.254:80", cloud)
	if got, want := observed(), []Observation{{"/" + podCgroup, false, 1}}; !slices.Equal(got, want) {
		t.Errorf("after the table was lost: %+v, want %+v", got, want)
	}

	redirect := b.plan // the rollout
	redirect.Mode, redirect.Guard = ModeEBPF, DefaultGuard()
	b.install(redirect)
	b.requireOK(redirect)
	b.answersIn(podCgroup, b.pod, "169.254.169.254:80", emulator)
	b.install(b.plan) // and back
	b.requireOK(b.plan)
	b.answersIn(podCgroup, b.pod, "169.254.169.254:80", cloud)
	b.remove(b.plan)
	b.requireEqual("remove", b.ruleset()+b.attachedText(t), before+programs)
}
