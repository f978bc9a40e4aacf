package attest

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A pod with CAP_NET_ADMIN may send netlink messages to the sockets that we ask by: they are tied
// to the kernel.
func TestForgedAnswers(t *testing.T) {
	b := newTestNode(t)
	ns := b.pod("one")
	attacker, victim := b.client(containerPath(1, 1), ns), b.client(containerPath(2, 2), b.pod("two"))
	b.startHelper()
	b.mustBe(victim, dial, podUID(2), containerIDOf(2))
	var stat unix.Stat_t
	if err := unix.Stat(b.cgroups+containerPath(2, 2), &stat); err != nil {
		t.Fatal(err)
	}
	own := attacker.do(dial)
	conn := b.accept(own)

	// Port ids are of one protocol each: at the other one the same number may be another socket's.
	forge := func(socket int) string {
		protocol, err := unix.GetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_PROTOCOL)
		if err != nil {
			t.Fatal(err)
		}
		sa, err := unix.Getsockname(socket)
		if err != nil {
			t.Fatal(err)
		}
		return attacker.do("forge %d %d %d %s %s", protocol, sa.(*unix.SockaddrNetlink).Pid, stat.Ino, own, metadataAddr)
	}
	for _, protocol := range []int{unix.NETLINK_SOCK_DIAG, unix.NETLINK_ROUTE} {
		var untied int
		if err := ns.Do(func() (err error) {
			untied, err = openNetlink(protocol)
			if err == nil {
				err = unix.Bind(untied, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(untied)
		if arrived := forge(untied); arrived == "0" {
			t.Fatal("the attack does not work on any socket: this test says nothing")
		}
		s := &netlinkSocket{fd: untied, buffer: make([]byte, 512)}
		if m, err := s.receive(); m != nil || err != nil {
			t.Errorf("a message that is not the kernel's was received: %v, %v", m, err)
		}
	}
	// A namespace may be handed over anew meanwhile, and its descriptors then be somebody else's: what
	// was seen counts if it was not.
	holder := func() *namespace { return b.holder(netip.MustParseAddrPort(own).Addr()).namespace }
	for again := true; again; {
		n := holder()
		diag, route := forge(n.diag.fd), forge(n.route.fd)
		if again = holder() != n; !again && (diag != "0" || route != "0") {
			t.Errorf("%s and %s forged messages arrived", diag, route)
		}
	}
	if e, err := b.look(accepted(conn)); err != nil || e.PodUID != podUID(1) {
		t.Errorf("the attacker is %+v, %v", e, err)
	}
}

// A-17, and who makes cgroups with a pod's name without being kubelet.
func TestForgedCgroups(t *testing.T) {
	b := newTestNode(t)
	ns := b.pod("one")
	c := b.client(containerPath(1, 1), ns)
	inner := b.client(containerPath(1, 1)+"/init.scope", ns)
	nested := b.client(containerPath(1, 1)+containerPath(2, 2), ns)
	b.cgroup("/kubepods/pod" + podUID(2))
	if err := os.Chown(b.cgroups+"/kubepods/pod"+podUID(2), 1000, 1000); err != nil {
		t.Fatal(err)
	}
	user := b.client("/kubepods/pod"+podUID(2)+"/"+containerIDOf(2), b.node.NS)
	b.startHelper()
	b.mustBe(c, dial, podUID(1), containerIDOf(1))
	b.mustBe(inner, dial, podUID(1), containerIDOf(1))
	b.requireRefused("another pod below", accepted(b.accept(nested.do(dial))), ErrPods)
	b.requireRefused("a user's own", accepted(b.accept(user.do(dial))), ErrOwner)
}

// root in what is no pod makes cgroups below its own, and has one that is named like a pod's
// ask. It stays what it is.
func TestForgedPods(t *testing.T) {
	b := newTestNode(t)
	escaped := strings.ReplaceAll(podUID(9), "-", "_")
	docker := "docker-" + containerIDOf(1) + ".scope"
	var clients []*client
	var units []string
	for _, forged := range []struct{ own, unit, below string }{
		{"/system.slice/" + docker, docker, containerPath(9, 9)},
		{"/system.slice/" + docker, docker, "/kubepods.slice/kubepods-pod" + escaped + ".slice/cri-containerd-" +
			containerIDOf(9) + ".scope"},
		{"/docker/" + containerIDOf(2), "", containerPath(9, 9)},
		{"/user.slice/user-0.slice/user@0.service", "user@0.service", containerPath(9, 9)},
		{"/system.slice/containerd.service/system.slice:docker:" + containerIDOf(3), "containerd.service",
			"/kubepods-pod" + escaped + ".slice:cri-containerd:" + containerIDOf(9)},
	} {
		ns := b.node.NS
		if len(clients) < 3 {
			ns = b.pod(fmt.Sprint("forged", len(clients)))
		}
		clients, units = append(clients, b.client(forged.own+forged.below, ns)), append(units, forged.unit)
	}
	runtimes := b.client(
		"/system.slice/containerd.service/kubepods-pod"+escaped+".slice:cri-containerd:"+containerIDOf(9),
		b.pod("runtimes"),
	)
	b.startHelper()
	for i, c := range clients {
		e, _ := b.mustBe(c, dial, "", "")
		if e.Unit() != units[i] {
			t.Errorf("%s is of unit %q, want %q", c.group, e.Unit(), units[i])
		}
	}
	b.mustBe(runtimes, dial, podUID(9), containerIDOf(9))
	if n := b.others(); n != 3 {
		t.Errorf("%d namespaces of no pod, want 3: the others count as the pod's", n)
	}
}
