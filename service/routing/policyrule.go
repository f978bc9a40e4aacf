package routing

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// policyRule is a policy rule: one of ours, with all that it says, or one of somebody else's, with
// what of it matters here. It is comparable.
type policyRule struct {
	pref   uint32
	six    bool
	to     netip.Addr // invalid: any
	iif    string     // "" is any
	port   uint16     // of TCP; 0 is any
	last   uint16     // of the ports from port on; 0: that one
	proto  uint8      // where no port is given; 0 is any
	action uint8      // FR_ACT_TO_TBL, FR_ACT_GOTO, FR_ACT_NOP, FR_ACT_PROHIBIT
	arg    uint32     // the table, or the preference to go on at

	foreign  string       // somebody else's, in the words of ip(8) and without its preference
	within   netip.Prefix // where what it matches is sent; invalid: anywhere
	harmless bool         // it matches nothing that is forwarded, or decides nothing about where that goes
}

// protocols are those of rules without a port, in the words of ip(8).
var protocols = map[uint8]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp", unix.IPPROTO_ICMPV6: "ipv6-icmp"}

// ip is the command for rules of the family.
func (r policyRule) ip() string {
	if r.six {
		return "ip -6"
	}
	return "ip"
}

// String returns the rule as ip(8) adds it, without "ip rule add".
func (r policyRule) String() string {
	text := fmt.Sprintf("pref %d", r.pref)
	if r.foreign != "" {
		return text + " " + r.foreign
	}
	if r.iif != "" {
		text += " iif " + r.iif
	}
	if r.to.IsValid() {
		text += " to " + netip.PrefixFrom(r.to, r.to.BitLen()).String()
	}
	switch {
	case r.last != 0:
		text += fmt.Sprintf(" ipproto tcp dport %d-%d", r.port, r.last)
	case r.port != 0:
		text += fmt.Sprintf(" ipproto tcp dport %d", r.port)
	case r.proto != 0:
		text += " ipproto " + protocols[r.proto]
	}
	return text + actionText(r.action, r.arg) + " protocol kernel"
}

func actionText(action uint8, arg uint32) string {
	switch action {
	case unix.FR_ACT_TO_TBL:
		switch arg {
		case unix.RT_TABLE_MAIN:
			return " lookup main"
		case unix.RT_TABLE_LOCAL:
			return " lookup local"
		}
		return fmt.Sprintf(" lookup %d", arg)
	case unix.FR_ACT_GOTO:
		return fmt.Sprintf(" goto %d", arg)
	case unix.FR_ACT_NOP:
		return " nop"
	case unix.FR_ACT_BLACKHOLE:
		return " blackhole"
	case unix.FR_ACT_UNREACHABLE:
		return " unreachable"
	}
	return " prohibit"
}

// ours says whether the rule is one that any version of ours can have made.
func (r policyRule) ours() bool { return r.foreign == "" }

// serves says whether the rule brings requests to the emulator (mode loopback).
func (r policyRule) serves() bool { return r.action == unix.FR_ACT_TO_TBL && r.arg == ourTable }

// looksLocal says whether the rule has table local asked.
func (r policyRule) looksLocal() bool {
	return r.action == unix.FR_ACT_TO_TBL && r.arg == unix.RT_TABLE_LOCAL
}

// meets says whether somebody else's rule can match what the guard's rules are for.
func (r policyRule) meets(guard []policyRule) bool {
	return !r.harmless && slices.ContainsFunc(guard, func(g policyRule) bool {
		return g.to.IsValid() && (!r.within.IsValid() || r.within.Contains(g.to))
	})
}

// change sends one rule to the kernel. The messages are made here since netlink v1.3.1 neither
// tells a listed rule's action nor writes ipproto as the single byte that it is; and its attribute
// parser panics on a message that was cut short.
func (r policyRule) change(command, flags int) error {
	req := nl.NewNetlinkRequest(command, flags|unix.NLM_F_ACK)
	msg := &nl.RtMsg{RtMsg: unix.RtMsg{Family: unix.AF_INET, Type: r.action}}
	if r.six {
		msg.Family = unix.AF_INET6
	}
	attrs := []*nl.RtAttr{
		nl.NewRtAttr(nl.FRA_PRIORITY, nl.Uint32Attr(r.pref)),
		nl.NewRtAttr(nl.FRA_PROTOCOL, nl.Uint8Attr(unix.RTPROT_KERNEL)),
	}
	if r.to.IsValid() {
		msg.Dst_len = uint8(r.to.BitLen())
		attrs = append(attrs, nl.NewRtAttr(nl.FRA_DST, r.to.AsSlice()))
	}
	switch r.action {
	case unix.FR_ACT_TO_TBL:
		attrs = append(attrs, nl.NewRtAttr(nl.FRA_TABLE, nl.Uint32Attr(r.arg)))
	case unix.FR_ACT_GOTO:
		attrs = append(attrs, nl.NewRtAttr(nl.FRA_GOTO, nl.Uint32Attr(r.arg)))
	}
	if r.iif != "" {
		attrs = append(attrs, nl.NewRtAttr(nl.FRA_IIFNAME, nl.ZeroTerminated(r.iif)))
	}
	switch {
	case r.port != 0:
		ports := binary.NativeEndian.AppendUint16(nil, r.port)
		attrs = append(attrs,
			nl.NewRtAttr(nl.FRA_IP_PROTO, nl.Uint8Attr(unix.IPPROTO_TCP)),
			nl.NewRtAttr(nl.FRA_DPORT_RANGE, binary.NativeEndian.AppendUint16(ports, max(r.port, r.last))))
	case r.proto != 0:
		attrs = append(attrs, nl.NewRtAttr(nl.FRA_IP_PROTO, nl.Uint8Attr(r.proto)))
	}
	req.AddData(msg)
	for _, a := range attrs {
		req.AddData(a)
	}
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// standingRules lists all rules of one family.
func standingRules(six bool) (rules []policyRule, err error) {
	family := unix.AF_INET
	if six {
		family = unix.AF_INET6
	}
	messages, err := retryDump(func() ([][]byte, error) {
		req := nl.NewNetlinkRequest(unix.RTM_GETRULE, unix.NLM_F_DUMP)
		req.AddData(nl.NewIfInfomsg(family))
		return req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWRULE)
	})
	if six && noIPv6(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list ip rules: %w", err)
	}
	for _, m := range messages {
		if r, ok := parseRule(m); ok {
			rules = append(rules, r)
		}
	}
	return rules, nil
}

// parseRule reads one message of the kernel; ok is false where it is cut short. A rule that says
// more than ours do is foreign.
func parseRule(message []byte) (r policyRule, ok bool) {
	if len(message) < unix.SizeofRtMsg {
		return r, false
	}
	msg := nl.DeserializeRtMsg(message)
	r.six, r.action = msg.Family == unix.AF_INET6, msg.Type
	from, dst, more := "all", "", ""
	inverted := msg.Flags&netlink.FibRuleInvert != 0
	foreign := inverted || msg.Src_len != 0 || msg.Tos != 0
	var table, onward, mark, mask uint32
	var protocol uint8
	outgoing := false
	for rest := message[unix.SizeofRtMsg:]; len(rest) > 0; {
		if len(rest) < unix.SizeofRtAttr {
			return r, false
		}
		size, kind := int(binary.NativeEndian.Uint16(rest)), binary.NativeEndian.Uint16(rest[2:])
		if size < unix.SizeofRtAttr || size > len(rest) {
			return r, false
		}
		v := rest[unix.SizeofRtAttr:size]
		rest = rest[min((size+3)&^3, len(rest)):]
		switch kind {
		case nl.FRA_DST:
			a, valid := netip.AddrFromSlice(v)
			if !valid {
				return r, false
			}
			r.within = netip.PrefixFrom(a, int(msg.Dst_len))
			if dst = r.within.String(); int(msg.Dst_len) == a.BitLen() {
				r.to = a
			}
		case nl.FRA_SRC:
			if a, valid := netip.AddrFromSlice(v); valid {
				from = netip.PrefixFrom(a, int(msg.Src_len)).String()
			}
		case nl.FRA_PRIORITY:
			r.pref = number(v)
		case nl.FRA_TABLE:
			table = number(v)
		case nl.FRA_PROTOCOL:
			protocol = uint8(number(v))
		case nl.FRA_IP_PROTO:
			r.proto = uint8(number(v))
		case nl.FRA_IIFNAME:
			r.iif = unix.ByteSliceToString(v)
		case nl.FRA_OIFNAME:
			outgoing, foreign, more = true, true, more+" oif "+unix.ByteSliceToString(v)
		case nl.FRA_FWMARK:
			mark = number(v)
			foreign = true
		case nl.FRA_FWMASK:
			mask = number(v)
			foreign = foreign || mask != 0
		case nl.FRA_DPORT_RANGE:
			if len(v) != 4 {
				return r, false
			}
			if r.port, r.last = binary.NativeEndian.Uint16(v), binary.NativeEndian.Uint16(v[2:]); r.last == r.port {
				r.last = 0
			}
		case nl.FRA_GOTO:
			onward = number(v)
		case fraDportMask:
			foreign = foreign || len(v) != 2 || binary.NativeEndian.Uint16(v) != 1<<16-1
		case nl.FRA_SUPPRESS_PREFIXLEN:
			if n := int32(number(v)); n != -1 {
				foreign, more = true, fmt.Sprintf("%s suppress_prefixlength %d", more, n)
			}
		case nl.FRA_SUPPRESS_IFGROUP:
			foreign = foreign || number(v) != 1<<32-1
		default: // a selector or an action that ours do not have
			foreign = true
			if kind == nl.FRA_L3MDEV {
				more += " l3mdev"
			}
		}
	}
	switch r.action {
	case unix.FR_ACT_TO_TBL:
		r.arg = table
	case unix.FR_ACT_GOTO:
		r.arg = onward
	}
	if r.port != 0 && r.proto == unix.IPPROTO_TCP {
		r.proto = 0
	} else if r.port != 0 {
		foreign = true
	}
	if !foreign && protocol == unix.RTPROT_KERNEL && r.shaped() {
		r.within = netip.Prefix{}
		return r, true
	}
	r.foreign = "from " + from
	if inverted {
		r.foreign, r.within = "not "+r.foreign, netip.Prefix{}
	}
	if dst != "" {
		r.foreign += " to " + dst
	}
	if mark != 0 || mask != 0 {
		r.foreign += fmt.Sprintf(" fwmark %#x/%#x", mark, mask)
	}
	if r.iif != "" {
		r.foreign += " iif " + r.iif
	}
	r.harmless = !inverted && (outgoing || r.iif == "lo") || r.action == unix.FR_ACT_NOP ||
		r.action == unix.FR_ACT_TO_TBL && table == unix.RT_TABLE_LOCAL
	if r.proto != 0 {
		r.foreign += fmt.Sprintf(" ipproto %d", r.proto)
	}
	if r.port != 0 {
		r.foreign += fmt.Sprintf(" dport %d-%d", r.port, max(r.port, r.last))
	}
	r.foreign += more + actionText(r.action, r.arg)
	return r, true
}

// shaped says whether a version of ours makes rules of this form.
func (r policyRule) shaped() bool {
	if r.pref > lastPref || r.last != 0 && r.last <= r.port {
		return false
	}
	if !r.to.IsValid() {
		return r.action == unix.FR_ACT_NOP && !r.within.IsValid() && r.iif == "" && r.port == 0 && r.proto == 0
	}
	switch r.action {
	case unix.FR_ACT_TO_TBL: // the first versions had the host's own requests look into table main
		return (r.arg == ourTable || r.arg == unix.RT_TABLE_LOCAL) && r.port != 0 && r.iif == "" ||
			r.arg == unix.RT_TABLE_MAIN && r.port == 0 && r.iif != ""
	case unix.FR_ACT_GOTO, unix.FR_ACT_PROHIBIT:
		return r.proto == 0 || protocols[r.proto] != ""
	case unix.FR_ACT_NOP:
		return r.iif == "" && r.port == 0 && r.proto == 0
	}
	return false
}

// fraDportMask is FRA_DPORT_MASK of linux/fib_rules.h, which kernels from 6.15 on tell for every
// port.
const fraDportMask = 29

// number reads an attribute of one or four bytes; 0 is what none of ours has.
func number(v []byte) uint32 {
	switch len(v) {
	case 1:
		return uint32(v[0])
	case 4:
		return binary.NativeEndian.Uint32(v)
	}
	return 0
}

func noIPv6(err error) bool {
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)
}

// ruleTexts are the rules as ip(8) adds them, one a line.
func ruleTexts(rules []policyRule) string {
	var b strings.Builder
	for _, r := range rules {
		fmt.Fprintf(&b, "%s rule add %s\n", r.ip(), r)
	}
	return b.String()
}
