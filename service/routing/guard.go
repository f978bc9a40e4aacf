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

// The guard that does not depend on netfilter. ip rule prints, for every guarded address:
//
//	97: from all to 169.254.169.254 iif lo lookup main proto kernel
//	98: from all to 169.254.169.254 ipproto tcp dport 80 prohibit proto kernel
//
// Redirected packets have another destination by the time they are routed, so these rules see only what would leak. DNS at
// 169.254.169.254:53 passes. "not iif lo … prohibit" would negate the whole selector and cut pods off.
//
// A rule that names a port matches no fragment, not even the first, in which the port is, and who may send packets of his own making can
// have any be one. Netfilter puts fragments together before they are routed, if it does anything at all. So behind these rules the
// server's other ports are let go on by name, and the rest of TCP is not; of IPv6, where headers can lie between the fragment's and
// TCP's, the rest of everything:
//
//	101: from all to 169.254.169.254 ipproto tcp dport 1-79 goto 103 proto kernel
//	101: from all to 169.254.169.254 ipproto tcp dport 81-65534 goto 103 proto kernel
//	102: from all to 169.254.169.254 ipproto tcp prohibit proto kernel
//	103: from all to 169.254.169.254 nop proto kernel
//
// R-10b: iif lo is all that this host sends, its own daemons and pods on the host network alike. Those pods reach the real
// server when only these rules are left; for them the promise holds while the netfilter rules stand.
//
// In mode loopback they bring requests to the emulator, too: what pods send to the metadata server's port is this node's own, and
// what other hosts send there is refused, a door that does not depend on netfilter either.
//
//	97: from all to 169.254.169.254 iif lo lookup main proto kernel
//	97: from all to 169.254.169.254 iif eth0 ipproto tcp dport 80 prohibit proto kernel
//	98: from all to 169.254.169.254 ipproto tcp dport 80 lookup 988 proto kernel
//	99: from all to 169.254.169.254 ipproto tcp dport 80 prohibit proto kernel
//
// proto kernel keeps networkd ≥ 248 from deleting the rules, and with the preference and the shape shows whose they are.
const (
	prefExempt  = 97
	prefGuard   = 98
	prefBehind  = 99  // what is prohibited where the table of 98 is empty
	prefPass    = 101 // what goes on at prefOnward (Cilium has table local at 100, which nothing is to go past),
	prefRest    = 102 // since all else is prohibited
	prefOnward  = 103
	ourTable    = 988 // where mode loopback has its route
	noTable     = 0   // a prohibition, but at prefPass and prefOnward
	mainTable   = unix.RT_TABLE_MAIN
	lastOfPrefs = prefOnward
	lastPort    = 65534 // that a rule can name
)

// policyRule is one rule of the guard.
type policyRule struct {
	pref  uint32
	to    netip.Addr
	iif   string // "" is any
	port  uint16 // of TCP; 0 is any
	last  uint16 // of the ports from port on; 0: that one
	proto uint8  // where no port is given; 0 is any
	table uint32 // noTable, mainTable or ourTable
}

// action is what the kernel calls what the rule does.
func (r policyRule) action() uint8 {
	switch {
	case r.pref == prefPass:
		return nl.FR_ACT_GOTO
	case r.pref == prefOnward:
		return nl.FR_ACT_NOP
	case r.table == noTable:
		return nl.FR_ACT_PROHIBIT
	}
	return nl.FR_ACT_TO_TBL
}

// protocols are those of rules without a port, in the words of ip(8).
var protocols = map[uint8]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp", unix.IPPROTO_ICMPV6: "ipv6-icmp"}

// String returns the rule as ip(8) adds it, without "ip rule add".
func (r policyRule) String() string {
	text := fmt.Sprintf("pref %d", r.pref)
	if r.iif != "" {
		text += " iif " + r.iif
	}
	text += " to " + netip.PrefixFrom(r.to, r.to.BitLen()).String()
	switch {
	case r.last != 0:
		text += fmt.Sprintf(" ipproto tcp dport %d-%d", r.port, r.last)
	case r.port != 0:
		text += fmt.Sprintf(" ipproto tcp dport %d", r.port)
	case r.proto != 0:
		text += " ipproto " + protocols[r.proto]
	}
	switch action := r.action(); {
	case action == nl.FR_ACT_GOTO:
		text += fmt.Sprintf(" goto %d", prefOnward)
	case action == nl.FR_ACT_NOP:
		text += " nop"
	case action == nl.FR_ACT_PROHIBIT:
		text += " prohibit"
	case r.table == mainTable:
		text += " lookup main"
	default:
		text += fmt.Sprintf(" lookup %d", r.table)
	}
	return text + " protocol kernel"
}

// guardRules are the Plan's, exemptions first: nobody is cut off for the moment in between. Mode loopback needs the uplinks.
func guardRules(p Plan, s surroundings) (rules []policyRule) {
	exempt := p.Guard
	if p.Mode == ModeLoopback && !p.Closed {
		exempt = append(slices.Clone(exempt), metadataServer) // else the host's own requests came to us too
	}
	for _, g := range exempt {
		for _, name := range append([]string{"lo"}, p.Spare...) {
			if r := (policyRule{pref: prefExempt, to: g.Addr(), iif: name, table: mainTable}); !slices.Contains(rules, r) {
				rules = append(rules, r)
			}
		}
	}
	if p.Mode == ModeLoopback && !p.Closed {
		to, port := metadataServer.Addr(), metadataServer.Port()
		for _, name := range s.uplinks {
			if !strings.HasSuffix(name, "+") { // policy rules know no pattern
				rules = append(rules, policyRule{pref: prefExempt, to: to, iif: name, port: port})
			}
		}
		rules = append(rules, policyRule{pref: prefGuard, to: to, port: port, table: ourTable}, policyRule{pref: prefBehind, to: to, port: port})
	}
	for _, g := range p.Guard {
		if r := (policyRule{pref: prefGuard, to: g.Addr(), port: g.Port()}); g != metadataServer || p.Mode != ModeLoopback || p.Closed {
			rules = append(rules, r)
		}
	}
	return append(rules, restRules(exempt)...)
}

// restRules prohibit what is sent to the guarded addresses and of which no rule can tell the port, whoever begins with what passes.
func restRules(guarded []netip.AddrPort) (rules []policyRule) {
	var order []netip.Addr
	ports := map[netip.Addr][]uint16{}
	for _, g := range guarded {
		if !slices.Contains(order, g.Addr()) {
			order = append(order, g.Addr())
		}
		ports[g.Addr()] = append(ports[g.Addr()], g.Port())
	}
	for _, to := range order {
		rules = append(rules, policyRule{pref: prefOnward, to: to})
		rest := policyRule{pref: prefRest, to: to, proto: unix.IPPROTO_TCP}
		if to.Is6() {
			rest.proto = 0
			rules = append(rules, policyRule{pref: prefPass, to: to, proto: unix.IPPROTO_UDP}, policyRule{pref: prefPass, to: to, proto: unix.IPPROTO_ICMPV6})
		}
		slices.Sort(ports[to])
		from := uint16(1)
		for _, port := range append(ports[to], lastPort+1) {
			switch {
			case port == from+1:
				rules = append(rules, policyRule{pref: prefPass, to: to, port: from})
			case port > from:
				rules = append(rules, policyRule{pref: prefPass, to: to, port: from, last: port - 1})
			}
			from = max(from, port+1)
		}
		rules = append(rules, rest)
	}
	return rules
}

// installGuard adds what is missing and then deletes what an earlier Plan wanted, but for the way of mode loopback: see removeWay.
func installGuard(p Plan, s surroundings) error {
	if err := addGuard(p, s); err != nil {
		return err
	}
	have, err := standingGuard()
	if err != nil {
		return err
	}
	want := guardRules(p, s)
	if p.Mode != ModeLoopback {
		have = slices.DeleteFunc(have, policyRule.ofWay)
	}
	return deleteGuard(have, want)
}

// ofWay says whether the rule is one of those that bring requests to the emulator in mode loopback, or that keep others from that.
func (r policyRule) ofWay() bool {
	return r.table == ourTable || r.table == noTable && (r.pref == prefBehind || r.pref == prefExempt)
}

// removeWay deletes the rules that mode loopback has besides the guard. Where another mode follows, that one's way stands by then.
func removeWay() error {
	have, err := standingGuard()
	if err != nil {
		return err
	}
	return deleteGuard(slices.DeleteFunc(have, func(r policyRule) bool { return !r.ofWay() }), nil)
}

// addGuard adds what is missing.
func addGuard(p Plan, s surroundings) error {
	have, err := standingGuard()
	if err != nil {
		return err
	}
	for _, r := range guardRules(p, s) {
		if slices.Contains(have, r) {
			continue
		}
		if err := r.change(unix.RTM_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_EXCL); err != nil && !errors.Is(err, unix.EEXIST) {
			if r.to.Is6() && noIPv6(err) {
				continue // nothing can leak where there is no IPv6
			}
			return fmt.Errorf("ip rule add %s: %w", r, permission(err))
		}
	}
	return nil
}

// removeGuard deletes all rules of the guard, whoever's Plan they were.
func removeGuard() error {
	have, err := standingGuard()
	if err != nil {
		return err
	}
	return deleteGuard(have, nil)
}

// deleteGuard deletes those that are not wanted, prohibitions first.
func deleteGuard(have, want []policyRule) error {
	var errs []error
	for _, pref := range []uint32{prefRest, prefPass, prefOnward, prefBehind, prefGuard, prefExempt} {
		for _, r := range have {
			if r.pref != pref || slices.Contains(want, r) {
				continue
			}
			if err := r.change(unix.RTM_DELRULE, 0); err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("ip rule del %s: %w", r, permission(err)))
			}
		}
	}
	return errors.Join(errs...)
}

// checkGuard names the rules that are not there.
func checkGuard(p Plan, s surroundings) []error {
	have, err := standingGuard()
	if err != nil {
		return []error{err}
	}
	var errs []error
	for _, r := range guardRules(p, s) {
		if r.to.Is6() && !haveIPv6() {
			continue
		}
		if !slices.Contains(have, r) {
			errs = append(errs, missing(layerRule, "ip rule: %s", r))
		}
	}
	return errs
}

// change sends one rule to the kernel. The messages are made here since netlink v1.3.1 neither tells a listed rule's action nor
// writes ipproto as the single byte that it is; and its attribute parser panics on a message that was cut short.
func (r policyRule) change(command, flags int) error {
	req := nl.NewNetlinkRequest(command, flags|unix.NLM_F_ACK)
	msg := &nl.RtMsg{RtMsg: unix.RtMsg{Family: unix.AF_INET, Dst_len: uint8(r.to.BitLen())}}
	if r.to.Is6() {
		msg.Family = unix.AF_INET6
	}
	attrs := []*nl.RtAttr{
		nl.NewRtAttr(nl.FRA_DST, r.to.AsSlice()),
		nl.NewRtAttr(nl.FRA_PRIORITY, nl.Uint32Attr(r.pref)),
		nl.NewRtAttr(nl.FRA_PROTOCOL, nl.Uint8Attr(unix.RTPROT_KERNEL)),
	}
	switch msg.Type = r.action(); msg.Type {
	case nl.FR_ACT_TO_TBL:
		attrs = append(attrs, nl.NewRtAttr(nl.FRA_TABLE, nl.Uint32Attr(r.table)))
	case nl.FR_ACT_GOTO:
		attrs = append(attrs, nl.NewRtAttr(nl.FRA_GOTO, nl.Uint32Attr(prefOnward)))
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

// standingGuard lists the rules of the guard's shape in both families.
func standingGuard() (rules []policyRule, err error) {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		messages, err := retryDump(func() ([][]byte, error) {
			req := nl.NewNetlinkRequest(unix.RTM_GETRULE, unix.NLM_F_DUMP)
			req.AddData(nl.NewIfInfomsg(family))
			return req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWRULE)
		})
		if err != nil {
			if family == unix.AF_INET6 && noIPv6(err) {
				break
			}
			return nil, fmt.Errorf("list ip rules: %w", err)
		}
		for _, m := range messages {
			if r, ours := parseRule(m); ours {
				rules = append(rules, r)
			}
		}
	}
	return rules, nil
}

// parseRule reads one message of the kernel and says whether it is a rule as change makes them, and nothing more.
func parseRule(message []byte) (r policyRule, ours bool) {
	if len(message) < unix.SizeofRtMsg {
		return r, false
	}
	msg := nl.DeserializeRtMsg(message)
	if msg.Src_len != 0 || msg.Tos != 0 || msg.Flags&netlink.FibRuleInvert != 0 {
		return r, false
	}
	var table, onward uint32
	var protocol uint8
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
			to, ok := netip.AddrFromSlice(v)
			if !ok || int(msg.Dst_len) != to.BitLen() {
				return r, false
			}
			r.to = to
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
			if len(v) != 2 || binary.NativeEndian.Uint16(v) != 1<<16-1 {
				return r, false
			}
		case nl.FRA_SUPPRESS_PREFIXLEN, nl.FRA_SUPPRESS_IFGROUP:
			if number(v) != 1<<32-1 {
				return r, false
			}
		default: // a selector or an action that ours do not have
			return r, false
		}
	}
	if protocol != unix.RTPROT_KERNEL || !r.to.IsValid() {
		return r, false
	}
	if msg.Type == nl.FR_ACT_TO_TBL {
		if r.table = table; table == noTable {
			return r, false
		}
	}
	if r.port != 0 {
		if r.proto != unix.IPPROTO_TCP {
			return r, false
		}
		r.proto = 0
	}
	return r, msg.Type == r.action() && (onward == prefOnward) == (r.pref == prefPass) && r.shaped()
}

// shaped says whether ours have a rule of this form at its preference.
func (r policyRule) shaped() bool {
	all := r.port == 0 && r.proto == 0
	switch r.pref {
	case prefExempt:
		return r.iif != "" && (all && r.table == mainTable || r.port != 0 && r.last == 0 && r.table == noTable)
	case prefGuard:
		return r.iif == "" && r.port != 0 && r.last == 0 && (r.table == noTable || r.table == ourTable)
	case prefBehind:
		return r.iif == "" && r.port != 0 && r.last == 0 && r.table == noTable
	case prefPass:
		return r.iif == "" && !all && (r.last == 0 || r.last > r.port)
	case prefRest:
		return r.iif == "" && r.port == 0 && r.table == noTable && (all == r.to.Is6()) && (all || r.proto == unix.IPPROTO_TCP)
	case prefOnward:
		return r.iif == "" && all
	}
	return false
}

// fraDportMask is FRA_DPORT_MASK of linux/fib_rules.h, which kernels from 6.15 on tell for every port.
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
