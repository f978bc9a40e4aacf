package probe

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
)

// ErrNoPod is returned where no network namespace has one of the addresses.
var ErrNoPod = errors.New("no process runs in the network namespace of a pod")

// JoinPod returns a Pod that connects from the network namespace of a pod, which has one of
// the addresses. Nothing is made, and the rules that name pods' addresses or interfaces are met,
// which the throw-away namespace of NewPod may not meet.
func JoinPod(addresses []netip.Addr) (_ *Pod, err error) {
	t := &Pod{node: netns.None(), pod: netns.None()}
	t.closing, t.close = context.WithCancel(context.Background())
	if t.node, err = netns.Get(); err != nil {
		return nil, errors.Join(fault.Permission(err), t.Close())
	}
	own, _ := os.Readlink("/proc/thread-self/ns/net")
	seen := map[string]bool{own: true}
	links, _ := filepath.Glob("/proc/[0-9]*/ns/net") // the pattern is a constant
	for _, link := range links {
		namespace, err := os.Readlink(link)
		if err != nil || seen[namespace] {
			continue // it ended, or is another user's
		}
		seen[namespace] = true
		there, err := netns.GetFromPath(link)
		if err != nil {
			continue
		}
		// Nodes within this one (kind's) have pods of the same addresses: theirs have no link to this
		// namespace.
		id, err := netlink.GetNetNsIdByFd(int(there))
		if err != nil || id < 0 {
			_ = there.Close()
			continue
		}
		if t.Addr = oneOf(there, addresses); t.Addr.IsValid() {
			t.pod = there
			return t, nil
		}
		_ = there.Close()
	}
	return nil, errors.Join(ErrNoPod, t.Close())
}

// oneOf returns the IPv4 address that the namespace has of those; the zero Addr if there is none.
func oneOf(there netns.NsHandle, addresses []netip.Addr) netip.Addr {
	h, err := netlink.NewHandleAt(there)
	if err != nil {
		return netip.Addr{}
	}
	defer h.Close()
	addrs, _ := netobj.Dump(func() ([]netlink.Addr, error) { return h.AddrList(nil, netlink.FAMILY_V4) })
	for _, a := range addrs {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && slices.Contains(addresses, ip.Unmap()) {
			return ip.Unmap()
		}
	}
	return netip.Addr{}
}
