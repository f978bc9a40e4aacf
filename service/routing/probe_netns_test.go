package routing

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/probe"
)

// try asks the metadata server from a throw-away pod on the test node, and returns who
// answered and who dropped.
func (b *testNode) try(t *testing.T) (answer string, dropped []string) {
	t.Helper()
	return b.tryAt(t, metadataServer)
}

// tried is tryAt again and again, where a machine is too busy to answer and nobody is in the way.
func (b *testNode) tried(t *testing.T, at netip.AddrPort) (answer string, dropped []string) {
	t.Helper()
	for end := time.Now().Add(long); answer == "" && len(dropped) == 0 && time.Now().Before(end); {
		answer, dropped = b.tryAt(t, at)
	}
	return answer, dropped
}

// tryAt is try of that one of the server's addresses.
func (b *testNode) tryAt(t *testing.T, at netip.AddrPort) (answer string, dropped []string) {
	t.Helper()
	ask := func(pod *probe.Pod, wait time.Duration) string {
		ctx, cancel := context.WithTimeout(t.Context(), wait)
		defer cancel()
		c, err := pod.Dial(ctx, "tcp", at.String())
		if err != nil {
			return ""
		}
		defer func() { _ = c.Close() }()
		answer, _ := talk(c, wait)
		return answer
	}
	if err := b.Do(func() error {
		pod, err := probe.NewPod()
		if err != nil {
			return err
		}
		from := pod.Addr
		if at.Addr().Is6() {
			err = pod.AddIPv6()
			from = pod.Addr6
		}
		if err != nil {
			return errors.Join(err, pod.Close())
		}
		if answer = ask(pod, short); answer != emulator {
			dropped, err = pod.Dropped(t.Context(), from, func() { answer = ask(pod, short) })
		} else {
			answer = ask(pod, long)
		}
		if closed := pod.Close(); closed != nil {
			t.Error(closed)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return answer, dropped
}

// a connection from a throw-away namespace tells what a check of our own rules cannot, names
// the chain, and leaves no trace.
func TestProbe(t *testing.T) {
	t.Parallel()
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		netnstest.Needs(t, "nft")
		b.install(b.plan)
		nft := b.plan.Binary == "iptables-nft"
		for _, c := range []struct {
			name, rules, undo string
			want              []string // of the nft backend, and of the legacy one
		}{
			{name: "nothing is in the way"},
			{"a later chain with policy drop",
				"nft 'add table inet foreign; add chain inet foreign late { type filter hook input priority filter + 10; policy " +
					"drop; }'", "nft delete table inet foreign",
				[]string{"nft chain inet foreign late (policy drop)", "nft chain inet foreign late (policy drop)"}},
			{"a rule of a later chain",
				"nft 'add table inet foreign; add chain inet foreign late { type filter hook input priority filter + 10; }; add " +
					"rule inet foreign late tcp dport 988 counter drop'", "nft delete table inet foreign",
				[]string{"nft chain inet foreign late (rule: tcp dport 988 drop)",
					"nft chain inet foreign late (rule: tcp dport 988 drop)"}},
			{"a rejection", "nft 'add table inet foreign; add chain inet foreign late { type filter hook input priority " +
				"filter + 10; }; add rule inet foreign late tcp dport 988 reject with tcp reset'", "nft delete table inet foreign",
				[]string{"nft chain inet foreign late (rule: tcp dport 988 reject with tcp reset)",
					"nft chain inet foreign late (rule: tcp dport 988 reject with tcp reset)"}},
			{"the way back", "nft 'add table inet foreign; add chain inet foreign back { type filter hook output priority " +
				"filter; }; add rule inet foreign back oifname gme-doctor drop'", "nft delete table inet foreign",
				[]string{`nft chain inet foreign back (rule: oifname "gme-doctor" drop)`,
					`nft chain inet foreign back (rule: oifname "gme-doctor" drop)`}},
			{"iptables INPUT before ours", "iptables -I INPUT -i gme-doctor -j DROP", "iptables -D INPUT -i gme-doctor -j DROP",
				[]string{`nft chain ip filter INPUT (rule: iifname "gme-doctor" drop)`,
					"iptables chain INPUT of table filter (rule: -A INPUT -i gme-doctor -j DROP)"}},
			{"iptables OUTPUT before ours", "iptables -I OUTPUT -o gme-doctor -j DROP",
				"iptables -D OUTPUT -o gme-doctor -j DROP",
				[]string{`nft chain ip filter OUTPUT (rule: oifname "gme-doctor" drop)`,
					"iptables chain OUTPUT of table filter (rule: -A OUTPUT -o gme-doctor -j DROP)"}},
		} {
			t.Run(c.name, func(t *testing.T) {
				b.t = t
				before := b.ruleset()
				if c.rules != "" {
					b.run(c.rules)
					defer b.run(c.undo)
				}
				standing := b.ruleset()
				answer, dropped := b.try(t)
				if c.want == nil {
					if answer != emulator {
						t.Errorf("%q answered, want %q", answer, emulator)
					}
				} else if want := c.want[map[bool]int{true: 0, false: 1}[nft]]; answer != "" || !slices.Contains(dropped, want) {
					t.Errorf("%q answered, and dropped by %q, want %q", answer, dropped, want)
				}
				b.requireEqual("after the probe", b.ruleset(), standing)
				if c.want == nil {
					b.requireEqual("after the probe", b.ruleset(), before)
				}
			})
		}
		b.t = t

		// Nothing of ours stands: the cloud is out of the probe's reach, or not, but it is not the
		// emulator that answers.
		b.remove(b.plan)
		if answer, dropped := b.try(t); answer == emulator || len(dropped) > 0 {
			t.Errorf("without rules %q answered, and dropped by %q", answer, dropped)
		}
	})
}

// A kernel without owners of tables, on which doctor was killed: the table that is left is
// replaced, and then goes.
func TestProbeFindsATableThatIsLeft(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	netnstest.Needs(t, "nft")
	b.install(b.plan)
	b.run("iptables -I INPUT -i gme-doctor -j DROP")
	before := b.ruleset()
	const table = "gke-metadata-emulator-doctor"
	for chain, match := range map[string]string{"from-pod": "prerouting iifname", "to-pod": "output oifname"} {
		hook, key, _ := strings.Cut(match, " ")
		b.run(fmt.Sprintf("nft 'add table ip %[1]s; "+
			"add chain ip %[1]s %[2]s { type filter hook %[3]s priority -2147483648; }; "+
			"add rule ip %[1]s %[2]s %[4]s gme-doctor meta nftrace set 1'", table, chain, hook, key))
	}
	if text := b.run("nft list ruleset"); !strings.Contains(text, table) ||
		!strings.Contains(text, `oifname "gme-doctor" meta nftrace set 1`) {
		t.Fatal(text)
	}
	if _, dropped := b.try(t); !slices.Contains(dropped, `nft chain ip filter INPUT (rule: iifname "gme-doctor" drop)`) {
		t.Errorf("dropped by %q", dropped)
	}
	b.requireEqual("after the probe", b.ruleset(), before)
}

// A connection that nobody waits for any more is in nobody's way, and none is made in another's
// namespace.
func TestProbeClosesWhileItDials(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	b.run("iptables -I INPUT -i gme-doctor -j DROP")
	if err := b.Do(func() error {
		pod, err := probe.NewPod()
		if err != nil {
			return err
		}
		begun := make(chan struct{})
		go func() {
			close(begun)
			if _, err := pod.Dial(t.Context(), "tcp4", "169.254.169.254:80"); err == nil {
				t.Error("it connected")
			}
		}()
		<-begun
		if err := pod.Close(); err != nil {
			return err
		}
		if _, err := pod.Dial(t.Context(), "tcp4", "169.254.169.254:80"); !errors.Is(err, net.ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// Whoever is killed in the middle of a probe leaves nothing: the kernel takes its namespace, its
// link and its table away.
func TestProbeIsKilled(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	netnstest.Needs(t, "nft")
	before := b.ruleset()
	cmd := b.play("probe", "", b.self())
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stdin.Close() }()
	stdout, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || line != "probing\n" {
		t.Errorf("%q, %v", line, err)
	}
	if during := b.ruleset(); !strings.Contains(during, probe.TraceTable) || !strings.Contains(during, probe.LinkName) {
		t.Errorf("no probe:\n%s", during)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	for deadline := time.Now().Add(long); b.ruleset() != before && time.Now().Before(deadline); {
		runtime.Gosched()
	}
	b.requireEqual("after the kill", b.ruleset(), before)
}

// The emulator lives elsewhere: what a pod sends to it is forwarded, and somebody's FORWARD chain
// may be in the way.
func TestProbeIsForwarded(t *testing.T) {
	t.Parallel()
	onBothBackends(t, func(t *testing.T, b *testNode) {
		elsewhere, err := b.AddPod("emulator")
		if err != nil {
			t.Fatal(err)
		}
		b.plan.Listen = netip.AddrPortFrom(elsewhere.Addr, 8080)
		b.serve(elsewhere, b.plan.Listen.String(), emulator)
		b.install(b.plan)
		if answer, dropped := b.tried(t, metadataServer); answer != emulator {
			t.Fatalf("%q answered, and dropped by %q", answer, dropped)
		}
		b.run("iptables -P FORWARD DROP; iptables -I FORWARD 1 -i gme-doctor -j DROP")
		_, dropped := b.try(t)
		if len(dropped) == 0 || !strings.Contains(dropped[0], "FORWARD") || !strings.Contains(dropped[0], "(rule: ") {
			t.Errorf("dropped by %q", dropped)
		}
	})
}

// Whatever ends a probe, nothing of it stays: here its namespace and link are gone with the
// process, or with Close.
func TestProbeLeavesNothing(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	before := b.ruleset()
	if err := b.Do(func() error {
		for range 3 { // again and again
			pod, err := probe.NewPod()
			if err != nil {
				return err
			}
			if _, err := probe.NewPod(); err == nil {
				t.Error("two probes at once")
			}
			if _, err := net.InterfaceByName(pod.Link); err != nil {
				t.Error(err) // the second, which failed, took the first one's link away
			}
			if err := pod.Close(); err != nil {
				return err
			}
			if err := pod.Close(); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	b.requireEqual("after three probes", b.ruleset(), before)
	if err := b.Do(func() error {
		_, err := net.InterfaceByName(probe.LinkName)
		if err == nil {
			t.Error(probe.LinkName + " is left")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}
