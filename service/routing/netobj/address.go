package netobj

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Address is an IPv4 address with a label of its own, which ip(8) prints in place of the interface.
type Address struct {
	Prefix netip.Prefix
	Dev    string
	Scope  uint8
	Label  string // the interface, a colon and more
}

// Command implements Object.
func (a Address) Command() string { return command("address", unix.AF_INET) }

func (a Address) String() string {
	text := a.Prefix.String() + " dev " + a.Dev
	if a.Scope == unix.RT_SCOPE_HOST {
		text += " scope host"
	}
	return text + " label " + a.Label
}

func (a Address) change(change func(netlink.Link, *netlink.Addr) error) error {
	link, err := netlink.LinkByName(a.Dev)
	if err != nil {
		return err
	}
	return change(link, &netlink.Addr{IPNet: IPNet(a.Prefix), Scope: int(a.Scope), Label: a.Label})
}

func (a Address) add() error { return a.change(netlink.AddrAdd) }
func (a Address) del() error { return a.change(netlink.AddrDel) }

func readAddresses() (all []Object, err error) {
	addrs, err := Dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		if !strings.Contains(a.Label, ":") {
			continue
		}
		link, err := netlink.LinkByIndex(a.LinkIndex)
		if err != nil {
			continue // it went this moment, and the address with it
		}
		prefix := prefixOf(a.IPNet, unix.AF_INET)
		all = append(all, Address{Prefix: prefix, Dev: link.Attrs().Name, Scope: uint8(a.Scope), Label: a.Label})
	}
	return all, nil
}

// Link is a network interface.
type Link struct {
	Name, Kind, Alias string
	Up                bool
}

// dummy is the kind of links that Add can make.
const dummy = "dummy"

// Command implements Object.
func (l Link) Command() string { return command("link", unix.AF_INET) }

func (l Link) String() string {
	text := l.Name
	if l.Up {
		text += " up"
	}
	if l.Kind == dummy { // else it is somebody's, and only set up
		text += " type " + l.Kind
	}
	return text
}

func (l Link) add() error {
	link, err := netlink.LinkByName(l.Name)
	if errors.As(err, new(netlink.LinkNotFoundError)) && l.Kind == dummy {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = l.Name
		link = &netlink.Dummy{LinkAttrs: attrs}
		if err = netlink.LinkAdd(link); err == nil {
			err = netlink.LinkSetAlias(link, l.Alias)
		}
		if errors.Is(err, unix.EOPNOTSUPP) {
			return fmt.Errorf("this kernel has no dummy links: modprobe dummy, or make a link of that name: %w", err)
		}
	}
	if err == nil && l.Up {
		err = netlink.LinkSetUp(link)
	}
	return err
}

func (l Link) del() error {
	link, err := netlink.LinkByName(l.Name)
	if err != nil {
		return err
	}
	return netlink.LinkDel(link)
}

func readLinks(names []string) (all []Object, err error) {
	var errs []error
	for _, name := range slices.Compact(slices.Sorted(slices.Values(names))) {
		if name == "" {
			continue
		}
		l, err := netlink.LinkByName(name)
		if errors.As(err, new(netlink.LinkNotFoundError)) {
			continue
		} else if err != nil {
			errs = append(errs, fmt.Errorf("find link %s: %w", name, err))
			continue
		}
		at := l.Attrs()
		all = append(all, Link{Name: at.Name, Kind: l.Type(), Alias: at.Alias, Up: at.RawFlags&unix.IFF_UP != 0})
	}
	return all, errors.Join(errs...)
}
