package routing

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"testing"
)

// BenchmarkConnectEBPF is a pod's fresh connection until its answer, by each mode against a direct one that nothing is in the way of. The modes
// take turns, and what is told besides nanoseconds are the medians of their ratios.
func BenchmarkConnectEBPF(b *testing.B) {
	bed := ebpfBed(b)
	bed.sh("ip address add 169.254.169.252/32 dev lo")
	const each = 2000
	once := func(at string) float64 {
		cmd := bed.in(podCgroup, bed.pod.Command(b.Context(), bed.self()))
		cmd.Env = append(os.Environ(), "ROUTING_TEST_ROLE=repeat", fmt.Sprintf("ROUTING_TEST_ARG=%d %s", each, at))
		out, err := cmd.Output()
		took, err2 := strconv.ParseFloat(string(out), 64)
		if err != nil || err2 != nil {
			b.Fatalf("%v, %v: %s", err, err2, out)
		}
		return took
	}
	ratios, direct := map[string][]float64{}, []float64{}
	for b.Loop() {
		base := once("169.254.169.252:988")
		direct = append(direct, base)
		for _, mode := range []string{ModeIPTables, ModeNFTables, ModeEBPF} {
			p := bed.plan
			p.Mode = mode
			bed.install(p)
			ratios[mode] = append(ratios[mode], once("169.254.169.254:80")/base)
			bed.remove(p)
		}
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(median(direct)/1000, "direct-µs")
	for mode, all := range ratios {
		b.ReportMetric(median(all), mode+"/direct")
	}
}

func median(all []float64) float64 {
	all = slices.Sorted(slices.Values(all))
	return all[len(all)/2]
}
