package netnstest

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Addresses are the same on every node: each lives in namespaces of its own.
//
//	pod 10.244.0.2 … ─ cni0 10.244.0.1 ┐                               ┌ cloud 198.51.100.1, and on lo 169.254.169.254 and those of IPv6
//	                   cni0 fd00:244::1 ├ node eth0 198.51.100.10 ─ lan0 ┤
//	routed pod 10.245.0.3 … ─ veth      ┘           fd00:51::10         └ neighbour 198.51.100.20 …
var (
	// Metadata is the real metadata server's address; the cloud namespace has it.
	Metadata = netip.MustParseAddr("169.254.169.254")
	// MetadataIPv6 is AWS's metadata server over IPv6; the cloud namespace has it too.
	MetadataIPv6 = netip.MustParseAddr("fd00:ec2::254")
	// OracleIPv6 is Oracle's over IPv6, which the cloud namespace has as well.
	OracleIPv6 = netip.MustParseAddr("fd00:c1::a9fe:a9fe")
	// GoogleIPv6 is Google's over IPv6 (H-24), which the cloud namespace has as well.
	GoogleIPv6 = netip.MustParseAddr("fd20:ce::254")

	cloudAddr, cloudAddr6   = netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("fd00:51::1")
	nodeAddr, nodeAddr6     = netip.MustParseAddr("198.51.100.10"), netip.MustParseAddr("fd00:51::10")
	bridgeAddr, bridgeAddr6 = netip.MustParseAddr("10.244.0.1"), netip.MustParseAddr("fd00:244::1")
	// of pods on the bridge
	podNet, podNet6       = netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/64")
	routedNet, routedNet6 = netip.MustParsePrefix(
		"10.245.0.0/16",
	), netip.MustParsePrefix(
		"fd00:245::/64",
	) // on veths of their own
	routedGateway = netip.MustParseAddr("169.254.1.1") // as Calico's
)

// Node is a node's namespace with what surrounds it. Its own NS is the node's: Do, Dial, Listen and
// Command act as a process of the node would. The uplink is eth0, the pods' bridge cni0.
type Node struct {
	*NS
	Cloud *NS // behind the uplink, the node's default gateway; Addr is its LAN address

	uplink string // the node's, to the LAN
	metric int    // of the default route there

	mu         sync.Mutex
	prefix     string
	pods       int
	neighbours int
	all        []*NS
}

// New makes a node with its uplink and its cloud. name ends up in the names of the namespaces.
func New(name string) (*Node, error) { return (&Node{uplink: "eth0"}).init(name, newNS) }

// NewHere makes the node out of the network namespace of this process, for a machine that was
// booted to be one. It refuses a namespace that is connected to anything, but for the link beside,
// if that is not "": a machine that is given orders over it keeps it, and its default route comes
// first. Then the node's uplink is called uplink0.
func NewHere(name, beside string) (*Node, error) {
	n := &Node{uplink: "eth0"}
	if beside != "" {
		n.uplink, n.metric = "uplink0", 10000
	}
	return n.init(name, func(name string) (*NS, error) { return thisNS(name, beside) })
}

func (n *Node) init(name string, node func(name string) (*NS, error)) (*Node, error) {
	n.prefix = fmt.Sprintf("gme-%d-%d-%s", os.Getpid(), sequence.Add(1), name)
	if err := n.make(node); err != nil {
		return nil, errors.Join(fmt.Errorf("make node %s: %w", name, err), n.Close())
	}
	return n, nil
}

func (n *Node) make(node func(name string) (*NS, error)) (err error) {
	if n.NS, err = node(n.prefix); err != nil {
		return err
	}
	n.all = append(n.all, n.NS)
	n.NS.Addr, n.NS.Addr6 = nodeAddr, nodeAddr6
	if n.Cloud, err = n.namespace("-cloud"); err != nil {
		return err
	}
	n.Cloud.Addr, n.Cloud.Addr6 = cloudAddr, cloudAddr6
	if err := n.Cloud.Do(func() error {
		return run(
			bridge("lan0"),
			address("lan0", netip.PrefixFrom(cloudAddr, 24)), address("lan0", netip.PrefixFrom(cloudAddr6, 64)),
			address("lan0", linkLocal(cloudAddr6)),
			address("lo", netip.PrefixFrom(Metadata, 32)), address("lo", netip.PrefixFrom(MetadataIPv6, 128)),
			address("lo", netip.PrefixFrom(GoogleIPv6, 128)),
			address("lo", netip.PrefixFrom(OracleIPv6, 128)),
			sysctl("ipv4/ip_forward", "1"), sysctl("ipv6/conf/all/forwarding", "1"),
		)
	}); err != nil {
		return err
	}
	if err := n.plug(n.NS, "node", n.uplink); err != nil {
		return err
	}
	if err := n.NS.Do(func() error {
		return run(
			bridge("cni0"),
			address("cni0", netip.PrefixFrom(bridgeAddr, 16)), address("cni0", netip.PrefixFrom(bridgeAddr6, 64)),
			address("cni0", linkLocal(bridgeAddr6)),
			n.defaultRoute(netip.MustParsePrefix("0.0.0.0/0"), Metadata, cloudAddr),
			n.defaultRoute(netip.MustParsePrefix("::/0"), MetadataIPv6, cloudAddr6),
			sysctl("ipv4/ip_forward", "1"), sysctl("ipv6/conf/all/forwarding", "1"),
		)
	}); err != nil {
		return err
	}
	// The cloud knows the way back to the pods, so that nothing needs masquerading and the node's
	// ruleset starts empty.
	return n.Cloud.Do(func() error {
		return run(route(podNet, nodeAddr, "lan0"), route(routedNet, nodeAddr, "lan0"),
			route(podNet6, nodeAddr6, "lan0"), route(routedNet6, nodeAddr6, "lan0"))
	})
}

// namespace makes one more namespace that Close removes.
func (n *Node) namespace(suffix string) (*NS, error) {
	ns, err := newNS(n.prefix + suffix)
	if err != nil {
		return nil, err
	}
	n.all = append(n.all, ns)
	return ns, nil
}

// plug connects ns to the LAN by its link.
func (n *Node) plug(ns *NS, port, link string) error {
	if err := n.Cloud.veth(port, ns, link, "lan0"); err != nil {
		return err
	}
	return ns.Do(func() error {
		return run(
			address(link, netip.PrefixFrom(ns.Addr, 24)),
			address(link, netip.PrefixFrom(ns.Addr6, 64)),
			address(link, linkLocal(ns.Addr6)),
		)
	})
}

// defaultRoute is the node's; where another comes first, the cloud is still where metadata is.
func (n *Node) defaultRoute(all netip.Prefix, metadata, via netip.Addr) func() error {
	return func() error {
		if n.metric == 0 {
			return route(all, via, n.uplink)()
		}
		return run(routeAt(n.metric, all, via, n.uplink), route(netip.PrefixFrom(metadata, metadata.BitLen()), via, n.uplink))
	}
}

// ForgetConnections deletes all of conntrack's entries, as conntrack -F does.
func (ns *NS) ForgetConnections() error {
	return ns.Do(func() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) })
}

// AddPod attaches a pod to the bridge cni0.
func (n *Node) AddPod(name string) (*NS, error) { return n.addPod(name, "cni0", nil) }

// AddPodAs attaches a pod to the bridge that gets the addresses of another one, which was
// unplugged: the node goes on knowing them by the same hardware address.
func (n *Node) AddPodAs(name string, before *NS) (*NS, error) { return n.addPod(name, "cni0", before) }

// Unplug takes a pod's link away, as a CNI does before it gives the address to another: processes
// that are left in the namespace have no address any more.
func (ns *NS) Unplug() error {
	return ns.Do(func() error {
		l, err := netlink.LinkByName("eth0")
		if err == nil {
			err = netlink.LinkDel(l)
		}
		if err != nil {
			return fmt.Errorf("ip link delete eth0 in %s: %w", ns.Name, err)
		}
		return nil
	})
}

// AddRoutedPod attaches a pod as Calico and the cloud CNIs do: a veth whose node side has no IPv4
// address, a /32 route to the pod and proxy ARP for its gateway (K-08).
func (n *Node) AddRoutedPod(name string) (*NS, error) { return n.addPod(name, "", nil) }

func (n *Node) addPod(name, master string, before *NS) (_ *NS, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	pod, err := n.namespace("-" + name)
	if err != nil {
		return nil, fmt.Errorf("add pod %s: %w", name, err)
	}
	n.pods++
	i := n.pods + 1 // the bridge is 1
	pod.Addr = netip.AddrFrom4([4]byte{10, 244, byte(i >> 8), byte(i)})
	addr6 := podNet6.Addr().As16()
	if master == "" {
		pod.Addr = netip.AddrFrom4([4]byte{10, 245, byte(i >> 8), byte(i)})
		addr6 = routedNet6.Addr().As16()
	}
	addr6[14], addr6[15] = byte(i>>8), byte(i)
	pod.Addr6 = netip.AddrFrom16(addr6)
	if before != nil {
		pod.Addr, pod.Addr6 = before.Addr, before.Addr6
	}
	host := fmt.Sprintf("veth%d", n.pods)
	if err := n.NS.veth(host, pod, "eth0", master); err != nil {
		return nil, fmt.Errorf("add pod %s: %w", name, err)
	}
	if master != "" {
		err = pod.Do(func() error {
			return run(
				hardware("eth0", pod.Addr),
				address(
					"eth0",
					netip.PrefixFrom(pod.Addr, 16),
				),
				address("eth0", netip.PrefixFrom(pod.Addr6, 64)),
				address("eth0", linkLocal(pod.Addr6)),
				route(
					netip.MustParsePrefix("0.0.0.0/0"),
					bridgeAddr,
					"eth0",
				),
				route(netip.MustParsePrefix("::/0"), bridgeAddr6, "eth0"),
			)
		})
	} else {
		err = errors.Join(
			n.NS.Do(func() error {
				return run(sysctl("ipv4/conf/"+host+"/proxy_arp", "1"), sysctl("ipv4/neigh/"+host+"/proxy_delay", "0"),
					route(netip.PrefixFrom(pod.Addr, 32), netip.Addr{}, host),
					route(netip.PrefixFrom(pod.Addr6, 128), netip.Addr{}, host),
					address(host, linkLocal(bridgeAddr6)))
			}),
			pod.Do(func() error {
				return run(address("eth0", netip.PrefixFrom(pod.Addr, 32)), address("eth0", netip.PrefixFrom(pod.Addr6, 128)),
					address("eth0", linkLocal(pod.Addr6)),
					route(netip.PrefixFrom(routedGateway, 32), netip.Addr{}, "eth0"),
					route(netip.MustParsePrefix("0.0.0.0/0"), routedGateway, "eth0"),
					route(netip.MustParsePrefix("::/0"), linkLocal(bridgeAddr6).Addr(), "eth0"))
			}))
	}
	if err != nil {
		return nil, fmt.Errorf("add pod %s: %w", name, err)
	}
	return pod, nil
}

// AddNeighbour puts another host on the node's LAN. Its default route is the cloud; a test gives it
// others.
func (n *Node) AddNeighbour(name string) (*NS, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	ns, err := n.namespace("-" + name)
	if err != nil {
		return nil, fmt.Errorf("add neighbour %s: %w", name, err)
	}
	i := byte(20 + n.neighbours)
	n.neighbours++
	ns.Addr = netip.AddrFrom4([4]byte{198, 51, 100, i})
	addr6 := cloudAddr6.As16()
	addr6[15] = i
	ns.Addr6 = netip.AddrFrom16(addr6)
	if err := n.plug(ns, fmt.Sprintf("nb%d", n.neighbours), "eth0"); err != nil {
		return nil, fmt.Errorf("add neighbour %s: %w", name, err)
	}
	if err := ns.Do(func() error {
		return run(route(netip.MustParsePrefix("0.0.0.0/0"), cloudAddr, "eth0"),
			route(netip.MustParsePrefix("::/0"), cloudAddr6, "eth0"))
	}); err != nil {
		return nil, fmt.Errorf("add neighbour %s: %w", name, err)
	}
	return ns, nil
}

// Close removes every namespace of the node, and with them links, routes and rules. It can be
// called again.
func (n *Node) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	var errs []error
	for _, ns := range n.all {
		errs = append(errs, ns.Close())
	}
	n.all = nil
	return errors.Join(errs...)
}

// linkLocal is the link-local address that goes with a global one; a router needs one on every link
// to find its neighbours.
func linkLocal(a netip.Addr) netip.Prefix {
	b := a.As16()
	copy(b[:8], []byte{0xfe, 0x80, 0, 0, 0, 0, 0, 0})
	return netip.PrefixFrom(netip.AddrFrom16(b), 64)
}

// run does the steps in order up to the first that fails.
func run(steps ...func() error) error {
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// loopback brings lo up. Links of the namespace make themselves no link-local addresses and wait
// for no duplicates: both happen some time later, and Ruleset wants to be the same text twice.
func loopback() error {
	return run(sysctl("ipv6/conf/default/accept_dad", "0"), sysctl("ipv6/conf/default/addr_gen_mode", "1"), up("lo"))
}

// unlimitedICMP has refusals by ICMP not limited to one a second: a client that gets none waits for
// long. A machine that was booted keeps its limit: it is to be as others are.
func unlimitedICMP() error {
	return run(sysctl("ipv4/icmp_ratelimit", "0"), sysctl("ipv6/icmp/ratelimit", "0"))
}

func up(link string) func() error {
	return func() error {
		l, err := netlink.LinkByName(link)
		if err == nil {
			err = netlink.LinkSetUp(l)
		}
		if err != nil {
			return fmt.Errorf("ip link set %s up: %w", link, err)
		}
		return nil
	}
}

// Hardware is the hardware address of the pod on the bridge that has the IPv4 address.
func Hardware(a netip.Addr) net.HardwareAddr {
	b := a.As4()
	return append(net.HardwareAddr{2, 0}, b[:]...)
}

// hardware gives a link the hardware address that goes with an IPv4 address.
func hardware(link string, a netip.Addr) func() error {
	return func() error {
		l, err := netlink.LinkByName(link)
		if err == nil {
			err = netlink.LinkSetHardwareAddr(l, Hardware(a))
		}
		if err != nil {
			return fmt.Errorf("ip link set %s address: %w", link, err)
		}
		return nil
	}
}

func bridge(name string) func() error {
	return func() error {
		la := netlink.NewLinkAttrs()
		la.Name = name
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: la}); err != nil {
			return fmt.Errorf("ip link add %s type bridge: %w", name, err)
		}
		return up(name)()
	}
}

// veth makes a pair: name in ns (a port of master unless that is ""), peerName in peer. Both are
// up.
func (ns *NS) veth(name string, peer *NS, peerName, master string) error {
	there, err := os.Open(peer.Path())
	if err != nil {
		return err
	}
	defer there.Close()
	if err := ns.Do(func() error {
		la := netlink.NewLinkAttrs()
		la.Name = name
		link := &netlink.Veth{LinkAttrs: la, PeerName: peerName, PeerNamespace: netlink.NsFd(there.Fd())}
		if err := netlink.LinkAdd(link); err != nil {
			return fmt.Errorf("ip link add %s type veth: %w", name, err)
		}
		if master != "" {
			m, err := netlink.LinkByName(master)
			if err == nil {
				err = netlink.LinkSetMaster(link, m)
			}
			if err != nil {
				return fmt.Errorf("ip link set %s master %s: %w", name, master, err)
			}
		}
		return up(name)()
	}); err != nil {
		return err
	}
	return peer.Do(up(peerName))
}

func address(link string, p netip.Prefix) func() error {
	return func() error {
		if p.Addr().Is6() && ipv6Disabled() {
			return nil
		}
		l, err := netlink.LinkByName(link)
		if err == nil {
			a := &netlink.Addr{IPNet: ipNet(p)}
			if p.Addr().Is6() {
				a.Flags = unix.IFA_F_NODAD
			}
			err = netlink.AddrAdd(l, a)
		}
		if err != nil {
			return fmt.Errorf("ip address add %s dev %s: %w", p, link, err)
		}
		return nil
	}
}

func route(to netip.Prefix, via netip.Addr, link string) func() error {
	return routeAt(0, to, via, link)
}

// routeAt is route with a metric; 0 is the kernel's default.
func routeAt(metric int, to netip.Prefix, via netip.Addr, link string) func() error {
	return func() error {
		if to.Addr().Is6() && ipv6Disabled() {
			return nil
		}
		l, err := netlink.LinkByName(link)
		if err == nil {
			r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipNet(to), Priority: metric}
			if via.IsValid() {
				r.Gw = via.AsSlice()
			} else {
				r.Scope = netlink.SCOPE_LINK
			}
			err = netlink.RouteAdd(r)
		}
		if err != nil {
			return fmt.Errorf("ip route add %s via %s dev %s: %w", to, via, link, err)
		}
		return nil
	}
}

// ipv6Disabled says whether IPv6 is disabled in the calling thread's namespace, or in the kernel,
// as a machine may be booted that was made a node: then what is of IPv6 is left out.
func ipv6Disabled() bool {
	b, err := os.ReadFile("/proc/sys/net/ipv6/conf/default/disable_ipv6")
	return err != nil || strings.TrimSpace(string(b)) == "1"
}

// sysctl writes below /proc/sys/net, which shows the calling thread's namespace.
func sysctl(key, value string) func() error {
	return func() error {
		if strings.HasPrefix(key, "ipv6/") && ipv6Disabled() {
			return nil
		}
		return os.WriteFile("/proc/sys/net/"+key, []byte(value), 0)
	}
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
