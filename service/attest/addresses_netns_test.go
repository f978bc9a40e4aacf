package attest

import (
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// changeAddress adds an address to lo, or deletes it.
func changeAddress(t *testing.T, ns *netnstest.NS, change func(netlink.Link, *netlink.Addr) error, a netip.Addr) {
	t.Helper()
	if err := ns.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return change(lo, &netlink.Addr{IPNet: netlink.NewIPNet(a.AsSlice())})
	}); err != nil {
		t.Fatal(err)
	}
}

// The kernel answers first and tells of the change after it, on the socket that the answer is read
// from. Nothing else tells of it.
func TestAddressAddedWhileOthersAreRead(t *testing.T) {
	b := newTestNode(t)
	ns := b.pod("one")
	var s *netlinkSocket
	if err := ns.Do(func() error {
		fd, err := openNetlink(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		t.Cleanup(func() { _ = unix.Close(fd) })
		s, err = newNetlink(fd, make([]byte, 32<<10))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if err := s.subscribeAddresses(); err != nil {
		t.Fatal(err)
	}
	if err := s.askAddresses(); err != nil {
		t.Fatal(err)
	}
	late := netip.MustParseAddr("192.0.2.77")
	changeAddress(t, ns, netlink.AddrAdd, late)
	if found, err := s.answeredAddresses(); err != errChanging || found[ns.Addr] == 0 || found[late] != 0 {
		t.Errorf("%v, %v; want %s alone, and %v", found, err, ns.Addr, errChanging)
	}
	if found, err := s.addresses(); err != nil || found[late] == 0 {
		t.Errorf("afterwards: %v, %v; want %s too", found, err, late)
	}
}

// A network plugin adds a pod's addresses one right after the other. Every one is known, and every
// one that is deleted is not.
func TestAddressesInQuickSuccession(t *testing.T) {
	b := newTestNode(t)
	ns := b.pod("one")
	b.client(containerPath(1, 1), ns)
	b.startHelper()
	eventually(t, "the pod is known", func() bool { return len(b.holders(ns.Addr)) == 1 })
	one, two := netip.MustParseAddr("192.0.2.77"), netip.MustParseAddr("192.0.2.78")
	for range 50 {
		changeAddress(t, ns, netlink.AddrAdd, one)
		changeAddress(t, ns, netlink.AddrAdd, two)
		eventually(t, "both are known", func() bool { return len(b.holders(one)) == 1 && len(b.holders(two)) == 1 })
		changeAddress(t, ns, netlink.AddrDel, one)
		changeAddress(t, ns, netlink.AddrDel, two)
		eventually(t, "neither is", func() bool { return len(b.holders(one)) == 0 && len(b.holders(two)) == 0 })
	}
}
