package routing

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// serviceRules is a ruleset of kube-proxy's shape with n rules in table nat.
func serviceRules(n int) string {
	var chains, rules strings.Builder
	chains.WriteString("*nat\n:KUBE-SERVICES - [0:0]\n")
	rules.WriteString("-A PREROUTING -j KUBE-SERVICES\n-A OUTPUT -j KUBE-SERVICES\n")
	for i := range n / 4 {
		fmt.Fprintf(&chains, ":KUBE-SVC-%08d - [0:0]\n:KUBE-SEP-%08d - [0:0]\n", i, i)
		ip := fmt.Sprintf("10.%d.%d.%d", 96+i>>16, i>>8&255, i&255)
		fmt.Fprintf(&rules, "-A KUBE-SERVICES -d %s/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-%08d\n-A KUBE-SVC-%08d -j KUBE-SEP-%08d\n"+
			"-A KUBE-SEP-%08d -s 10.200.0.1/32 -j MARK --set-xmark 0x4000/0x4000\n-A KUBE-SEP-%08d -p tcp -m tcp -j DNAT --to-destination 10.200.0.1:80\n", ip, i, i, i, i, i)
	}
	return chains.String() + rules.String() + "COMMIT\n"
}

// BenchmarkRouter is install, repeated install, check and remove beside other people's rules.
func BenchmarkRouter(b *testing.B) {
	for _, binary := range []string{"iptables-nft", "iptables-legacy"} {
		for _, n := range []int{0, 10000} {
			bed := newBed(b, binary)
			if n > 0 {
				cmd := bed.Command(context.Background(), binary+"-restore", "--noflush")
				cmd.Stdin = strings.NewReader(serviceRules(n))
				if out, err := cmd.CombinedOutput(); err != nil {
					b.Fatalf("%v: %s", err, out)
				}
			}
			r := bed.router(bed.plan)
			step := func(b *testing.B, f func(context.Context) error) {
				if err := bed.Do(func() error { return f(context.Background()) }); err != nil {
					b.Fatal(err)
				}
			}
			name := fmt.Sprintf("%s/%d", binary, n)
			b.Run(name+"/install", func(b *testing.B) {
				for b.Loop() {
					b.StopTimer()
					step(b, r.Remove)
					b.StartTimer()
					step(b, r.Install)
				}
			})
			step(b, r.Install)
			b.Run(name+"/reinstall", func(b *testing.B) {
				for b.Loop() {
					step(b, r.Install)
				}
			})
			b.Run(name+"/check", func(b *testing.B) {
				for b.Loop() {
					step(b, r.Check)
				}
			})
			b.Run(name+"/remove", func(b *testing.B) {
				for b.Loop() {
					b.StopTimer()
					step(b, r.Install)
					b.StartTimer()
					step(b, r.Remove)
				}
			})
			if err := bed.Close(); err != nil {
				b.Fatal(err)
			}
		}
	}
}

// BenchmarkWatch is the time from somebody's command to all standing again, the reading back included.
func BenchmarkWatch(b *testing.B) {
	for _, binary := range []string{"iptables-nft", "iptables-legacy"} {
		for _, c := range []struct{ name, flush string }{
			{"nat", "iptables -t nat -F"}, {"filter", "iptables -F"}, {"ip-rule", "ip rule del pref 98"},
			{"ruleset", "nft flush ruleset"},
		} {
			if c.name == "ruleset" && binary != "iptables-nft" {
				continue
			}
			b.Run(binary+"/"+c.name, func(b *testing.B) {
				bed := newBed(b, binary)
				bed.install(bed.plan)
				w := bed.watchWith(Watch{burst: 1 << 20}, bed.plan)
				for b.Loop() {
					b.StopTimer()
					before := w.state().Repairs.Total()
					bed.sh(c.flush)
					b.StartTimer()
					w.until("a repair", func() bool { s := w.state(); return s.Repairs.Total() > before && s.Standing.Good })
				}
				w.end()
			})
		}
	}
}

// BenchmarkConnect is a pod's fresh connection until its answer, by each mode against a direct one that nothing is in the way of. The modes
// take turns, and what is told besides nanoseconds are the medians of their ratios.
func BenchmarkConnect(b *testing.B) {
	bed := newBPFBed(b, newBed(b, "iptables-nft"))
	bed.plan.BPFDir, bed.plan.CgroupRoot = filepath.Join(bed.bpffs, "gme"), bed.cgroups
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
		for _, mode := range []string{ModeIPTables, ModeEBPF} {
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
