package nft

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// TableName is the name of the one table that is ours.
const TableName = "gke-metadata-emulator"

// Chain is one base chain of our table.
type Chain struct {
	Name, Kind, Hook string // such as prerouting, nat, prerouting
	Priority         int
	Rules            []Rule
}

// hooks are netfilter's, by the words of nft.
var hooks = map[string]*nftables.ChainHook{
	"prerouting": nftables.ChainHookPrerouting, "input": nftables.ChainHookInput,
	"forward": nftables.ChainHookForward, "output": nftables.ChainHookOutput,
}

// Priorities: before everybody else's of the hook, by ten. nft 1.0.6 refuses "dstnat - 10" in
// output, so they are numbers in what is shown.
const (
	PriorityRaw     = -310
	PriorityDestNAT = -110
	PriorityFilter  = -10
)

// head is the chain's first line.
func (c Chain) head() string {
	return fmt.Sprintf("type %s hook %s priority %d; policy accept;", c.Kind, c.Hook, c.Priority)
}

// Rule is a rule as nft writes it, and as the kernel gets it. The text lies with the rule in the
// kernel, where nft does not show it: a rule is never changed, only replaced, so it tells what the
// rule is, whatever a kernel makes of the expressions when they are read back.
type Rule struct {
	text  string
	short string // in the mark in place of a text that is too long: a rule has room for 254 octets
	Mark  string // the text, and what it stands for that it does not tell
	exprs []expr.Any
}

// Part is a part of a rule.
type Part = Rule

func NewRule(parts ...Part) (r Rule) {
	var texts, words, marks []string
	for _, p := range parts {
		texts, words = append(texts, p.text), append(words, cmp.Or(p.short, p.text))
		if p.Mark != "" {
			marks = append(marks, p.Mark)
		}
		r.exprs = append(r.exprs, p.exprs...)
	}
	r.text = strings.Join(texts, " ")
	r.Mark = strings.Join(append([]string{strings.Join(words, " ")}, marks...), "\x00")
	return r
}

func equals(value []byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: value} }

// ByInterface matches where a packet came in; a trailing + stands for any ending, as iptables has
// it.
func ByInterface(name string) Part {
	value, text := []byte(name+"\x00"), name
	if beginning, any := strings.CutSuffix(name, "+"); any {
		value, text = []byte(beginning), beginning+"*"
	} else {
		value = append(value, make([]byte, unix.IFNAMSIZ-len(value))...)
	}
	return Part{text: fmt.Sprintf("iifname %q", text), exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, equals(value)}}
}

// ToInterface is ByInterface for where a packet goes out.
func ToInterface(name string) Part {
	p := ByInterface(name)
	p.text = strings.Replace(p.text, "iifname", "oifname", 1)
	p.exprs[0].(*expr.Meta).Key = expr.MetaKeyOIFNAME
	return p
}

func NotLoopback() Part {
	p := ByInterface("lo")
	p.text = `iifname != "lo"`
	p.exprs[1].(*expr.Cmp).Op = expr.CmpOpNeq
	return p
}

// ToServer matches packets of TCP to an address and a port.
func ToServer(a netip.AddrPort) Part { return ofTCP(a, "daddr %s tcp dport %d", 16, 24, 2) }

// FromServer matches packets of TCP from an address and a port.
func FromServer(a netip.AddrPort) Part { return ofTCP(a, "saddr %s tcp sport %d", 12, 8, 0) }

// ofTCP matches packets of TCP that have the address at one of the offsets, which are those of IPv4
// and of IPv6, and the port at its own.
func ofTCP(a netip.AddrPort, format string, ipv4, ipv6, port uint32) Part {
	word, offset := "ip ", ipv4
	if a.Addr().Is6() {
		word, offset = "ip6 ", ipv6
	}
	return Part{text: word + fmt.Sprintf(format, a.Addr(), a.Port()), exprs: []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset,
			Len: uint32(a.Addr().BitLen() / 8)}, equals(a.Addr().AsSlice()),
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, equals([]byte{unix.IPPROTO_TCP}),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: port, Len: 2},
		equals(binary.BigEndian.AppendUint16(nil, a.Port())),
	}}
}

// NotReset matches packets of TCP without the flag RST.
func NotReset() Part {
	return Part{text: "tcp flags & rst == 0", exprs: []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{4}, Xor: []byte{0}}, equals([]byte{0}),
	}}
}

// SourceTranslated matches packets of connections whose source address or port conntrack changed.
func SourceTranslated() Part {
	const ipsSrcNAT = 1 << 4 // IPS_SRC_NAT of linux/netfilter/nf_conntrack_common.h
	return Part{text: "ct status snat", exprs: []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATUS, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binary.NativeEndian.AppendUint32(nil, ipsSrcNAT), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}}
}

// Tracked is what track is of iptables.
func Tracked() Part {
	return Part{text: "ct zone set 0", exprs: []expr.Any{
		&expr.Immediate{Register: 1, Data: make([]byte, 2)},
		&expr.Ct{Key: expr.CtKeyZONE, Register: 1, SourceRegister: true}}}
}

// OriginallyTo matches what was sent to the address before DNAT.
func OriginallyTo(a netip.Addr) Part {
	word := "ip"
	if a.Is6() {
		word = "ip6"
	}
	return Part{text: fmt.Sprintf("ct original %s daddr %s", word, a), exprs: []expr.Any{
		&expr.Ct{Key: expr.CtKeyDST, Register: 1}, equals(a.AsSlice())}}
}

// OfCgroup matches what sockets of a cgroup below root send. The rule holds the number of the
// cgroup: one that is made anew has another.
func OfCgroup(root, path string) (Part, error) {
	info, err := os.Stat(filepath.Join(root, path))
	if err != nil {
		return Part{}, err
	}
	id, err := inode(info)
	level := strings.Count(path, "/") + 1
	return Part{text: fmt.Sprintf("socket cgroupv2 level %d %q", level, path), Mark: fmt.Sprint(id), exprs: []expr.Any{
		&expr.Socket{Key: expr.SocketKeyCgroupv2, Level: uint32(level), Register: 1},
		equals(binary.NativeEndian.AppendUint64(nil, id)),
	}}, err
}

func verdict(word string, kind expr.VerdictKind) Part {
	return Part{text: word, exprs: []expr.Any{&expr.Verdict{Kind: kind}}}
}

func Accept() Part { return verdict("accept", expr.VerdictAccept) }

func Drop() Part { return verdict("drop", expr.VerdictDrop) }

func Return() Part { return verdict("return", expr.VerdictReturn) }

func Reset() Part {
	return Part{text: "reject with tcp reset", exprs: []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}}
}

// DNAT counts, so that an operator sees whether anybody asks.
func DNAT(to netip.AddrPort) Part {
	family := uint32(unix.NFPROTO_IPV4)
	if to.Addr().Is6() {
		family = unix.NFPROTO_IPV6
	}
	return Part{text: "counter dnat to " + to.String(), exprs: []expr.Any{
		&expr.Counter{},
		&expr.Immediate{Register: 1, Data: to.Addr().AsSlice()},
		&expr.Immediate{Register: 2, Data: binary.BigEndian.AppendUint16(nil, to.Port())},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: family, RegAddrMin: 1, RegProtoMin: 2},
	}}
}

// ToPort matches packets of TCP to a port of this node, whichever its address.
func ToPort(port uint16) Part {
	p := ToServer(netip.AddrPortFrom(netip.IPv4Unspecified(), port))
	return Part{text: fmt.Sprintf("fib daddr type local tcp dport %d", port), exprs: append([]expr.Any{
		&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
		equals(binary.NativeEndian.AppendUint32(nil, unix.RTN_LOCAL)),
	}, p.exprs[2:]...)}
}

// Text is the table of one family as nft -f reads it.
func Text(chains []Chain, family string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "add table %[1]s %[2]s\ndelete table %[1]s %[2]s\ntable %[1]s %[2]s {\n", family, TableName)
	for _, c := range chains {
		fmt.Fprintf(&b, "\tchain %s {\n\t\t%s\n", c.Name, c.head())
		for _, r := range c.Rules {
			fmt.Fprintf(&b, "\t\t%s\n", r.text)
		}
		b.WriteString("\t}\n")
	}
	b.WriteString("}\n")
	return b.String()
}
