package routing

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
)

// threeProhibits opens the three servers of DefaultGuard's that are IPv6.
const threeProhibits = "for n in 1 2 3; do ip -6 rule del pref 97 prohibit; done"

// ipv6Node is a testNode that serves IPv6 too.
func ipv6Node(b *testNode) {
	b.t.Helper()
	b.plan.Listen6 = netip.MustParseAddrPort("[fd20:ce::252]:988")
	b.serveAnywhere(b.plan.Listen6.String())
}

// serveAnywhere answers at an address that the node has not yet.
func (b *testNode) serveAnywhere(at string) {
	b.t.Helper()
	b.run("sysctl -qw net.ipv6.ip_nonlocal_bind=1")
	b.serve(b.NS, at, emulator)
	b.run("sysctl -qw net.ipv6.ip_nonlocal_bind=0")
}

// TestIPv6Lifecycle is a node's life where IPv6 is served (H-24), in both modes and on both
// backends: install, a request arrives, the neighbour is kept out, others flush, nothing leaks,
// check names what is missing, the watcher repairs, remove leaves no trace.
func TestIPv6Lifecycle(t *testing.T) {
	t.Parallel()
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		routed, err := b.AddRoutedPod("routed")
		if err != nil {
			t.Fatal(err)
		}
		ipv6Node(b)
		before := b.ruleset()
		b.answers(b.pod, "[fd20:ce::254]:80", cloud) // the testNode would show a leak
		ctx, cancel := context.WithTimeout(t.Context(), long)
		defer cancel()
		open, err := b.pod.Dial(ctx, "tcp", "[fd20:ce::254]:80")
		if err != nil {
			t.Fatal(err)
		}
		defer open.Close()
		b.install(b.plan)
		b.requireOK(b.plan)
		first := b.ruleset()
		if b.plan.Mode == ModeNFTables {
			golden(t, "nft/ipv6.nft", b.run("nft list table ip6 gke-metadata-emulator"))
		}
		if got, err := talk(open, long); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("on a connection from before %q answered (%v)", got, err)
		}
		served := func() {
			t.Helper()
			b.answers(b.pod, "[fd20:ce::254]:80", emulator)
			b.answers(routed, "[fd20:ce::254]:80", emulator)
			b.answers(b.pod, "169.254.169.254:80", emulator)
			b.answers(b.NS, "[fd20:ce::254]:80", cloud) // the node's own daemons do not notice
			b.answers(b.pod, "[fd00:ec2::254]:80", "")
			b.answers(b.pod, "[fd20:ce::252]:988", "") // not directly
		}
		served()
		b.install(b.plan)
		b.requireEqual("second install", sorted(b.ruleset()), sorted(first))

		// a neighbour that takes the node for a router is served by neither address, nor by either
		// check alone.
		b.neighbourRoutes("fd20:ce::254", "fd20:ce::252")
		outside := func(what string) {
			t.Helper()
			for _, at := range []string{"[fd20:ce::254]:80", "[fd20:ce::252]:988"} {
				if got, _ := ask(b.neighbour, at, short); got == emulator {
					t.Errorf("%s: the neighbour was served at %s", what, at)
				}
			}
		}
		outside("all stands")

		w := b.watch(b.plan, time.Hour)
		for _, c := range []struct {
			name, xtables, nft string
			want               []string // what Check names
		}{
			{"filter", "ip6tables -F", "nft flush chain ip6 gke-metadata-emulator input", nil},
			{"raw", "ip6tables -t raw -F", "nft flush chain ip6 gke-metadata-emulator raw", nil},
			{"nat", "ip6tables -t nat -F", "nft flush chain ip6 gke-metadata-emulator prerouting", nil},
			{"all", "for t in filter raw nat; do ip6tables -t $t -F; done", "nft delete table ip6 gke-metadata-emulator", nil},
			{"address", "ip -6 route del table local fd20:ce::252", "ip -6 route del table local fd20:ce::252", []string{
				"ip -6 route: local fd20:ce::252 dev lo table local protocol 252"}},
			{"guard", threeProhibits, threeProhibits, []string{
				"ip -6 rule: pref 97 to fd00:c1::a9fe:a9fe/128 ipproto tcp dport 80 prohibit protocol kernel",
				"ip -6 rule: pref 97 to fd00:ec2::254/128 ipproto tcp dport 80 prohibit protocol kernel",
				"ip -6 rule: pref 97 to fd20:ce::254/128 ipproto tcp dport 80 prohibit protocol kernel"}},
		} {
			flush := c.xtables
			if b.plan.Mode == ModeNFTables {
				flush = c.nft
			}
			w.end()
			b.run(flush)
			var got []string
			for _, f := range faults(t, b.check(b.plan)) {
				got = append(got, strings.TrimPrefix(f, "missing: "))
			}
			if len(got) == 0 || c.want != nil && !slices.Equal(got, c.want) {
				t.Errorf("%s: check named\n%s\nwant\n%s", c.name, strings.Join(got, "\n"), strings.Join(c.want, "\n"))
			}
			if got, err := ask(b.pod, "[fd20:ce::254]:80", short); got == cloud {
				t.Errorf("%s: the real server answered (%v)", c.name, err)
			}
			if c.name != "all" { // with both chains
				outside(c.name)
			}
			w = b.watch(b.plan, time.Hour) // finds it when it starts
			w.until("a repair of "+c.name, func() bool { return b.stands(b.plan) && w.state().Standing.Good })
			b.requireEqual("repair of "+c.name, sorted(b.ruleset()), sorted(first))
			served()
			said := len(w.repaired())
			b.run(flush) // and when it runs
			w.until("the line", func() bool { return len(w.repaired()) > said && b.stands(b.plan) && w.state().Standing.Good })
		}
		w.end()
		if s := w.state(); s.Listen6 != b.plan.Listen6.String() || s.IPv6 != "" {
			t.Errorf("state: %q %q", s.Listen6, s.IPv6)
		}
		off := b.plan
		off.Listen6 = netip.AddrPort{}
		b.install(off)
		b.requireOK(off)
		if s := b.ruleset(); strings.Contains(s, "fd20:ce::252") {
			t.Errorf("left of listen6:\n%s", s)
		}
		b.answers(b.pod, "169.254.169.254:80", emulator)
		b.install(b.plan)
		served()
		b.remove(off)
		b.requireEqual("remove", sorted(b.ruleset()), sorted(before))
		b.answers(b.pod, "[fd20:ce::254]:80", cloud)
	})
}

func (b *testNode) neighbourRoutes(to ...string) {
	b.t.Helper()
	for _, a := range to {
		if out, err := b.neighbour.Command(b.t.Context(), "ip", "-6", "route", "add", a, "via",
			b.Addr6.String()).CombinedOutput(); err != nil {
			b.t.Fatalf("%v: %s", err, out)
		}
	}
}

// TestIPv6Checks: each of the two chains keeps a neighbour out by itself.
func TestIPv6Checks(t *testing.T) {
	t.Parallel()
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		ipv6Node(b)
		b.install(b.plan)
		b.neighbourRoutes("fd20:ce::252")
		for check, open := range map[string][2]string{
			"input": {"ip6tables -t raw -F GME-RAW", "nft flush chain ip6 gke-metadata-emulator raw"},
			"raw":   {"ip6tables -F GME-IN", "nft flush chain ip6 gke-metadata-emulator input"},
		} {
			b.install(b.plan)
			b.run(open[map[bool]int{true: 1}[b.plan.Mode == ModeNFTables]])
			if got, _ := ask(b.neighbour, "[fd20:ce::252]:988", short); got != "" {
				t.Errorf("the check %s alone: %s answered the neighbour", check, got)
			}
		}
		b.run(
			map[bool]string{false: "ip6tables -F GME-IN; ip6tables -t raw -F GME-RAW",
				true: "nft flush chain ip6 gke-metadata-emulator input; nft flush chain ip6 gke-metadata-emulator " +
					"raw"}[b.plan.Mode == ModeNFTables],
		)
		b.answers(b.neighbour, "[fd20:ce::252]:988", emulator) // the testNode would show an open check
	})
}

// TestIPv6ShownText runs the shown commands by a shell, as TestNFTablesShownText does.
func TestIPv6ShownText(t *testing.T) {
	t.Parallel()
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		ipv6Node(b)
		var shown string
		if err := b.Do(func() (err error) { shown, err = Show(b.plan); return err }); err != nil {
			t.Fatal(err)
		}
		b.run(shown)
		byHand := b.ruleset()
		b.answers(b.pod, "[fd20:ce::254]:80", emulator)
		b.install(b.plan)
		b.requireOK(b.plan)
		b.requireEqual("install after the shown text", sorted(b.ruleset()), sorted(byHand))
	})
}

// TestIPv6IsGuarded: where IPv6 is not served no pod reaches the clouds' servers by it either
// in each mode, whatever becomes of the firewall; the node's own processes do. A node
// without IPv6 has the same rules, or none, and no fault.
func TestIPv6IsGuarded(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"iptables-nft", "iptables-legacy", ModeNFTables, ModeLoopback, ModeNone, ModeEBPF} {
		t.Run(mode, func(t *testing.T) {
			b := modeNode(t, mode)
			routed, err := b.AddRoutedPod("routed")
			if err != nil {
				t.Fatal(err)
			}
			servers := []string{"[fd00:c1::a9fe:a9fe]:80", "[fd00:ec2::254]:80", "[fd20:ce::254]:80"}
			for _, at := range servers {
				b.answers(b.pod, at, cloud) // the testNode would show a leak
			}
			b.install(b.plan)
			b.requireOK(b.plan)
			guarded := func() {
				t.Helper()
				var asked sync.WaitGroup // side by side: whoever is not refused at once waits
				for _, at := range servers {
					asked.Go(func() { b.answers(b.pod, at, "") })
					asked.Go(func() { b.answers(routed, at, "") })
					asked.Go(func() { b.answers(b.NS, at, cloud) })
				}
				asked.Wait()
			}
			guarded()
			b.run("ip6tables -F; nft flush ruleset")
			guarded()
			b.install(b.plan)
			b.run("while ip -6 rule del prohibit 2>/dev/null; do :; done")
			if got := faults(t, b.check(b.plan)); len(got) != 6 {
				t.Errorf("missing: %q", got)
			}
			guarded() // by the firewall alone
			b.run("sysctl -qw net.ipv6.conf.all.disable_ipv6=1")
			b.install(b.plan)
			b.requireOK(b.plan)
			b.remove(b.plan)
		})
	}
}

// TestIPv6Refused: where somebody else listens there, nothing is redirected to him.
func TestIPv6Refused(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	ipv6Node(b)
	b.plan.Listen6 = netip.MustParseAddrPort("[fd20:ce::253]:1988")
	out, end := b.start(b.play("listen", "[::]:1988", b.copyOfSelf()))
	defer end()
	var word string
	if _, err := fmt.Fscan(out, &word); err != nil {
		t.Fatal(err)
	}
	b.install(b.plan)
	b.requireOK(b.plan)
	b.answers(b.pod, "169.254.169.254:80", emulator)
	if s, err := ReadState(b.plan.RunDir); err != nil || !strings.Contains(s.IPv6, "belongs to somebody else") {
		t.Errorf("%q, %v", s.IPv6, err)
	}
	if s := b.ruleset(); strings.Contains(s, "fd20:ce::253") {
		t.Errorf("%s", s)
	}
}

// copyOfSelf is another program.
func (b *testNode) copyOfSelf() string {
	b.t.Helper()
	to := b.t.TempDir() + "/other"
	if out, err := exec.Command("cp", b.self(), to).CombinedOutput(); err != nil {
		b.t.Fatalf("%v: %s", err, out)
	}
	return to
}

// ipv6Flushes are what others do to IPv6's part of it. A watcher may be back before the chains are
// taken away, too.
var ipv6Flushes = []struct {
	name, xtables, nft string
	layer, cause       string // of the mode's own rules where layer is ""
}{
	{"filter", "ip6tables -F", "nft flush chain ip6 gke-metadata-emulator input", "", ""},
	{"filter and its chains", "ip6tables -F; ip6tables -X || true", "nft flush table ip6 gke-metadata-emulator", "", ""},
	{"raw", "ip6tables -t raw -F", "nft flush chain ip6 gke-metadata-emulator raw", "", ""},
	{"nat", "ip6tables -t nat -F", "nft flush chain ip6 gke-metadata-emulator prerouting", "", ""},
	{
		"nat and its chains",
		"ip6tables -t nat -F; ip6tables -t nat -X || true",
		"nft delete chain ip6 gke-metadata-emulator prerouting",
		"",
		"",
	},
	{
		"base chain only",
		"ip6tables -t nat -F PREROUTING",
		"nft 'add table ip6 gke-metadata-emulator { flags dormant; }'",
		"",
		"",
	},
	{
		"one rule",
		"ip6tables -t nat -D GME-PRE -i eth0 -j RETURN",
		"nft delete rule ip6 gke-metadata-emulator prerouting handle $(nft -a list chain ip6 gke-metadata-emulator " +
			"prerouting | sed -n 's/.*\"eth0\".*handle //p')",
		"",
		"",
	},
	{
		"a rule too much",
		"ip6tables -t nat -I GME-PRE -p tcp -j ACCEPT",
		"nft insert rule ip6 gke-metadata-emulator prerouting accept",
		"",
		"",
	},
	{
		"all",
		"for t in filter raw nat; do ip6tables -t $t -F; ip6tables -t $t -X || true; done",
		"nft delete table ip6 gke-metadata-emulator",
		"",
		"",
	},
	{
		"both families",
		"for t in filter raw nat; do iptables -t $t -F; ip6tables -t $t -F; done",
		"nft delete table ip gke-metadata-emulator; nft delete table ip6 gke-metadata-emulator",
		"",
		"",
	},
	{
		"guard",
		"for n in 1 2; do ip -6 rule del pref 97 iif lo; ip -6 rule del pref 97 prohibit; done",
		"for n in 1 2; do ip -6 rule del pref 97 iif lo; ip -6 rule del pref 97 prohibit; done",
		fault.Rule,
		"ip-rule",
	},
	{
		"listen route",
		"ip -6 route del table local fd20:ce::252",
		"ip -6 route del table local fd20:ce::252",
		fault.Route,
		"ip-route",
	},
}

// TestIPv6WatchRepairs: a watcher that never sweeps notices each by itself, legacy tables too, and
// puts it back; no pod gets to the real server by IPv6 meanwhile.
func TestIPv6WatchRepairs(t *testing.T) {
	t.Parallel()
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		ipv6Node(b)
		b.install(b.plan)
		whole := sorted(b.ruleset())
		layer, cause := fault.IP6Tables, "nftables"
		switch {
		case b.plan.Mode == ModeNFTables:
			layer = fault.NFTables
		case b.plan.Binary == "iptables-legacy":
			cause = "xtables"
		}
		w := b.watch(b.plan, time.Hour)
		leaks := b.asking("[fd20:ce::254]:80")
		for _, c := range ipv6Flushes {
			t.Run(c.name, func(t *testing.T) {
				b.t = t
				said, flush := len(w.repaired()), c.xtables
				if b.plan.Mode == ModeNFTables {
					flush = c.nft
				}
				b.run(flush)
				wantLayer, wantCause := layer, cause
				if c.layer != "" {
					wantLayer, wantCause = c.layer, c.cause
				}
				w.until(
					"a line of layer "+wantLayer+" and cause "+wantCause,
					func() bool { // one of those that a flush in steps takes
						return slices.ContainsFunc(w.repaired()[said:], func(e *logrus.Entry) bool {
							return slices.Contains(strings.Split(fmt.Sprint(e.Data["layer"]), ","), wantLayer) &&
								e.Data["cause"] == wantCause
						})
					},
				)
				w.until("a repair", func() bool { return b.stands(b.plan) && w.state().Standing.Good })
				b.requireEqual("repair", sorted(b.ruleset()), whole)
				b.answers(b.pod, "[fd20:ce::254]:80", emulator)
				b.answers(b.pod, "169.254.169.254:80", emulator)
			})
			w.testNode.t = t
		}
		b.t = t
		if asked, answered := leaks(); answered > 0 || asked == 0 {
			t.Errorf("of %d connections meanwhile the real server answered %d", asked, answered)
		}
		w.end()
		b.remove(b.plan)
	})
}

// asking has the pod ask without pause until it is told to end; then it says how often, and how
// often the real server answered.
func (b *testNode) asking(at string) (end func() (asked, cloudAnswered int)) {
	ctx, cancel := context.WithCancel(b.t.Context())
	over := make(chan struct{})
	asked, leaked := 0, 0
	go func() {
		defer close(over)
		for ; ctx.Err() == nil; asked++ {
			if who, _ := ask(b.pod, at, short); who == cloud {
				leaked++
			}
		}
	}()
	return func() (int, int) {
		cancel()
		<-over
		return asked, leaked
	}
}
