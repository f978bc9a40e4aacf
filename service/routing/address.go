package routing

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// addressLabel marks the address that Install puts on lo (ip address prints it in place of the interface), so that Remove takes
// away that one and no other.
const addressLabel = "lo:gme"

// addressText is the address as ip(8) adds it, without "ip address add". The kernel adds the local route by itself.
func addressText(a netip.Addr) string {
	return netip.PrefixFrom(a, 32).String() + " dev lo scope host label " + addressLabel
}

// localAddress is what stands of an address on this node.
type localAddress struct {
	local bool         // the node takes packets to it as its own, whoever made that so
	ours  []*net.IPNet // addresses on lo with our label, this or another
}

// wantsAddress says whether the address is ours to put on lo: one that needs no network, and that nothing else of the node has.
// Any other address that is not local lives elsewhere: in another namespace, a container or a machine of the node.
func (l localAddress) wants(a netip.Addr) bool {
	return a.Is4() && a.IsLinkLocalUnicast() && a != metadataServer.Addr() && !l.local
}

func readAddress(a netip.Addr) (l localAddress, err error) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return l, fmt.Errorf("find lo: %w", err)
	}
	addrs, err := retryDump(func() ([]netlink.Addr, error) { return netlink.AddrList(lo, netlink.FAMILY_V4) })
	if err != nil {
		return l, fmt.Errorf("list the addresses of lo: %w", err)
	}
	for _, o := range addrs {
		if o.Label == addressLabel {
			l.ours = append(l.ours, o.IPNet)
		}
	}
	if a.IsValid() {
		l.local, err = isLocal(a)
	}
	return l, err
}

// isLocal asks the kernel's routing, which knows addresses and local routes (ip route add local …) alike.
func isLocal(a netip.Addr) (bool, error) {
	routes, err := netlink.RouteGet(a.AsSlice())
	switch {
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.EACCES), errors.Is(err, unix.EINVAL):
		return false, nil // no route, or one that refuses
	case err != nil:
		return false, fmt.Errorf("ip route get %s: %w", a, err)
	}
	return len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL, nil
}

// installAddress puts the Plan's listen address on lo where it is wanted, or in mode loopback makes the metadata server's our own. What an
// earlier Plan wanted goes when nothing leads there any more (see removeEarlier).
func installAddress(p Plan) error {
	if p.traits().localServer {
		err := installLocalRoute()
		if err == nil && p.Link != "" {
			err = installLink(p.Link)
		}
		return err
	}
	a := p.Listen.Addr()
	l, err := readAddress(a)
	if err != nil || !l.wants(a) {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.AddrAdd(lo, &netlink.Addr{IPNet: hostNet(a), Scope: int(netlink.SCOPE_HOST), Label: addressLabel})
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("ip address add %s: %w", addressText(a), permission(err))
	}
	return nil
}

// removeEarlier takes away the ways to the emulator that an earlier Plan wanted, last of all that Install does. As long as rules, or conntrack by
// rules of before, lead to an address, it has to be this node's: else the packets are forwarded, and a connect() fails by what a
// router says of them.
func removeEarlier(p Plan, s nodeFacts) error {
	keep := p.Listen.Addr()
	var errs []error
	if p.traits().localServer {
		keep = netip.Addr{}
		errs = append(errs, removeLinks(p.Link))
	} else {
		errs = append(errs, trimGuard(p, s), removeLocal())
	}
	resetConnections(keep)
	return errors.Join(append(errs, removeAddress(keep), removeListenRoutes(s.listen6.Addr()))...)
}

// resetConnections ends what is open at the addresses of ours that are about to go, all but keep. Without its address the
// kernel sends nothing for a socket, not even that it was closed: a client whose request was taken in, and be it by the
// backlog alone, would wait for the answer until its own keepalive finds out. It is done as well as can be: a kernel without
// CONFIG_INET_DIAG_DESTROY leaves clients to that.
func resetConnections(keep netip.Addr) {
	l, err := readAddress(netip.Addr{})
	if err != nil {
		return
	}
	going := slices.DeleteFunc(l.ours, func(n *net.IPNet) bool { return n.IP.Equal(keep.AsSlice()) })
	if len(going) > 0 {
		resetAt(unix.AF_INET, func(ip net.IP) bool {
			return slices.ContainsFunc(going, func(n *net.IPNet) bool { return n.IP.Equal(ip) })
		})
	}
}

// resetAt ends what this node has open at addresses of its own.
func resetAt(family uint8, goes func(net.IP) bool) {
	sockets, err := netlink.SocketDiagTCP(family)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return
	}
	for _, s := range sockets {
		if goes(s.ID.Source) && s.State != netlink.TCP_LISTEN && s.State != netlink.TCP_TIME_WAIT {
			_ = resetSocket(family, s.ID)
		}
	}
}

// resetSocket ends the very socket that was listed. Without its cookie, which netlink v1.3.1's SocketDestroy does not send, the kernel
// looks for whoever takes packets of such a connection: where that was closed meanwhile it is the listener, and the service with it.
func resetSocket(family uint8, id netlink.SocketID) error {
	b := make([]byte, 56) // struct inet_diag_req_v2
	b[0], b[1] = family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(b[4:], 1<<32-1) // whatever its state
	binary.BigEndian.PutUint16(b[8:], id.SourcePort)
	binary.BigEndian.PutUint16(b[10:], id.DestinationPort)
	source, destination := id.Source, id.Destination
	if family == unix.AF_INET {
		source, destination = source.To4(), destination.To4()
	}
	copy(b[12:28], source)
	copy(b[28:44], destination)
	binary.NativeEndian.PutUint32(b[44:], id.Interface)
	binary.NativeEndian.PutUint32(b[48:], id.Cookie[0])
	binary.NativeEndian.PutUint32(b[52:], id.Cookie[1])
	req := nl.NewNetlinkRequest(nl.SOCK_DESTROY, unix.NLM_F_ACK)
	req.AddRawData(b)
	_, err := req.Execute(unix.NETLINK_INET_DIAG, 0)
	return err
}

// removeAddress takes away every address with our label but keep; none is kept when keep is the zero Addr.
func removeAddress(keep netip.Addr) error {
	l, err := readAddress(netip.Addr{})
	if err != nil || len(l.ours) == 0 {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	var errs []error
	for _, n := range l.ours {
		if ip, ok := netip.AddrFromSlice(n.IP); ok && ip.Unmap() == keep {
			continue
		}
		if err := netlink.AddrDel(lo, &netlink.Addr{IPNet: n, Label: addressLabel}); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			errs = append(errs, fmt.Errorf("ip address del %s dev lo: %w", n, permission(err)))
		}
	}
	return errors.Join(errs...)
}

func checkAddress(p Plan) []error {
	if p.traits().localServer {
		errs := checkLocalRoute()
		if p.Link != "" {
			errs = append(errs, checkLink(p.Link)...)
		}
		return errs
	}
	l, err := readAddress(p.Listen.Addr())
	switch {
	case err != nil:
		return []error{err}
	case l.wants(p.Listen.Addr()):
		return []error{missing(layerAddress, "ip address: %s", addressText(p.Listen.Addr()))}
	}
	return nil
}

// The route of a node without one to the metadata server: connect() would fail before nat OUTPUT sees a packet. Only what
// this host sends needs it, so it is there only where pods on the host network are redirected, and only as long as table main has no
// other route: it would take the real server away from the node's daemons. The source is given, since a node without any IPv4
// address of its own has none to choose; an emulator elsewhere answers to the node's own address.
func metadataRoute(listen netip.Addr, listenIsLocal bool) *netlink.Route {
	r := &netlink.Route{Dst: hostNet(metadataServer.Addr()), Scope: netlink.SCOPE_LINK, Table: unix.RT_TABLE_MAIN, Protocol: unix.RTPROT_KERNEL}
	if listenIsLocal {
		r.Src = listen.AsSlice()
	}
	return r
}

// wantsRoute says whether there is to be such a route. Programs see connect() before it asks for a route.
func wantsRoute(p Plan, s nodeFacts) bool { return s.hostPods && p.dnats() }

// routeText is the route as ip(8) adds it, without "ip route add".
func routeText(r *netlink.Route) string {
	text := r.Dst.String() + " dev lo scope link protocol kernel"
	if r.Src != nil {
		text += " src " + r.Src.String()
	}
	return text
}

// readRoute returns our route, nil if there is none, and whether table main has another one for the metadata server.
func readRoute() (ours *netlink.Route, other bool, err error) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, false, fmt.Errorf("find lo: %w", err)
	}
	routes, err := retryDump(func() ([]netlink.Route, error) { return netlink.RouteList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, false, fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		switch {
		case r.LinkIndex == lo.Attrs().Index && r.Protocol == unix.RTPROT_KERNEL && r.Scope == netlink.SCOPE_LINK &&
			r.Dst != nil && r.Dst.String() == hostNet(metadataServer.Addr()).String():
			ours = &r
		case r.Type == unix.RTN_UNICAST && (r.Dst == nil || r.Dst.Contains(metadataServer.Addr().AsSlice())):
			other = true
		}
	}
	return ours, other, nil
}

// installRoute adds our route, or takes it away where it is not wanted.
func installRoute(p Plan, s nodeFacts) error {
	ours, other, err := readRoute()
	if err != nil {
		return err
	}
	if !wantsRoute(p, s) || other {
		return deleteRoute(ours)
	}
	local, err := isLocal(p.Listen.Addr())
	if err != nil {
		return err
	}
	want := metadataRoute(p.Listen.Addr(), local)
	if ours != nil && ours.Src.Equal(want.Src) {
		return nil
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		want.LinkIndex = lo.Attrs().Index
		err = netlink.RouteReplace(want)
	}
	if err != nil {
		return fmt.Errorf("ip route add %s: %w", routeText(want), permission(err))
	}
	return nil
}

func removeRoute() error {
	ours, _, err := readRoute()
	if err != nil {
		return err
	}
	return deleteRoute(ours)
}

func deleteRoute(r *netlink.Route) error {
	if r == nil {
		return nil
	}
	if err := netlink.RouteDel(r); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("ip route del %s: %w", routeText(r), permission(err))
	}
	return nil
}

// checkRoute looks at both routes: this one, and the one that makes IPv6's listen address this node's own.
func checkRoute(p Plan, s nodeFacts) []error {
	errs := checkListenRoute(s.listen6.Addr())
	ours, other, err := readRoute()
	switch {
	case err != nil:
		return append(errs, err)
	case wantsRoute(p, s) && !other && ours == nil:
		local, err := isLocal(p.Listen.Addr())
		if err != nil {
			return append(errs, err)
		}
		errs = append(errs, missing(layerRoute, "ip route: %s", routeText(metadataRoute(p.Listen.Addr(), local))))
	case ours != nil && (other || !wantsRoute(p, s)):
		errs = append(errs, missing(layerRoute, "ip route: %s should not be there any more", routeText(ours)))
	}
	return errs
}

func hostNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// reachesSix says whether the node has an IPv6 address that reaches beyond a link and itself.
func reachesSix() bool {
	b, _ := os.ReadFile("/proc/thread-self/net/if_inet6")
	for line := range strings.Lines(string(b)) {
		// fd005100…10 02 40 00 80 eth0: address, interface, prefix, scope, flags, name
		if f := strings.Fields(line); len(f) == 6 && f[3] == "00" && f[5] != "lo" {
			return true
		}
	}
	return false
}

func haveIPv6() bool {
	_, err := os.Stat("/proc/thread-self/net/if_inet6")
	return err == nil
}
