package routing

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
)

// The metadata server's IPv6 address (H-24): in modes iptables and nftables, where Plan.Listen6 is
// set, what pods send to [fd20:ce::254]:80 is redirected by the same rules as IPv4's in the other
// family. It is an offer beside IPv4 and never a reason for IPv4 to be without rules: a node that
// cannot redirect IPv6 says why, in the log once and in State.IPv6.
//
// There is no route to fd20:ce::254 like IPv4's of R-07: pods on the host network of a node that
// has no IPv6 route there are refused by connect() at once, and ask by IPv4.

// metadataServer6 is where clients that prefer IPv6 send their requests.
var metadataServer6 = netip.AddrPortFrom(netip.MustParseAddr("fd20:ce::254"), 80)

// closedListen6 is where requests by IPv6 go while there is no valid configuration.
var closedListen6 = netip.MustParseAddrPort("[fd20:ce::252]:988")

const noIPv6Here = "IPv6 is not there or disabled on lo"

// redirectTarget is what is redirected in one family, and where to; without a valid listen nothing
// is.
type redirectTarget struct{ server, listen netip.AddrPort }

func (p Plan) target(s nodeFacts, family netobj.Family) redirectTarget {
	if family == netobj.IPv6 {
		return redirectTarget{metadataServer6, s.listen6}
	}
	return redirectTarget{metadataServer, p.Listen}
}

// ipv6Target says where IPv6 requests go on this node, or why nowhere.
func (r *router) ipv6Target() (listen6 netip.AddrPort, why string) {
	switch {
	case !r.plan.Listen6.IsValid():
		return netip.AddrPort{}, ""
	case !ipv6Enabled():
		return netip.AddrPort{}, noIPv6Here
	case r.ipv6Refused != "":
		return netip.AddrPort{}, r.ipv6Refused
	}
	return r.plan.Listen6, ""
}

func ipv6Enabled() bool {
	b, err := os.ReadFile("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
	return err == nil && strings.TrimSpace(string(b)) == "0" && netobj.HaveIPv6()
}

// remember takes over why the last Install redirects no IPv6: only another Install tries again.
func (r *router) remember(s State) {
	r.cloud, r.ipv6Refused, r.dnsRefused = s.CloudServer, s.IPv6, s.DNSRefused
	if s.IPv6 == noIPv6Here { // that is seen anew
		r.ipv6Refused = ""
	}
}

// putIPv6Optional is put, without IPv6 if that is what fails.
func (r *router) putIPv6Optional(ctx context.Context, n *node) error {
	err := r.put(ctx, n)
	if err == nil || !n.listen6.IsValid() {
		return err
	}
	with := *n
	n.refuseIPv6(err)
	if _, again := n.survey(ctx, n.nodeFacts); again != nil || r.put(ctx, n) != nil {
		n.nodeFacts = with.nodeFacts // it was not IPv6
		return err
	}
	r.ipv6Refused = n.whyNot6
	r.plan.Log.WithError(err).Warn("routing: requests by IPv6 cannot be redirected on this node: IPv4 alone is served")
	return nil
}

func (n *node) refuseIPv6(err error) {
	n.listen6 = netip.AddrPort{}
	n.whyNot6, _, _ = strings.Cut(err.Error(), "\n")
}

// refuseForeignIPv6Listener sees to it that nobody else gets what is redirected.
func (r *router) refuseForeignIPv6Listener(n *node, have netobj.Snapshot) {
	if !n.listen6.IsValid() || !isLocal(n.listen6.Addr(), have) {
		return // nobody, or somebody elsewhere
	}
	if err := foreignListener(n.listen6); err != nil {
		n.refuseIPv6(err)
		r.ipv6Refused = n.whyNot6
		r.plan.Log.WithError(err).Warn("routing: requests by IPv6 are not redirected")
	}
}

// reachesIPv6 says whether the node has an IPv6 address that reaches beyond a link and itself.
func reachesIPv6() bool {
	b, _ := os.ReadFile("/proc/thread-self/net/if_inet6")
	for line := range strings.Lines(string(b)) {
		// fd005100…10 02 40 00 80 eth0: address, interface, prefix, scope, flags, name
		if f := strings.Fields(line); len(f) == 6 && f[3] == "00" && f[5] != "lo" {
			return true
		}
	}
	return false
}

func checkListen6(p Plan) error {
	const remedy = "; the usual choice is [fd20:ce::252]:988"
	l, a := p.Listen6, p.Listen6.Addr()
	switch {
	case l == netip.AddrPort{}:
	case !p.dnats():
		return fmt.Errorf(
			"listen6 %s: mode %s serves IPv4 alone: remove it, or use mode %s or %s",
			l,
			p.Mode,
			ModeIPTables,
			ModeNFTables,
		)
	case !l.IsValid() || l.Port() == 0 || !a.Is6() || a.Is4In6() || a.Zone() != "":
		return fmt.Errorf("listen6 %s: an IPv6 address and a port are needed%s", l, remedy)
	case !a.IsGlobalUnicast():
		return fmt.Errorf(
			"listen6 %s: packets can be redirected to a unicast address that reaches beyond a link only%s",
			l,
			remedy,
		)
	case a == metadataServer6.Addr() || slices.ContainsFunc(p.Guard, func(g netip.AddrPort) bool { return g.Addr() == a }):
		return fmt.Errorf("listen6 %s: packets cannot be redirected to a metadata server%s", l, remedy)
	}
	return nil
}
