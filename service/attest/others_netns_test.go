package attest

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// others is how many namespaces of no pod are known.
func (b *testNode) others() (n int) {
	b.kernel.mu.RLock()
	defer b.kernel.mu.RUnlock()
	for _, ns := range b.kernel.namespaces {
		if ns.ofNode {
			n++
		}
	}
	return n
}

// Containers that are no pods, and units with a network of their own, are known by their cgroups:
// those that were there before the helper, and those that start later.
func TestOtherNamespaces(t *testing.T) {
	b := newTestNode(t)
	scope := func(n int) string { return "/system.slice/docker-" + containerIDOf(n) + ".scope" }
	early := b.client(scope(1), b.pod("early"))
	pod := b.client(containerPath(1, 1), b.pod("pod"))
	b.startHelper()
	b.mustBe(pod, dial, podUID(1), containerIDOf(1))
	b.mustBe(early, dial, "", "")
	late := b.client(scope(2), b.pod("late"))
	e, _ := b.mustBe(late, dial, "", "")
	if want := strings.TrimPrefix(scope(2), "/system.slice/"); e.Unit() != want {
		t.Errorf("Unit = %q, want %q", e.Unit(), want)
	}

	// Not only a cgroup's first process counts, nor only a cgroup with a unit's name.
	b.client("/system.slice/mixed.service", b.node.NS)
	mixed := b.client("/system.slice/mixed.service", b.pod("mixed"))
	bare := b.client("/docker/"+containerIDOf(3), b.pod("bare"))
	b.mustBe(mixed, dial, "", "")
	b.mustBe(bare, dial, "", "")
	if n := b.others(); n != 4 || b.kernel.Status().Namespaces != 5 {
		t.Errorf("%d namespaces of no pod are known; %+v", n, b.kernel.Status())
	}

	// Its namespace is let go with its last process, and until then found by any.
	ns := b.pod("two")
	first, second := b.client(scope(4), ns), b.client("/system.slice/helper.service", ns)
	b.mustBe(first, dial, "", "")
	b.mustBe(second, dial, "", "")
	kill(first.cmd)
	b.mustBe(second, dial, "", "")
	for _, c := range []*client{early, late, mixed, bare, second} {
		kill(c.cmd)
	}
	eventually(t, "all are let go, and their evidence is dead",
		func() bool { return b.kernel.Status().Namespaces == 1 && !e.Alive() })
}

// A pod that has the node believe that a container's address is its own is seen for what it is, or
// requireRefused.
func TestSpoofedContainer(t *testing.T) {
	b := newTestNode(t)
	containerNS, attackerNS := b.pod("container"), b.pod("attacker")
	container := b.client("/system.slice/docker-"+containerIDOf(1)+".scope", containerNS)
	attacker := b.client(containerPath(2, 2), attackerNS)
	b.startHelper()
	b.mustBe(container, dial, "", "")
	end := func(port int) string { return netip.AddrPortFrom(containerNS.Addr, uint16(port)).String() }
	b.in(b.node.NS, "ip neigh flush dev cni0")
	b.in(b.node.NS, "ip neigh replace %s lladdr %s dev cni0 nud permanent", containerNS.Addr, hardware(t, attackerNS, ""))
	b.in(attackerNS, "ip route add local %s/32 dev lo", containerNS.Addr)
	container.do("listen %s", end(41000))
	attacker.do("spoof %s %s", end(41000), metadataAddr)
	conn := accepted(b.accept(end(41000)))
	b.requireRefused("the container listens", conn, ErrNoSocket)
	var none *NoSocketError
	if _, err := b.kernel.Look(conn); !errors.As(err, &none) || !none.Others || none.Holder != "" {
		t.Errorf("%+v, %v; want one that only namespaces of no pod hold", none, err)
	}

	b.in(attackerNS, "ip address add %s/32 dev eth0", containerNS.Addr)
	attacker.do("spoof %s %s", end(41001), metadataAddr)
	eventually(t, "the second holder of the address is known",
		func() bool { return len(b.holders(containerNS.Addr)) == 2 })
	if e, err := b.look(accepted(b.accept(end(41001)))); err != nil || e.PodUID != podUID(2) {
		t.Errorf("the attacker is %+v, %v", e, err)
	}

	b.in(b.node.NS, "ip neigh del %s dev cni0", containerNS.Addr)
	b.in(attackerNS, "ip address add 169.254.169.254/32 dev lo")
	attacker.do("listen %s", metadataAddr)
	b.in(attackerNS, "ip link set eth0 arp off")
	b.twoSockets(attacker, container, containerNS.Addr, 41002)
}

// Users of the node may be allowed to make namespaces, and do not fill us with them.
func TestTooManyOthers(t *testing.T) {
	h := &Helper{options: HelperOptions{Log: quiet()}, found: map[uint64]*anchor{}}
	for i := range uint64(maxOthers - 1) {
		h.found[i] = &anchor{others: map[string]bool{"/x": true}}
	}
	h.found[maxOthers] = &anchor{pods: []string{containerPath(1, 1)}, others: map[string]bool{"/x": true}}
	if !h.room() || h.problem != "" {
		t.Errorf("%q when there is room", h.problem)
	}
	h.found[maxOthers+1] = &anchor{others: map[string]bool{"/x": true}}
	want := fmt.Sprintf("more than %d network namespaces belong to no pod", maxOthers)
	if h.room() || !strings.Contains(h.problem, want) {
		t.Errorf("%q when there is none", h.problem)
	}
}

// Whose an address is, where the namespaces that have it have no socket.
func TestPodOf(t *testing.T) {
	in := func(cgroups ...string) holder {
		n := &namespace{inode: 7}
		n.pods("", cgroups)
		return holder{namespace: n}
	}
	one, two, other := containerPath(1, 1), containerPath(2, 2), "/kata_overhead/1"
	for name, tt := range map[string]struct {
		holders []holder
		uid     string
		others  bool
	}{
		"nobody's":                                {},
		"a pod's":                                 {holders: []holder{in(one)}, uid: podUID(1)},
		"a pod's that another process is in too":  {holders: []holder{in(one, other)}, uid: podUID(1)},
		"the node's":                              {holders: []holder{in()}},
		"two pods'":                               {holders: []holder{in(one, two)}},
		"a pod's, and another's":                  {holders: []holder{in(one), in(two)}},
		"one of no pod":                           {holders: []holder{in(other)}, others: true},
		"one of no pod, and a pod's":              {holders: []holder{in(other), in(one)}, uid: podUID(1)},
		"one of no pod, and the node's":           {holders: []holder{in(other), in()}},
		"one whose cgroup names two pods (A-17)":  {holders: []holder{in(one + two)}},
		"that, beside what would be a pod's else": {holders: []holder{in(one+two, one)}},
	} {
		if uid, others := podOf(tt.holders); uid != tt.uid || others != tt.others {
			t.Errorf("%s: podOf = %q, %v; want %q, %v", name, uid, others, tt.uid, tt.others)
		}
	}
}
