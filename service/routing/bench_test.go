package routing

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/nft"
)

// serviceRules is a ruleset of kube-proxy's shape with n rules in table nat.
func serviceRules(n int) string {
	var chains, rules strings.Builder
	chains.WriteString("*nat\n:KUBE-SERVICES - [0:0]\n")
	rules.WriteString("-A PREROUTING -j KUBE-SERVICES\n-A OUTPUT -j KUBE-SERVICES\n")
	for i := range n / 4 {
		fmt.Fprintf(&chains, ":KUBE-SVC-%08d - [0:0]\n:KUBE-SEP-%08d - [0:0]\n", i, i)
		ip := fmt.Sprintf("10.%d.%d.%d", 96+i>>16, i>>8&255, i&255)
		fmt.Fprintf(
			&rules,
			"-A KUBE-SERVICES -d %s/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-%08d\n-A KUBE-SVC-%08d -j KUBE-SEP-%08d\n"+
				"-A KUBE-SEP-%08d -s 10.200.0.1/32 -j MARK --set-xmark 0x4000/0x4000\n-A KUBE-SEP-%08d -p tcp -m tcp -j DNAT "+
				"--to-destination 10.200.0.1:80\n",
			ip,
			i,
			i,
			i,
			i,
			i,
		)
	}
	return chains.String() + rules.String() + "COMMIT\n"
}

// addServices puts n rules of kube-proxy's shape on the node, by the testNode's backend.
func (b *testNode) addServices(n int) {
	b.t.Helper()
	if n == 0 {
		return
	}
	cmd := b.Command(context.Background(), b.plan.Binary+"-restore", "--noflush")
	cmd.Stdin = strings.NewReader(serviceRules(n))
	if out, err := cmd.CombinedOutput(); err != nil {
		b.t.Fatalf("%v: %s", err, out)
	}
}

// memoryDir is a directory in memory, as /run is.
func memoryDir(b *testing.B) string {
	dir, err := os.MkdirTemp("/dev/shm", "gme-bench-")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// settle waits until the kernel has let go of what was deleted.
func settle() {
	done := make(chan struct{})
	nft.CloseLater(func() { close(done) })
	<-done
}

// BenchmarkRouter is install, repeated install, check and remove beside other people's rules.
func BenchmarkRouter(b *testing.B) {
	for _, binary := range []string{"iptables-nft", "iptables-legacy", ModeNFTables} {
		for _, n := range []int{0, 10000} {
			testNode := modeNode(b, binary)
			testNode.addServices(n)
			testNode.plan.RunDir = memoryDir(b)
			r := testNode.router(testNode.plan)
			step := func(b *testing.B, f func(context.Context) error) {
				if err := testNode.Do(func() error { return f(context.Background()) }); err != nil {
					b.Fatal(err)
				}
			}
			name := fmt.Sprintf("%s/%d", binary, n)
			b.Run(name+"/install", func(b *testing.B) {
				for b.Loop() {
					b.StopTimer()
					step(b, r.Remove)
					settle()
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
					settle()
					b.StartTimer()
					step(b, r.Remove)
				}
			})
			if err := testNode.Close(); err != nil {
				b.Fatal(err)
			}
		}
	}
}

// BenchmarkWatch is the time from somebody's command to all standing again, the reading back
// included.
func BenchmarkWatch(b *testing.B) {
	for _, binary := range []string{"iptables-nft", "iptables-legacy", ModeNFTables} {
		for _, c := range []struct{ name, flush string }{
			{"nat", "iptables -t nat -F"}, {"filter", "iptables -F"}, {"ip-rule", "ip rule del pref 97 prohibit"},
			{"ruleset", "nft flush ruleset"},
		} {
			if c.name == "ruleset" && binary == "iptables-legacy" ||
				binary == ModeNFTables && strings.HasPrefix(c.flush, "iptables") {
				continue // which changes nothing of ours
			}
			b.Run(binary+"/"+c.name, func(b *testing.B) {
				testNode := modeNode(b, binary)
				testNode.install(testNode.plan)
				w := testNode.watchWith(Watch{burst: 1 << 20}, testNode.plan)
				for b.Loop() {
					b.StopTimer()
					before := w.state().Repairs.Total()
					testNode.run(c.flush)
					b.StartTimer()
					w.until("a repair", func() bool { s := w.state(); return s.Repairs.Total() > before && s.Standing.Good })
				}
				w.end()
			})
		}
	}
}

// BenchmarkWatchChurn is the processor time that the watcher takes while a thousand interfaces come
// and go, as those of pods do.
func BenchmarkWatchChurn(b *testing.B) {
	testNode := newTestNode(b, "iptables-nft")
	testNode.install(testNode.plan)
	var comes, goes strings.Builder
	for i := range 500 {
		fmt.Fprintf(&comes, "link add churn%d type veth peer name nruhc%d\n", i, i)
		fmt.Fprintf(&goes, "link del churn%d\n", i)
	}
	var took, used time.Duration
	for b.Loop() {
		watcher := testNode.play("watch", filepath.Join(testNode.plan.RunDir, testNode.plan.Binary), testNode.self())
		if err := watcher.Start(); err != nil {
			b.Fatal(err)
		}
		start := time.Now()
		for _, batch := range []string{comes.String(), goes.String()} {
			ip := testNode.Command(context.Background(), "ip", "-batch", "-")
			ip.Stdin = strings.NewReader(batch)
			if out, err := ip.CombinedOutput(); err != nil {
				b.Fatalf("%v: %s", err, out)
			}
		}
		took += time.Since(start)
		_ = watcher.Process.Kill()
		_ = watcher.Wait()
		used += watcher.ProcessState.UserTime() + watcher.ProcessState.SystemTime()
	}
	b.ReportMetric(used.Seconds()/float64(b.N), "cpu-s")
	b.ReportMetric(took.Seconds()/float64(b.N), "churn-s")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkConnect is a fresh connection of a pod's with one question and its answer, in each mode,
// beside rules of kube-proxy's. The modes take turns, so that what else the machine does falls on
// all alike: it is the ratios to a direct connection, on a node without any rules, that count, of
// which the medians are reported.
func BenchmarkConnect(b *testing.B) {
	const each = 300 // connections in a turn
	for _, n := range []int{0, 1000, 10000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			names := []string{"direct", "iptables-nft", "iptables-legacy", ModeNFTables, ModeLoopback, ModeEBPF, ModeNone}
			turns := map[string]func() float64{} // each gives nanoseconds for a connection
			for _, name := range names {
				to := metadataServer.String()
				var testNode *testNode
				var pod func() *exec.Cmd
				switch name {
				case "direct":
					testNode, to = newTestNode(b, "iptables-nft"), "10.244.0.1:80"
					testNode.serve(testNode.NS, to, emulator)
				case ModeEBPF: // which knows pods by their cgroup, too
					in := ebpfNode(b)
					testNode = in.testNode
					pod = func() *exec.Cmd { return in.in(podCgroup, testNode.pod.Command(b.Context(), testNode.self())) }
				default:
					testNode = modeNode(b, name)
				}
				if pod == nil {
					pod = func() *exec.Cmd { return testNode.pod.Command(b.Context(), testNode.self()) }
				}
				if name != "direct" {
					testNode.addServices(n)
					testNode.install(testNode.plan)
				}
				if name == ModeNone {
					to = testNode.plan.Listen.String()
				}
				turns[name] = func() float64 {
					cmd := pod()
					cmd.Env = append(os.Environ(), "ROUTING_TEST_ROLE=repeat", fmt.Sprintf("ROUTING_TEST_ARG=%d %s", each, to))
					out, err := cmd.Output()
					took, err2 := strconv.ParseFloat(string(out), 64)
					if err != nil || err2 != nil {
						b.Fatalf("%s: %v, %v: %s", name, err, err2, out)
					}
					return took
				}
			}
			var direct []float64
			ratios := map[string][]float64{}
			for b.Loop() {
				base := turns["direct"]()
				direct = append(direct, base)
				for _, name := range names[1:] {
					ratios[name] = append(ratios[name], turns[name]()/base)
				}
			}
			for name, all := range ratios {
				b.ReportMetric(median(all), name+"/direct")
			}
			b.ReportMetric(median(direct)/1000, "direct-µs")
			b.ReportMetric(0, "ns/op")
		})
	}
}

func median(all []float64) float64 {
	all = slices.Sorted(slices.Values(all))
	return all[len(all)/2]
}
