package service

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// chaosLong has TestChaos apply every load for as long as figures need, and tell them; `make chaos`
// sets it.
const chaosLong = "GME_CHAOS"

// chaosNode is a node whose pods ask while something else puts a load on the service, which is a
// process of its own.
type chaosNode struct {
	*kernelNode
	asker *podNode // one of the others
	bare  string   // where a net/http server is that the asker asks too, and nobody else: what the load takes of the node
	scale int      // divides how much of a load there is
	n     int      // loads so far
}

// figures are what others notice of a load.
type figures struct {
	p50, p99   time.Duration
	bare50     time.Duration // the other server's p50,
	bare       time.Duration // and its p99
	cpu        float64       // cores that the service uses meanwhile
	failed     int
	memory     float64 // MB: the process's own, and what its sockets hold in the kernel
	probe      string  // what /healthz answered
	stop, back time.Duration
}

// loads are what can be put on the service. Each is started, and returns what ends it.
var loads = []struct {
	name  string
	start func(b *chaosNode, t *testing.T) (end func())
	long  bool // only in the long form
}{
	{"idle health connections", (*chaosNode).idleHealth, false},
	{"made-up addresses on /", (*chaosNode).madeUpAddresses, false},
	{"clients that never read", (*chaosNode).neverReading, false},
	{"slow headers", (*chaosNode).slowHeaders, false},
	{"half-closed clients", (*chaosNode).halfClosing, false},
	{"refusals of 10 MB", (*chaosNode).longRefusals, false},
	{"many namespaces", (*chaosNode).manyNamespaces, false},
	{"many cgroups", (*chaosNode).manyCgroups, false},
	{"ambiguous sockets", (*chaosNode).ambiguousSockets, false},
	{"requests without end, no limit", unlimited((*chaosNode).requestsWithoutEnd), true},
	{"requests without end", (*chaosNode).requestsWithoutEnd, true},
	{"waits for changes, no limit", unlimited((*chaosNode).waits), true},
	{"waits for changes", (*chaosNode).waits, true},
	{"audiences without end", (*chaosNode).audiences, true},
	{"scrapes without end", (*chaosNode).metricsFlood, true},
	{"pods that come and go", (*chaosNode).churn, true},
	{"spoofed SYNs", (*chaosNode).synFlood, true},
}

// TestChaos applies each load, one at a time, and looks at what others notice. What is bounded is
// asserted; times are only reported.
func TestChaos(t *testing.T) {
	netnstest.Needs(t, "ss")
	long := os.Getenv(chaosLong) != ""
	k := newKernelNode(t, "log: {level: warning}", "hostCheck: true")
	b := &chaosNode{kernelNode: k, scale: 10}
	measure, memoryHigh := 20, chaosMemoryHigh(t)
	if long {
		b.scale, measure = 1, 2000
	}
	k.scraped(t)
	b.asker = k.newAsker(t)
	b.eventually(t, "the asker is served", func() bool { return b.asks(t).Status == 200 })
	b.serveBare(t)
	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "load\tp50\tp99\tof undisturbed\tbare server's\tcores\tfailed\tMB\tprobe\tstop\trecovery")
	calm := b.figures(t, measure)
	report := func(name string, f figures) {
		t.Logf("%s: %+v", name, f) // also where the table is never written
		fmt.Fprintf(
			w,
			"%s\t%v\t%v\t%.1f %.1f\t%.1f %.1f\t%.2f\t%d of %d\t%.0f\t%s\t%v\t%v\n",
			name,
			f.p50.Round(time.Microsecond),
			f.p99.Round(time.Microsecond),
			ratio(
				f.p50,
				calm.p50,
			),
			ratio(f.p99, calm.p99),
			ratio(f.bare50, calm.bare50),
			ratio(f.bare, calm.bare),
			f.cpu,
			f.failed,
			measure,
			f.memory,
			f.probe,
			f.stop.Round(time.Millisecond),
			f.back.Round(time.Millisecond),
		)
	}
	report("none", calm)
	for _, l := range loads {
		if l.long && !long {
			continue
		}
		t.Run(l.name, func(t *testing.T) {
			b.n++
			end := sync.OnceFunc(l.start(b, t))
			defer end()
			f := b.figures(t, measure)
			if f.memory > memoryHigh {
				t.Errorf("the service has %.0f MB, and MemoryHigh= is %.0f MB", f.memory, memoryHigh)
			}
			if f.failed > 0 &&
				!long { // a machine that others load, with the race detector, makes clients wait longer than the service does
				b.eventually(t, "others are served under the load", func() bool { return b.asks(t).Status == 200 })
			}
			if f.failed > 0 && long || f.probe != "200" {
				t.Errorf("%d of %d requests of others were not answered, and the probe got %s", f.failed, measure, f.probe)
			}
			began := time.Now()
			_ = k.server.Process.Signal(unix.SIGTERM)
			_ = k.server.Wait()
			f.stop = time.Since(began)
			b.serve(t)
			end()
			began = time.Now()
			b.eventually(t, "others are served again", func() bool { return b.asks(t).Status == 200 })
			f.back = time.Since(began)
			report(l.name, f)
		})
	}
	_ = w.Flush()
	if t.Failed() {
		t.Log("a load without a row stopped its test")
	}
	t.Logf("others' requests, each on a connection of its own, while a load is on the service:\n%s", &table)
}

func ratio(a, b time.Duration) float64 { return float64(a) / float64(b) }

func (b *chaosNode) asks(t *testing.T) said {
	t.Helper()
	a, err := b.asker.ask("fresh", accts+"default/token")
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// serveBare starts a server that says what ours says, and that is no load's target: its figures are
// what the machine is like.
func (b *chaosNode) serveBare(t *testing.T) {
	t.Helper()
	a := b.asks(t)
	text, err := json.Marshal(answer{a.Header, []byte(a.Body)})
	if err != nil {
		t.Fatal(err)
	}
	b.write(t, "answer.json", string(text))
	b.bare = netip.AddrPortFrom(b.node.Addr, 8080).String()
	t.Setenv(benchAnswer, filepath.Join(b.dir, "answer.json"))
	t.Setenv(benchListen, b.bare)
	b.process("bare", "/system.slice/bare.service")
	b.eventually(t, "a bare server serves", func() bool { a, err := b.asksBare(); return err == nil && a.Status == 200 })
}

func (b *chaosNode) asksBare() (said, error) {
	return b.asker.ask(fmt.Sprint(b.bare, ",,", testTimeout), accts+"default/token")
}

// figures has the asker ask both servers by turns.
func (b *chaosNode) figures(t *testing.T, n int) (f figures) {
	t.Helper()
	var took, bare []time.Duration
	service := process{cmd: b.server}
	start, cpu := time.Now(), service.cpu(t)
	for range n {
		began := time.Now()
		if a := b.asks(t); a.Status != 200 {
			f.failed++
			t.Logf("%d %s %.200s", a.Status, a.Err, a.Body)
		}
		took = append(took, time.Since(began))
		began = time.Now()
		if a, err := b.asksBare(); err != nil || a.Status != 200 {
			t.Fatalf("the bare server: %v, %+v", err, a)
		}
		bare = append(bare, time.Since(began))
	}
	f.cpu = (service.cpu(t) - cpu).Seconds() / time.Since(start).Seconds()
	slices.Sort(took)
	slices.Sort(bare)
	f.p50, f.p99, f.bare50, f.bare, f.memory = took[n/2], took[n*99/100], bare[n/2], bare[n*99/100], b.memory(t)
	f.probe = b.health("/healthz")
	return f
}

// health asks healthListen as Prometheus does.
func (b *chaosNode) health(path string) string {
	res, err := b.getHealth(path)
	if err != nil {
		return "no answer"
	}
	defer res.Body.Close()
	_, _ = io.Copy(io.Discard, res.Body)
	return strconv.Itoa(res.StatusCode)
}

var skmem = regexp.MustCompile(`skmem:\(r(\d+),rb\d+,t\d+,tb\d+,f(\d+),w(\d+),`)

// memory is what the process has for itself (its part of what it shares with others) and what its
// connections hold in the kernel, orphans included, in MB.
func (b *chaosNode) memory(t *testing.T) float64 {
	t.Helper()
	out, err := b.node.Command(t.Context(), "ss", "-Htanm", "( sport = :988 or sport = :16322 )").Output()
	if err != nil {
		t.Fatal(err)
	}
	bytes := 0
	for _, m := range skmem.FindAllStringSubmatch(string(out), -1) {
		for _, text := range m[1:] {
			n, _ := strconv.Atoi(text)
			bytes += n
		}
	}
	return pss(t, b.server.Process.Pid) + float64(bytes)/(1<<20)
}

// pss is what a process has for itself, and its part of what it shares with others, in MB
// (proc_pid_smaps(5)).
func pss(t testing.TB, pid int) float64 {
	t.Helper()
	rollup, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(rollup), "\nPss:")
	kB, err := strconv.ParseFloat(strings.Fields(after)[0], 64)
	if err != nil {
		t.Fatal(err)
	}
	return kB / 1024
}

// chaosMemoryHigh is what the unit allows, in MB.
func chaosMemoryHigh(t *testing.T) float64 {
	t.Helper()
	unit, err := os.ReadFile("../systemd/gke-metadata-emulator.service")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^MemoryHigh=(\d+)M$`).FindSubmatch(unit)
	if m == nil {
		t.Fatal("the unit has no MemoryHigh= in MB")
	}
	n, _ := strconv.Atoi(string(m[1]))
	return float64(n)
}
