package routing

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/bpf"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
)

// ebpfNode is a testNode of mode ebpf.
func ebpfNode(t testing.TB) *bpfNode {
	t.Helper()
	b := newBPFNode(t, nftNode(t))
	b.plan.Mode, b.plan.BPFDir, b.plan.CgroupRoot = ModeEBPF, filepath.Join(b.bpffs, "gme"), b.cgroups
	return b
}

// TestEBPFStory is TestStory in mode ebpf.
func TestEBPFStory(t *testing.T) {
	t.Parallel()
	b := ebpfNode(t)
	routed, err := b.AddRoutedPod("routed")
	if err != nil {
		t.Fatal(err)
	}
	before, programs := b.ruleset(), b.attachedText(t)
	b.answersIn(podCgroup, b.pod, "169.254.169.254:80", cloud)
	b.install(b.plan)
	b.requireOK(b.plan)
	for _, pod := range []string{podCgroup, "system.slice"} { // wherever a runtime puts it
		b.answersIn(pod, b.pod, "169.254.169.254:80", emulator)
		b.answersIn(pod, routed, "169.254.169.254:80", emulator)
	}
	b.answersIn(podCgroup, b.NS, "169.254.169.254:80", cloud)      // host pods are left alone
	b.answersIn("system.slice", b.NS, "169.254.169.254:80", cloud)
	b.answersIn(podCgroup, b.pod, "169.254.169.254:53", cloud)
	b.answersIn(podCgroup, b.pod, "169.254.169.254:443", "")
	b.answersIn(podCgroup, b.pod, "[fd00:ec2::254]:80", "")
	b.answers(b.pod, "169.254.169.254:80", "")                     // who escapes the programs runs into the guard
	b.viaNode(t)
	b.answers(b.neighbour, "169.254.169.252:988", "") // not off the node, directly or not
	b.answers(b.neighbour, "169.254.169.254:80", "")
	first := b.ruleset() + b.attachedText(t)
	b.install(b.plan)
	b.requireEqual("second install", b.ruleset()+b.attachedText(t), first)

	for _, c := range []struct {
		name string
		harm func()
		want []string
	}{
		{"the chains", func() {
			b.run("nft flush chain ip gke-metadata-emulator input; nft flush chain ip gke-metadata-emulator raw")
		}, []string{
			`input iifname "eth0" ip daddr 169.254.169.252 tcp dport 988 drop`,
			`raw iifname "eth0" ip daddr 169.254.169.252 tcp dport 988 drop`,
		}},
		{"a program by force", func() { b.detach(t, "connect6") }, []string{"eBPF program connect6 at " + b.cgroups + ": "}},
		{"all programs", func() {
			b.must(os.RemoveAll(b.plan.BPFDir))
			b.detached(t)
		}, []string{"program getpeername4 at ", "program getpeername6 at ", "program connect4 at ", "program connect6 at "}},
		{"the guard", func() { b.run("ip rule del pref 97 prohibit; ip address del 169.254.169.252/32 dev lo") },
			[]string{"ip rule: pref 97", "ip address: 169.254.169.252"}},
	} {
		c.harm()
		found := faults(t, b.check(b.plan))
		if len(found) != len(c.want) || slices.ContainsFunc(c.want, func(w string) bool {
			return !slices.ContainsFunc(found, func(f string) bool { return strings.Contains(f, w) })
		}) {
			t.Errorf("%s: named %q, want %q", c.name, found, c.want)
		}
		b.answersIn(
			podCgroup,
			b.pod,
			"169.254.169.254:80",
			map[bool]string{true: emulator}[!strings.HasPrefix(c.name, "all") && c.name != "the guard"],
		)
		b.install(b.plan)
		b.requireOK(b.plan)
		b.answersIn(podCgroup, b.pod, "169.254.169.254:80", emulator)
	}
	b.remove(b.plan)
	b.requireEqual("remove", b.ruleset()+b.attachedText(t), before+programs)
	b.answersIn(podCgroup, b.pod, "169.254.169.254:80", cloud)
}

// TestEBPFHostPods: pods on the host network are recognised by what they are not: in a slice of the
// host's. Kubelet may make its cgroup later, and anew.
func TestEBPFHostPods(t *testing.T) {
	t.Parallel()
	b := ebpfNode(t)
	b.plan.InterceptHostPods = "on"
	b.install(b.plan)
	b.answersIn(podCgroup, b.NS, "169.254.169.254:80", emulator)
	b.answersIn("system.slice", b.NS, "169.254.169.254:80", cloud)
	b.answersIn("system.slice", b.pod, "169.254.169.254:80", emulator)
	if strings.Contains(b.run("ip route"), "169.254.169.254") {
		t.Error("programs need no route, and there is one")
	}
	again := filepath.Join(b.cgroups, podCgroup)
	if err := errors.Join(os.Remove(again), os.Mkdir(again, 0o755)); err != nil {
		t.Fatal(err)
	}
	b.answersIn(podCgroup, b.NS, "169.254.169.254:80", emulator)
	// A slice of the host's that is made anew is another one, and the next look says so.
	system := filepath.Join(b.cgroups, "system.slice")
	if err := errors.Join(os.Remove(system), os.Mkdir(system, 0o755)); err != nil {
		t.Fatal(err)
	}
	if got := faults(t, b.check(b.plan)); len(got) != 4 {
		t.Errorf("%q, want the four programs", got)
	}
	b.install(b.plan)
	b.answersIn("system.slice", b.NS, "169.254.169.254:80", cloud)
}

// TestChangeOfMode loses no request from DNAT to programs. On the way back connections that are
// open then are cut off: nothing can tell their packets from those of somebody who sends to the
// listen address directly, which nobody may where DNAT is.
func TestChangeOfMode(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{ModeIPTables, ModeNFTables} {
		t.Run(mode, func(t *testing.T) {
			b := ebpfNode(t)
			// As on any node with kube-proxy: without somebody's rule the kernel turns conntrack off and
			// translates nothing that it has begun to.
			b.run(
				"nft 'add table ip kube-proxy; add chain ip kube-proxy nat { type nat hook prerouting priority dstnat; }; add " +
					"rule ip kube-proxy nat ip daddr 192.0.2.1 tcp dport 80 dnat to 10.244.0.99:80'",
			)
			before := b.ruleset() + b.attachedText(t)
			programs, dnat := b.plan, b.plan
			dnat.Mode = mode
			b.install(dnat)
			for range 3 {
				end := b.load(podCgroup, b.pod)
				b.install(programs)
				b.requireOK(programs)
				end()
				if strings.Contains(b.ruleset(), "to 169.254.169.252:988") {
					t.Error("DNAT is left")
				}
				b.install(dnat)
				b.requireOK(dnat)
				if _, err := os.Stat(b.plan.BPFDir); err == nil {
					t.Error("programs are left")
				}
				b.answersIn(podCgroup, b.pod, "169.254.169.254:80", emulator)
			}
			b.remove(dnat)
			b.requireEqual("remove", b.ruleset()+b.attachedText(t), before)
		})
	}
}

// detach detaches one of our programs by force, as `bpftool link detach` does.
func (b *bpfNode) detach(t *testing.T, name string) {
	t.Helper()
	l, err := link.LoadPinnedLink(filepath.Join(b.plan.BPFDir, ModeEBPF, name+"_link"), nil)
	if err == nil {
		err = errors.Join(l.Detach(), l.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// detached waits until no program of ours is attached: the kernel takes its time for those of which
// the last pin went.
func (b *bpfNode) detached(t *testing.T) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(long); ; <-tick.C {
		all, err := b.pins().Attached(bpf.RedirectHooks...)
		if err != nil || time.Now().After(deadline) {
			t.Fatalf("still attached: %v, %v", all, err)
		}
		if len(slices.Concat(all...)) == 0 {
			return
		}
	}
}

// viaNode has the neighbour route both addresses through the node.
func (b *bpfNode) viaNode(t *testing.T) {
	t.Helper()
	if out, err := b.neighbour.Command(t.Context(), "sh", "-ec",
		"for a in 169.254.169.254 169.254.169.252; do ip route add $a/32 via "+b.Addr.String()+
			"; done").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// TestEBPFWatch: who detaches a program, or takes its pin away, is noticed and undone; so is a
// flush of the guard; and another's program that comes or goes is nobody's business.
func TestEBPFWatch(t *testing.T) {
	t.Parallel()
	b := ebpfNode(t)
	b.install(b.plan)
	w := b.watch(b.plan, time.Hour)
	for _, c := range []struct {
		name         string
		harm         func()
		layer, cause string
	}{
		{"detached by force", func() { b.detach(t, "connect4") }, fault.EBPF, "ebpf"},
		{"all pins", func() { b.must(os.RemoveAll(b.plan.BPFDir)) }, fault.EBPF, "ebpf"},
		{"the chains", func() { b.run("nft delete table ip gke-metadata-emulator") }, fault.NFTables, ""},
	} {
		was := w.state().Repairs.Total()
		c.harm()
		took := w.until(c.name, func() bool { s := w.state(); return s.Repairs.Total() > was && s.Standing.Good })
		b.requireOK(b.plan)
		b.answersIn(podCgroup, b.pod, "169.254.169.254:80", emulator)
		last := w.repaired()[len(w.repaired())-1].Data
		if last["layer"] != c.layer || c.cause != "" && last["cause"] != c.cause {
			t.Errorf("%s: reported as %v", c.name, last)
		}
		t.Logf("%s: repaired in %v", c.name, took)
	}
	was := w.state().Repairs.Total()
	reads := w.reads.Load()
	b.attachForeign(t)
	w.until("a look at another's program", func() bool { return w.reads.Load() > reads })
	w.end()
	if got := w.state().Repairs.Total(); got != was {
		t.Errorf("%d repairs for another's program", got-was)
	}
	b.remove(b.plan)
}

func (b *bpfNode) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

// TestPortsAfterAnotherMode: a connection from a port that had one by another mode keeps its port,
// and so its client's socket is found.
func TestPortsAfterAnotherMode(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	b.run("iptables -t nat -A POSTROUTING -s 192.0.2.0/24 -j MASQUERADE") // a network plugin's: conntrack translates
	none := b.plan
	none.Mode = ModeNone
	talks := func(port uint16, to netip.AddrPort) {
		t.Helper()
		d := net.Dialer{Timeout: long, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(b.pod.Addr, port)),
			Control: func(_, _ string, c syscall.RawConn) (err error) { // else the port is nobody's for a minute
				_ = c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
				return err
			}}
		var c net.Conn
		err := b.pod.Do(func() (err error) {
			c, err = d.DialContext(t.Context(), "tcp", to.String())
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if who, err := talk(c, long); who != emulator {
			t.Fatalf("%q (%v)", who, err)
		}
		var sockets []*netlink.Socket
		if err := b.Do(func() (err error) {
			sockets, err = netlink.SocketDiagTCP(unix.AF_INET)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(sockets, func(s *netlink.Socket) bool {
			return s.ID.SourcePort == b.plan.Listen.Port() && s.ID.DestinationPort == port
		}) {
			t.Errorf("to %s: the emulator sees another port than %d", to, port)
		}
	}
	b.install(b.plan)
	talks(40000, metadataServer)
	b.install(none)
	talks(40000, none.Listen)
	talks(40001, none.Listen)
	b.install(b.plan)
	talks(40001, metadataServer)
}

// What goes on by another mode is not forgotten before its end, and what goes elsewhere never.
func TestServedFlows(t *testing.T) {
	t.Parallel()
	flow := func(to, by string, state uint8) *netlink.ConntrackFlow {
		f := &netlink.ConntrackFlow{ProtoInfo: &netlink.ProtoInfoTCP{State: state}}
		dst := netip.MustParseAddrPort(to)
		f.Forward.Protocol, f.Forward.DstIP, f.Forward.DstPort, f.Reverse.SrcIP = unix.IPPROTO_TCP, dst.Addr().
			AsSlice(),
			dst.Port(), net.ParseIP(
				by,
			)
		return f
	}
	w := redirectTarget{metadataServer, netip.MustParseAddrPort("169.254.169.252:988")}
	for _, c := range []struct {
		flow                    *netlink.ConntrackFlow
		picks, over, redirected bool
	}{
		{flow("169.254.169.254:80", "169.254.169.252", nl.TCP_CONNTRACK_ESTABLISHED), true, false, true},
		{flow("169.254.169.254:80", "169.254.169.252", nl.TCP_CONNTRACK_TIME_WAIT), true, true, true},
		{flow("169.254.169.252:988", "169.254.169.252", nl.TCP_CONNTRACK_CLOSE), true, true, false},
		{flow("169.254.169.254:80", "169.254.169.254", nl.TCP_CONNTRACK_TIME_WAIT), false, false, false}, // the cloud's
		{flow("169.254.169.254:53", "169.254.169.252", nl.TCP_CONNTRACK_TIME_WAIT), false, false, false},
	} {
		if got := (served{redirectTarget: w}).MatchConntrackFlow(c.flow); got != c.picks {
			t.Errorf("%v: %t", c.flow.Forward, got)
		}
		if got := (served{redirectTarget: w, over: true}).MatchConntrackFlow(c.flow); got != c.over {
			t.Errorf("%v, over: %t", c.flow.Forward, got)
		}
		if got := (served{redirectTarget: w, redirected: true}).MatchConntrackFlow(c.flow); got != c.redirected {
			t.Errorf("%v, redirected: %t", c.flow.Forward, got)
		}
	}
}
