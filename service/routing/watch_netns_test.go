package routing

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/messageid"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// running is a watcher on a testNode's node.
type running struct {
	*testNode
	reload chan os.Signal
	log    *logtest.Hook
	end    func()

	reads    atomic.Int64
	mu       sync.Mutex
	reported []string
	load     Plan
}

// watch starts a watcher that is over with the test at the latest, and waits until it has looked
// for the first time.
func (b *testNode) watch(load Plan, sweep time.Duration) *running {
	b.t.Helper()
	return b.watchWith(Watch{sweep: sweep}, load)
}

func (b *testNode) watchWith(w Watch, load Plan) *running {
	b.t.Helper()
	log, hook := logtest.NewNullLogger()
	log.SetLevel(logrus.InfoLevel)
	r := &running{testNode: b, reload: make(chan os.Signal, 1), log: hook, load: load}
	w.RunDir, w.Log, w.Reload = load.RunDir, log, r.reload
	w.read = func() { r.reads.Add(1) }
	w.Load = func() Plan { r.mu.Lock(); defer r.mu.Unlock(); return r.load }
	also := w.Report
	w.Report = func(text string) {
		if also != nil {
			also(text)
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.reported = append(r.reported, text)
	}
	ctx, cancel := context.WithCancel(context.Background())
	over := make(chan error, 1)
	go func() { over <- b.Do(func() error { return w.Run(ctx) }) }()
	r.end = sync.OnceFunc(func() {
		cancel()
		if err := <-over; err != nil {
			b.t.Errorf("watch: %v", err)
		}
	})
	b.t.Cleanup(r.end)
	r.until("the first look", func() bool { return r.last() != "" })
	return r
}

// stands is a check without the lock: one that is asked for again and again would keep the watcher
// out.
func (b *testNode) stands(p Plan) bool {
	r := b.router(p).(*router)
	return nil == b.Do(func() error {
		if r.plan.guardAlone() {
			return errors.Join(checkGuard(r.plan, nodeFacts{})...)
		}
		n, err := r.open(context.Background(), p.Binary, false)
		if err != nil {
			return err
		}
		return errors.Join(r.check(context.Background(), n)...)
	})
}

// last is what was reported last.
func (r *running) last() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.reported) == 0 {
		return ""
	}
	return r.reported[len(r.reported)-1]
}

// until polls until ok, for as long as a slow machine may need. Between polls it pauses for as long
// as one takes: many run commands, and the watcher needs the processor too.
func (r *running) until(what string, ok func() bool) time.Duration {
	r.t.Helper()
	start := time.Now()
	for asked := start; !ok(); asked = time.Now() {
		if time.Since(start) > 30*time.Second {
			r.t.Fatalf(
				"not within 30 s: %s; the watcher says %q; check: %v; log: %s",
				what,
				r.last(),
				r.check(r.plan),
				r.lines(),
			)
		}
		<-time.After(max(10*time.Millisecond, time.Since(asked)))
	}
	return time.Since(start)
}

func (r *running) lines() string {
	var b strings.Builder
	for _, e := range r.log.AllEntries() {
		fmt.Fprintln(&b, e.Level, e.Message, e.Data)
	}
	return b.String()
}

// repaired are the lines about repairs.
func (r *running) repaired() (found []*logrus.Entry) {
	for _, e := range r.log.AllEntries() {
		if e.Data[messageid.Field] == string(messageid.RulesRepaired) {
			found = append(found, e)
		}
	}
	return found
}

func (r *running) state() State {
	r.t.Helper()
	s, err := ReadState(r.plan.RunDir)
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

// flushes are what others do to us.
var flushes = []struct {
	name, flush, layer string
	cause              [2]string // on nft, on legacy; "" where none can be told in advance
}{
	{"filter", "iptables -F", fault.IPTables, [2]string{"nftables", "xtables"}},
	{"nat", "iptables -t nat -F", fault.IPTables, [2]string{"nftables", "xtables"}},
	{
		"nat and its chains",
		"iptables -t nat -F; iptables -t nat -X || true",
		fault.IPTables,
		[2]string{"nftables", "xtables"},
	},
	{"raw", "iptables -t raw -F", fault.IPTables, [2]string{"nftables", "xtables"}},
	{"base chain only", "iptables -t nat -F PREROUTING", fault.IPTables, [2]string{"nftables", "xtables"}},
	{"one rule", "iptables -t nat -D GME-PRE -i eth0 -j RETURN", fault.IPTables, [2]string{"nftables", "xtables"}},
	{"a rule too much", "iptables -t nat -I GME-PRE -p tcp -j ACCEPT", fault.IPTables, [2]string{"nftables", "xtables"}},
	{
		"a second jump",
		"iptables -t nat -A PREROUTING -m comment --comment gke-metadata-emulator -j GME-PRE",
		fault.IPTables,
		[2]string{"nftables", "xtables"},
	},
	{
		"order",
		"iptables -t nat -D GME-PRE -i eth0 -j RETURN; iptables -t nat -A GME-PRE -i eth0 -j RETURN",
		fault.IPTables,
		[2]string{"nftables", ""},
	},
	{"guard", "ip rule del pref 97 prohibit", fault.Rule, [2]string{"ip-rule", "ip-rule"}},
	{
		"guard of IPv6",
		"ip -6 rule del pref 97 iif lo; ip -6 rule del pref 97 prohibit",
		fault.Rule,
		[2]string{"ip-rule", "ip-rule"},
	},
	{"address", "ip address del 169.254.169.252/32 dev lo", fault.Address, [2]string{"ip-address", "ip-address"}},
	// The address that the repair before has put back is an event too, and may have somebody look
	// first.
	{"IPv6 filter", "ip6tables -F; ip6tables -X", fault.IP6Tables, [2]string{"", ""}},
}

// TestWatchRepairs: whatever others flush stands again, no pod gets to the real server meanwhile,
// and it is counted and said.
func TestWatchRepairs(t *testing.T) {
	t.Parallel()
	onBothBackends(t, func(t *testing.T, b *testNode) {
		b.install(b.plan)
		whole := b.ruleset()
		w := b.watch(b.plan, time.Second)
		for _, c := range flushes {
			t.Run(c.name, func(t *testing.T) {
				b.t = t
				before, said := w.state().Repairs.Total(), len(w.repaired())
				b.run(c.flush)
				took := w.until(
					"a repair",
					func() bool { return w.state().Repairs.Total() > before && b.stands(b.plan) && w.state().Standing.Good },
				)
				w.until("the line", func() bool { return len(w.repaired()) > said })
				t.Logf(
					"stands %v after the command was over, the last repair took %v",
					took.Round(time.Millisecond),
					w.repaired()[len(w.repaired())-1].Data["took"],
				)
				b.requireEqual("repair", sorted(b.ruleset()), sorted(whole)) // policy rules of one preference have no order
				b.answers(b.pod, "169.254.169.254:80", emulator)
				line := w.repaired()[said]
				cause := c.cause[0]
				if b.plan.Binary == "iptables-legacy" {
					cause = c.cause[1]
				}
				if line.Data["layer"] != c.layer || cause != "" && line.Data["cause"] != cause && line.Data["cause"] != "sweep" ||
					line.Data["missing"] == "" {
					t.Errorf("want layer %s and cause %s in %v", c.layer, cause, line.Data)
				}
			})
			w.testNode.t = t
		}
		if got := w.state().Repairs; got[fault.IPTables] == nil || got[fault.Rule]["ip-rule"]+got[fault.Rule]["sweep"] < 2 {
			t.Errorf("counted: %v", got)
		}
		w.end()
		b.remove(b.plan)
	})
}

// TestWatchSaysWho: a restart of nftables.service wipes everything at once, and the line
// names the process.
func TestWatchSaysWho(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	b.install(b.plan)
	w := b.watch(b.plan, time.Hour)
	b.run("nft flush ruleset")
	w.until("a repair", func() bool { return len(w.repaired()) == 1 && b.stands(b.plan) })
	line := w.repaired()[0]
	if by := fmt.Sprint(line.Data["by"]); !strings.HasPrefix(by, "nft (") {
		t.Errorf("by %q, want nft and its pid", by)
	}
	for _, want := range []string{"GME-PRE", "GME-RAW", "ip6tables"} {
		if !strings.Contains(fmt.Sprint(line.Data["missing"]), want) {
			t.Errorf("the line does not name %s: %v", want, line.Data["missing"])
		}
	}
}

// TestWatchObeys: what is removed stays removed, what is installed next is kept, and a closed guard
// stays closed.
func TestWatchObeys(t *testing.T) {
	t.Parallel()
	onBothBackends(t, func(t *testing.T, b *testNode) {
		before := b.ruleset()
		w := b.watch(b.plan, 100*time.Millisecond)
		w.until("the rules", func() bool { return b.stands(b.plan) }) // nobody desired anything: the configuration does
		if s := w.state(); s.Desired != Installed || s.Repairs.Total() != 0 {
			t.Errorf("after the first look: %+v", s)
		}

		b.remove(b.plan)
		w.until("to hear of the removal", func() bool { return strings.Contains(w.last(), "removed") })
		b.run(
			"ip rule add pref 97 to 169.254.169.254/32 ipproto tcp dport 80 prohibit protocol kernel; ip rule del pref 97 " +
				"prohibit; iptables -N X; iptables -X X",
		)
		w.reload <- os.Interrupt // whatever the signal: a removal is no fault of the configuration
		w.until("the reload", func() bool { return len(w.reload) == 0 })
		b.requireEqual("removed", b.ruleset(), before)
		if s := w.state(); s.Desired != Removed || !s.Standing.Good {
			t.Errorf("after the removal: %+v", s)
		}

		closed := Plan{Closed: true, RunDir: b.plan.RunDir, Binary: b.plan.Binary}
		b.install(closed)
		w.until("to hear of the guard", func() bool { return strings.Contains(w.last(), "closed guard") })
		b.run("ip rule del pref 97 prohibit")
		w.until("the guard", func() bool { return b.stands(closed) })
		if s := w.state(); !s.Closed || s.Repairs[fault.Rule] == nil {
			t.Errorf("after a flush of the guard: %+v", s)
		}
		if strings.Contains(b.ruleset(), "GME-") {
			t.Error("rules were put up around the closed guard")
		}

		other := b.plan
		other.Listen = b.plan.Listen
		other.ExcludeInterfaces = []string{"docker0"}
		b.install(other) // not what the watcher's configuration says, and yet what is desired now
		w.until("to hear of it", func() bool { return w.last() == "the rules stand" })
		b.run("iptables -t nat -F")
		w.until("the other rules", func() bool { return b.stands(other) })

		w.reload <- os.Interrupt // now the configuration counts
		w.until("the configuration's rules", func() bool { return b.stands(b.plan) && w.state().ExcludeInterfaces == nil })
		w.mu.Lock()
		w.load = Plan{Closed: true, RunDir: b.plan.RunDir, Binary: b.plan.Binary}
		w.mu.Unlock()
		w.reload <- os.Interrupt // a configuration that broke changes nothing
		w.until("the reload", func() bool { return len(w.reload) == 0 })
		b.run("iptables -t nat -F")
		w.until("a repair", func() bool { return b.stands(b.plan) })
		w.end()
		b.remove(b.plan)
		b.requireEqual("remove", b.ruleset(), before)
	})
}

// TestWatchBrokenConfiguration: at boot, with a configuration that is broken, the guard goes up and
// nothing else.
func TestWatchBrokenConfiguration(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	closed := Plan{Closed: true, RunDir: b.plan.RunDir}
	w := b.watch(closed, time.Hour)
	b.requireOK(closed)
	b.answers(b.pod, "169.254.169.254:80", "")
	w.mu.Lock()
	w.load = b.plan
	w.mu.Unlock()
	w.reload <- os.Interrupt
	w.until("the rules", func() bool { return b.stands(b.plan) })
	b.answers(b.pod, "169.254.169.254:80", emulator)
}

// TestWatchUplinks: an interface that comes is spared from then on, so that the hosts behind it are
// not served; one that goes is forgotten. Modes loopback and none do so in their stories.
func TestWatchUplinks(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"iptables-nft", "iptables-legacy", ModeNFTables, ModeEBPF} {
		t.Run(mode, func(t *testing.T) {
			b := modeNode(t, mode)
			named := func() bool {
				if b.plan.Mode == ModeIPTables {
					return strings.Contains(b.run("iptables -t nat -S GME-PRE"), "-i wan9 -j RETURN")
				}
				return strings.Contains(b.run("nft list table ip gke-metadata-emulator"), `iifname "wan9"`)
			}
			b.install(b.plan)
			whole := b.ruleset()
			w := b.watch(b.plan, time.Hour)
			b.run(
				"ip link add wan9 type veth peer name wan9p; ip link set wan9 up; ip address add 192.0.2.1/24 dev wan9; ip " +
					"route add default via 192.0.2.9 dev wan9 metric 900",
			)
			w.until("the uplink to be spared", named)
			w.until("all", func() bool { return b.stands(b.plan) })
			b.run("ip link del wan9")
			w.until("the uplink to be forgotten", func() bool { return !named() && b.stands(b.plan) })
			b.requireEqual("without it", b.ruleset(), whole)
			w.end()
			b.remove(b.plan)
		})
	}
}

// TestWatchStorm: what others do to their own rules costs next to no run of iptables on nft, few on
// legacy, and no repair.
func TestWatchStorm(t *testing.T) {
	onBothBackends(t, func(t *testing.T, b *testNode) {
		b.run("iptables -t nat -N KUBE-SERVICES; iptables -t nat -A PREROUTING -j KUBE-SERVICES")
		b.install(b.plan)
		w := b.watch(b.plan, time.Hour)
		start := time.Now()
		before, reads := w.state(), w.reads.Load()
		b.run(
			`i=0; while [ $i -lt 1000 ]; do i=$((i+1)); iptables -t nat -A KUBE-SERVICES -d 10.96.0.1/32 -p tcp --dport $i ` +
				`-j RETURN; done`,
		)
		b.run("ip rule del pref 97 prohibit") // the last event: when it is repaired, all before it were looked at
		w.until("the repair", func() bool { return b.stands(b.plan) && w.state().Repairs.Total() > before.Repairs.Total() })
		if got := w.state().Repairs.Total() - before.Repairs.Total(); got != 1 {
			t.Errorf("%d repairs, want that of the ip rule alone: %s", got, w.lines())
		}
		took := time.Since(start)
		most := burst // none but for dumps that were disturbed five times: somebody else's chain is not ours
		if b.plan.Binary == "iptables-legacy" {
			most = burst + int(took/refill) + 1
		}
		if got := int(w.reads.Load() - reads); got > most {
			t.Errorf("iptables was run to read the rules %d times in %v, want %d at most", got, took, most)
		}
		t.Logf("1000 changes in %v, rules read %d times", took.Round(time.Millisecond), w.reads.Load()-reads)
	})
}

// TestWatchFighter: somebody flushes every 10 ms. We repair five times at once and then once a
// second, no more.
func TestWatchFighter(t *testing.T) {
	onBothBackends(t, func(t *testing.T, b *testNode) {
		b.install(b.plan)
		w := b.watch(b.plan, time.Second)
		before := w.state().Installs
		start := time.Now()
		b.run(`i=0; while [ $i -lt 300 ]; do i=$((i+1)); iptables -t nat -F PREROUTING; sleep 0.01; done`)
		w.until("peace", func() bool { return b.stands(b.plan) })
		took := time.Since(start)
		installs := w.state().Installs - before
		if most := burst + int(took/refill) + 1; installs > most || installs < 2 {
			t.Errorf("%d installs in %v, want 2 to %d", installs, took, most)
		}
		t.Logf("%d installs in %v", installs, took.Round(time.Millisecond))
	})
}

// TestWatchIsQuiet: its own repairs, and those of nobody, make it do nothing more.
func TestWatchIsQuiet(t *testing.T) {
	t.Parallel()
	onBothBackends(t, func(t *testing.T, b *testNode) {
		b.install(b.plan)
		w := b.watch(b.plan, 50*time.Millisecond) // many sweeps
		b.run("iptables -t nat -F; ip rule del pref 97 prohibit")
		w.until("a repair", func() bool { return b.stands(b.plan) && w.state().Standing.Good })
		s := w.state()
		w.until("another sweep", func() bool { return w.state().Standing.Time.After(s.Standing.Time) })
		s = w.state()
		for range 3 {
			at := w.state().Standing.Time
			w.until("more sweeps", func() bool { return w.state().Standing.Time.After(at) })
		}
		if now := w.state(); now.Installs != s.Installs || now.Repairs.Total() != s.Repairs.Total() {
			t.Errorf("it went on repairing: %+v, then %+v", s, now)
		}
	})
}

// TestWatchCapabilities: of root's rights CAP_NET_ADMIN and CAP_NET_RAW are enough, and less
// is said plainly.
func TestWatchCapabilities(t *testing.T) {
	t.Parallel()
	onBothBackends(t, func(t *testing.T, b *testNode) {
		netnstest.Needs(t, "setpriv")
		b.install(b.plan)
		arg := filepath.Join(b.plan.RunDir, b.plan.Binary)
		out, err := b.play("watch", arg, b.self(), "setpriv", "--bounding-set", "-all", "--inh-caps", "-all").Output()
		if err == nil || !strings.Contains(string(out), "CAP_NET_ADMIN") {
			t.Errorf("%v: %s", err, out)
		}
		cmd := b.play("watch", arg, b.self(), "setpriv", "--bounding-set", "-all,+net_admin,+net_raw", "--inh-caps", "-all")
		var said bytes.Buffer
		cmd.Stdout = &said
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		r := &running{testNode: b, log: new(logtest.Hook)}
		for _, flush := range []string{"iptables -t nat -F; ip rule del pref 97 prohibit",
			"ip6tables -F; ip address del 169.254.169.252/32 dev lo"} {
			b.run(flush)
			flushed := time.Now()
			r.until("a repair", func() bool {
				s := r.state().Standing // not one that is still read back: what is flushed next would be missing then
				return s.Good && s.Time.After(flushed) && b.stands(b.plan)
			})
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if strings.Contains(said.String(), "level=error") {
			t.Errorf("%s", said.String())
		}
	})
}
