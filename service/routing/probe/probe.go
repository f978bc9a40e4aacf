// Package probe answers: does what a pod sends arrive, and who drops it if not?
//
// It connects from a pod's network namespace, or from a throw-away one beside the node's, and asks
// nf_tables' tracing and the counters of legacy iptables who drops the packets. It knows nothing of
// our rules.
package probe

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
)

// Pod is a pod that is none: a network namespace without a name, connected to the node as
// Calico and the cloud CNIs connect pods (K-08). What connects from it takes the path of a pod's
// packets, through everybody's rules.
//
// The node gets an interface and a route to one address of each family, and no address, sysctl or
// rule. The namespace lives as long as this process holds it; with it the kernel takes away all the
// rest, also when the process is killed.
type Pod struct {
	Addr, Addr6 netip.Addr // the pod's; Addr6 is invalid before AddIPv6
	Link        string     // the node's end

	node, pod netns.NsHandle
	linked    bool
	*inhabitant

	dialling sync.RWMutex    // pod is in use: net/http dials on while nobody waits for it any more
	closing  context.Context // until then
	close    context.CancelFunc
}

// LinkName is the interface's name. Only one probe at a time is possible.
const LinkName = "gme-doctor"

var (
	// podAddr is of the range for benchmarks (RFC 2544), which nobody routes.
	podAddr = netip.AddrFrom4([4]byte{198, 18, 169, 254})
	// gateway is nobody's: the pod knows its hardware address, so no sysctl has to make the node
	// answer for it.
	gateway = netip.AddrFrom4([4]byte{169, 254, 1, 1})
	// The same of IPv6 (RFC 5180).
	podAddr6 = netip.MustParseAddr("2001:2::a9fe:a9fe")
	gateway6 = netip.MustParseAddr("fe80::1")
)

// NewPod makes one beside the network namespace of the calling thread. ErrPermission is
// wrapped where that is not allowed.
func NewPod() (_ *Pod, err error) {
	t := &Pod{Addr: podAddr, Link: LinkName, node: netns.None(), pod: netns.None()}
	t.closing, t.close = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("make a throw-away network namespace: %w", fault.Permission(err)), t.Close())
		}
	}()
	runtime.LockOSThread()
	if t.node, err = netns.Get(); err != nil {
		runtime.UnlockOSThread()
		return t, err
	}
	if t.pod, err = netns.New(); err != nil { // moves this thread
		runtime.UnlockOSThread()
		return t, err
	}
	if err := netns.Set(t.node); err != nil {
		return t, err // the thread stays locked, and ends with its goroutine
	}
	defer runtime.UnlockOSThread()
	return t, t.connect()
}

// connect makes the two ends of the pod's link.
func (t *Pod) connect() error {
	la := netlink.NewLinkAttrs()
	la.Name = t.Link
	veth := &netlink.Veth{LinkAttrs: la, PeerName: "eth0", PeerNamespace: netlink.NsFd(t.pod)}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("ip link add %s type veth: %w", t.Link, err)
	}
	t.linked = true
	here, err := netlink.LinkByName(t.Link)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(here); err != nil {
		return fmt.Errorf("ip link set %s up: %w", t.Link, err)
	}
	return t.address(t.Addr, gateway)
}

// AddIPv6 gives the pod IPv6, too. Where the node has none, or not for new interfaces, that is an
// error.
func (t *Pod) AddIPv6() error {
	if err := t.in(t.node, func() error { return t.address(podAddr6, gateway6) }); err != nil {
		return fmt.Errorf("give the throw-away network namespace IPv6: %w", err)
	}
	t.Addr6 = podAddr6
	return nil
}

// address has both ends find each other at the address without a question: the first packet is to
// get through, too.
func (t *Pod) address(a, gateway netip.Addr) error {
	here, err := netlink.LinkByName(t.Link)
	if err != nil {
		return err
	}
	pod, err := netlink.NewHandleAt(t.pod, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer pod.Close()
	there, err := pod.LinkByName("eth0")
	if err != nil {
		return err
	}
	index := there.Attrs().Index
	flags := 0
	if a.Is6() {
		flags = unix.IFA_F_NODAD
	}
	for _, step := range []func() error{
		func() error { return pod.LinkSetUp(there) },
		func() error {
			return pod.AddrAdd(there, &netlink.Addr{IPNet: netobj.IPNet(netobj.Host(a)), Flags: flags})
		},
		func() error {
			return pod.NeighSet(&netlink.Neigh{LinkIndex: index, IP: gateway.AsSlice(), HardwareAddr: here.Attrs().HardwareAddr,
				State: unix.NUD_PERMANENT})
		},
		func() error {
			return pod.RouteAdd(&netlink.Route{LinkIndex: index, Gw: gateway.AsSlice(), Flags: int(netlink.FLAG_ONLINK)})
		},
		func() error {
			return netlink.RouteAdd(&netlink.Route{LinkIndex: here.Attrs().Index, Dst: netobj.IPNet(netobj.Host(a)),
				Scope: netlink.SCOPE_LINK})
		},
		func() error {
			return netlink.NeighSet(&netlink.Neigh{LinkIndex: here.Attrs().Index, IP: a.AsSlice(),
				HardwareAddr: there.Attrs().HardwareAddr, State: unix.NUD_PERMANENT})
		},
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// Dial connects from the pod. The address is an IP address and a port.
func (t *Pod) Dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	t.dialling.RLock()
	defer t.dialling.RUnlock()
	if !t.pod.IsOpen() {
		return nil, net.ErrClosed
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(t.closing, cancel)()
	err = t.in(t.pod, func() error {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// in runs f with this thread in the namespace.
func (t *Pod) in(there netns.NsHandle, f func() error) error {
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer func() { _ = home.Close() }()
	if err := netns.Set(there); err != nil {
		runtime.UnlockOSThread()
		return err
	}
	err = f()
	if back := netns.Set(home); back != nil {
		return errors.Join(err, back) // the thread stays locked, and ends with its goroutine
	}
	runtime.UnlockOSThread()
	return err
}

// Dropped says who drops what the pod sends from one of its addresses, or what is sent back there,
// while try runs: nf_tables' tracing tells for its chains, those of iptables-nft among them, and
// counters tell for the legacy ones, which may be others' packets on a busy node. "" is nobody.
func (t *Pod) Dropped(ctx context.Context, from netip.Addr, try func()) (by []string, err error) {
	err = t.in(t.node, func() error {
		by, err = dropped(ctx, from, t.Link, try)
		return err
	})
	return by, err
}

// DroppedHere says who drops what processes of the node itself send to the node's address, or what
// is sent back, while try runs, as [Pod.Dropped] does. It looks in the network namespace of
// the calling thread.
func DroppedHere(ctx context.Context, to netip.Addr, try func()) (by []string, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	return dropped(ctx, to, "lo", try)
}

func dropped(ctx context.Context, addr netip.Addr, link string, try func()) (by []string, err error) {
	before := LegacyDrops(ctx, netobj.FamilyOf(addr))
	trace, err := StartTrace(addr, link)
	try()
	if err == nil {
		by, err = trace.drops(200 * time.Millisecond)
		err = errors.Join(err, trace.close())
	}
	by = append(by, risen(before, LegacyDrops(ctx, netobj.FamilyOf(addr)))...)
	if len(by) > 0 || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) ||
		errors.Is(err, unix.EPROTONOSUPPORT) {
		return by, nil // a kernel without nf_tables has none of its chains
	}
	return by, err
}

// Close takes all away, and ends what dials.
func (t *Pod) Close() error {
	errs := []error{t.inhabitant.end()}
	t.inhabitant = nil
	if t.linked { // at once, where the kernel would take its time to free the namespace
		t.linked = false
		errs = append(errs, t.in(t.node, func() error {
			l, err := netlink.LinkByName(t.Link)
			if err != nil {
				return err
			}
			return netlink.LinkDel(l)
		}))
	}
	t.close()
	t.dialling.Lock()
	defer t.dialling.Unlock()
	if t.node.IsOpen() {
		errs = append(errs, t.node.Close())
	}
	if t.pod.IsOpen() {
		errs = append(errs, t.pod.Close())
	}
	return errors.Join(errs...)
}
