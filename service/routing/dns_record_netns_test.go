package routing

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// TestDNSRecordInCluster: where the cluster's DNS has the record already, clients find with
// `dns: answer` what they find without it: by Go's resolver and the C libraries', by each name of
// the search list, and in what a resolver reads of an answer: its code, its question, its records
// but for their TTL, and whether it has an OPT record.
//
// These may differ, which no stub resolver shows to a program. The test holds them for the node:
//
//   - TTL: the node's is 60 s, the name server's is what somebody configured.
//   - Flags: the node sets AA and RA. A name server may lack either.
//   - Authority section: the node has no SOA in an empty answer and in NXDOMAIN, so a cache in the
//     pod keeps neither (RFC 2308).
//
// These do differ, and are not in the test: a record other than A 169.254.169.254 and AAAA
// fd20:ce::254; AAAA where the record and `listen6` disagree; a record below the name, such as a
// wildcard of a search domain, which is NXDOMAIN; ANY, which is A alone; signatures of DNSSEC.
func TestDNSRecordInCluster(t *testing.T) {
	t.Parallel()
	libraries := cLibraries(t)
	for _, ipv6 := range []bool{false, true} {
		t.Run(fmt.Sprintf("AAAA %t", ipv6), func(t *testing.T) {
			t.Parallel()
			onEveryDNAT(t, func(t *testing.T, b *testNode) {
				if ipv6 {
					ipv6Node(b)
				}
				servers, _ := dnsNode(b)
				records := map[dnsmessage.Type]dnsmessage.ResourceBody{
					dnsmessage.TypeA: &dnsmessage.AResource{A: metadataServer.Addr().As4()}}
				if ipv6 {
					records[dnsmessage.TypeAAAA] = &dnsmessage.AAAAResource{AAAA: netip.MustParseAddr("fd20:ce::254").As16()}
				}
				servers.hold(records)
				clients := slices.Concat(libraries, b.goResolvers())
				podCommand := b.podCommand("")
				for _, database := range []string{"ahosts", "ahostsv4", "ahostsv6", "hosts"} {
					clients = append(clients, dnsClient{name: "getent " + database,
						words: []string{"sh", "-c", `for name; do getent "$0" "$name" || echo "$name $?"; done`, database}})
				}
				names := []string{dnsName + ".", "MetaData.Google.Internal.", dnsName + ".default.svc.cluster.local."}
				find := func(byNode bool) map[string]string {
					t.Helper()
					found := b.rawAnswers(byNode)
					for _, c := range clients {
						names := names
						if !c.absolute {
							names = append(slices.Clone(names), dnsName, dnsName+".default", dnsName+".default.svc")
						}
						found[c.name] = c.run(t, podCommand, names...)
					}
					return found
				}
				off := b.plan
				off.DNS = false
				b.install(off)
				without := find(false)
				if servers.was(dnsName+".") == 0 {
					t.Fatal("no query came to the name server")
				}
				if !strings.Contains(without["Go, netdns=go"], "169.254.169.254") {
					t.Fatalf("the name server has no record: %s", without["Go, netdns=go"])
				}
				b.install(b.plan)
				servers.forget()
				with := find(true)
				if n := servers.was(dnsName + "."); n != 0 {
					t.Errorf("%d queries for the name went to the name server", n)
				}
				for what, got := range with {
					if want := without[what]; got != want {
						t.Errorf("%s: with dns: answer\n%s\nwithout it\n%s", what, got, want)
					}
				}
			})
		})
	}
}

// rawAnswers are answers to queries that a pod sends by itself, of each type and with each option,
// as text without what may differ.
func (b *testNode) rawAnswers(byNode bool) map[string]string {
	b.t.Helper()
	c := b.resolver(b.pod, clusterDNS).c
	all := map[string]string{}
	types := []dnsmessage.Type{dnsmessage.TypeA, dnsmessage.TypeAAAA, dnsmessage.TypeMX, dnsmessage.TypeTXT,
		dnsmessage.TypeSRV, dnsmessage.TypeNS, dnsmessage.TypeSOA, dnsmessage.TypeCNAME, dnsmessage.TypePTR,
		64, 65, 257} // SVCB, HTTPS, CAA
	for _, name := range []string{dnsName + ".", "mEtAdAtA.GoOgLe.InTeRnAl.", dnsName + ".default.svc.cluster.local.",
		dnsName + ".svc.cluster.local.", dnsName + ".cluster.local."} {
		for _, of := range types {
			for option, change := range map[string]func(*dnsmessage.Message){
				"":               func(*dnsmessage.Message) {},
				" not recursive": func(m *dnsmessage.Message) { m.RecursionDesired = false },
				" AD":            func(m *dnsmessage.Message) { m.AuthenticData = true },
				" CD":            func(m *dnsmessage.Message) { m.CheckingDisabled = true },
				" EDNS":          func(m *dnsmessage.Message) { m.Additionals = optRecord(b.t, false) },
				" EDNS DO":       func(m *dnsmessage.Message) { m.Additionals = optRecord(b.t, true) },
			} {
				m := dnsmessage.Message{Header: dnsmessage.Header{ID: 4711, RecursionDesired: true},
					Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: of,
						Class: dnsmessage.ClassINET}}}
				change(&m)
				query, err := m.Pack()
				if err != nil {
					b.t.Fatal(err)
				}
				m = exchange(b.t, c, query)
				what := fmt.Sprintf("%s %v%s", name, of, option)
				if byNode && (!m.Authoritative || !m.RecursionAvailable || len(m.Authorities) > 0 ||
					len(m.Answers) > 0 && m.Answers[0].Header.TTL != 60) {
					b.t.Errorf("%s: the node's answer is not as documented: %s", what, m.GoString())
				}
				all[what] = visible(m)
			}
		}
	}
	return all
}

func optRecord(t testing.TB, do bool) []dnsmessage.Resource {
	t.Helper()
	var h dnsmessage.ResourceHeader
	if err := h.SetEDNS0(1232, 0, do); err != nil {
		t.Fatal(err)
	}
	return []dnsmessage.Resource{{Header: h, Body: &dnsmessage.OPTResource{}}}
}

// exchange sends a query, and returns the answer.
func exchange(t testing.TB, c net.Conn, query []byte) (m dnsmessage.Message) {
	t.Helper()
	if err := c.SetDeadline(time.Now().Add(long)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(query); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 1500)
	n, err := c.Read(answer)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Unpack(answer[:n]); err != nil {
		t.Fatal(err)
	}
	return m
}

// visible is what a client can see of an answer: all but AA and RA, the TTL of records, and the
// authority section.
func visible(m dnsmessage.Message) string {
	m.Authoritative, m.RecursionAvailable, m.Authorities = false, false, nil
	for i := range m.Answers {
		m.Answers[i].Header.TTL = 0
	}
	return m.GoString()
}
