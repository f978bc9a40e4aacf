package netobj

import (
	"net/netip"

	"golang.org/x/sys/unix"
)

// Family is a version of IP. Its number is that of AF_INET or AF_INET6, which netfilter shares
// (NFPROTO_IPV4 and NFPROTO_IPV6) and the netlink library as well (FAMILY_V4 and FAMILY_V6).
type Family uint8

const (
	IPv4 Family = unix.AF_INET
	IPv6 Family = unix.AF_INET6
)

// Families are both, in the order in which reports name them.
var Families = []Family{IPv4, IPv6}

// FamilyOf is the family of an address; of the zero Addr it is ipv4.
func FamilyOf(a netip.Addr) Family {
	if a.Is6() {
		return IPv6
	}
	return IPv4
}

// Has says whether the address is of the family.
func (f Family) Has(a netip.Addr) bool { return a.IsValid() && FamilyOf(a) == f }

func (f Family) String() string {
	if f == IPv4 {
		return "IPv4"
	}
	return "IPv6"
}

// NFT is the word of nft for the family.
func (f Family) NFT() string {
	if f == IPv6 {
		return "ip6"
	}
	return "ip"
}
