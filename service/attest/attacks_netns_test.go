package attest

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// A thread that has a cgroup of its own, in a threaded part of its container's cgroup, is the
// container; the kernel keeps it out of other pods' cgroups.
func TestThreadedCgroup(t *testing.T) {
	b := newTestNode(t)
	one, two := containerPath(1, 1), containerPath(2, 2)
	c, other := b.client(one, b.pod("one")), b.client(two, b.pod("two"))
	for _, threaded := range []string{one + "/threads", two + "/threads"} {
		b.cgroup(threaded)
		if err := os.WriteFile(b.cgroups+threaded+"/cgroup.type", []byte("threaded"), 0); err != nil {
			t.Fatal(err)
		}
	}
	b.startHelper()
	b.mustBe(other, dial, podUID(2), containerIDOf(2))
	b.mustBe(c, dial, podUID(1), containerIDOf(1))

	e, _, err := b.connect(c, "thread "+b.seenByClients(one+"/threads")+" "+metadataAddr)
	if err != nil || e.PodUID != podUID(1) || e.Container != containerIDOf(1) || e.Cgroup != one+"/threads" || !e.Alive() {
		t.Errorf("a thread with a cgroup of its own is %+v, %v", e, err)
	}
	for _, foreign := range []string{two, two + "/threads"} {
		if own, err := c.try("thread %s %s", b.seenByClients(foreign), metadataAddr); err == nil {
			t.Errorf("the kernel let a thread into %s: it asks from %s", foreign, own)
		}
	}
	kill(c.cmd)
	eventually(t, "its evidence is dead", func() bool { return !e.Alive() })
}

// Evidence is of one cgroup, and not of its path: what is made anew at the same path, for a pod in
// another network namespace, has another id and another life. A socket of the first one, which
// another process holds on to, is nobody's.
func TestCgroupMadeAnew(t *testing.T) {
	b := newTestNode(t)
	path := containerPath(1, 1)
	holder := b.client(containerPath(2, 2), b.pod("holder"))
	firstNS := b.pod("first")
	// Keeps the namespace, in the node's own cgroup, where nobody is who asks.
	b.client("/system.slice/keeper.service", firstNS)
	first := b.client(path, firstNS)
	b.startHelper()
	b.mustBe(holder, dial, podUID(2), containerIDOf(2))
	old, conn := b.mustBe(first, dial, podUID(1), containerIDOf(1))
	rendezvous := filepath.Join(t.TempDir(), "pass")
	holder.do("take %s", rendezvous)
	own := conn.RemoteAddr().String()
	first.do("pass %s %s", own, rendezvous)
	if taken := holder.answer(); taken != own {
		t.Fatalf("taken %q, not %q", taken, own)
	}
	id := func() uint64 {
		var s unix.Stat_t
		if err := unix.Stat(b.cgroups+path, &s); err != nil {
			t.Fatal(err)
		}
		return s.Ino
	}
	ids := map[uint64]bool{id(): true}
	kill(first.cmd)
	eventually(t, "the old evidence is dead", func() bool { return !old.Alive() })
	for range 50 { // an inode that is free is often the next that is given
		for _, dir := range []string{path, filepath.Dir(path)} {
			eventually(t, dir+" is removed", func() bool { return unix.Rmdir(b.cgroups+dir) == nil })
		}
		b.cgroup(path)
		if ids[id()] {
			t.Errorf("the kernel gave the id %d twice", id())
		}
		ids[id()] = true
	}
	second := b.client(path, b.pod("second"))
	e, _ := b.mustBe(second, dial, podUID(1), containerIDOf(1))
	if old.Alive() || e == old {
		t.Error("the old evidence lives again")
	}
	if e, err := b.kernel.Look(accepted(conn)); err == nil {
		t.Errorf("a socket of the cgroup that was removed is %+v", e)
	}
}

// Pods whose connections are in conntrack zones of their own, where SO_ORIGINAL_DST knows nothing,
// are told apart.
func TestConntrackZones(t *testing.T) {
	b := newTestNode(t)
	b.kernel.options.Redirected = []netip.AddrPort{netip.MustParseAddrPort(metadataAddr)}
	oneNS, twoNS := b.pod("one"), b.pod("two")
	one, two := b.client(containerPath(1, 1), oneNS), b.client(containerPath(2, 2), twoNS)
	for zone, ns := range map[int]netip.Addr{11: oneNS.Addr, 12: twoNS.Addr} {
		b.in(b.node.NS, "iptables -t raw -A PREROUTING -s %s -j CT --zone %d", ns, zone)
		b.in(b.node.NS, "iptables -t raw -A OUTPUT -d %s -j CT --zone %d", ns, zone)
	}
	b.startHelper()
	for range 3 {
		for c, n := range map[*client]int{one: 1, two: 2} {
			_, conn := b.mustBe(c, dial, podUID(n), containerIDOf(n))
			if a := accepted(conn); a.Original != a.Server {
				t.Fatalf("%+v: the zone hides nothing, and this test says nothing", a)
			}
		}
	}
}

// Two SYNs that cross make a connection that both ends opened, so the kernel's numbers do not show
// that a neighbour on the bridge, and not the emulator, is the pod's other end. What the neighbour
// sent shows it: whoever asks as if from the pod's port is refused then. Without that the
// condition of SECURITY.md holds, as for any connection that the pod opens at that moment.
func TestSimultaneousOpen(t *testing.T) {
	b := newBridge(t)
	victim, attacker, server := b.victim, b.attacker, b.server
	// No RST answers the first SYN.
	b.in(b.serverNS, "iptables -A INPUT -p tcp --tcp-flags SYN,ACK SYN -j DROP")
	end := netip.AddrPortFrom(b.victimNS.Addr, 41000)
	victim.do("try %s %s", end, metadataAddr)
	server.do("spoof %s %s", metadataAddr, end)
	server.do("say x")
	h := b.holder(b.victimNS.Addr)
	eventually(t, "both ends opened it, and the pod received a byte", func() bool {
		f, ok, err := h.socket(end, netip.MustParseAddrPort(metadataAddr), h.device)
		return err == nil && ok && f.live() && f.opened() && f.received == 1
	})
	attacker.do("spoof %s %s", end, metadataAddr)
	b.requireRefused("a connection of the pod's with a neighbour", accepted(b.accept(end.String())), ErrNoSocket)
}
