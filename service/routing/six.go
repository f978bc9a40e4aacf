package routing

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The metadata server's IPv6 address (H-24): in modes iptables and nftables, where Plan.Listen6 is set, what pods send to
// [fd20:ce::254]:80 is redirected by the same rules as IPv4's in the other family. It is an offer beside IPv4 and never a reason for
// IPv4 to be without rules: a node that cannot redirect IPv6 says why, in the log once and in State.IPv6.
//
// There is no route to fd20:ce::254 like IPv4's of R-07: pods on the host network of a node that has no IPv6 route there are refused
// by connect() at once, and ask by IPv4.

// metadataServer6 is where clients that prefer IPv6 send their requests.
var metadataServer6 = netip.AddrPortFrom(netip.MustParseAddr("fd20:ce::254"), 80)

// network6 is Google's for metadata servers: an address in it needs no network, so it is ours to make this node's.
var network6 = netip.MustParsePrefix("fd20:ce::/64")

const noIPv6Here = "IPv6 is not there or disabled on lo"

// redirectTarget is what is redirected in one family, and where to; without a valid listen nothing is.
type redirectTarget struct{ server, listen netip.AddrPort }

func (p Plan) target(s nodeFacts, family Family) redirectTarget {
	if family == ipv6 {
		return redirectTarget{metadataServer6, s.listen6}
	}
	return redirectTarget{metadataServer, p.Listen}
}

// sixAround says where IPv6 requests go on this node, or why nowhere.
func (r *router) sixAround() (listen6 netip.AddrPort, why string) {
	switch {
	case r.plan.Closed || !r.plan.Listen6.IsValid():
		return netip.AddrPort{}, ""
	case !sixEnabled():
		return netip.AddrPort{}, noIPv6Here
	case r.sixRefused != "":
		return netip.AddrPort{}, r.sixRefused
	}
	return r.plan.Listen6, ""
}

func sixEnabled() bool {
	b, err := os.ReadFile("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
	return err == nil && strings.TrimSpace(string(b)) == "0" && haveIPv6()
}

// remember takes over why the last Install redirects no IPv6: only another Install tries again.
func (r *router) remember(s State) {
	r.cloud, r.sixRefused = s.CloudServer, s.IPv6
	if s.IPv6 == noIPv6Here { // that is seen anew
		r.sixRefused = ""
	}
}

// putSix is put, without IPv6 if that is what fails.
func (r *router) putSix(ctx context.Context, n *node) error {
	err := r.put(ctx, n)
	if err == nil || !n.listen6.IsValid() {
		return err
	}
	with := *n
	n.refuseSix(err)
	if _, again := n.survey(ctx, n.nodeFacts); again != nil || r.put(ctx, n) != nil {
		n.nodeFacts = with.nodeFacts // it was not IPv6
		return err
	}
	r.sixRefused = n.whyNot6
	r.plan.Log.WithError(err).Warn("routing: requests by IPv6 cannot be redirected on this node: IPv4 alone is served")
	return nil
}

func (n *node) refuseSix(err error) {
	n.listen6 = netip.AddrPort{}
	n.whyNot6, _, _ = strings.Cut(err.Error(), "\n")
}

// surveySix sees to it that nobody else gets what is redirected.
func (r *router) surveySix(n *node) {
	if local, err := isLocal(n.listen6.Addr()); !n.listen6.IsValid() || err == nil && !local && !network6.Contains(n.listen6.Addr()) {
		return // nobody, or somebody elsewhere
	}
	if err := foreignListener(n.listen6); err != nil {
		n.refuseSix(err)
		r.sixRefused = n.whyNot6
		r.plan.Log.WithError(err).Warn("routing: requests by IPv6 are not redirected")
	}
}

// IPv6 addresses have no labels, and what marks them (IFA_PROTO) came with Linux 5.18. So it is a route that makes the listen address
// this node's own, which every kernel marks:
//
//	local fd20:ce::252 dev lo table local proto 252
//
// No source address is chosen from it either, as one might be from an address on lo of a node that has no other.
const listenProtocol = 252

func listenRoute(a netip.Addr) *netlink.Route {
	return &netlink.Route{Dst: hostNet(a), Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL, Protocol: listenProtocol}
}

// listenRouteText is the route as ip(8) adds it, without "ip -6 route add".
func listenRouteText(a netip.Addr) string {
	return fmt.Sprintf("local %s dev lo table local protocol %d", a, listenProtocol)
}

// standingListenRoutes are those of ours, for this or another address. A node without IPv6 has none.
func standingListenRoutes() ([]netlink.Route, error) {
	if !haveIPv6() {
		return nil, nil
	}
	of := &netlink.Route{Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL, Protocol: listenProtocol}
	routes, err := retryDump(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_V6, of, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE|netlink.RT_FILTER_PROTOCOL)
	})
	if err != nil && !noIPv6(err) {
		return nil, fmt.Errorf("list the IPv6 routes of table local: %w", err)
	}
	return slices.DeleteFunc(routes, func(r netlink.Route) bool { return r.Dst == nil || r.Dst.String() != hostNet6(r.Dst.IP).String() }), nil
}

func hostNet6(ip net.IP) *net.IPNet { return &net.IPNet{IP: ip, Mask: net.CIDRMask(128, 128)} }

// wantsListenRoute says whether the address is to be made this node's own. Any other that is not local lives elsewhere.
func wantsListenRoute(a netip.Addr) (bool, error) {
	if !network6.Contains(a) {
		return false, nil
	}
	local, err := isLocal(a)
	return !local, err
}

// installListenRoute makes the address this node's own where that is wanted.
func installListenRoute(a netip.Addr) error {
	wanted, err := wantsListenRoute(a)
	if err != nil || !wanted {
		return err
	}
	route := listenRoute(a)
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		route.LinkIndex = lo.Attrs().Index
		err = netlink.RouteAdd(route)
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("ip -6 route add %s: %w", listenRouteText(a), permission(err))
	}
	return nil
}

// removeListenRoutes takes away every route of ours but keep's, and ends what is open there first (see resetConnections).
func removeListenRoutes(keep netip.Addr) error {
	routes, err := standingListenRoutes()
	if err != nil {
		return err
	}
	routes = slices.DeleteFunc(routes, func(r netlink.Route) bool { return r.Dst.IP.Equal(keep.AsSlice()) })
	resetSix(routes)
	var errs []error
	for _, r := range routes {
		if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("ip -6 route del %s: %w", r.Dst, permission(err)))
		}
	}
	return errors.Join(errs...)
}

// resetAllSix ends what is open at addresses of ours.
func resetAllSix() {
	if routes, err := standingListenRoutes(); err == nil {
		resetSix(routes)
	}
}

func resetSix(going []netlink.Route) {
	if len(going) > 0 {
		resetAt(unix.AF_INET6, func(ip net.IP) bool {
			return slices.ContainsFunc(going, func(r netlink.Route) bool { return r.Dst.IP.Equal(ip) })
		})
	}
}

// checkListenRoute names the route that is missing, or should not be there.
func checkListenRoute(a netip.Addr) (errs []error) {
	wanted, err := wantsListenRoute(a)
	if err != nil {
		return []error{err}
	}
	if wanted {
		errs = append(errs, missing(layerRoute, "ip -6 route: %s", listenRouteText(a)))
	}
	standing, err := standingListenRoutes()
	if err != nil {
		return append(errs, err)
	}
	for _, r := range standing {
		if !r.Dst.IP.Equal(a.AsSlice()) {
			errs = append(errs, missing(layerRoute, "ip -6 route: %s should not be there any more", r.Dst))
		}
	}
	return errs
}

func checkListen6(p Plan) error {
	const remedy = "; the usual choice is [fd20:ce::252]:988"
	l, a := p.Listen6, p.Listen6.Addr()
	switch {
	case l == netip.AddrPort{}:
	case !p.dnats():
		return fmt.Errorf("listen6 %s: mode %s serves IPv4 alone: remove it, or use mode %s or %s", l, p.Mode, ModeIPTables, ModeNFTables)
	case !l.IsValid() || l.Port() == 0 || !a.Is6() || a.Is4In6() || a.Zone() != "":
		return fmt.Errorf("listen6 %s: an IPv6 address and a port are needed%s", l, remedy)
	case !a.IsGlobalUnicast():
		return fmt.Errorf("listen6 %s: packets can be redirected to a unicast address that reaches beyond a link only%s", l, remedy)
	case a == metadataServer6.Addr() || slices.ContainsFunc(p.Guard, func(g netip.AddrPort) bool { return g.Addr() == a }):
		return fmt.Errorf("listen6 %s: packets cannot be redirected to a metadata server%s", l, remedy)
	}
	return nil
}
