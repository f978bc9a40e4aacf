package nft

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// ToUDP matches packets of UDP to an address and a port.
func ToUDP(a netip.AddrPort) Part { return ofUDP(a, "daddr %s udp dport %d", 16, 24, 2) }

// FromUDP matches packets of UDP from an address and a port.
func FromUDP(a netip.AddrPort) Part { return ofUDP(a, "saddr %s udp sport %d", 12, 8, 0) }

func ofUDP(a netip.AddrPort, format string, ipv4, ipv6, port uint32) Part {
	p := ofTCP(a, format, ipv4, ipv6, port)
	p.exprs[3] = equals([]byte{unix.IPPROTO_UDP})
	return p
}

// Asks matches DNS queries over UDP with one question whose name begins with the labels, in upper
// or lower case. labels are as in a packet, each behind its length, and consist of letters.
//
// The question stands at a fixed place, behind the headers of UDP (8 octets) and DNS (12). nft
// reads 16 octets at most at once. The text is too long for a rule's mark, which says what it
// means.
func Asks(labels, name string) Part {
	const (
		flags    = 8 + 2  // QR and the opcode are 0 in a query
		question = 8 + 12 // where the name begins
		longest  = 16
	)
	load := func(at, length int) expr.Any {
		return &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: uint32(at), Len: uint32(length)}
	}
	masked := func(mask []byte) expr.Any {
		return &expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: uint32(len(mask)), Mask: mask,
			Xor: make([]byte, len(mask))}
	}
	p := Part{text: "udp dport 53 @th,80,16 & 0xf800 == 0 @th,96,16 1", short: "udp dport 53 asks " + name,
		exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, equals([]byte{unix.IPPROTO_UDP}),
			load(2, 2), equals([]byte{0, 53}),
			load(flags, 2), masked([]byte{0xf8, 0}), equals([]byte{0, 0}),
			load(flags+2, 2), equals([]byte{0, 1}), // questions
		}}
	value, mask := bytes.ToUpper([]byte(labels)), CaseMask(labels)
	for at := 0; at < len(value); at += longest {
		v, m := value[at:min(at+longest, len(value))], mask[at:min(at+longest, len(mask))]
		p.text += fmt.Sprintf(" @th,%d,%d & 0x%x == 0x%x", 8*(question+at), 8*len(v), m, v)
		p.exprs = append(p.exprs, load(question+at, len(v)), masked(m), equals(v))
	}
	return p
}

// CaseMask has the bit cleared that tells lower case from upper, for each letter.
func CaseMask(labels string) []byte {
	mask := make([]byte, len(labels))
	for i, c := range []byte(labels) {
		if mask[i] = 0xff; c|0x20 >= 'a' && c|0x20 <= 'z' {
			mask[i] = 0xdf
		}
	}
	return mask
}

// InZone is a conntrack zone of its own for the packet.
func InZone(zone uint16) Part {
	p := Tracked()
	p.text = fmt.Sprintf("ct zone set %d", zone)
	p.exprs[0].(*expr.Immediate).Data = binary.NativeEndian.AppendUint16(nil, zone)
	return p
}

// DestinationTranslated matches packets of connections whose destination conntrack changed.
func DestinationTranslated() Part {
	const ipsDstNAT = 1 << 5 // IPS_DST_NAT of linux/netfilter/nf_conntrack_common.h
	p := SourceTranslated()
	p.text = "ct status dnat"
	p.exprs[1].(*expr.Bitwise).Mask = binary.NativeEndian.AppendUint32(nil, ipsDstNAT)
	return p
}
