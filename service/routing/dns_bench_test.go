package routing

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// BenchmarkDNSOtherQueries is how long a pod's queries for other names take with `dns: answer`, as
// a ratio to the same without it: of the medians and of the 99th percentiles. Each query is the
// first packet of a new connection, which meets all rules. One iteration is one query on each of
// three nodes, in an order that changes, so that what else the machine does falls on all alike. The
// third node is without `dns: answer` as the second is: its ratio is the noise of the measurement.
func BenchmarkDNSOtherQueries(b *testing.B) {
	for _, mode := range []string{"iptables-nft", "iptables-legacy", ModeNFTables} {
		b.Run(mode, func(b *testing.B) {
			const nodes = 3
			var on [nodes]*testNode
			for i := range on {
				on[i] = modeNode(b, mode)
				dnsNode(on[i])
				on[i].plan.DNS = i == 0
				on[i].install(on[i].plan)
			}
			ask := func(n *testNode, id uint16) time.Duration {
				m := dnsmessage.Message{Header: dnsmessage.Header{ID: id, RecursionDesired: true},
					Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(fmt.Sprintf("other-%d.example.", id%100)),
						Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}}
				query, err := m.Pack()
				if err != nil {
					b.Fatal(err)
				}
				c, err := n.pod.Dial(b.Context(), "udp", clusterDNS)
				if err != nil {
					b.Fatal(err)
				}
				defer c.Close()
				start := time.Now()
				m = exchange(b, c, query)
				took := time.Since(start)
				if len(m.Answers) != 1 {
					b.Fatalf("no answer: %s", m.GoString())
				}
				return took
			}
			var took [nodes][]time.Duration
			for i := 0; b.Loop(); i++ {
				for turn := range nodes {
					// Each node follows each other one equally often.
					at := []int{0, 1, 2, 0, 2, 1}[(i*nodes+turn)%6]
					took[at] = append(took[at], ask(on[at], uint16(i)))
				}
			}
			at := func(node, percent int) float64 {
				all := slices.Sorted(slices.Values(took[node]))
				return float64(all[(len(all)-1)*percent/100])
			}
			b.ReportMetric(at(0, 50)/at(1, 50), "median/without")
			b.ReportMetric(at(2, 50)/at(1, 50), "median-noise")
			b.ReportMetric(at(0, 99)/at(1, 99), "p99/without")
			b.ReportMetric(at(2, 99)/at(1, 99), "p99-noise")
			b.ReportMetric(at(1, 50)/1000, "without-µs")
			b.ReportMetric(0, "ns/op")
			for _, n := range on {
				if err := n.Close(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
