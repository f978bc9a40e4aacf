package routing

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// TestLoopbackStory is a node's life in mode loopback, and TestNoneStory in mode none: install,
// others flush, nothing leaks, check names what is missing, the watcher repairs, remove leaves no
// trace.
func TestLoopbackStory(t *testing.T) {
	t.Parallel()
	b := modeNode(t, ModeLoopback)
	served := func() {
		t.Helper()
		b.answers(b.pod, "169.254.169.254:80", emulator)
		b.answers(b.NS, "169.254.169.254:80", cloud)
		b.answers(b.pod, "169.254.169.254:53", cloud)
	}
	b.story(served, []story{
		{
			"the rule",
			"ip rule del pref 97 lookup 988",
			fault.Rule,
			[]string{"ip rule: pref 97 to 169.254.169.254/32 ipproto tcp dport 80 lookup 988 protocol kernel"},
		},
		{
			"the route",
			"ip route flush table 988",
			fault.Route,
			[]string{"ip route: local 169.254.169.254 dev lo table 988 protocol kernel"},
		},
		{"the guard behind", "ip rule del pref 97 prohibit; ip rule del pref 97 prohibit", fault.Rule, []string{
			"ip rule: pref 97 iif eth0 to 169.254.169.254/32 ipproto tcp dport 80 prohibit protocol kernel",
			"ip rule: pref 97 to 169.254.169.254/32 ipproto tcp dport 80 prohibit protocol kernel"}},
		{
			"a check outside netfilter",
			"ip rule del pref 97 iif eth0 to 169.254.169.254",
			fault.Rule,
			[]string{"ip rule: pref 97 iif eth0 to 169.254.169.254/32 ipproto tcp dport 80 prohibit protocol kernel"},
		},
		{
			"the chains",
			"nft flush chain ip gke-metadata-emulator raw; nft flush chain ip gke-metadata-emulator input",
			fault.NFTables,
			[]string{
				`nft add rule ip gke-metadata-emulator raw iifname "eth0" ip daddr 169.254.169.254 tcp dport 80 drop`,
				`nft add rule ip gke-metadata-emulator input iifname "eth0" ip daddr 169.254.169.254 tcp dport 80 drop`},
		},
	})
}

func TestNoneStory(t *testing.T) {
	t.Parallel()
	b := modeNode(t, ModeNone)
	served := func() {
		t.Helper()
		b.answers(b.pod, "169.254.169.254:80", "") // the guard
		b.answers(b.pod, b.plan.Listen.String(), emulator)
		b.answers(b.NS, "169.254.169.254:80", cloud)
	}
	b.story(served, []story{
		{
			"the guard",
			"ip rule del pref 97 prohibit",
			fault.Rule,
			[]string{"ip rule: pref 97 to 169.254.169.254/32 ipproto tcp dport 80 prohibit protocol kernel"},
		},
		{
			"the address",
			"ip address del 169.254.169.252/32 dev lo",
			fault.Address,
			[]string{"ip address: 169.254.169.252/32 dev lo scope host label lo:gme"},
		},
		{
			"the chains",
			"nft flush chain ip gke-metadata-emulator raw; nft flush chain ip gke-metadata-emulator input",
			fault.NFTables,
			[]string{
				`nft add rule ip gke-metadata-emulator raw iifname "eth0" ip daddr 169.254.169.252 tcp dport 988 drop`,
				`nft add rule ip gke-metadata-emulator input iifname "eth0" ip daddr 169.254.169.252 tcp dport 988 drop`},
		},
	})
}

// TestLoopbackLink: a link that is missing is made where the kernel has dummy links, and goes with
// us; where it has none that is said, and pods get no answer rather than the real server's.
func TestLoopbackLink(t *testing.T) {
	t.Parallel()
	b := modeNode(t, ModeLoopback)
	b.plan.Link = "gme0"
	before := b.ruleset()
	err := b.Do(func() error { return b.router(b.plan).Install(t.Context()) })
	if err != nil {
		if !strings.Contains(err.Error(), "this kernel has no dummy links") {
			t.Fatal(err)
		}
		t.Log(err)
		if got, _ := ask(b.pod, "169.254.169.254:80", short); got == cloud {
			t.Error("the real server answered")
		}
		b.run("ip link add gme0 type bridge")
		b.install(b.plan)
	}
	b.requireOK(b.plan)
	whole := b.ruleset()
	b.install(b.plan) // which finds ourselves at the address, and not a metadata server
	b.requireEqual("second install", b.ruleset(), whole)
	for _, c := range []struct{ do, want string }{
		{"ip address del 169.254.169.254/32 dev gme0", "ip address: 169.254.169.254/32 dev gme0 label gme0:gme"},
		{"ip link set gme0 down", "ip link: gme0 up"},
	} {
		b.run(c.do)
		if got := faults(t, b.check(b.plan)); !slices.Equal(got, []string{"missing: " + c.want}) {
			t.Errorf("%s: check named %q", c.do, got)
		}
		w := b.watch(b.plan, time.Hour)
		w.until("a repair", func() bool { return b.stands(b.plan) && w.state().Standing.Good })
		b.run(c.do)
		w.until("another", func() bool { return len(w.repaired()) == 2 && b.stands(b.plan) })
		w.end()
		b.answers(b.pod, "169.254.169.254:80", emulator)
	}
	b.plan.Link = "" // Remove needs no memory of the Plan, and a Plan without a link takes it away
	b.install(b.plan)
	b.answers(b.NS, "169.254.169.254:80", cloud)
	b.plan.Link = "gme0"
	if err != nil {
		b.install(b.plan)
		b.remove(b.plan)
		b.run("ip link del gme0")
	} else {
		b.install(b.plan)
		b.remove(b.plan)
		if out := b.run("ip link"); strings.Contains(out, "gme0") {
			t.Error(out)
		}
	}
	b.requireEqual("remove", b.ruleset(), before)

	b.run("ip address add 169.254.169.254/32 dev lo") // somebody else's
	if err := b.Do(func() error { return b.router(b.plan).Install(t.Context()) }); !errors.Is(err, fault.ErrForeign) {
		t.Errorf("%v, want ErrForeign", err)
	}
}

// TestNoneOnEveryAddress: pods reach the node's address, other hosts do not, and the node's other
// ports are nobody's business here.
func TestNoneOnEveryAddress(t *testing.T) {
	t.Parallel()
	b := nftNode(t)
	b.plan.Mode, b.plan.Listen = ModeNone, netip.MustParseAddrPort("0.0.0.0:8988")
	at, another := netip.AddrPortFrom(b.Addr, 8988).String(), netip.AddrPortFrom(b.Addr, 10250).String()
	b.serve(b.NS, "0.0.0.0:8988", emulator)
	b.serve(b.NS, another, "kubelet")
	b.serve(b.Cloud, "198.51.100.1:8988", "another host")
	b.answers(b.neighbour, at, emulator) // so that it is the chains that keep it out
	before := b.ruleset()
	b.install(b.plan)
	b.requireOK(b.plan)
	golden(t, "nft/none-every-address.nft", b.run("nft list table ip gke-metadata-emulator"))
	b.answers(b.pod, at, emulator)
	b.answers(b.neighbour, at, "")
	b.answers(b.neighbour, another, "kubelet")
	b.answers(b.pod, "198.51.100.1:8988", "another host")
	b.remove(b.plan)
	b.requireEqual("remove", b.ruleset(), before)
}

type story struct {
	name, flush, layer string
	want               []string // what Check names, exactly
}

func (b *testNode) story(served func(), flushes []story) {
	t := b.t.(*testing.T)
	before := b.ruleset()
	b.install(b.plan)
	b.requireOK(b.plan)
	whole := b.ruleset()
	served()
	golden(
		t,
		"nft/"+b.plan.Mode+".nft",
		b.run(
			"ip rule | grep 169.254 | sed 's/^/# /'; ip route show table 988 2>/dev/null | sed 's/^/# /'; nft list table ip "+
				"gke-metadata-emulator; nft list table ip6 gke-metadata-emulator",
		),
	)
	b.install(b.plan)
	b.requireEqual("second install", b.ruleset(), whole)
	for _, c := range flushes {
		t.Run(c.name, func(t *testing.T) {
			b.t = t
			b.run(c.flush)
			var got []string
			for _, f := range faults(t, b.check(b.plan)) {
				got = append(got, strings.TrimPrefix(f, "missing: "))
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("check named\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
			}
			if got, err := ask(b.pod, "169.254.169.254:80", short); got == cloud {
				t.Errorf("the real server answered (%v)", err)
			}
			b.install(b.plan)
			b.requireEqual("install", b.ruleset(), whole)
			w := b.watch(b.plan, time.Hour)
			said := len(w.repaired())
			b.run(c.flush)
			w.until("a repair", func() bool { return len(w.repaired()) > said && b.stands(b.plan) && w.state().Standing.Good })
			if line := w.repaired()[said]; line.Data["layer"] != c.layer {
				t.Errorf("%v", line.Data)
			}
			w.end()
			b.requireEqual("repair", b.ruleset(), whole)
			served()
		})
		b.t = t
	}
	w := b.watch(b.plan, time.Hour)
	b.run(
		"ip link add wan9 type veth peer name wan9p; ip link set wan9 up; ip address add 192.0.2.1/24 dev wan9; ip route " +
			"add default via 192.0.2.9 dev wan9 metric 900",
	)
	w.until("the chains at an uplink that comes", func() bool {
		return strings.Contains(b.run("nft list table ip gke-metadata-emulator"), "wan9") && b.stands(b.plan)
	})
	b.run("ip link del wan9")
	w.until("no chains at one that goes",
		func() bool { return b.stands(b.plan) && !strings.Contains(b.ruleset(), "wan9") })
	w.end()
	b.remove(b.plan)
	b.requireEqual("remove", b.ruleset(), before)
	b.answers(b.pod, "169.254.169.254:80", cloud)
	b.remove(b.plan)
	b.requireEqual("second remove", b.ruleset(), before)
}

// TestLoopbackRefuses: where a metadata server answers this host, unless forced, and where somebody
// has port 80 of every address.
func TestLoopbackRefuses(t *testing.T) {
	t.Parallel()
	b := nftNode(t)
	b.plan.Mode, b.plan.Listen = ModeLoopback, metadataServer
	before := b.ruleset()
	install := func() error { return b.Do(func() error { return b.router(b.plan).Install(t.Context()) }) }
	if err := install(); !errors.Is(err, fault.ErrForeign) || !strings.Contains(err.Error(), "routing.force") {
		t.Errorf("a metadata server answers: %v", err)
	}
	b.requireEqual("refused", b.ruleset(), before)
	b.plan.Force = true
	b.install(b.plan)
	b.remove(b.plan)
	b.plan.Force = false
	b.run("ip route add blackhole 169.254.169.254") // nobody answers
	b.install(b.plan)
	b.remove(b.plan)

	netnstest.Needs(t, "python3")
	cmd := b.Command(t.Context(), "python3", "-c", `
import socket, sys
s = socket.create_server(("0.0.0.0", 80))
print("listening", flush=True)
sys.stdin.read()`)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := stdout.Read(make([]byte, 9)); err != nil {
		t.Fatal(err)
	}
	if err := install(); !errors.Is(err, fault.ErrForeign) || !strings.Contains(err.Error(), "python3") ||
		!strings.Contains(err.Error(), "0.0.0.0:80") {
		t.Errorf("a wildcard listener: %v", err)
	}
	_ = stdin.Close()
	_ = cmd.Wait()
	b.install(b.plan)
}

// TestLoopbackEndsConnections: who has a connection by DNAT or by mode loopback is told when the
// other takes over, or nobody does.
func TestLoopbackEndsConnections(t *testing.T) {
	t.Parallel()
	b := modeNode(t, ModeLoopback)
	b.run("iptables -A FORWARD -m conntrack --ctstate INVALID -j DROP") // conntrack is on, as on nodes
	loopback, dnat := b.plan, b.plan
	dnat.Mode, dnat.Listen = ModeNFTables, netip.MustParseAddrPort("169.254.169.252:988")
	for _, c := range []struct {
		name   string
		before Plan
		then   func(Plan)
		plan   Plan
		by     string // is answered afterwards
	}{
		{"to loopback", dnat, b.install, loopback, emulator},
		{"from loopback", loopback, b.install, dnat, emulator},
		{"removed", loopback, b.remove, loopback, cloud},
	} {
		b.install(c.before)
		conn, err := b.pod.Dial(t.Context(), "tcp", metadataServer.String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if who, err := talk(conn, long); who != emulator {
			t.Fatalf("%s: %q (%v)", c.name, who, err)
		}
		c.then(c.plan)
		if _, err := talk(conn, long); !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
			t.Errorf("%s: the connection of before got %v", c.name, err)
		}
		b.answers(b.pod, metadataServer.String(), c.by)
	}
}
