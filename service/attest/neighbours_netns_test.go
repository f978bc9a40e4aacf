package attest

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// a neighbour on the bridge that has the node believe that a pod's address is its own
// makes the connection that the pod's half-dead socket has, which nobody else knows any more.
func TestHalfDeadSocket(t *testing.T) {
	b := newTestNode(t)
	victimNS, attackerNS := b.pod("victim"), b.pod("attacker")
	victim, attacker := b.client(containerPath(1, 1), victimNS), b.client(containerPath(2, 2), attackerNS)
	b.startHelper()
	b.mustBe(victim, dial, podUID(1), containerIDOf(1))
	end := netip.AddrPortFrom(victimNS.Addr, 41000)
	victim.do("dial tcp4 %s %s", metadataAddr, end)
	conn := b.accept(end.String())
	if err := b.node.ForgetConnections(); err != nil { // the victim is not told that its connection is over
		t.Fatal(err)
	}
	if err := errors.Join(conn.(*net.TCPConn).SetLinger(0), conn.Close()); err != nil {
		t.Fatal(err)
	}
	own := b.holder(victimNS.Addr)
	eventually(t, "the victim's socket is older than the attacker's will be", func() bool {
		f, ok, err := own.socket(end, netip.MustParseAddrPort(metadataAddr), own.device)
		if err != nil || !ok || !f.live() {
			t.Fatalf("%+v, %v, %v", f, ok, err)
		}
		return f.acknowledged > fitSlack+500
	})
	b.in(b.node.NS, "ip neigh replace %s lladdr %s dev cni0 nud permanent", victimNS.Addr, hardware(t, attackerNS, ""))
	b.in(attackerNS, "ip route add local %s/32 dev lo", victimNS.Addr)
	attacker.do("spoof %s %s", end, metadataAddr)
	b.requireRefused("the half-dead socket", accepted(b.accept(end.String())), ErrNoSocket)
}

// twoSockets has the attacker make a socket with the ends that the victim's connection is to have,
// and fails unless that connection is refused, for a reason that does not name the attacker. A
// machine that is slow makes the attacker's socket too old: then it is tried anew.
func (b *testNode) twoSockets(attacker, victim *client, addr netip.Addr, port uint16) {
	b.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; port++ {
		end := netip.AddrPortFrom(addr, port).String()
		attacker.do("spoof %s %s", end, metadataAddr)
		victim.do("dial tcp4 %s %s", metadataAddr, end)
		e, err := b.look(accepted(b.accept(end)))
		switch {
		case errors.Is(err, ErrSockets):
			if strings.Contains(err.Error(), "pod") || strings.Contains(err.Error(), "namespace") {
				b.t.Errorf("the reason names others: %v", err)
			}
			return
		case err != nil || e.Cgroup != victim.group || time.Now().After(deadline):
			b.t.Fatalf("A-12: two sockets: %+v, %v", e, err)
		}
	}
}
