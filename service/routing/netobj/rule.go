package netobj

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	attributes "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Rule is a policy rule. Those that have nothing but these selectors and are marked protocol kernel
// are read with all that they say, and can be added; of others Foreign has the text.
type Rule struct {
	Pref   uint32
	To     netip.Prefix // of length 0: any address of the family
	IIF    string       // "": any
	Port   uint16       // of TCP; 0: any
	Last   uint16       // of the ports from Port on; 0: Port alone
	Proto  uint8        // where no Port is given; 0: any
	Action uint8        // unix.FR_ACT_TO_TBL and so on
	Arg    uint32       // the table, or the preference to go on at

	Foreign string // another rule in the words of ip(8), without its preference; To is any where it is inverted
	Sent    bool   // another rule that matches only what this host sends
}

// protocols are those of rules without a port, in the words of ip(8).
var protocols = map[uint8]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp", unix.IPPROTO_ICMPV6: "ipv6-icmp"}

func (r Rule) family() uint8 { return familyOf(r.To.Addr()) }

// Command implements Object.
func (r Rule) Command() string { return command("rule", r.family()) }

func (r Rule) String() string {
	text := fmt.Sprintf("pref %d", r.Pref)
	if r.Foreign != "" {
		return text + " " + r.Foreign
	}
	if r.IIF != "" {
		text += " iif " + r.IIF
	}
	if r.To.Bits() > 0 {
		text += " to " + r.To.String()
	}
	switch {
	case r.Last != 0:
		text += fmt.Sprintf(" ipproto tcp dport %d-%d", r.Port, r.Last)
	case r.Port != 0:
		text += fmt.Sprintf(" ipproto tcp dport %d", r.Port)
	case protocols[r.Proto] != "":
		text += " ipproto " + protocols[r.Proto]
	case r.Proto != 0:
		text += fmt.Sprintf(" ipproto %d", r.Proto)
	}
	return text + actionText(r.Action, r.Arg) + " protocol kernel"
}

func actionText(action uint8, arg uint32) string {
	switch action {
	case unix.FR_ACT_TO_TBL:
		return " lookup " + tableName(int(arg))
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

// Looks says whether the rule has the table asked.
func (r Rule) Looks(table uint32) bool { return r.Action == unix.FR_ACT_TO_TBL && r.Arg == table }

// Diverts says whether the rule can decide where a packet goes that is forwarded to the address. To
// take it for this node's own is no such decision.
func (r Rule) Diverts(a netip.Addr) bool {
	forwarded := !r.Sent && r.IIF != loopback
	return r.To.Contains(a) && forwarded && r.Action != unix.FR_ACT_NOP && !r.Looks(unix.RT_TABLE_LOCAL)
}

func (r Rule) add() error {
	err := r.change(unix.RTM_NEWRULE, unix.NLM_F_CREATE)
	if r.family() == unix.AF_INET6 && noIPv6(err) {
		return nil // no packet either
	}
	return err
}

func (r Rule) del() error { return r.change(unix.RTM_DELRULE, 0) }

// change sends one rule to the kernel. The message is made here since netlink v1.3.1 does not write
// ipproto as the single byte that it is, nor tells a listed rule's action; and its attribute parser
// panics on a message that was cut short.
func (r Rule) change(command, flags int) error {
	req := nl.NewNetlinkRequest(command, flags|unix.NLM_F_ACK)
	msg := &nl.RtMsg{RtMsg: unix.RtMsg{Family: r.family(), Type: r.Action}}
	attrs := []*nl.RtAttr{
		nl.NewRtAttr(nl.FRA_PRIORITY, nl.Uint32Attr(r.Pref)),
		nl.NewRtAttr(nl.FRA_PROTOCOL, nl.Uint8Attr(unix.RTPROT_KERNEL)),
	}
	if r.To.Bits() > 0 {
		msg.Dst_len = uint8(r.To.Bits())
		attrs = append(attrs, nl.NewRtAttr(nl.FRA_DST, r.To.Addr().AsSlice()))
	}
	switch r.Action {
	case unix.FR_ACT_TO_TBL:
		attrs = append(attrs, nl.NewRtAttr(nl.FRA_TABLE, nl.Uint32Attr(r.Arg)))
	case unix.FR_ACT_GOTO:
		attrs = append(attrs, nl.NewRtAttr(nl.FRA_GOTO, nl.Uint32Attr(r.Arg)))
	}
	if r.IIF != "" {
		attrs = append(attrs, nl.NewRtAttr(nl.FRA_IIFNAME, nl.ZeroTerminated(r.IIF)))
	}
	switch {
	case r.Port != 0:
		ports := binary.NativeEndian.AppendUint16(nil, r.Port)
		attrs = append(attrs,
			nl.NewRtAttr(nl.FRA_IP_PROTO, nl.Uint8Attr(unix.IPPROTO_TCP)),
			nl.NewRtAttr(nl.FRA_DPORT_RANGE, binary.NativeEndian.AppendUint16(ports, max(r.Port, r.Last))))
	case r.Proto != 0:
		attrs = append(attrs, nl.NewRtAttr(nl.FRA_IP_PROTO, nl.Uint8Attr(r.Proto)))
	}
	req.AddData(msg)
	for _, a := range attrs {
		req.AddData(a)
	}
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

func readRules(family uint8) (all []Object, err error) {
	messages, err := Dump(func() ([][]byte, error) {
		req := nl.NewNetlinkRequest(unix.RTM_GETRULE, unix.NLM_F_DUMP)
		req.AddData(nl.NewIfInfomsg(int(family)))
		return req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWRULE)
	})
	if family == unix.AF_INET6 && noIPv6(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list ip rules: %w", err)
	}
	for _, m := range messages {
		if r, ok := ParseRule(m); ok {
			all = append(all, r)
		}
	}
	return all, nil
}

// fraDportMask is FRA_DPORT_MASK of linux/fib_rules.h, which kernels from 6.15 on tell for every
// port.
const fraDportMask = 29

// ParseRule reads one message of the kernel; ok is false where it is cut short.
func ParseRule(message []byte) (r Rule, ok bool) {
	if len(message) < unix.SizeofRtMsg {
		return r, false
	}
	msg := nl.DeserializeRtMsg(message)
	ad, err := attributes.NewAttributeDecoder(message[unix.SizeofRtMsg:])
	if err != nil {
		return r, false
	}
	r.To, r.Action = anyOf(msg.Family), msg.Type
	inverted := msg.Flags&netlink.FibRuleInvert != 0
	foreign := inverted || msg.Src_len != 0 || msg.Tos != 0
	from, more, outgoing := "all", "", false
	var table, onward, mark, mask uint32
	var protocol uint8
	prefix := func(bits uint8) (p netip.Prefix) {
		if a, valid := netip.AddrFromSlice(ad.Bytes()); valid && familyOf(a) == msg.Family {
			p = netip.PrefixFrom(a, int(bits))
		}
		return p
	}
	for ad.Next() {
		switch ad.Type() {
		case nl.FRA_DST:
			if r.To = prefix(msg.Dst_len); !r.To.IsValid() {
				return r, false
			}
		case nl.FRA_SRC:
			from = prefix(msg.Src_len).String()
		case nl.FRA_PRIORITY:
			r.Pref = ad.Uint32()
		case nl.FRA_TABLE:
			table = ad.Uint32()
		case nl.FRA_PROTOCOL:
			protocol = ad.Uint8()
		case nl.FRA_IP_PROTO:
			r.Proto = ad.Uint8()
		case nl.FRA_IIFNAME:
			r.IIF = ad.String()
		case nl.FRA_OIFNAME:
			outgoing, foreign, more = true, true, more+" oif "+ad.String()
		case nl.FRA_FWMARK:
			mark, foreign = ad.Uint32(), true
		case nl.FRA_FWMASK:
			mask = ad.Uint32()
			foreign = foreign || mask != 0
		case nl.FRA_DPORT_RANGE:
			v := ad.Bytes()
			if len(v) != 4 {
				return r, false
			}
			if r.Port, r.Last = binary.NativeEndian.Uint16(v), binary.NativeEndian.Uint16(v[2:]); r.Last == r.Port {
				r.Last = 0
			}
		case nl.FRA_GOTO:
			onward = ad.Uint32()
		case fraDportMask:
			foreign = ad.Uint16() != 1<<16-1 || foreign
		case nl.FRA_SUPPRESS_PREFIXLEN:
			if n := ad.Int32(); n != -1 {
				foreign, more = true, fmt.Sprintf("%s suppress_prefixlength %d", more, n)
			}
		case nl.FRA_SUPPRESS_IFGROUP:
			foreign = ad.Uint32() != 1<<32-1 || foreign
		case nl.FRA_L3MDEV:
			foreign, more = true, more+" l3mdev"
		default: // another selector or action
			foreign = true
		}
	}
	if ad.Err() != nil {
		return r, false
	}
	switch r.Action {
	case unix.FR_ACT_TO_TBL:
		r.Arg = table
	case unix.FR_ACT_GOTO:
		r.Arg = onward
	}
	if r.Port != 0 && r.Proto == unix.IPPROTO_TCP {
		r.Proto = 0
	} else if r.Port != 0 {
		foreign = true
	}
	if !foreign && protocol == unix.RTPROT_KERNEL {
		return r, true
	}
	text := "from " + from
	if inverted {
		text = "not " + text
	}
	if r.To.Bits() > 0 {
		text += " to " + r.To.String()
	}
	if mark != 0 || mask != 0 {
		text += fmt.Sprintf(" fwmark %#x/%#x", mark, mask)
	}
	if r.IIF != "" {
		text += " iif " + r.IIF
	}
	if r.Proto != 0 {
		text += fmt.Sprintf(" ipproto %d", r.Proto)
	}
	if r.Port != 0 {
		text += fmt.Sprintf(" dport %d-%d", r.Port, max(r.Port, r.Last))
	}
	r.Foreign, r.Sent = text+more+actionText(r.Action, r.Arg), outgoing
	if inverted {
		r.To, r.IIF, r.Sent = anyOf(msg.Family), "", false
	}
	return r, true
}
