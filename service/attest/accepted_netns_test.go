package attest

import (
	"net/netip"
	"testing"
)

// A pod that only listens opens no connection to the metadata server, so nobody can be taken for it. A neighbour on the bridge connects to
// its listener as if from the metadata server, whereby the pod comes to have a socket with just the ends of a client's, and then to the
// emulator as if from the listener. Both need forged packets; the pod need do nothing.
func TestAcceptedSocket(t *testing.T) {
	for _, listener := range []string{"silent", "greets", "greets, and is not heard out", "ends its half"} {
		t.Run(listener, func(t *testing.T) {
			b := newBed(t)
			victimNS, attackerNS, serverNS := b.pod("victim"), b.pod("attacker"), b.pod("server")
			victim := b.client(containerPath(1, 1), victimNS)
			attacker, server := b.client(containerPath(2, 2), attackerNS), b.client(containerPath(3, 3), serverNS)
			b.startHelper()
			b.mustBe(victim, dial, podUID(1), containerIDOf(1))
			// Where bridged packets pass netfilter, conntrack takes what the listener sends for answers, and redirects none of it.
			b.in(b.node.NS, "sysctl -eqw net.bridge.bridge-nf-call-iptables=0")
			b.in(b.node.NS, "ip neigh flush dev cni0")
			b.in(b.node.NS, "ip neigh replace %s lladdr %s dev cni0 nud permanent", victimNS.Addr, hardware(t, attackerNS, ""))
			b.in(victimNS, "ip route replace 169.254.169.254/32 dev eth0")
			b.in(victimNS, "ip neigh replace 169.254.169.254 lladdr %s dev eth0 nud permanent", hardware(t, serverNS, ""))
			b.in(attackerNS, "ip route add local %s/32 dev lo", victimNS.Addr)
			b.in(serverNS, "ip route add local 169.254.169.254/32 dev lo")
			b.in(serverNS, "ip route replace %s/32 dev eth0", victimNS.Addr)
			b.in(serverNS, "ip neigh replace %s lladdr %s dev eth0 nud permanent", victimNS.Addr, hardware(t, victimNS, ""))

			b.in(serverNS, "iptables -A INPUT -p tcp --sport 41000 -m string --algo bm --string more -j DROP")
			end := netip.AddrPortFrom(victimNS.Addr, 41000)
			victim.do(map[bool]string{true: "listen %s", false: "greet %s"}[listener == "silent"], end)
			server.do("spoof %s %s", metadataAddr, end)
			if listener != "silent" {
				victim.answer() // one that came was greeted
			}
			switch listener {
			case "greets, and is not heard out":
				victim.do("send %s more", end)
			case "ends its half":
				victim.do("half %s", end)
			}
			attacker.do("spoof %s %s", end, metadataAddr)
			b.refused("the victim was connected to", accepted(b.accept(end.String())), ErrNoSocket)
		})
	}
}
