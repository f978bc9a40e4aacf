package routing

import (
	"errors"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
)

// unconfigured is the Plan of a node without a valid configuration, as the commands make it.
func (b *testNode) unconfigured() Plan {
	p := b.plan
	p.Closed, p.Guard = true, nil
	return p
}

// requireAnswers fails unless all of many connections that the pod opens at once are answered by
// the service, or by IPv6, where it does not listen, reset. The kernel limits how often it refuses
// by ICMP.
func (b *testNode) requireAnswers(when string) {
	b.t.Helper()
	for at, want := range map[string]string{"169.254.169.254:80": emulator, "[fd20:ce::254]:80": "reset"} {
		outcomes := make(chan string)
		begin := time.Now()
		for range 16 {
			go func() {
				who, err := ask(b.pod, at, long)
				if errors.Is(err, syscall.ECONNREFUSED) {
					who = "reset"
				} else if err != nil {
					who = err.Error()
				}
				outcomes <- who
			}()
		}
		counts := map[string]int{}
		for range 16 {
			counts[<-outcomes]++
		}
		if counts[want] != 16 {
			b.t.Errorf("%s: 16 connections to %s at once: %v, want %s", when, at, counts, want)
		}
		b.t.Logf("%s: 16 connections to %s at once: %v in %v", when, at, counts, time.Since(begin).Round(time.Millisecond))
	}
}

// load has the pod ask until the end is called, which fails unless each request was answered.
func (b *testNode) load() (end func()) {
	done := make(chan struct{})
	var asked atomic.Int64
	var clients sync.WaitGroup
	for range 2 {
		clients.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				asked.Add(1)
				if who, err := ask(b.pod, "169.254.169.254:80", long); who != emulator {
					b.t.Errorf("under load %q answered (%v)", who, err)
				}
			}
		})
	}
	return func() {
		close(done)
		clients.Wait()
		b.t.Logf("%d requests under load", asked.Load())
	}
}

// TestUnconfigured: without a configuration pods reach the service, which tells them so; with one
// they go on to, and one that breaks changes nothing.
func TestUnconfigured(t *testing.T) {
	t.Parallel()
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		before := b.ruleset()
		b.install(b.plan)
		whole := b.ruleset()
		b.remove(b.plan)
		b.requireEqual("remove", b.ruleset(), before)

		closed := b.unconfigured()
		if err := b.check(closed); err == nil {
			t.Error("nothing is missing before the first install")
		}
		b.install(closed)
		b.requireOK(closed)
		b.requireAnswers("unconfigured")
		for _, at := range []string{"[fd00:c1::a9fe:a9fe]:80", "[fd00:ec2::254]:80", "169.254.169.254:443"} {
			b.answers(b.pod, at, "")
		}
		b.answers(b.neighbour, "169.254.169.252:988", "")
		b.answers(b.pod, "169.254.169.254:53", cloud)
		b.answers(b.NS, "169.254.169.254:80", cloud)
		if s, err := ReadState(b.plan.RunDir); err != nil || !s.Closed || s.Listen == "" || !s.Standing.Good {
			t.Errorf("state: %+v, %v", s, err)
		}
		unconfigured := b.ruleset()
		b.install(closed)
		b.requireEqual("installed again", b.ruleset(), unconfigured)

		end := b.load()
		b.install(b.plan)
		b.requireEqual("configured", sorted(b.ruleset()), sorted(whole))
		b.install(closed)
		b.requireEqual("broken", sorted(b.ruleset()), sorted(whole))
		b.requireOK(closed)
		b.install(b.plan)
		end()
		if s, err := ReadState(b.plan.RunDir); err != nil || s.Closed {
			t.Errorf("state after a configuration broke and was mended: %+v, %v", s, err)
		}
		b.remove(closed)
		b.requireEqual("remove", b.ruleset(), before)
		b.install(closed)
		b.remove(closed)
		b.requireEqual("remove what stands without a configuration", b.ruleset(), before)
		if n := b.leaked.Load(); n != 1 {
			t.Errorf("the cloud's own server accepted %d connections of the pod, want that of DNS alone", n)
		}
	})
}

// TestBrokenKeeps: what the last valid configuration installed is kept standing while it is broken,
// whatever it was.
func TestBrokenKeeps(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"iptables-nft", ModeNFTables, ModeLoopback} {
		t.Run(mode, func(t *testing.T) {
			b := modeNode(t, mode)
			b.plan.Guard = append(DefaultGuard(), netip.MustParseAddrPort("169.254.170.2:80"))
			before := b.ruleset()
			b.install(b.plan)
			whole := b.ruleset()
			closed := Plan{Closed: true, Mode: ModeIPTables, Listen: netip.MustParseAddrPort("169.254.169.252:988"),
				InterceptHostPods: "auto", RunDir: b.plan.RunDir, Binary: b.plan.Binary}
			b.install(closed)
			b.requireEqual("broken", b.ruleset(), whole)
			b.requireOK(closed)
			b.answers(b.pod, "169.254.169.254:80", emulator)
			b.run("nft flush ruleset; ip rule del pref 97 prohibit; ip rule del pref 97 prohibit")
			if err := b.check(closed); !errors.Is(err, fault.ErrMissing) {
				t.Errorf("after a flush: %v", err)
			}
			b.install(closed)
			b.requireEqual("installed again", sorted(b.ruleset()), sorted(whole))
			b.answers(b.pod, "169.254.169.254:80", emulator)
			b.remove(closed)
			b.requireEqual("remove", sorted(b.ruleset()), sorted(before))
		})
	}
}

// TestUnconfiguredWatch: the watcher puts up the same at boot, keeps it, and installs what a
// configuration says that comes.
func TestUnconfiguredWatch(t *testing.T) {
	t.Parallel()
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		closed := b.unconfigured()
		w := b.watch(closed, time.Hour)
		b.requireOK(closed)
		b.requireAnswers("at boot")
		flush := "iptables -t nat -F; ip6tables -t nat -F"
		if closed.Mode == ModeNFTables {
			flush = "nft flush ruleset"
		}
		for _, flush := range []string{flush, "ip rule del pref 97 prohibit", "ip address del 169.254.169.252/32 dev lo",
			"ip -6 route del local fd20:ce::252 dev lo table local"} {
			b.run(flush)
			w.until("a repair after "+flush, func() bool { return b.stands(closed) })
			b.requireAnswers("after " + flush)
		}
		w.mu.Lock()
		w.load = b.plan
		w.mu.Unlock()
		end := b.load()
		w.reload <- syscall.SIGHUP
		w.until("the configuration's rules", func() bool { return !w.state().Closed && b.stands(b.plan) })
		end()
		if n := b.leaked.Load(); n != 0 {
			t.Errorf("the cloud's own server accepted %d connections of the pod", n)
		}
	})
}

// TestUnconfiguredElse: where pods cannot be redirected to the service the guard stands alone, and
// that is no failure.
func TestUnconfiguredElse(t *testing.T) {
	t.Parallel()
	t.Run("without iptables", func(t *testing.T) {
		b := newTestNode(t, "iptables-nft")
		before := b.ruleset()
		closed := b.unconfigured()
		closed.Binary = "iptables-that-nobody-has"
		b.install(closed)
		b.requireOK(closed)
		b.requireAnswers("by nftables")
		b.remove(closed)
		b.requireEqual("remove", b.ruleset(), before)
	})
	t.Run("redirected by somebody else", func(t *testing.T) {
		b := newTestNode(t, "iptables-nft")
		b.run("iptables -t nat -A PREROUTING ! -i eth0 -d 169.254.169.254 -p tcp --dport 80 -j DNAT --to-destination " +
			"169.254.169.253:988")
		before := b.ruleset()
		closed := b.unconfigured()
		b.install(closed)
		b.requireOK(closed)
		b.answers(b.pod, "[fd20:ce::254]:80", "")
		if strings.Contains(b.ruleset(), "GME-") {
			t.Error("rules were put up beside another's")
		}
		if s, err := ReadState(b.plan.RunDir); err != nil || !s.Closed || s.Listen != "" || !s.Standing.Good {
			t.Errorf("state: %+v, %v", s, err)
		}
		b.remove(closed)
		b.requireEqual("remove", b.ruleset(), before)
		if n := b.leaked.Load(); n != 0 {
			t.Errorf("the cloud's own server accepted %d connections of the pod", n)
		}
	})
}
