package routing

import (
	"errors"
	"fmt"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Mode loopback with a link (Plan.Link), for Cilium with BPF host routing: its programs hand to the node's own stack only what is sent to an
// address of one of its links, lo excepted. So the metadata server's address is put on a dummy link, of which it then is the node's own
// for everybody and for every port: the node's daemons get no other answer than ours, a name server of the cloud's at that address is out
// of reach, and what keeps other hosts out are the two doors of netfilter. An address of scope host would be passed over too.
//
// A link that is there already is used, and stays when we go; one that we made has our comment as its alias.

// linkLabel marks the address on such a link, as addressLabel does on lo.
func linkLabel(link string) string { return link + linkLabelEnd }

const linkLabelEnd = ":gme"

func linkAddressText(link string) string {
	return fmt.Sprintf("%s dev %s label %s", hostNet(metadataServer.Addr()), link, linkLabel(link))
}

// linkAddress is an address of ours on a link that is not lo.
type linkAddress struct {
	link netlink.Link
	addr netlink.Addr
}

func standingLinkAddresses() (found []linkAddress, err error) {
	addrs, err := retryDump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		if a.Label == addressLabel || !strings.HasSuffix(a.Label, linkLabelEnd) || a.IPNet.String() != hostNet(metadataServer.Addr()).String() {
			continue
		}
		l, err := netlink.LinkByIndex(a.LinkIndex)
		if err != nil {
			continue // it went this moment, and the address with it
		}
		found = append(found, linkAddress{link: l, addr: a})
	}
	return found, nil
}

func installLink(name string) error {
	l, err := netlink.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		at := netlink.NewLinkAttrs()
		at.Name = name
		l = &netlink.Dummy{LinkAttrs: at}
		if err = netlink.LinkAdd(l); err == nil {
			err = netlink.LinkSetAlias(l, comment)
		}
		if errors.Is(err, unix.EOPNOTSUPP) {
			return fmt.Errorf("ip link add %s type dummy: this kernel has no dummy links: modprobe dummy, or make a link of that name: %w", name, err)
		}
	}
	if err != nil {
		return fmt.Errorf("ip link add %s type dummy: %w", name, permission(err))
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("ip link set %s up: %w", name, permission(err))
	}
	err = netlink.AddrAdd(l, &netlink.Addr{IPNet: hostNet(metadataServer.Addr()), Label: linkLabel(name)})
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("ip address add %s: %w", linkAddressText(name), permission(err))
	}
	return nil
}

// removeLinks takes our address from every link but keep, and away the links that we made.
func removeLinks(keep string) error {
	standing, err := standingLinkAddresses()
	if err != nil {
		return err
	}
	var errs []error
	for _, s := range standing {
		switch at := s.link.Attrs(); {
		case at.Name == keep:
			continue
		case s.link.Type() == "dummy" && at.Alias == comment:
			err = netlink.LinkDel(s.link)
		default:
			err = netlink.AddrDel(s.link, &s.addr)
		}
		if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, fmt.Errorf("ip address del %s: %w", linkAddressText(s.link.Attrs().Name), permission(err)))
		}
	}
	return errors.Join(errs...)
}

func checkLink(name string) []error {
	standing, err := standingLinkAddresses()
	if err != nil {
		return []error{err}
	}
	for _, s := range standing {
		if s.link.Attrs().Name != name {
			continue
		}
		if s.link.Attrs().RawFlags&unix.IFF_UP == 0 {
			return []error{missing(layerAddress, "ip link: %s up", name)}
		}
		return nil
	}
	return []error{missing(layerAddress, "ip address: %s", linkAddressText(name))}
}

// foreignAddress returns an error where the metadata server's address is this node's own already, and not by us.
func foreignAddress() error {
	ours, err := standingLinkAddresses()
	if err != nil || len(ours) > 0 {
		return err
	}
	local, err := isLocal(metadataServer.Addr())
	if err != nil || !local {
		return err
	}
	return fmt.Errorf("%s %w: it is an address of this node, as on GKE, or with another metadata server; remove that first", metadataServer.Addr(), ErrForeign)
}
