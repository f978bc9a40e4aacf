package routing

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
)

// nodeFacts are what the rules need to know of the node they stand on.
type nodeFacts struct {
	uplinks  []string // interfaces behind which there are other hosts
	slices   []string // cgroups of the host itself that exist
	hostPods bool     // pods on the host network are redirected, which is whoever is outside slices
	hostWhy  string   // or are not: why, for people
	// it has an IPv6 address that reaches beyond a link: else there is no route to anything that is
	// guarded
	reachesIPv6 bool
	listen6     netip.AddrPort // where what pods send by IPv6 is redirected to; invalid: nowhere
	whyNot6     string         // though the Plan wants it

	dns       bool   // DNS queries for the metadata server's name are redirected
	whyNotDNS string // though the Plan wants it
}

// device is a network interface as far as it matters for the difference between uplinks and pods'
// interfaces.
type device struct {
	name         string
	index        int
	master       int    // the index of the bridge or bond that it is a port of
	kind         string // what netlink.Link.Type says; "" is hardware
	defaultRoute bool
	nodeAddress  bool // holds the address that the node uses towards its default route
}

// Kinds behind which there are other hosts, never a pod of this node. Tunnels count: an overlay can
// be spoken to from the LAN; and so does tun, which a VPN has. What a macvlan or ipvlan of the
// node's is spoken to by is the LAN of the link below it.
var (
	hardwareKinds = []string{"", "bond", "team", "vlan", "ipoib", "macvlan", "ipvlan", "macsec"}
	tunnelKinds   = []string{
		"vxlan",
		"geneve",
		"gre",
		"gretap",
		"erspan",
		"ipip",
		"sit",
		"ip6tnl",
		"ip6gre",
		"ip6gretap",
		"wireguard",
		"vti",
		"vti6",
		"xfrm",
		tunKind,
	}
	podKinds = []string{"veth", "tuntap", "netkit"}
)

// tunKind is that of links which carry packets and no frames; the library calls them tuntap, as
// those of machines.
const tunKind = "tun"

// uplinks picks from the devices those of R-05, sorted, and says what an operator should look at.
func uplinks(devices []device) (names, remarks []string) {
	for _, d := range devices {
		switch {
		case d.name == "lo":
			continue
		case !interfaceName.MatchString(d.name) || strings.HasSuffix(d.name, "+"):
			// The kernel allows any name; iptables would read this one as a pattern, or not at all.
			remarks = append(
				remarks,
				fmt.Sprintf("interface %q has a name that no rule can say: if it is an uplink, rename it", d.name),
			)
			continue
		case d.kind == "bridge":
			hardware, pods := ports(d, devices)
			switch {
			case len(hardware) > 0 && len(pods) > 0:
				remarks = append(
					remarks,
					fmt.Sprintf(
						"bridge %s has the physical port %s and pods or machines at %s: requests that come over it are redirected, "+
							"from the LAN too; "+
							"name it in routing.uplinks if no pod is served by it",
						d.name,
						strings.Join(hardware, ", "),
						strings.Join(pods, ", "),
					),
				)
				continue
			case len(hardware) == 0 && !d.defaultRoute && !d.nodeAddress:
				continue
			}
		case d.defaultRoute, d.nodeAddress, slices.Contains(hardwareKinds, d.kind), slices.Contains(tunnelKinds, d.kind):
		default:
			continue
		}
		names = append(names, d.name)
	}
	slices.Sort(names)
	return names, remarks
}

func ports(bridge device, devices []device) (hardware, pods []string) {
	for _, d := range devices {
		switch {
		case d.master != bridge.index:
		case slices.Contains(hardwareKinds, d.kind):
			hardware = append(hardware, d.name)
		case slices.Contains(podKinds, d.kind):
			pods = append(pods, d.name)
		}
	}
	return hardware, pods
}

// readDevices lists the interfaces of this network namespace.
func readDevices() ([]device, error) {
	links, err := netobj.Dump(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list network interfaces: %w", err)
	}
	routes, err := netobj.Dump(func() ([]netlink.Route, error) {
		// Every table: with policy routing an uplink may have its default route in another one than main.
		return netlink.RouteListFiltered(
			netlink.FAMILY_ALL,
			&netlink.Route{Table: unix.RT_TABLE_UNSPEC, Type: unix.RTN_UNICAST},
			netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE,
		)
	})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	addrs, err := netobj.Dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	defaults, advertised, sources := map[int]bool{}, map[int]bool{}, map[netip.Addr]bool{}
	for _, r := range routes {
		if r.Dst != nil {
			if ones, _ := r.Dst.Mask.Size(); ones != 0 {
				continue
			}
		}
		found := defaults
		if r.Protocol == unix.RTPROT_RA {
			found = advertised
		}
		found[r.LinkIndex] = true
		for _, hop := range r.MultiPath {
			found[hop.LinkIndex] = true
		}
		if a, ok := netip.AddrFromSlice(r.Src); ok {
			sources[a.Unmap()] = true
		}
	}
	// A pod with CAP_NET_RAW can send router advertisements, and would make an uplink of the pods'
	// bridge. So the routes of advertisements count where the node has no other default route.
	if len(defaults) == 0 {
		defaults = advertised
	}
	holders := map[int]bool{}
	for _, a := range addrs {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && sources[ip.Unmap()] {
			holders[a.LinkIndex] = true
		}
	}
	var devices []device
	for _, l := range links {
		kind := l.Type()
		if kind == "device" { // the library's name for a link without a kind
			kind = ""
		}
		if t, ok := l.(*netlink.Tuntap); ok && t.Mode == netlink.TUNTAP_MODE_TUN {
			kind = tunKind
		}
		at := l.Attrs()
		devices = append(devices, device{name: at.Name, index: at.Index, master: at.MasterIndex, kind: kind,
			defaultRoute: defaults[at.Index], nodeAddress: holders[at.Index]})
	}
	return devices, nil
}
