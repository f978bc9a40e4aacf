package netobj

import (
	"fmt"
	"net/netip"
	"strconv"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Route is a route, as far as it can be one through lo: gateways and metrics are not read.
type Route struct {
	Dst      netip.Prefix
	Type     uint8 // unix.RTN_UNICAST and so on
	Loopback bool  // through lo
	Table    int
	Scope    uint8
	Protocol uint8
	Src      netip.Addr // invalid: none is given
}

// The words of ip(8) for types of routes, of which unicast goes without saying, and for who made
// them.
var (
	routeTypes = map[uint8]string{unix.RTN_LOCAL: "local ", unix.RTN_BROADCAST: "broadcast ",
		unix.RTN_ANYCAST: "anycast ", unix.RTN_MULTICAST: "multicast ", unix.RTN_BLACKHOLE: "blackhole ",
		unix.RTN_UNREACHABLE: "unreachable ",
		unix.RTN_PROHIBIT:    "prohibit ", unix.RTN_THROW: "throw "}
	protocolNames = map[uint8]string{unix.RTPROT_KERNEL: "kernel", unix.RTPROT_BOOT: "boot",
		unix.RTPROT_STATIC: "static"}
)

// Command implements Object.
func (r Route) Command() string { return command("route", familyOf(r.Dst.Addr())) }

func (r Route) String() string {
	text := r.Dst.String()
	switch {
	case r.Dst.Bits() == 0:
		text = "default"
	case r.Type != unix.RTN_UNICAST && r.Dst.IsSingleIP():
		text = r.Dst.Addr().String()
	}
	text = routeTypes[r.Type] + text
	if r.Loopback {
		text += " dev lo"
	}
	if r.Table != unix.RT_TABLE_MAIN {
		text += " table " + tableName(r.Table)
	}
	if r.Scope == unix.RT_SCOPE_LINK {
		text += " scope link"
	}
	if name := protocolNames[r.Protocol]; name != "" {
		text += " protocol " + name
	} else {
		text += fmt.Sprintf(" protocol %d", r.Protocol)
	}
	if r.Src.IsValid() {
		text += " src " + r.Src.String()
	}
	return text
}

// tableName is the table in the words of ip(8).
func tableName(table int) string {
	switch table {
	case unix.RT_TABLE_MAIN:
		return "main"
	case unix.RT_TABLE_LOCAL:
		return "local"
	}
	return strconv.Itoa(table)
}

func (r Route) netlink() *netlink.Route {
	return &netlink.Route{LinkIndex: loopbackIndex, Dst: IPNet(r.Dst), Type: int(r.Type), Table: r.Table,
		Src: r.Src.AsSlice(), Scope: netlink.Scope(r.Scope), Protocol: netlink.RouteProtocol(r.Protocol)}
}

// add replaces a route to the same destination, which may have another source.
func (r Route) add() error { return netlink.RouteReplace(r.netlink()) }

func (r Route) del() error { return netlink.RouteDel(r.netlink()) }

func readRoutes(family uint8) (all []Object, err error) {
	routes, err := Dump(func() ([]netlink.Route, error) {
		all := &netlink.Route{Table: unix.RT_TABLE_UNSPEC}
		return netlink.RouteListFiltered(int(family), all, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		src, _ := netip.AddrFromSlice(r.Src)
		all = append(all, Route{Dst: prefixOf(r.Dst, family), Type: uint8(r.Type),
			Loopback: r.LinkIndex == loopbackIndex, Table: r.Table, Scope: uint8(r.Scope), Protocol: uint8(r.Protocol),
			Src: src})
	}
	return all, nil
}
