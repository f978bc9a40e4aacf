package attest

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

const dial = "dial tcp4 " + metadataAddr

func (b *testNode) pod(name string) *netnstest.NS {
	b.t.Helper()
	ns, err := b.node.AddPod(name)
	if err != nil {
		b.t.Fatal(err)
	}
	return ns
}

// in runs a command in the namespace.
func (b *testNode) in(ns *netnstest.NS, format string, args ...any) string {
	b.t.Helper()
	line := fmt.Sprintf(format, args...)
	words := strings.Fields(line)
	out, err := ns.Command(b.t.Context(), words[0], words[1:]...).CombinedOutput()
	if err != nil {
		b.t.Fatalf("%s: %v: %s", line, err, out)
	}
	return string(out)
}

// requireRefused fails unless the connection is refused for one of the reasons.
func (b *testNode) requireRefused(what string, c Conn, reasons ...error) {
	b.t.Helper()
	e, err := b.look(c)
	for _, r := range reasons {
		if errors.Is(err, r) {
			return
		}
	}
	b.t.Errorf("%s: Look = %+v, %v; want %v", what, e, err, reasons)
}

// two containers in one pod's namespace are told apart, and so are a pod on the host
// network and a unit of the node.
func TestIdentities(t *testing.T) {
	b := newTestNode(t)
	one := b.pod("one")
	two, err := b.node.AddRoutedPod("two")
	if err != nil {
		t.Fatal(err)
	}
	a, side := b.client(containerPath(1, 1), one), b.client(containerPath(1, 2), one)
	other := b.client(containerPath(2, 3), two)
	host := b.client(containerPath(3, 4), b.node.NS)
	unit := b.client("/system.slice/kubelet.service", b.node.NS)
	b.startHelper()
	b.mustBe(a, dial, podUID(1), containerIDOf(1))
	b.mustBe(side, dial, podUID(1), containerIDOf(2))
	b.mustBe(other, dial, podUID(2), containerIDOf(3))
	b.mustBe(host, dial, podUID(3), containerIDOf(4))
	e, _ := b.mustBe(unit, dial, "", "")
	if e.Unit() != "kubelet.service" {
		t.Errorf("Unit = %q", e.Unit())
	}
	b.mustBe(a, "mapped "+metadataAddr, podUID(1), containerIDOf(1))
	b.mustBe(a, "mptcp "+metadataAddr, podUID(1), containerIDOf(1))
	b.mustBe(a, "bound eth0 "+metadataAddr, podUID(1), containerIDOf(1))
	b.mustBe(host, "dial tcp4 "+listenAddr+" 127.0.0.1:0", podUID(3), containerIDOf(4)) // nothing translated
	if s := b.kernel.Status(); s.Namespaces != 2 || !s.Helper || s.Hierarchy != "cgroup2" || len(s.Lacks) != 0 {
		t.Errorf("Status = %+v", s)
	}
}

// A pod on the host network that connects to the listen address and then, from the same port, to
// the metadata server: conntrack gives the second connection another port. If that is one of which
// a process of the node has a connection to the real server, the pod is not that process.
func TestPortOfAnother(t *testing.T) {
	b := newTestNode(t)
	if _, err := b.node.Cloud.Listen("tcp4", metadataAddr); err != nil {
		t.Fatal(err)
	}
	port := netip.AddrPortFrom(b.node.Addr, 33333)
	b.in(b.node.NS, "iptables -t nat -I OUTPUT -p tcp --sport 33333 -j RETURN") // as the rules spare the node's slices
	unit, host := b.client("/system.slice/backup.service", b.node.NS), b.client(containerPath(1, 1), b.node.NS)
	b.startHelper()
	if own := unit.do("dial tcp4 %s %s", metadataAddr, port); own != port.String() {
		t.Fatal(own)
	}
	// conntrack takes one at random
	b.in(b.node.NS, "iptables -t nat -A POSTROUTING -p tcp -d 169.254.169.252 --dport 988 -j SNAT --to-source %s", port)
	host.do(dial)
	conn := accepted(b.accept(port.String()))
	if conn.Original.String() != metadataAddr {
		t.Fatalf("%+v", conn)
	}
	if e, err := b.look(conn); err != nil || e.Unit() != "backup.service" {
		t.Fatalf("%+v, %v: the port is not that of the unit", e, err)
	}
	b.kernel.options.Spared = []string{"system.slice"}
	b.requireRefused("a pod with a unit's port", conn, ErrSpared)
	b.kernel.options.Spared = []string{"system", "user.slice"}
	if e, err := b.look(conn); err != nil || e.Unit() != "backup.service" {
		t.Errorf("%+v, %v", e, err)
	}
}

// Clients that speak IPv6, where nothing is translated.
func TestIPv6(t *testing.T) {
	b := newTestNode(t)
	pod := b.client(containerPath(1, 1), b.pod("one"))
	host := b.client(containerPath(2, 2), b.node.NS)
	b.startHelper()
	const bridge = "[fd00:244::1]:988"
	l, err := b.node.Listen("tcp6", bridge)
	if err != nil {
		t.Fatal(err)
	}
	for c, uid := range map[*client]string{pod: podUID(1), host: podUID(2)} {
		own := c.do("dial tcp6 %s", bridge)
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if e, err := b.look(accepted(conn)); err != nil || e.PodUID != uid || conn.RemoteAddr().String() != own {
			t.Errorf("%s is %+v, %v", own, e, err)
		}
	}
}

// A pod that starts while we run is known when it asks for the first time, or a moment later.
func TestNewPod(t *testing.T) {
	b := newTestNode(t)
	b.startHelper()
	for i := range 5 {
		ns := b.pod(fmt.Sprint("new", i))
		b.mustBe(b.client(containerPath(i, i), ns), dial, podUID(i), containerIDOf(i))
	}
	// Its process is in its cgroup before it is in its namespace, as with every runtime.
	ns := b.pod("late")
	late := b.client(containerPath(9, 9), b.node.NS)
	b.mustBe(late, dial, podUID(9), containerIDOf(9))
	late.do("enter %s", ns.Path())
	b.mustBe(late, dial, podUID(9), containerIDOf(9))
}

// the socket stays with whoever made it.
func TestMakerOfTheSocket(t *testing.T) {
	b := newTestNode(t)
	ns, ns2 := b.pod("one"), b.pod("two")
	maker, taker := b.client(containerPath(1, 1), ns), b.client(containerPath(2, 2), ns2)
	b.startHelper()

	own := maker.do(dial)
	conn := b.accept(own)
	rendezvous := filepath.Join(t.TempDir(), "pass")
	taker.do("take %s", rendezvous)
	maker.do("pass %s %s", own, rendezvous)
	if passed := taker.answer(); passed != own {
		t.Fatalf("passed %q, not %q", passed, own)
	}
	if e, err := b.look(accepted(conn)); err != nil || e.PodUID != podUID(1) {
		t.Errorf("a passed descriptor is %+v, %v: it keeps its maker's identity", e, err)
	}

	own = maker.do(dial)
	conn = b.accept(own)
	b.client(containerPath(1, 1), ns) // somebody stays
	b.cgroup(containerPath(3, 3))
	maker.do("move %s", b.seenByClients(containerPath(3, 3)))
	// The socket stays its maker's. It is refused once the helper has seen that two pods are in the
	// namespace.
	if e, err := b.look(accepted(conn)); !errors.Is(err, ErrOtherNamespace) &&
		(err != nil || e.PodUID != podUID(1) || !e.Alive()) {
		t.Errorf("the connection of a process that was moved is %+v, %v", e, err)
	}
	// What it makes from now on is its new cgroup's, which is another pod's than the namespace it is
	// in.
	b.requireRefused("a process that was moved", accepted(b.accept(maker.do(dial))), ErrOtherNamespace)
}

// of a cgroup that was removed nothing is known, whoever still has a socket that was made in
// it.
func TestRemovedCgroup(t *testing.T) {
	b := newTestNode(t)
	c := b.client(containerPath(1, 1), b.pod("one"))
	b.startHelper()
	e, known := b.mustBe(c, dial, podUID(1), containerIDOf(1))
	unseen := b.accept(c.do(dial))
	b.cgroup(containerPath(2, 2))
	c.do("move %s", b.seenByClients(containerPath(2, 2)))
	eventually(t, "the evidence dies", func() bool { return !e.Alive() })
	eventually(t, "the cgroup is removed", func() bool { return unix.Rmdir(b.cgroups+containerPath(1, 1)) == nil })
	for _, conn := range []Conn{accepted(known), accepted(unseen)} {
		b.requireRefused("removed", conn, ErrUnknownCgroup, ErrEmptyCgroup) // the latter until inotify has reported
	}
	if err := os.Mkdir(b.cgroups+containerPath(1, 1), 0o755); err != nil { // the same name is not the same cgroup
		t.Fatal(err)
	}
	eventually(t, "the old cgroup is not taken for the new one", func() bool {
		e, err := b.kernel.Look(accepted(unseen))
		if e != nil {
			t.Fatalf("a removed cgroup is %+v", e)
		}
		return errors.Is(err, ErrUnknownCgroup)
	})
	if e.Alive() {
		t.Error("what died is alive again")
	}
}

// who shut down its direction is still found, who is gone is not.
func TestClientsThatLeave(t *testing.T) {
	b := newTestNode(t)
	c := b.client(containerPath(1, 1), b.pod("one"))
	b.startHelper()
	b.mustBe(c, dial, podUID(1), containerIDOf(1))

	half := c.do(dial)
	conn := b.accept(half)
	c.do("half %s", half)
	if e, err := b.look(accepted(conn)); err != nil || e.PodUID != podUID(1) {
		t.Errorf("half-closed: %+v, %v", e, err)
	}
	closed := c.do(dial)
	conn = b.accept(closed)
	there := accepted(conn)
	c.do("close %s", closed)
	if _, err := conn.Read(make([]byte, 1)); err == nil {
		t.Fatal("not closed")
	}
	conn.Close()
	eventually(t, "the closed socket is none that is believed", func() bool {
		_, err := b.kernel.Look(there)
		return errors.Is(err, ErrNoSocket) || errors.Is(err, ErrNoCgroup)
	})
	reset := c.do(dial)
	conn = b.accept(reset)
	c.do("reset %s", reset)
	b.requireRefused("reset", accepted(conn), ErrNoSocket)
}

// TestOldTranslation: conntrack may tell of a connection where an earlier one from the same port
// went.
func TestOldTranslation(t *testing.T) {
	b := newTestNode(t)
	host := b.client(containerPath(3, 4), b.node.NS)
	b.startHelper()
	from := host.do("dial tcp4 " + listenAddr + " 127.0.0.1:0")
	conn := b.accept(from)
	there := accepted(conn)
	there.Original = netip.MustParseAddrPort(metadataAddr)
	if e, err := b.look(there); err != nil || e.PodUID != podUID(3) {
		t.Errorf("Look = %+v, %v", e, err)
	}
	host.do("reset %s", from)
	b.requireRefused("reset", there, ErrNoSocket)

	// Conntrack says that the connection was redirected: then it is not that of a process which nobody
	// redirects.
	unit := b.client("/system.slice/kubelet.service", b.node.NS)
	there = accepted(b.accept(unit.do("dial tcp4 " + listenAddr + " 127.0.0.1:0")))
	if e, err := b.look(there); err != nil || e.Unit() != "kubelet.service" {
		t.Errorf("Look = %+v, %v", e, err)
	}
	b.kernel.options.Spared = []string{"system.slice"}
	there.Original = netip.MustParseAddrPort(metadataAddr)
	b.requireRefused("a unit's direct connection, and one that was redirected", there, ErrSpared)
}

// a neighbour on the bridge that has the node believe that a pod's address is its own.
func TestSpoofedAddress(t *testing.T) {
	b := newTestNode(t)
	victimNS, attackerNS := b.pod("victim"), b.pod("attacker")
	victim, attacker := b.client(containerPath(1, 1), victimNS), b.client(containerPath(2, 2), attackerNS)
	b.startHelper()
	e, _ := b.mustBe(victim, dial, podUID(1), containerIDOf(1))
	mac := strings.TrimSpace(b.in(attackerNS, "cat /sys/class/net/eth0/address"))
	poison := func() {
		b.in(b.node.NS, "ip neigh replace %s lladdr %s dev cni0 nud permanent", victimNS.Addr, hardware(t, attackerNS, mac))
	}
	b.in(b.node.NS, "ip neigh flush dev cni0")
	end := func(port int) string { return netip.AddrPortFrom(victimNS.Addr, uint16(port)).String() }

	// The attacker has the address without having it: no namespace but the victim's is known to hold
	// it. The victim listens on the same port, or is about to connect from it.
	poison()
	b.in(attackerNS, "ip route add local %s/32 dev lo", victimNS.Addr)
	victim.do("listen %s", end(41000))
	attacker.do("spoof %s %s", end(41000), metadataAddr)
	b.requireRefused("A-08: the victim listens", accepted(b.accept(end(41000))), ErrNoSocket)
	b.in(victimNS, "iptables -A OUTPUT -p tcp --sport 41001 -j DROP") // what the attacker swallows
	victim.do("try %s %s", end(41001), metadataAddr)
	attacker.do("spoof %s %s", end(41001), metadataAddr)
	b.requireRefused("the victim connects, and is not answered", accepted(b.accept(end(41001))), ErrNoSocket)

	// It takes the address openly: then it is seen for what it is.
	b.in(attackerNS, "ip address add %s/32 dev eth0", victimNS.Addr)
	attacker.do("spoof %s %s", end(41002), metadataAddr)
	eventually(t, "the second holder of the address is known", func() bool { return len(b.holders(victimNS.Addr)) == 2 })
	if e, err := b.look(accepted(b.accept(end(41002)))); err != nil || e.PodUID != podUID(2) {
		t.Errorf("the attacker is %+v, %v", e, err)
	}

	// It makes a socket with the ends of the victim's, by being the metadata server to itself.
	b.in(b.node.NS, "ip neigh del %s dev cni0", victimNS.Addr)
	b.in(attackerNS, "ip address add 169.254.169.254/32 dev lo")
	attacker.do("listen %s", metadataAddr)
	b.in(attackerNS, "ip link set eth0 arp off") // else it would answer for the address
	b.twoSockets(attacker, victim, victimNS.Addr, 41003)
	conflicts := b.kernel.Status().Conflicts
	if len(conflicts) != 1 || conflicts[0].Address != victimNS.Addr || !slices.Contains(conflicts[0].Between[:],
		podUID(1)) || !slices.Contains(conflicts[0].Between[:], podUID(2)) {
		t.Errorf("Conflicts = %+v", conflicts)
	}

	// One that was made beforehand, as for every port that the victim may use, has nobody refused.
	attacker.do("spoof %s %s", end(41500), metadataAddr)
	var forged holder
	for _, h := range b.holders(victimNS.Addr) {
		if h.pod == podUID(2) {
			forged = h
		}
	}
	eventually(t, "the attacker's socket is older than the victim's will be", func() bool {
		f, ok, err := forged.socket(netip.MustParseAddrPort(end(41500)), netip.MustParseAddrPort(metadataAddr), forged.device)
		if err != nil || !ok || !f.live() {
			t.Fatalf("%+v, %v, %v", f, ok, err)
		}
		return f.acknowledged > fitSlack+500
	})
	victim.do("dial tcp4 %s %s", metadataAddr, end(41500))
	if e, err := b.look(accepted(b.accept(end(41500)))); err != nil || e.PodUID != podUID(1) {
		t.Errorf("beside a socket of somebody else's that is older: %+v, %v", e, err)
	}

	b.in(attackerNS, "ip address del %s/32 dev eth0", victimNS.Addr)
	b.in(attackerNS, "ip route del local %s/32 dev lo", victimNS.Addr)
	eventually(t, "the address is the victim's alone", func() bool { return len(b.holders(victimNS.Addr)) == 1 })
	b.mustBe(victim, dial, podUID(1), containerIDOf(1))
	if !e.Alive() {
		t.Error("the victim's evidence died")
	}
}

func hardware(t *testing.T, ns *netnstest.NS, _ string) string {
	t.Helper()
	out, err := ns.Command(t.Context(), "ip", "-o", "link", "show", "eth0").Output()
	if err != nil {
		t.Fatal(err)
	}
	words := strings.Fields(string(out))
	for i, w := range words {
		if w == "link/ether" {
			return words[i+1]
		}
	}
	t.Fatalf("no address in %s", out)
	return ""
}

func (b *testNode) holders(a netip.Addr) []holder {
	b.kernel.mu.RLock()
	defer b.kernel.mu.RUnlock()
	return b.kernel.byAddr[a]
}

// holder is the first that has the address, once one is known.
func (b *testNode) holder(a netip.Addr) (h holder) {
	b.t.Helper()
	eventually(b.t, "a holder of "+a.String()+" is known", func() bool {
		holders := b.holders(a)
		if len(holders) > 0 {
			h = holders[0]
		}
		return len(holders) > 0
	})
	return h
}

// Evidence lives as long as its container, and its namespace is let go with its last process.
func TestDeath(t *testing.T) {
	b := newTestNode(t)
	ns := b.pod("one")
	a, side := b.client(containerPath(1, 1), ns), b.client(containerPath(1, 2), ns)
	b.startHelper()
	first, _ := b.mustBe(a, dial, podUID(1), containerIDOf(1))
	second, _ := b.mustBe(side, dial, podUID(1), containerIDOf(2))
	kill(a.cmd) // the process that the namespace was found by
	eventually(t, "its evidence is dead", func() bool { return !first.Alive() })
	b.mustBe(side, dial, podUID(1), containerIDOf(2)) // found by another
	if !second.Alive() {
		t.Error("the other container's evidence is dead")
	}
	kill(side.cmd)
	eventually(t, "nothing is alive", func() bool { return !second.Alive() && b.kernel.Status().Namespaces == 0 })
	if err := ns.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the veth is gone", func() bool {
		return !bytes.Contains([]byte(b.in(b.node.NS, "ip -o link")),
			[]byte("veth1@"))
	})
}
