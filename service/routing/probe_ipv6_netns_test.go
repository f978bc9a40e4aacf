package routing

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/probe"
)

// R-30 for IPv6: the connection of the probe meets the other family's rules, the chain that drops
// it is named, and what IPv4 is let through by is no word on it.
func TestProbeIPv6(t *testing.T) {
	t.Parallel()
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		netnstest.Needs(t, "nft")
		ipv6Node(b)
		b.install(b.plan)
		nft := b.plan.Binary == "iptables-nft"
		for _, c := range []struct {
			name, rules, undo string
			nft, legacy       string // who drops; "" is nobody
		}{
			{name: "nothing is in the way"},
			{"a later chain with policy drop",
				"nft 'add table ip6 foreign; add chain ip6 foreign late { type filter hook input priority filter + 10; policy " +
					"drop; }'", "nft delete table ip6 foreign",
				"nft chain ip6 foreign late (policy drop)", "nft chain ip6 foreign late (policy drop)"},
			{"a rule of a later chain",
				"nft 'add table inet foreign; add chain inet foreign late { type filter hook input priority filter + 10; }; add " +
					"rule inet foreign late meta nfproto ipv6 tcp dport 988 drop'", "nft delete table inet foreign",
				"nft chain inet foreign late (rule: meta nfproto ipv6 tcp dport 988 drop)",
				"nft chain inet foreign late (rule: meta nfproto ipv6 tcp dport 988 drop)"},
			{"the way back", "nft 'add table ip6 foreign; add chain ip6 foreign back { type filter hook output priority " +
				"filter; }; add rule ip6 foreign back oifname gme-doctor drop'", "nft delete table ip6 foreign",
				`nft chain ip6 foreign back (rule: oifname "gme-doctor" drop)`,
				`nft chain ip6 foreign back (rule: oifname "gme-doctor" drop)`},
			{"ip6tables INPUT before ours", "ip6tables -I INPUT -i gme-doctor -j DROP",
				"ip6tables -D INPUT -i gme-doctor -j DROP",
				`nft chain ip6 filter INPUT (rule: iifname "gme-doctor" drop)`,
				"ip6tables chain INPUT of table filter (rule: -A INPUT -i gme-doctor -j DROP)"},
			{"a table that IPv4 does not have", "ip6tables -t mangle -I PREROUTING -i gme-doctor -j DROP",
				"ip6tables -t mangle -D PREROUTING -i gme-doctor -j DROP",
				`nft chain ip6 mangle PREROUTING (rule: iifname "gme-doctor" drop)`,
				"ip6tables chain PREROUTING of table mangle (rule: -A PREROUTING -i gme-doctor -j DROP)"},
			{"ip6tables OUTPUT before ours", "ip6tables -I OUTPUT -o gme-doctor -j DROP",
				"ip6tables -D OUTPUT -o gme-doctor -j DROP",
				`nft chain ip6 filter OUTPUT (rule: oifname "gme-doctor" drop)`,
				"ip6tables chain OUTPUT of table filter (rule: -A OUTPUT -o gme-doctor -j DROP)"},
		} {
			t.Run(c.name, func(t *testing.T) {
				b.t = t
				before := b.ruleset()
				if c.rules != "" {
					b.run(c.rules)
					defer b.run(c.undo)
				}
				standing := b.ruleset()
				answer, dropped := b.tried(t, metadataServer6)
				want := c.legacy
				if nft {
					want = c.nft
				}
				switch {
				case c.rules == "" && (answer != emulator || len(dropped) > 0):
					t.Errorf("%q answered, and dropped by %q", answer, dropped)
				case c.rules != "" && (answer != "" || !slices.Contains(dropped, want)):
					t.Errorf("%q answered, and dropped by %q, want %q", answer, dropped, want)
				}
				if answer, dropped := b.tried(t, metadataServer); answer != emulator {
					t.Errorf("by IPv4 %q answered, and dropped by %q", answer, dropped)
				}
				b.requireEqual("after the probe", b.ruleset(), standing)
				if c.rules == "" {
					b.requireEqual("after the probe", b.ruleset(), before)
				}
			})
		}
		b.t = t
		b.remove(b.plan)
		if answer, dropped := b.tryAt(t, metadataServer6); answer == emulator || len(dropped) > 0 {
			t.Errorf("without rules %q answered, and dropped by %q", answer, dropped)
		}
	})
}

// A node without IPv6 says so, and is tried by IPv4 all the same.
func TestProbeIPv6Absent(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	b.install(b.plan)
	b.run("sysctl -qw net.ipv6.conf.all.disable_ipv6=1")
	before := b.ruleset()
	if err := b.Do(func() error {
		pod, err := probe.NewPod()
		if err != nil {
			return err
		}
		if err := pod.AddIPv6(); err == nil || pod.Addr6.IsValid() {
			t.Errorf("IPv6 at %s", pod.Addr6)
		} else {
			t.Log(err)
		}
		c, err := pod.Dial(t.Context(), "tcp", metadataServer.String())
		if err != nil {
			return err
		}
		if who, err := talk(c, long); who != emulator {
			t.Errorf("%q answered by IPv4 (%v)", who, err)
		}
		_ = c.Close()
		return pod.Close()
	}); err != nil {
		t.Fatal(err)
	}
	b.requireEqual("after the probe", b.ruleset(), before)
}

// Examine counts what was redirected in each family by itself, and names the base chains of either
// that drop by their policy.
func TestExamineIPv6(t *testing.T) {
	t.Parallel()
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		ipv6Node(b)
		examine := func() (x Examination) {
			t.Helper()
			if err := b.Do(func() error {
				s, err := ReadState(b.plan.RunDir)
				x = Examine(t.Context(), b.plan, s)
				return err
			}); err != nil {
				t.Fatal(err)
			}
			return x
		}
		if x := examine(); x.Redirected6 != nil {
			t.Errorf("before anything was installed: %d", *x.Redirected6)
		}
		b.install(b.plan)
		b.answers(b.pod, "169.254.169.254:80", emulator)
		for range 2 {
			b.answers(b.pod, "[fd20:ce::254]:80", emulator)
		}
		x := examine()
		if x.Redirected == nil || *x.Redirected != 1 || x.Redirected6 == nil || *x.Redirected6 != 2 {
			t.Errorf("redirected: %v and %v, want 1 and 2", x.Redirected, x.Redirected6)
		}
		b.run(
			"ip6tables -P INPUT DROP; nft 'add table ip6 late; add chain ip6 late c { type filter hook input priority 10; " +
				"policy drop; }'",
		)
		want := []string{"ip6 filter INPUT", "ip6 late c"}
		if b.plan.Binary == "iptables-legacy" {
			want = []string{"ip6 late c", "ip6tables chain INPUT of table filter"}
		}
		if x = examine(); !slices.Equal(x.Policies, want) {
			t.Errorf("policies: %q, want %q", x.Policies, want)
		}
		b.plan.Listen6 = netip.AddrPort{}
		if x = examine(); x.Redirected6 != nil || strings.Contains(strings.Join(x.Policies, " "), "ip6") {
			t.Errorf("where IPv6 is not served: %v, %q", x.Redirected6, x.Policies)
		}
		b.run("ip6tables -P INPUT ACCEPT")
	})
}
