package routing

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
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

// addServices puts n rules of kube-proxy's shape on the node, by the bed's backend.
func (b *bed) addServices(n int) {
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
	closeLater(func() { close(done) })
	<-done
}

// BenchmarkRouter is install, repeated install, check and remove beside other people's rules.
func BenchmarkRouter(b *testing.B) {
	for _, binary := range []string{"iptables-nft", "iptables-legacy", ModeNFTables} {
		for _, n := range []int{0, 10000} {
			bed := modeBed(b, binary)
			bed.addServices(n)
			bed.plan.RunDir = memoryDir(b)
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

// BenchmarkConnect is a fresh connection of a pod's with one question and its answer, in each mode, beside rules of kube-proxy's. The modes
// take turns, so that what else the machine does falls on all alike: it is the ratios to a direct connection, on a node without any rules,
// that count.
func BenchmarkConnect(b *testing.B) {
	names := []string{"direct", "iptables-nft", "iptables-legacy", ModeNFTables, ModeLoopback, ModeNone}
	for _, n := range []int{0, 1000, 10000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			type path struct {
				pod *netnstest.NS
				to  string
			}
			var paths []path
			for _, name := range names {
				if name == "direct" {
					bed := newBed(b, "iptables-nft")
					bed.serve(bed.NS, "10.244.0.1:80", emulator)
					paths = append(paths, path{bed.pod, "10.244.0.1:80"})
					continue
				}
				bed := modeBed(b, name)
				bed.addServices(n)
				bed.install(bed.plan)
				to := metadataServer.String()
				if name == ModeNone {
					to = bed.plan.Listen.String()
				}
				paths = append(paths, path{bed.pod, to})
			}
			took := make([]time.Duration, len(paths))
			for b.Loop() {
				for i, p := range paths {
					if err := p.pod.Do(func() error {
						start := time.Now()
						c, err := net.DialTimeout("tcp", p.to, long)
						if err != nil {
							return err
						}
						defer c.Close()
						who, err := talk(c, long)
						took[i] += time.Since(start)
						if who != emulator {
							b.Errorf("%s: %q answered", names[i], who)
						}
						return err
					}); err != nil {
						b.Fatalf("%s: %v", names[i], err)
					}
				}
			}
			for i, name := range names[1:] {
				b.ReportMetric(float64(took[i+1])/float64(took[0]), name+"/direct")
			}
			b.ReportMetric(float64(took[0].Microseconds())/float64(b.N), "direct-µs")
			b.ReportMetric(0, "ns/op")
		})
	}
}
