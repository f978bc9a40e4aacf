package routing

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestExamine(t *testing.T) {
	t.Parallel()
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		examine := func() (x Examination) {
			t.Helper()
			if err := b.Do(func() error {
				s, err := ReadState(b.plan.RunDir)
				x = Examine(context.Background(), b.plan, s)
				return err
			}); err != nil {
				t.Fatal(err)
			}
			return x
		}
		if x := examine(); len(Faults(x.Rules)) == 0 || len(x.Guard) != len(guardRules(b.plan, nodeFacts{})) ||
			x.Redirected != nil {
			t.Errorf("before anything was installed: %+v", x)
		}
		b.install(b.plan)
		b.answers(b.pod, "169.254.169.254:80", emulator)
		b.answers(b.pod, "169.254.169.254:80", emulator)
		x := examine()
		if x.Rules != nil || len(x.Guard) > 0 || !x.Local || !x.IPv6 {
			t.Errorf("%+v", x)
		}
		if x.Redirected == nil || *x.Redirected != 2 {
			t.Errorf("redirected: %v, want 2", x.Redirected)
		}
		if want := []Uplink{{"eth0", "default route"}}; !slices.Equal(x.Uplinks, want) {
			t.Errorf("uplinks: %v, want %v", x.Uplinks, want)
		}
		if x.Policies == nil || len(x.Policies) > 0 {
			t.Errorf("policies: %v", x.Policies)
		}
		if !x.Holder.Own || x.Holder.At != b.plan.Listen { // this process
			t.Errorf("holder: %+v", x.Holder)
		}

		b.run(
			"ip rule del pref 97 prohibit; iptables -P INPUT DROP; iptables -P FORWARD DROP; nft 'add table inet late; add " +
				"chain inet late c { type filter hook input priority 10; policy drop; }'",
		)
		if x = examine(); len(x.Guard) != 1 || !strings.Contains(x.Guard[0], "pref 97 to 169.254.169.254/32") ||
			!slices.Equal(Faults(x.Rules), x.Guard) {
			t.Errorf("guard: %q, rules: %v", x.Guard, x.Rules)
		}
		want := []string{"inet late c", "ip filter INPUT"}
		if b.plan.Binary == "iptables-legacy" {
			want = []string{"inet late c", "iptables chain INPUT of table filter"}
		}
		if !slices.Equal(x.Policies, want) {
			t.Errorf("policies: %q, want %q", x.Policies, want)
		}
		b.run("nft delete table inet late; iptables -P INPUT ACCEPT")
		b.plan.Listen = netip.MustParseAddrPort("198.51.100.77:988") // another host's: requests are forwarded
		b.plan.Uplinks = []string{"eth+"}
		x = examine()
		if x.Local || len(x.Policies) != 1 || !strings.Contains(x.Policies[0], "FORWARD") ||
			!slices.Equal(x.Uplinks, []Uplink{{"eth+", "routing.uplinks"}}) {
			t.Errorf("%+v", x)
		}
		b.remove(b.plan)
		b.plan.Mode, b.plan.Listen = ModeLoopback, metadataServer
		if x = examine(); !x.Local || x.Holder.At.IsValid() {
			t.Errorf("%+v", x)
		}
	})
}
