package routing

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/dns"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

const (
	clusterDNS  = "10.96.0.10:53" // a Service, in front of a pod
	clusterDNS6 = "[fd00:96::10]:53"
	cloudDNS    = "198.51.100.1:53"
	cachedDNS   = "169.254.20.10:53" // on the node, its packets not tracked, as NodeLocal DNSCache's
)

// dnsNode has b answer DNS queries too, and makes name servers. The rules of the Service are like
// those of kube-proxy.
func dnsNode(b *testNode) (servers *nameServer, answered func(dns.Outcome) int) {
	b.t.Helper()
	return dnsNodeAt(b, b.NS)
}

// dnsNodeAt is dnsNode with the emulator in another namespace.
func dnsNodeAt(b *testNode, emulator *netnstest.NS) (servers *nameServer, answered func(dns.Outcome) int) {
	b.t.Helper()
	coredns, err := b.AddRoutedPod("coredns")
	if err != nil {
		b.t.Fatal(err)
	}
	servers = &nameServer{asked: map[string]int{}}
	b.run(fmt.Sprintf(`ip address add 169.254.20.10/32 dev lo
iptables -t nat -N KUBE-SERVICES; iptables -t nat -A PREROUTING -j KUBE-SERVICES; iptables -t nat -A OUTPUT -j KUBE-SERVICES
iptables -t nat -A KUBE-SERVICES -d 10.96.0.10/32 -p udp --dport 53 -j DNAT --to-destination %s:53
ip6tables -t nat -N KUBE-SERVICES; ip6tables -t nat -A PREROUTING -j KUBE-SERVICES
ip6tables -t nat -A KUBE-SERVICES -d fd00:96::10/128 -p udp --dport 53 -j DNAT --to-destination '[%s]:53'
for c in PREROUTING OUTPUT; do
	iptables -t raw -A $c -d 169.254.20.10/32 -p udp --dport 53 -j NOTRACK
	iptables -t raw -A $c -s 169.254.20.10/32 -p udp --sport 53 -j NOTRACK
done`, coredns.Addr, coredns.Addr6))
	listen := func(ns *netnstest.NS, at string, serve func(net.PacketConn)) {
		b.t.Helper()
		c, err := ns.ListenPacket("udp", at)
		if err != nil {
			b.t.Fatal(err)
		}
		go serve(c)
	}
	listen(coredns, netip.AddrPortFrom(coredns.Addr, 53).String(), servers.serve)
	listen(coredns, netip.AddrPortFrom(coredns.Addr6, 53).String(), servers.serve)
	listen(b.Cloud, cloudDNS, servers.serve)
	listen(b.NS, cachedDNS, servers.serve)

	b.plan.DNS = true
	registry := prometheus.NewRegistry()
	responder := dns.New(dns.Options{IPv6: func() bool { return b.plan.Listen6.IsValid() }, Log: logrus.New(),
		Registerer: registry})
	for _, at := range []netip.AddrPort{b.plan.Listen, b.plan.Listen6} {
		if at.IsValid() {
			listen(emulator, at.String(), func(c net.PacketConn) { responder.Serve(c.(*net.UDPConn)) })
		}
	}
	return servers, func(o dns.Outcome) (n int) {
		families, err := registry.Gather()
		if err != nil {
			b.t.Fatal(err)
		}
		for _, m := range families[0].GetMetric() {
			if m.GetLabel()[0].GetValue() == string(o) {
				n = int(m.GetCounter().GetValue())
			}
		}
		return n
	}
}

// resolver is a client's socket.
type resolver struct {
	c  net.Conn
	id uint16
}

func (b *testNode) resolver(ns *netnstest.NS, server string) *resolver {
	b.t.Helper()
	c, err := ns.Dial(b.t.Context(), "udp", server)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { _ = c.Close() })
	return &resolver{c: c}
}

func (r *resolver) send(name string, of dnsmessage.Type) error {
	r.id++
	m := dnsmessage.Message{Header: dnsmessage.Header{ID: r.id, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: of, Class: dnsmessage.ClassINET}}}
	b, err := m.Pack()
	if err == nil {
		_, err = r.c.Write(b)
	}
	return err
}

// receive returns the name that an answer is for, and the answer: NXDOMAIN, empty, or an address.
func (r *resolver) receive(wait time.Duration) (name, answer string, err error) {
	if err := r.c.SetReadDeadline(time.Now().Add(wait)); err != nil {
		return "", "", err
	}
	b := make([]byte, 1500)
	n, err := r.c.Read(b)
	if err != nil {
		return "", "", err
	}
	var m dnsmessage.Message
	if err := m.Unpack(b[:n]); err != nil {
		return "", "", err
	}
	answer = strings.TrimPrefix(m.RCode.String(), "RCode")
	for _, a := range m.Answers {
		switch body := a.Body.(type) {
		case *dnsmessage.AResource:
			answer = netip.AddrFrom4(body.A).String()
		case *dnsmessage.AAAAResource:
			answer = netip.AddrFrom16(body.AAAA).String()
		}
	}
	return m.Questions[0].Name.String(), answer, nil
}

// resolves fails unless a new socket of ns gets the answer; "" is none at all.
func (b *testNode) resolves(ns *netnstest.NS, server, name string, of dnsmessage.Type, want string) {
	b.t.Helper()
	wait := long
	if want == "" {
		wait = short
	}
	r := b.resolver(ns, server)
	err := r.send(name, of)
	got := ""
	if err == nil {
		_, got, err = r.receive(wait)
	}
	if got != want {
		b.t.Errorf("%s asked %s for %v of %s: %q (%v), want %q", ns.Name, server, of, name, got, err, want)
	}
}

// TestDNSStory: with Plan.DNS a pod's queries for the metadata server's name are answered by the
// node, whichever name server they were sent to, and nothing else is.
func TestDNSStory(t *testing.T) {
	t.Parallel()
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		routed, err := b.AddRoutedPod("routed")
		if err != nil {
			t.Fatal(err)
		}
		ipv6Node(b)
		servers, answered := dnsNode(b)
		before := b.ruleset()
		const a, aaaa = dnsmessage.TypeA, dnsmessage.TypeAAAA
		const name, nxdomain = dnsName + ".", "NameError"
		everywhere := []string{clusterDNS, clusterDNS6, cloudDNS, cachedDNS}
		for _, at := range everywhere { // the testNode's name servers answer
			b.resolves(b.pod, at, name, a, nxdomain)
		}

		off := b.plan
		off.DNS = false
		b.install(off)
		b.resolves(b.pod, clusterDNS, name, a, nxdomain)
		if rules := b.ruleset(); strings.Contains(rules, "bytecode") || strings.Contains(rules, "@th") {
			t.Error("rules for DNS without Plan.DNS")
		}
		b.install(b.plan)
		b.requireOK(b.plan)
		first := b.ruleset()
		if b.plan.Mode == ModeNFTables {
			golden(t, "nft/dns.nft", b.run("nft list table ip gke-metadata-emulator; nft list table ip6 gke-metadata-emulator"))
		}
		served := func() {
			b.t.Helper()
			ours := servers.was(dnsName + ".")
			for _, ns := range []*netnstest.NS{b.pod, routed} {
				for _, at := range everywhere {
					b.resolves(ns, at, name, a, "169.254.169.254")
					b.resolves(ns, at, name, aaaa, "fd20:ce::254")
					b.resolves(ns, at, "example.com.", a, "192.0.2.1")
				}
			}
			for _, upper := range []string{"METADATA.GOOGLE.INTERNAL.", "mEtAdAtA.gOoGlE.iNtErNaL."} {
				b.resolves(b.pod, clusterDNS, upper, a, "169.254.169.254")
				b.resolves(b.pod, clusterDNS6, upper, a, "169.254.169.254")
			}
			b.resolves(b.pod, clusterDNS, name, dnsmessage.TypeMX, "Success")
			for _, search := range []string{"default.svc.cluster.local.", "svc.cluster.local.", "Cluster.Local.", "a."} {
				b.resolves(b.pod, clusterDNS, name+search, a, nxdomain)
				b.resolves(b.pod, clusterDNS6, name+search, aaaa, nxdomain)
			}
			if n := servers.was(dnsName+".") - ours; n != 0 {
				t.Errorf("%d queries for the name went to the name servers", n)
			}
		}
		served()

		// Neighbours and the node's own processes ask whom they ask.
		b.resolves(b.NS, cloudDNS, name, a, nxdomain)
		b.resolves(b.NS, clusterDNS, name, a, nxdomain)
		if out, err := b.neighbour.Command(t.Context(), "sh", "-c", "ip route add 10.96.0.10 via 198.51.100.10; "+
			"ip route add 169.254.169.252 via 198.51.100.10; ip -6 route add fd20:ce::252 via fd00:51::10").
			CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		b.resolves(b.neighbour, clusterDNS, name, a, nxdomain)
		for _, ns := range []*netnstest.NS{b.neighbour, b.pod} { // not directly
			b.resolves(ns, "169.254.169.252:988", name, a, "")
			b.resolves(ns, "[fd20:ce::252]:988", name, a, "")
		}
		// What is no query for the name goes where it was sent.
		quiet := answered(dns.Refused) + answered(dns.Malformed)
		for _, other := range []string{"metadata.google.", "xmetadata.google.internal.", "x.metadata.google.internal.",
			"metadata.google.internals.", "metadata-google.internal.", "metadatb.google.internal."} {
			asked := servers.was(other)
			b.resolves(b.pod, clusterDNS, other, aaaa, "Success")
			if servers.was(other) == asked {
				t.Errorf("%s was not asked for", other)
			}
		}
		if n := answered(dns.Refused) + answered(dns.Malformed) - quiet; n != 0 {
			t.Errorf("%d other queries came to the emulator", n)
		}
		b.mixes(servers, answered)
		if b.plan.Mode != ModeNFTables {
			b.comesFirst(served)
		}
		b.forged()

		// Others flush.
		w := b.watch(b.plan, time.Hour)
		flush := "iptables -t raw -F; iptables -t nat -F GME-PRE"
		if b.plan.Mode == ModeNFTables {
			flush = "nft flush chain ip gke-metadata-emulator raw; nft flush chain ip gke-metadata-emulator prerouting"
		}
		said := len(w.repaired())
		b.run(flush)
		w.until("a repair", func() bool { return len(w.repaired()) > said && b.stands(b.plan) && w.state().Standing.Good })
		w.end()
		if b.plan.Mode != ModeNFTables { // with NodeLocal DNSCache's
			b.run("for c in PREROUTING OUTPUT; do iptables -t raw -A $c -d 169.254.20.10/32 -p udp --dport 53 -j NOTRACK; " +
				"iptables -t raw -A $c -s 169.254.20.10/32 -p udp --sport 53 -j NOTRACK; done")
		}
		b.requireEqual("repair", sorted(b.ruleset()), sorted(first))
		served()

		b.install(off)
		b.requireOK(off)
		b.resolves(b.pod, clusterDNS, name, a, nxdomain)
		b.install(b.plan)
		b.remove(b.plan)
		b.requireEqual("remove", sorted(b.ruleset()), sorted(before))
		b.resolves(b.pod, clusterDNS, name, a, nxdomain)
	})
}

// comesFirst has kube-proxy start later than the service: its jump is in front of ours then. Until
// that is repaired a query has its name server's answer, and is not lost.
func (b *testNode) comesFirst(served func()) {
	b.t.Helper()
	const name = dnsName + "."
	b.run("iptables -t nat -D PREROUTING -j KUBE-SERVICES; iptables -t nat -I PREROUTING -j KUBE-SERVICES")
	b.resolves(b.pod, clusterDNS, name, dnsmessage.TypeA, "NameError")
	b.resolves(b.pod, clusterDNS, "example.com.", dnsmessage.TypeA, "192.0.2.1")
	if err := b.check(b.plan); err == nil || !strings.Contains(err.Error(), "KUBE-SERVICES") {
		b.t.Errorf("kube-proxy redirects queries before our rules do, and check says %v", err)
	}
	w := b.watch(b.plan, time.Hour)
	w.until("a repair", func() bool { return b.stands(b.plan) })
	w.end()
	served()
	b.run("iptables -t nat -I PREROUTING -p tcp -d 192.0.2.1 --dport 1 -j RETURN") // of no concern
	b.requireOK(b.plan)
	b.run("iptables -t nat -D PREROUTING -p tcp -d 192.0.2.1 --dport 1 -j RETURN")
	served()
}

// forged has a pod ask in the name of a host behind the uplink, which gets no answer.
func (b *testNode) forged() {
	b.t.Helper()
	c, err := b.Cloud.ListenPacket("udp", "198.51.100.1:5000")
	if err != nil {
		b.t.Fatal(err)
	}
	defer c.Close()
	b.run("for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 >$f; done")
	if out, err := b.pod.Command(b.t.Context(), "ip", "address", "add", "198.51.100.1/32", "dev", "lo").
		CombinedOutput(); err != nil {
		b.t.Fatalf("%v: %s", err, out)
	}
	forger := net.Dialer{LocalAddr: &net.UDPAddr{IP: net.IPv4(198, 51, 100, 1), Port: 5000}}
	var q net.Conn
	if err := b.pod.Do(func() (err error) {
		q, err = forger.DialContext(b.t.Context(), "udp", clusterDNS)
		return err
	}); err != nil {
		b.t.Fatal(err)
	}
	defer q.Close()
	r := &resolver{c: q}
	for range 3 {
		if err := r.send(dnsName+".secret.", dnsmessage.TypeA); err != nil {
			b.t.Fatal(err)
		}
	}
	_ = c.SetReadDeadline(time.Now().Add(short))
	if n, from, err := c.ReadFrom(make([]byte, 1500)); err == nil {
		b.t.Errorf("an answer of %d octets left the node in the name of %v", n, from)
	}
	if out, err := b.pod.Command(b.t.Context(), "ip", "address", "del", "198.51.100.1/32", "dev", "lo").
		CombinedOutput(); err != nil {
		b.t.Fatalf("%v: %s", err, out)
	}
}

// mixes asks for several names from one port: each query goes where its name says, whichever was
// the first, and however close they are.
func (b *testNode) mixes(servers *nameServer, answered func(dns.Outcome) int) {
	b.t.Helper()
	const ours = dnsName + "."
	for _, server := range []string{clusterDNS, clusterDNS6, cloudDNS, cachedDNS} {
		for about, names := range map[string][]string{
			"ours first":  {ours, "a.example.", ours, "b.example.", "a.example.", ours},
			"ours last":   {"a.example.", "b.example.", ours},
			"all but one": {ours, ours, "a.example.", ours, ours},
		} {
			r := b.resolver(b.pod, server)
			for _, name := range names { // one after the other
				want := "192.0.2.1"
				if name == ours {
					want = "169.254.169.254"
				}
				err := r.send(name, dnsmessage.TypeA)
				if err != nil {
					b.t.Fatal(err)
				}
				if of, got, err := r.receive(long); of != name || got != want {
					b.t.Errorf("%s, %s: asked for %s, got %s for %s (%v)", server, about, name, got, of, err)
				}
			}
			for _, name := range names { // all at once
				if err := r.send(name, dnsmessage.TypeA); err != nil {
					b.t.Fatal(err)
				}
			}
			var want, got []string
			for _, name := range names {
				of, answer, err := r.receive(long)
				if err != nil {
					b.t.Errorf("%s, %s: an answer is missing: %v", server, about, err)
				}
				got = append(got, of+" "+answer)
				if name == ours {
					want = append(want, name+" 169.254.169.254")
				} else {
					want = append(want, name+" 192.0.2.1")
				}
			}
			slices.Sort(got)
			slices.Sort(want)
			if !slices.Equal(got, want) {
				b.t.Errorf("%s, %s: got %q, want %q", server, about, got, want)
			}
		}
	}
	// Ten thousand queries for other names, from 50 sockets that ask for ours as well: none is lost,
	// none is answered by us.
	was, other := answered(dns.Refused)+answered(dns.Malformed)+answered(dns.NXDomain), servers.was("other-")
	var all sync.WaitGroup
	lost := make(chan string, 10_000)
	for socket := range 50 {
		r := b.resolver(b.pod, clusterDNS)
		all.Go(func() {
			for i := range 200 {
				name := fmt.Sprintf("other-%d-%d.example.", socket, i)
				asks := []string{name}
				if i%40 == 0 { // 250 of them: the responder's burst for one address is 1,000
					asks = append(asks, ours)
				}
				for _, name := range asks {
					want := "192.0.2.1"
					if name == ours {
						want = "169.254.169.254"
					}
					err := r.send(name, dnsmessage.TypeA)
					of, got := "", ""
					if err == nil {
						of, got, err = r.receive(long)
					}
					if of != name || got != want {
						lost <- fmt.Sprintf("%s: %s for %s (%v)", name, got, of, err)
					}
				}
			}
		})
	}
	all.Wait()
	close(lost)
	for l := range lost {
		b.t.Errorf("lost: %s", l)
	}
	if n := servers.was("other-") - other; n != 10_000 {
		b.t.Errorf("%d of 10000 other queries came to the name server", n)
	}
	if n := answered(dns.Refused) + answered(dns.Malformed) + answered(dns.NXDomain) - was; n != 0 {
		b.t.Errorf("%d other queries came to the emulator", n)
	}
}
