package routing

import (
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Mode loopback, for networks whose data path bypasses netfilter's DNAT: the metadata server's address is made this node's own for
// whom the policy rules of the guard send to a table of ours, which are pods and neither this host nor other hosts. There is no DNAT, and so
// no address on lo that would take the real server away from the node's daemons. The emulator listens at 169.254.169.254:80 itself, by a
// socket that is transparent: only such a one may answer from an address that is not the host's.

func localRoute() (*netlink.Route, error) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, fmt.Errorf("find lo: %w", err)
	}
	return &netlink.Route{LinkIndex: lo.Attrs().Index, Dst: hostNet(metadataServer.Addr()), Table: ourTable, Type: unix.RTN_LOCAL,
		Scope: netlink.SCOPE_HOST, Protocol: unix.RTPROT_KERNEL}, nil
}

// localRouteText is the route as ip(8) adds it, without "ip route add".
func localRouteText() string {
	return fmt.Sprintf("local %s dev lo table %d protocol kernel", metadataServer.Addr(), ourTable)
}

// standingLocalRoute returns the route, nil if it is not there.
func standingLocalRoute() (*netlink.Route, error) {
	routes, err := retryDump(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: ourTable}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("list the routes of table %d: %w", ourTable, err)
	}
	for _, r := range routes {
		if r.Type == unix.RTN_LOCAL && r.Protocol == unix.RTPROT_KERNEL && r.Dst != nil && r.Dst.String() == hostNet(metadataServer.Addr()).String() {
			return &r, nil
		}
	}
	return nil, nil
}

func installLocalRoute() error {
	have, err := standingLocalRoute()
	if err != nil || have != nil {
		return err
	}
	want, err := localRoute()
	if err == nil {
		err = netlink.RouteAdd(want)
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("ip route add %s: %w", localRouteText(), permission(err))
	}
	return nil
}

// removeLocal takes away what makes the metadata server's address this node's own.
func removeLocal() error {
	if err := removeLinks(""); err != nil {
		return err
	}
	have, err := standingLocalRoute()
	if err != nil || have == nil {
		return err
	}
	// What pods have open here no packet of theirs comes to any more, now that the policy rules are gone.
	resetAt(unix.AF_INET, net.IP(metadataServer.Addr().AsSlice()).Equal)
	if err := netlink.RouteDel(have); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("ip route del %s: %w", localRouteText(), permission(err))
	}
	return nil
}

func checkLocalRoute() []error {
	have, err := standingLocalRoute()
	switch {
	case err != nil:
		return []error{err}
	case have == nil:
		return []error{missing(layerRoute, "ip route: %s", localRouteText())}
	}
	return nil
}

// realServer returns an error if a metadata server of the cloud answers this host. If somebody flushes the policy rules pods talk to it again,
// which mode loopback has no second guard for; and with a link the node's own daemons would lose it.
func (r *router) realServer() error {
	if r.ask() != cloudAnswers {
		return nil
	}
	return fmt.Errorf("%s %w: a metadata server answers this host there, and in mode %s policy rules alone keep pods from it; use another mode, or set routing.force to true",
		metadataServer, ErrForeign, ModeLoopback)
}
