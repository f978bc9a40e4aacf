package routing

import (
	"net/netip"

	"golang.org/x/sys/unix"
)

// Family is a version of IP. Its number is that of AF_INET or AF_INET6, which netfilter shares
// (NFPROTO_IPV4 and NFPROTO_IPV6) and the netlink library as well (FAMILY_V4 and FAMILY_V6).
type Family uint8

const (
	ipv4 Family = unix.AF_INET
	ipv6 Family = unix.AF_INET6
)

// families are both, in the order in which reports name them.
var families = []Family{ipv4, ipv6}

// familyOf is the family of an address; of the zero Addr it is ipv4.
func familyOf(a netip.Addr) Family {
	if a.Is6() {
		return ipv6
	}
	return ipv4
}

// has says whether the address is of the family.
func (f Family) has(a netip.Addr) bool { return a.IsValid() && familyOf(a) == f }

func (f Family) String() string {
	if f == ipv4 {
		return "IPv4"
	}
	return "IPv6"
}
