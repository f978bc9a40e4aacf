package routing

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
)

// TestGuardFollows: the watcher puts the guard before a policy rule that comes later, back when
// that is gone, and the repair names the rule.
func TestGuardFollows(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	b.install(b.plan)
	w := b.watch(b.plan, time.Hour)
	at := func(pref uint32) func() bool {
		return func() bool {
			var have netobj.Snapshot
			if err := b.Do(func() (err error) { have, err = netobj.Read(); return err }); err != nil {
				t.Fatal(err)
			}
			guard := func(r netobj.Rule) bool { return ourRule(r) && r.Pref == pref }
			return slices.ContainsFunc(have.Rules(uint8(netobj.IPv4)), guard) && b.stands(b.plan)
		}
	}
	for _, step := range []struct {
		does string
		pref uint32
		says string
	}{
		{"ip rule add pref 10 iif cni0 lookup 101", 8,
			"the guard at preference 8, not at 97: it is bypassed by pref 10 from all iif cni0 lookup 101"},
		{"ip rule add pref 5 to 192.0.2.0/24 lookup 101; ip rule add pref 6 iif lo lookup 101", 8, ""}, // neither can match
		{"ip rule add pref 2 fwmark 0x1/0xff lookup 101", 0,
			"not at 8: it is bypassed by pref 2 from all fwmark 0x1/0xff lookup 101"},
		{"ip rule del pref 2", 8, "the guard at preference 8, not at 0"},
		{"ip rule del pref 10", 97, "the guard at preference 97, not at 8"},
	} {
		b.run(step.does)
		w.until(step.does, at(step.pref))
		if step.says != "" {
			w.until(step.says, func() bool {
				return slices.ContainsFunc(
					w.repaired(),
					func(e *logrus.Entry) bool { return strings.Contains(fmt.Sprint(e.Data["missing"]), step.says) },
				)
			})
		}
	}
}

// TestGuardBypassed: a rule that stands at preference 0 before ours cannot be overtaken. Install
// and check say so, and whoever examines sees it.
func TestGuardBypassed(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	b.run("ip rule add pref 0 iif cni0 lookup 101")
	log, hook := logtest.NewNullLogger()
	p := b.plan
	p.Log = log
	for _, step := range []struct {
		what string
		does func()
	}{{"install", func() { b.install(p) }}, {"check", func() { b.requireOK(p) }}} {
		hook.Reset()
		step.does()
		if !slices.ContainsFunc(hook.AllEntries(), func(e *logrus.Entry) bool {
			return e.Level == logrus.WarnLevel &&
				strings.Contains(e.Message, "ip rule: pref 0 from all iif cni0 lookup 101: delete that rule")
		}) {
			t.Errorf("%s does not say that the guard is bypassed", step.what)
		}
	}
	_ = b.Do(func() error {
		x := Examine(t.Context(), p, State{})
		if want := []string{"ip rule: pref 0 from all iif cni0 lookup 101"}; !slices.Equal(x.Bypass, want) {
			t.Errorf("%v", x.Bypass)
		}
		return nil
	})
}

// TestLocalRoute: a route of table local, which is asked before the guard, leads pods to the real
// server once the firewall is flushed. Install, check and whoever examines say so. One that leads
// elsewhere, or nowhere, is no fault.
func TestLocalRoute(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	b.run(
		"ip route add 192.0.2.0/24 via 198.51.100.1 dev eth0 table local; ip route add prohibit 169.254.170.2/32 table local",
	)
	log, hook := logtest.NewNullLogger()
	p := b.plan
	p.Log = log
	b.install(p)
	if n := len(hook.AllEntries()); n > 0 && strings.Contains(hook.LastEntry().Message, "table local") {
		t.Errorf("%s", hook.LastEntry().Message)
	}
	b.run("ip route add 169.254.169.0/24 via 198.51.100.1 dev eth0 table local")
	const route = "ip route: 169.254.169.0/24 table local protocol boot"
	for name, does := range map[string]func(){"install": func() { b.install(p) }, "check": func() { b.requireOK(p) }} {
		hook.Reset()
		does()
		if !slices.ContainsFunc(hook.AllEntries(), func(e *logrus.Entry) bool {
			return e.Level == logrus.WarnLevel && strings.Contains(e.Message, route+": delete")
		}) {
			t.Errorf("%s does not say that the guard is bypassed", name)
		}
	}
	_ = b.Do(func() error {
		if x := Examine(t.Context(), p, State{}); !slices.Equal(x.Bypass, []string{route}) {
			t.Errorf("%v", x.Bypass)
		}
		return nil
	})
	b.run("nft flush ruleset")
	b.answers(b.pod, "169.254.169.254:80", cloud)
}

// TestLoopbackBypassed: in mode loopback what walks round the guard is not served either, so
// check fails and names the rule.
func TestLoopbackBypassed(t *testing.T) {
	t.Parallel()
	b := modeNode(t, ModeLoopback)
	b.run("ip route add default via 198.51.100.1 dev eth0 table 101; ip rule add pref 0 iif cni0 lookup 101")
	b.install(b.plan)
	if who, _ := ask(b.pod, "169.254.169.254:80", short); who == emulator {
		t.Fatal("the emulator answered a pod: the rule does not walk round the guard")
	}
	err := b.check(b.plan)
	if err == nil || !strings.Contains(err.Error(), "ip rule: pref 0 from all iif cni0 lookup 101: delete that rule") {
		t.Errorf("check: %v", err)
	}
}

// TestEarlierGuard: the rules of earlier versions, which spread over preferences from 97 to 103, go
// with an install and with a removal.
func TestEarlierGuard(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	before := b.ruleset()
	put := func() {
		b.run(`add() { ip $1 rule add $2 protocol kernel; }
			add -4 "pref 97 iif lo to 169.254.169.254 lookup main"; add -4 "pref 98 to 169.254.169.254 ipproto tcp dport 80 prohibit"
			add -4 "pref 103 to 169.254.169.254 nop"; add -4 "pref 101 to 169.254.169.254 ipproto tcp dport 1-79 goto 103"
			add -4 "pref 101 to 169.254.169.254 ipproto tcp dport 81-65534 goto 103"; add -4 "pref 102 to 169.254.169.254 ipproto tcp prohibit"
			add -6 "pref 97 iif lo to fd00:ec2::254 lookup main"; add -6 "pref 102 to fd00:ec2::254 prohibit"; add -6 "pref 101 to fd00:ec2::254 ipproto udp goto 103"`)
	}
	b.install(b.plan)
	fresh := b.ruleset()
	b.remove(b.plan)
	put()
	b.remove(b.plan)
	b.requireEqual("remove", sorted(b.ruleset()), sorted(before))
	put()
	b.install(b.plan)
	b.requireEqual("install", sorted(b.ruleset()), sorted(fresh))
	b.remove(b.plan)
	b.requireEqual("remove", sorted(b.ruleset()), sorted(before))
}

// TestGuardOrder: rules in any state come to stand once and in their order.
func TestGuardOrder(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	p := b.plan
	p.ExcludeInterfaces = []string{"docker0", "virbr0"}
	b.install(b.plan)
	fresh := b.ruleset()
	for _, change := range []string{
		"ip rule del pref 98", "ip rule del pref 97 iif lo", "ip rule del pref 97 prohibit",
		"ip rule del pref 97 prohibit; ip rule add pref 97 to 169.254.169.254 ipproto tcp dport 80 prohibit protocol kernel",
		"ip rule add pref 96 to 169.254.169.254 ipproto tcp prohibit protocol kernel; ip rule add pref 50 to " +
			"169.254.169.254 prohibit protocol kernel",
		"while ip rule del protocol kernel pref 97 2>/dev/null; do :; done",
	} {
		b.run(change)
		b.install(b.plan)
		b.requireEqual(change, b.ruleset(), fresh)
		b.install(p)
		b.requireOK(p)
		b.install(b.plan)
		b.requireEqual(change+", and back", b.ruleset(), fresh)
	}
}

// TestRawOrder: who takes pods out of conntrack before our chains in table raw is overtaken again,
// and named; who stands there and does not is left alone.
func TestRawOrder(t *testing.T) {
	t.Parallel()
	onBothBackends(t, func(t *testing.T, b *testNode) {
		b.install(b.plan)
		b.run("iptables -t raw -N OTHER; iptables -t raw -A OTHER -p udp -j ACCEPT; iptables -t raw -I PREROUTING 1 -j OTHER")
		b.requireOK(b.plan)
		b.run("iptables -t raw -A OTHER -s 10.244.0.0/16 -j CT --notrack")
		b.answers(b.pod, "169.254.169.254:80", "")
		err := fmt.Sprint(b.check(b.plan))
		if want := b.plan.Binary + " -t raw -I PREROUTING 1 -m comment --comment gke-metadata-emulator -j GME-RAW before " +
			"-A OTHER -s 10.244.0.0/16 -j CT --notrack"; !strings.Contains(
			err,
			want,
		) {
			t.Errorf("%s", err)
		}
		w := b.watch(b.plan, time.Hour)
		w.until("a repair", func() bool { return b.stands(b.plan) })
		b.answers(b.pod, "169.254.169.254:80", emulator)
	})
}

// TestUntracking: a chain of nft's that comes before ours and takes pods out of conntrack is
// overruled in mode nftables, and named in mode iptables.
func TestUntracking(t *testing.T) {
	t.Parallel()
	const early, late = "table inet net { chain raw { type filter hook prerouting priority -350; ip saddr " +
		"10.244.0.0/16 notrack; }; }",
		"table ip net { chain raw { type filter hook prerouting priority -290; ip saddr 10.244.0.0/16 notrack; }; }"
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		for _, rules := range []string{early, late} {
			b.run("nft '" + rules + "'")
			log, hook := logtest.NewNullLogger()
			p := b.plan
			p.Log = log
			b.install(p)
			var said []string
			for _, e := range hook.AllEntries() {
				if e.Level == logrus.WarnLevel && strings.Contains(e.Message, "pods may not be redirected: ") {
					said = append(said, e.Message)
				}
			}
			var x Examination
			_ = b.Do(func() error { x = Examine(t.Context(), p, State{}); return nil })
			served := emulator
			if b.plan.Mode == ModeIPTables && rules == early {
				served = ""
				if len(said) != 1 || !slices.Equal(x.Untrack, []string{"nft chain inet net raw"}) {
					t.Errorf("%s: said %q, seen %q", rules, said, x.Untrack)
				}
			} else if len(said) > 0 || len(x.Untrack) > 0 {
				t.Errorf("%s: said %q, seen %q", rules, said, x.Untrack)
			}
			b.answers(b.pod, "169.254.169.254:80", served)
			b.remove(p)
			b.run("nft flush ruleset")
		}
	})
}
