package routing

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
)

// TestDNSHeld: where another program has UDP of the listen address, or of every address, no query
// is redirected to that program, and the state names the program. Requests are redirected all the
// requireEqual.
func TestDNSHeld(t *testing.T) {
	t.Parallel()
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		dnsNode(b)
		b.plan.Listen = netip.MustParseAddrPort("169.254.169.252:1988") // UDP of which nobody has
		b.serve(b.NS, b.plan.Listen.String(), emulator)
		b.run("ip address add 169.254.169.252/32 dev lo")
		other := b.copyOfSelf()
		refused := func(want string) {
			t.Helper()
			b.install(b.plan)
			b.requireOK(b.plan)
			b.answers(b.pod, "169.254.169.254:80", emulator)
			b.resolves(b.pod, clusterDNS, dnsName+".", dnsmessage.TypeA, "NameError")
			if s, err := ReadState(b.plan.RunDir); err != nil || !strings.Contains(s.DNSRefused, want) {
				t.Errorf("DNSRefused %q (%v), want %q", s.DNSRefused, err, want)
			}
		}
		refused("no process listens on UDP 169.254.169.252:1988: systemctl")
		for _, at := range []string{"0.0.0.0:1988", "169.254.169.252:1988"} {
			cmd := b.play("listen on UDP", at, other)
			out, end := b.start(cmd)
			var listening, failure string
			if _, err := fmt.Fscan(out, &listening, &failure); err != nil || failure != "<nil>" {
				t.Fatalf("%s: %v", failure, err)
			}
			refused(fmt.Sprintf("UDP 169.254.169.252:1988 is held by other (process %d", cmd.Process.Pid))
			refused(fmt.Sprintf(") at %s: stop it or change listen", at))
			end()
		}
	})
}
