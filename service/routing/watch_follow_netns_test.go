package routing

import (
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/watch"
)

const addUplink = "ip link add wan9 type veth peer name wan9p; ip link set wan9 up; ip address add 192.0.2.1/24 dev " +
	"wan9; ip route add default via 192.0.2.9 dev wan9 metric 900"

// TestWatchFollows: rules that follow interfaces are no repair, which is what somebody's flush
// needs: not counted, and no warning. The same holds for an interface that appears between the
// first install and the first look, as a node boots.
func TestWatchFollows(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"iptables-nft", "iptables-legacy", ModeNFTables, ModeLoopback} {
		t.Run(mode, func(t *testing.T) {
			b := modeNode(t, mode)
			b.plan.InterceptHostPods = "off" // else an answer of the cloud's installs at any time
			named := func() bool { return strings.Contains(b.ruleset(), "wan9") }
			boot := sync.OnceFunc(func() {
				if out, err := b.Command(t.Context(), "sh", "-c", addUplink).CombinedOutput(); err != nil {
					t.Errorf("%v: %s", err, out)
				}
			})
			w := b.watchWith(Watch{sweep: time.Hour, Report: func(string) { boot() }}, b.plan)
			over := func() bool { return b.stands(b.plan) && w.state().Standing.Good } // false while it installs
			w.until("the uplink that appears at boot", func() bool { return named() && over() })
			b.run("ip link del wan9")
			w.until("the uplink to be forgotten", func() bool { return !named() && over() })
			b.run("iptables -t nat -N SOMEBODY; " + addUplink) // others change their own rules as well
			w.until("the uplink to be spared", func() bool { return named() && over() })
			follows := func() (n int) {
				for _, e := range w.log.AllEntries() {
					if strings.Contains(e.Message, "the rules follow") {
						n++
					}
				}
				return n
			}
			w.until("each that appeared to be logged", func() bool { return follows() >= 2 })
			if n := w.state().Repairs.Total(); n != 0 {
				t.Errorf("%d repairs were counted: %v", n, w.state().Repairs)
			}
			for _, e := range w.log.AllEntries() {
				if e.Level <= logrus.WarnLevel {
					t.Errorf("logged at %s: %s %v", e.Level, e.Message, e.Data)
				}
			}

			b.run("ip link del wan9; ip rule del pref 97 prohibit")
			w.until("a repair", func() bool { return !named() && b.stands(b.plan) && len(w.repaired()) > 0 })
			if w.state().Repairs[fault.Rule] == nil {
				t.Errorf("what somebody took away was not counted: %v", w.state().Repairs)
			}
		})
	}
}

// TestRepairCauses: what had gone is told from what only follows the node.
func TestRepairCauses(t *testing.T) {
	all := []error{fault.Missing(fault.NFTables, "a"), fault.Missing(fault.Rule, "b"), fault.Missing(fault.Address, "c"),
		fault.Missing(fault.Route, "d")}
	for name, c := range map[string]struct {
		r    repair
		want string
	}{
		"gone":    {repair{}, "nftables ip-rule ip-address ip-route"},
		"follows": {repair{follows: []string{fault.NFTables}}, "ip-rule ip-address ip-route"},
		"all do":  {repair{follows: fault.All}, "ip-address ip-route"},
	} {
		c.r.why, c.r.faults = watch.Link, all
		var got []string
		for _, layer := range fault.Layers(all) {
			if c.r.causes()[layer] != "" {
				got = append(got, layer)
			}
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s: %v, want %s", name, got, c.want)
		}
	}
}
