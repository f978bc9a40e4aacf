package attest

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// A-24 (accepted sockets): a pod that only listens opens no connection to the metadata server, so
// nobody can be taken for it. A neighbour on the bridge connects to its listener as if from the
// metadata server, whereby the pod comes to have a socket with just the ends of a client's, and
// then to the emulator as if from the listener. Both need forged packets; the pod need do
// nothing.
func TestAcceptedSocket(t *testing.T) {
	for _, listener := range []string{
		"silent", "greets", "greets, and is not heard out", "ends its half", "greets once",
		"greets once, and is not heard out",
		"greets once, and ends its half",
	} {
		t.Run(listener, func(t *testing.T) {
			t.Parallel() // a refusal is waited for
			b := newBridge(t)
			victim, attacker, server := b.victim, b.attacker, b.server
			b.in(b.serverNS, "iptables -A INPUT -p tcp --sport 41000 -m string --algo bm --string more -j DROP")
			end := netip.AddrPortFrom(b.victimNS.Addr, 41000)
			victim.do(map[bool]string{true: "listen %s", false: "greet %s"}[listener == "silent"], end)
			server.do("spoof %s %s", metadataAddr, end)
			if listener != "silent" {
				victim.answer() // one that came was greeted
			}
			if strings.Contains(listener, "once") {
				victim.do("deaf")
			}
			if strings.Contains(listener, "not heard out") {
				victim.do("send %s more", end)
			}
			if strings.Contains(listener, "ends its half") {
				victim.do("half %s", end)
			}
			attacker.do("spoof %s %s", end, metadataAddr)
			b.requireRefused("the victim was connected to", accepted(b.accept(end.String())), ErrNoSocket)
		})
	}
}

// bridge is a node on whose bridge a neighbour of the victim's plays the metadata server for it,
// and another one sends from the victim's address.
type bridge struct {
	*testNode
	victimNS, attackerNS, serverNS *netnstest.NS
	victim, attacker, server       *client
}

func newBridge(t *testing.T) *bridge {
	t.Helper()
	b := &bridge{testNode: newTestNode(t)}
	b.victimNS, b.attackerNS, b.serverNS = b.pod("victim"), b.pod("attacker"), b.pod("server")
	b.victim = b.client(containerPath(1, 1), b.victimNS)
	b.attacker, b.server = b.client(containerPath(2, 2), b.attackerNS), b.client(containerPath(3, 3), b.serverNS)
	b.startHelper()
	b.mustBe(b.victim, dial, podUID(1), containerIDOf(1))
	// Where bridged packets pass netfilter, conntrack takes what the listener sends for answers, and
	// redirects none of it.
	b.in(b.node.NS, "sysctl -eqw net.bridge.bridge-nf-call-iptables=0")
	b.in(b.node.NS, "ip neigh flush dev cni0")
	b.in(b.node.NS, "ip neigh replace %s lladdr %s dev cni0 nud permanent", b.victimNS.Addr, hardware(t, b.attackerNS, ""))
	b.in(b.victimNS, "ip route replace 169.254.169.254/32 dev eth0")
	b.in(b.victimNS, "ip neigh replace 169.254.169.254 lladdr %s dev eth0 nud permanent", hardware(t, b.serverNS, ""))
	b.in(b.attackerNS, "ip route add local %s/32 dev lo", b.victimNS.Addr)
	b.in(b.serverNS, "ip route add local 169.254.169.254/32 dev lo")
	b.in(b.serverNS, "ip route replace %s/32 dev eth0", b.victimNS.Addr)
	b.in(b.serverNS, "ip neigh replace %s lladdr %s dev eth0 nud permanent", b.victimNS.Addr, hardware(t, b.victimNS, ""))
	return b
}

// A client whose request is lost on the way, and has to be sent again, is found all the same; also
// one that listens at its own port.
func TestRequestLost(t *testing.T) {
	b := newTestNode(t)
	ns := b.pod("pod")
	pod := b.client(containerPath(1, 1), ns)
	b.startHelper()
	b.mustBe(pod, dial, podUID(1), containerIDOf(1))
	b.in(
		b.node.NS,
		"iptables -t raw -A PREROUTING -p tcp -m string --algo bm --string lost -m statistic --mode nth --every 2 "+
			"--packet 0 -j DROP",
	)
	for _, listens := range []bool{false, true} {
		end := netip.AddrPortFrom(ns.Addr, map[bool]uint16{false: 41000, true: 41001}[listens])
		pod.do("spoof %s %s", end, metadataAddr)
		if listens {
			pod.do("listen %s", end)
		}
		pod.do("say lost")
		conn := accepted(b.accept(end.String()))
		if e, err := b.kernel.Look(conn); err != nil || e.PodUID != podUID(1) {
			t.Errorf("listens at its port: %v: %+v, %v", listens, e, err)
		}
	}
}
