// Package netobj answers: which policy rules, routes, addresses and links does a network namespace
// have, and which of those that are wanted are not there?
//
// Each is an Object: a comparable value with the text by which ip(8) adds it. Read lists what there
// is, Diff compares it with what is wanted, and Add and Delete apply the difference. Whose an
// object is, the caller says.
package netobj

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Object is a Rule, Route, Address or Link.
type Object interface {
	// Command is the command of ip(8) for objects of the kind and family, such as "ip -6 rule".
	Command() string
	// String is what follows "add" in that command.
	String() string
	add() error
	del() error
}

// Snapshot is what a network namespace has: the rules of each family in the order in which the
// kernel asks them, the routes of all tables, the IPv4 addresses that have a label of their own,
// and the links that were asked for or have such an address.
type Snapshot []Object

// Read looks at the network namespace of the calling thread. What it can read it returns together
// with the error.
func Read(links ...string) (all Snapshot, _ error) {
	var errs []error
	take := func(found []Object, err error) {
		all, errs = append(all, found...), append(errs, err)
	}
	take(readRules(unix.AF_INET))
	take(readRoutes(unix.AF_INET))
	if HaveIPv6() {
		take(readRules(unix.AF_INET6))
		take(readRoutes(unix.AF_INET6))
	}
	take(readAddresses())
	for _, o := range all {
		if a, ok := o.(Address); ok && a.Dev != loopback && !slices.Contains(links, a.Dev) {
			links = append(slices.Clone(links), a.Dev)
		}
	}
	take(readLinks(links))
	return all, errors.Join(errs...)
}

// Has says whether the object is there.
func (s Snapshot) Has(o Object) bool { return slices.Contains(s, o) }

// Rules are the policy rules of one family (unix.AF_INET or AF_INET6), in the order in which the
// kernel asks them.
func (s Snapshot) Rules(family uint8) (rules []Rule) {
	return slices.DeleteFunc(of[Rule](s), func(r Rule) bool { return r.family() != family })
}

// Routes are the routes of one table that lead the address somewhere.
func (s Snapshot) Routes(table int, to netip.Addr) (routes []Route) {
	return slices.DeleteFunc(of[Route](s), func(r Route) bool { return r.Table != table || !r.Dst.Contains(to) })
}

// Local says whether the node takes packets to the address as its own: by an address or by a local
// route.
func (s Snapshot) Local(a netip.Addr) bool {
	routes := s.Routes(unix.RT_TABLE_LOCAL, a)
	if len(routes) == 0 {
		return false
	}
	longest := slices.MaxFunc(routes, func(a, b Route) int { return cmp.Compare(a.Dst.Bits(), b.Dst.Bits()) })
	return longest.Type == unix.RTN_LOCAL
}

// Link returns the link of that name, if it is there and was asked for.
func (s Snapshot) Link(name string) (Link, bool) {
	links := of[Link](s)
	if i := slices.IndexFunc(links, func(l Link) bool { return l.Name == name }); i >= 0 {
		return links[i], true
	}
	return Link{}, false
}

func of[T Object](objects []Object) (found []T) {
	for _, o := range objects {
		if o, ok := o.(T); ok {
			found = append(found, o)
		}
	}
	return found
}

// Diff compares what is wanted with what is there. missing are the objects to add, in the order of
// want. surplus are those of ours that are not wanted, in the order in which to delete them.
//
// Rules of one family stand when all are there and in order. Where they do not, all are missing:
// added anew they come behind those that are there, and of two equal rules the first is surplus.
// What differs from what is wanted in a state that Add changes is missing, and not surplus.
func Diff(want, have []Object, ours func(Object) bool) (missing, surplus []Object) {
	left := make([]Object, 0, len(want))
	for _, w := range want {
		left = append(left, identity(w))
	}
	var kept []Rule
	for _, o := range slices.Backward(have) {
		if !ours(o) {
			continue
		}
		if i := slices.Index(left, identity(o)); i >= 0 {
			left = slices.Delete(left, i, i+1)
			if r, ok := o.(Rule); ok {
				kept = append(kept, r)
			}
		} else {
			surplus = append(surplus, o)
		}
	}
	slices.Reverse(kept)
	for _, w := range want {
		r, rule := w.(Rule)
		if rule && !inOrder(of[Rule](want), kept, r.family()) || !rule && !slices.Contains(have, w) {
			missing = append(missing, w)
		}
	}
	slices.Reverse(surplus)
	slices.SortStableFunc(surplus, func(a, b Object) int { return cmp.Compare(deletion(a), deletion(b)) })
	return missing, surplus
}

// identity is the object without the state that Add changes of one that is there.
func identity(o Object) Object {
	switch o := o.(type) {
	case Route:
		o.Src = netip.Addr{}
		return o
	case Link:
		o.Up = false
		return o
	}
	return o
}

// inOrder says whether what was kept of one family is all that is wanted, in the order in which the
// kernel asks it.
func inOrder(want, kept []Rule, family uint8) bool {
	other := func(r Rule) bool { return r.family() != family }
	want, kept = slices.DeleteFunc(slices.Clone(want), other), slices.DeleteFunc(slices.Clone(kept), other)
	slices.SortStableFunc(want, func(a, b Rule) int { return cmp.Compare(a.Pref, b.Pref) })
	return slices.Equal(kept, want)
}

// deletion is the object's place in the order in which to delete. What leads to an address goes
// before the address, and an address before its link. Of rules the kernel deletes the first that
// has all that the request says, so one that names a port goes before one that names none; and what
// is closed goes before what passes.
func deletion(o Object) int {
	switch o := o.(type) {
	case Route:
		if o.Type != unix.RTN_LOCAL {
			return 0
		}
		return 8
	case Rule:
		switch {
		case o.Action == unix.FR_ACT_NOP:
			return 5
		case o.IIF != "" && o.Port == 0:
			return 4
		case o.Port == 0 && o.Action == unix.FR_ACT_PROHIBIT:
			return 3
		case o.IIF == "":
			return 2
		}
		return 1
	case Address:
		return 6
	}
	return 7
}

// Add makes the object stand. One that is there already is no error.
func Add(o Object) error {
	if err := o.add(); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

// Delete takes the object away. One that is gone already is no error.
func Delete(o Object) error {
	err := o.del()
	for _, gone := range []error{unix.ENOENT, unix.ESRCH, unix.EADDRNOTAVAIL, unix.ENODEV} {
		if errors.Is(err, gone) {
			return nil
		}
	}
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	return err
}

const loopback = "lo"

// loopbackIndex is the index that the kernel gives to lo in every namespace.
const loopbackIndex = 1

func command(kind string, family uint8) string {
	if family == unix.AF_INET6 {
		return "ip -6 " + kind
	}
	return "ip " + kind
}

// Commands add the object in a shell, one a line.
func Commands(o Object) string {
	text := fmt.Sprintf("%s add %s\n", o.Command(), o)
	if l, is := o.(Link); is {
		text += fmt.Sprintf("%s set %s alias %s\n", o.Command(), l.Name, l.Alias)
	}
	return text
}

// HaveIPv6 says whether the kernel has IPv6.
func HaveIPv6() bool {
	_, err := os.Stat("/proc/thread-self/net/if_inet6")
	return err == nil
}

func noIPv6(err error) bool {
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)
}

// prefixOf is a prefix of netlink's; nil is all of the family.
func prefixOf(n *net.IPNet, family uint8) netip.Prefix {
	if n != nil {
		if a, ok := netip.AddrFromSlice(n.IP); ok {
			ones, _ := n.Mask.Size()
			if family == unix.AF_INET {
				a = a.Unmap() // that of a default route has 16 bytes
			}
			return netip.PrefixFrom(a, ones)
		}
	}
	return anyOf(family)
}

// anyOf is the prefix of all addresses.
func anyOf(family uint8) netip.Prefix {
	if family == unix.AF_INET6 {
		return Any(netip.IPv6Unspecified())
	}
	return Any(netip.IPv4Unspecified())
}

// IPNet is the prefix as netlink has it.
func IPNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func familyOf(a netip.Addr) uint8 {
	if a.Is6() {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// Any is the prefix of all addresses of the family of this one.
func Any(a netip.Addr) netip.Prefix {
	p, _ := a.Prefix(0) // every address has one of that length
	return p
}

// Objects are the rules as Objects.
func Objects(rules []Rule) (all []Object) {
	for _, r := range rules {
		all = append(all, r)
	}
	return all
}

// Host is the prefix of the address alone.
func Host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// Dump repeats a dump that the kernel says was disturbed by a change.
func Dump[T any](dump func() ([]T, error)) (got []T, err error) {
	for range 5 {
		if got, err = dump(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return got, err
}
