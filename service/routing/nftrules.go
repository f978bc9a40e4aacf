package routing

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
)

// nftTable is the name of the one table that is ours, of family ip, and of family ip6 where
// something there is guarded or redirected (H-24). In mode nftables with listen
// 169.254.169.252:988, the uplink eth0 and docker0 spared, nft list table prints
//
//	table ip gke-metadata-emulator {
//		chain raw {
//			type filter hook prerouting priority raw - 10; policy accept;
//			iifname != "lo" ip daddr 169.254.169.252 tcp dport 988 drop
//			iifname "docker0" return
//			ip daddr 169.254.169.254 tcp dport 80 ct zone set 0
//			ip saddr 169.254.169.252 tcp sport 988 ct zone set 0
//		}
//		chain raw-output {
//			type filter hook output priority raw - 10; policy accept;
//			ip daddr 169.254.169.254 tcp dport 80 ct zone set 0
//			ip saddr 169.254.169.252 tcp sport 988 ct zone set 0
//		}
//		chain forward {
//			type filter hook forward priority filter - 10; policy accept;
//			iifname "docker0" return
//			ip daddr 169.254.169.254 tcp dport 80 reject with tcp reset
//			…
//		}
//		chain input {
//			type filter hook input priority filter - 10; policy accept;
//			ip daddr 169.254.169.252 tcp dport 988 ct status snat reject with tcp reset
//			ip daddr 169.254.169.252 tcp dport 988 ct original ip daddr 169.254.169.254 accept
//			iifname != "lo" ip daddr 169.254.169.252 tcp dport 988 drop
//		}
//		chain local {
//			type filter hook output priority filter - 10; policy accept;
//			ip saddr 169.254.169.252 tcp sport 988 tcp flags & rst == 0 ct status snat drop
//		}
//		chain output {
//			type nat hook output priority -110; policy accept;
//			socket cgroupv2 level 1 "system.slice" return
//			ip daddr 169.254.169.254 tcp dport 80 counter … dnat to 169.254.169.252:988
//		}
//		chain prerouting {
//			type nat hook prerouting priority dstnat - 10; policy accept;
//			iifname { lo, docker0, eth0 } return                               (a rule each)
//			ip daddr 169.254.169.254 tcp dport 80 counter … dnat to 169.254.169.252:988
//		}
//	}
//
// An accept is final for its own chain only: what a later chain of somebody else's refuses stays
// refused. So there is no accept for what is forwarded to an emulator elsewhere, nor for
// what the node itself sends to the listener, which mode iptables has.
const nftTable = "gke-metadata-emulator"

// nftChain is one base chain of our table.
type nftChain struct {
	name, kind, hook string // such as prerouting, nat, prerouting
	priority         int
	rules            []nftRule
}

// hooks are netfilter's, by the words of nft.
var hooks = map[string]*nftables.ChainHook{
	"prerouting": nftables.ChainHookPrerouting, "input": nftables.ChainHookInput,
	"forward": nftables.ChainHookForward, "output": nftables.ChainHookOutput,
}

// Priorities: before everybody else's of the hook, by ten. nft 1.0.6 refuses "dstnat - 10" in
// output, so they are numbers in what is shown.
const (
	priorityRaw     = -310
	priorityDestNAT = -110
	priorityFilter  = -10
)

// head is the chain's first line.
func (c nftChain) head() string {
	return fmt.Sprintf("type %s hook %s priority %d; policy accept;", c.kind, c.hook, c.priority)
}

// nftRule is a rule as nft writes it, and as the kernel gets it. The text lies with the rule in the
// kernel, where nft does not show it: a rule is never changed, only replaced, so it tells what the
// rule is, whatever a kernel makes of the expressions when they are read back.
type nftRule struct {
	text  string
	mark  string // the text, and what it stands for that it does not tell
	exprs []expr.Any
}

// nftPart is a part of a rule.
type nftPart = nftRule

func rule(parts ...nftPart) (r nftRule) {
	var texts, marks []string
	for _, p := range parts {
		texts = append(texts, p.text)
		if p.mark != "" {
			marks = append(marks, p.mark)
		}
		r.exprs = append(r.exprs, p.exprs...)
	}
	r.text = strings.Join(texts, " ")
	r.mark = strings.Join(append([]string{r.text}, marks...), "\x00")
	return r
}

func equals(value []byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: value} }

// byInterface matches where a packet came in; a trailing + stands for any ending, as iptables has
// it.
func byInterface(name string) nftPart {
	value, text := []byte(name+"\x00"), name
	if beginning, any := strings.CutSuffix(name, "+"); any {
		value, text = []byte(beginning), beginning+"*"
	} else {
		value = append(value, make([]byte, unix.IFNAMSIZ-len(value))...)
	}
	return nftPart{text: fmt.Sprintf("iifname %q", text), exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, equals(value)}}
}

func notLoopback() nftPart {
	p := byInterface("lo")
	p.text = `iifname != "lo"`
	p.exprs[1].(*expr.Cmp).Op = expr.CmpOpNeq
	return p
}

// toServer matches packets of TCP to an address and a port.
func toServer(a netip.AddrPort) nftPart { return ofTCP(a, "daddr %s tcp dport %d", 16, 24, 2) }

// fromServer matches packets of TCP from an address and a port.
func fromServer(a netip.AddrPort) nftPart { return ofTCP(a, "saddr %s tcp sport %d", 12, 8, 0) }

// ofTCP matches packets of TCP that have the address at one of the offsets, which are those of IPv4
// and of IPv6, and the port at its own.
func ofTCP(a netip.AddrPort, format string, ipv4, ipv6, port uint32) nftPart {
	word, offset := "ip ", ipv4
	if a.Addr().Is6() {
		word, offset = "ip6 ", ipv6
	}
	return nftPart{text: word + fmt.Sprintf(format, a.Addr(), a.Port()), exprs: []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset,
			Len: uint32(a.Addr().BitLen() / 8)}, equals(a.Addr().AsSlice()),
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, equals([]byte{unix.IPPROTO_TCP}),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: port, Len: 2},
		equals(binary.BigEndian.AppendUint16(nil, a.Port())),
	}}
}

// notReset matches packets of TCP without the flag RST.
func notReset() nftPart {
	return nftPart{text: "tcp flags & rst == 0", exprs: []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{4}, Xor: []byte{0}}, equals([]byte{0}),
	}}
}

// sourceTranslated matches packets of connections whose source address or port conntrack changed.
func sourceTranslated() nftPart {
	const ipsSrcNAT = 1 << 4 // IPS_SRC_NAT of linux/netfilter/nf_conntrack_common.h
	return nftPart{text: "ct status snat", exprs: []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATUS, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binary.NativeEndian.AppendUint32(nil, ipsSrcNAT), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}}
}

// tracked is what track is of iptables.
func tracked() nftPart {
	return nftPart{text: "ct zone set 0", exprs: []expr.Any{
		&expr.Immediate{Register: 1, Data: make([]byte, 2)},
		&expr.Ct{Key: expr.CtKeyZONE, Register: 1, SourceRegister: true}}}
}

// originallyTo matches what was sent to the address before DNAT.
func originallyTo(a netip.Addr) nftPart {
	word := "ip"
	if a.Is6() {
		word = "ip6"
	}
	return nftPart{text: fmt.Sprintf("ct original %s daddr %s", word, a), exprs: []expr.Any{
		&expr.Ct{Key: expr.CtKeyDST, Register: 1}, equals(a.AsSlice())}}
}

// ofCgroup matches what sockets of a cgroup send. The rule holds the number of the cgroup: one that
// is made anew has another.
func ofCgroup(path string) (nftPart, error) {
	info, err := os.Stat(filepath.Join(cgroup2(), path))
	if err != nil {
		return nftPart{}, err
	}
	id, err := inode(info)
	level := strings.Count(path, "/") + 1
	return nftPart{text: fmt.Sprintf("socket cgroupv2 level %d %q", level, path), mark: fmt.Sprint(id), exprs: []expr.Any{
		&expr.Socket{Key: expr.SocketKeyCgroupv2, Level: uint32(level), Register: 1},
		equals(binary.NativeEndian.AppendUint64(nil, id)),
	}}, err
}

func verdict(word string, kind expr.VerdictKind) nftPart {
	return nftPart{text: word, exprs: []expr.Any{&expr.Verdict{Kind: kind}}}
}

func accept() nftPart { return verdict("accept", expr.VerdictAccept) }
func drop() nftPart   { return verdict("drop", expr.VerdictDrop) }
func leave() nftPart  { return verdict("return", expr.VerdictReturn) }

func reset() nftPart {
	return nftPart{text: "reject with tcp reset", exprs: []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}}
}

// dnat counts, so that an operator sees whether anybody asks.
func dnat(to netip.AddrPort) nftPart {
	family := uint32(unix.NFPROTO_IPV4)
	if to.Addr().Is6() {
		family = unix.NFPROTO_IPV6
	}
	return nftPart{text: "counter dnat to " + to.String(), exprs: []expr.Any{
		&expr.Counter{},
		&expr.Immediate{Register: 1, Data: to.Addr().AsSlice()},
		&expr.Immediate{Register: 2, Data: binary.BigEndian.AppendUint16(nil, to.Port())},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: family, RegAddrMin: 1, RegProtoMin: 2},
	}}
}

// nftChainsFor is the Plan as chains of one family, in the order in which they are put up; none:
// there is to be no table.
func nftChainsFor(p Plan, s nodeFacts, family netobj.Family) (chains []nftChain, err error) {
	forward := nftChain{name: "forward", kind: "filter", hook: "forward", priority: priorityFilter}
	for _, name := range p.Spare {
		forward.rules = append(forward.rules, rule(byInterface(name), leave()))
	}
	guarded := false
	w := p.target(s, family)
	for _, a := range resetServers(p, s) {
		if family.Has(a.Addr()) {
			guarded = true
			forward.rules = append(forward.rules, rule(toServer(a), reset()))
		}
	}
	if family == netobj.IPv6 && !w.listen.IsValid() && (p.dnats() || p.Listen.Addr().Is4()) {
		if guarded {
			chains = append(chains, forward)
		}
		return chains, nil
	}
	if !p.dnats() {
		// Modes loopback, none and ebpf redirect by other means. No clash of ports: all clients
		// send to one address and port, so two of one source are one connection.
		return append(doors(p, s, family), forward), nil
	}
	raw := nftChain{name: "raw", kind: "filter", hook: "prerouting", priority: priorityRaw}
	input := nftChain{name: "input", kind: "filter", hook: "input", priority: priorityFilter}
	local := nftChain{name: "local", kind: "filter", hook: "output", priority: priorityFilter}
	// two doors, each of which holds alone. A-18 (port clash): see chainsFor.
	raw.rules = []nftRule{rule(notLoopback(), toServer(w.listen), drop())}
	local.rules = []nftRule{rule(fromServer(w.listen), notReset(), sourceTranslated(), drop())}
	for _, name := range p.Spare {
		raw.rules = append(raw.rules, rule(byInterface(name), leave()))
	}
	raw.rules = append(raw.rules, rule(toServer(w.server), tracked()), rule(fromServer(w.listen), tracked()))
	rawOut := nftChain{name: "raw-output", kind: "filter", hook: "output", priority: priorityRaw}
	if s.hostPods {
		rawOut.rules = []nftRule{rule(toServer(w.server), tracked())}
	}
	rawOut.rules = append(rawOut.rules, rule(fromServer(w.listen), tracked()))
	input.rules = []nftRule{
		rule(toServer(w.listen), sourceTranslated(), reset()),
		rule(toServer(w.listen), originallyTo(w.server.Addr()), accept()),
		rule(notLoopback(), toServer(w.listen), drop()),
	}
	chains = []nftChain{raw, rawOut, forward, input, local}
	if s.hostPods {
		output := nftChain{name: "output", kind: "nat", hook: "output", priority: priorityDestNAT}
		for _, slice := range s.slices {
			of, err := ofCgroup(slice)
			if err != nil {
				return nil, err
			}
			output.rules = append(output.rules, rule(of, leave()))
		}
		output.rules = append(output.rules, rule(toServer(w.server), dnat(w.listen)))
		chains = append(chains, output)
	}
	prerouting := nftChain{name: "prerouting", kind: "nat", hook: "prerouting", priority: priorityDestNAT}
	for _, name := range spared(p, s) {
		prerouting.rules = append(prerouting.rules, rule(byInterface(name), leave()))
	}
	prerouting.rules = append(prerouting.rules, rule(toServer(w.server), dnat(w.listen)))
	return append(chains, prerouting), nil
}

// doors keep other hosts out where pods may send to the listen address themselves: two, of which
// each holds alone. What listens on 127.0.0.0/8 nobody reaches anyway.
func doors(p Plan, s nodeFacts, family netobj.Family) []nftChain {
	raw := nftChain{name: "raw", kind: "filter", hook: "prerouting", priority: priorityRaw}
	input := nftChain{name: "input", kind: "filter", hook: "input", priority: priorityFilter}
	to := toServer(p.Listen)
	if p.Listen.Addr().IsUnspecified() {
		to = toPort(p.Listen.Port())
	} else if !family.Has(p.Listen.Addr()) {
		return nil
	}
	if p.Listen.Addr().IsLoopback() {
		return nil
	}
	for _, name := range s.uplinks {
		raw.rules = append(raw.rules, rule(byInterface(name), to, drop()))
		input.rules = append(input.rules, rule(byInterface(name), to, drop()))
	}
	return []nftChain{raw, input}
}

// toPort matches packets of TCP to a port of this node, whichever its address.
func toPort(port uint16) nftPart {
	p := toServer(netip.AddrPortFrom(netip.IPv4Unspecified(), port))
	return nftPart{text: fmt.Sprintf("fib daddr type local tcp dport %d", port), exprs: append([]expr.Any{
		&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
		equals(binary.NativeEndian.AppendUint32(nil, unix.RTN_LOCAL)),
	}, p.exprs[2:]...)}
}

// environmentText tells what pods need where nothing is routed.
func environmentText(p Plan) string {
	host, who := "$(NODE_IP)", "pods need"
	field := "\n#   - name: NODE_IP\n#     valueFrom: {fieldRef: {fieldPath: status.hostIP}}"
	switch a := p.Listen.Addr(); {
	case a.IsLoopback():
		host, field, who = a.String(), "", "pods on the host network, who alone reach it, need"
	case a.IsLinkLocalUnicast():
		host, field = a.String(), ""
	case a.Is6() && !a.IsUnspecified():
		host = "[$(NODE_IP)]"
	}
	return fmt.Sprintf("\n# what %s in their environment\n#   env:%s\n#   - name: GCE_METADATA_HOST\n#     value: %s\n",
		who, field, net.JoinHostPort(host, strconv.Itoa(int(p.Listen.Port()))))
}

// resetServers are the servers to which nothing is forwarded: those of the guard, and the metadata
// server's other doors (H-25, H-26). DNS on 53 passes.
func resetServers(p Plan, s nodeFacts) []netip.AddrPort {
	addresses := []netip.Addr{metadataServer.Addr()}
	if s.listen6.IsValid() {
		addresses = append(addresses, metadataServer6.Addr())
	}
	servers := slices.Clone(p.Guard)
	for _, a := range addresses {
		for _, port := range []uint16{80, 443, 8080} {
			servers = append(servers, netip.AddrPortFrom(a, port))
		}
	}
	slices.SortFunc(servers, netip.AddrPort.Compare)
	return slices.Compact(servers)
}

// nftText is the table of one family as nft -f reads it.
func nftText(chains []nftChain, family string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "add table %[1]s %[2]s\ndelete table %[1]s %[2]s\ntable %[1]s %[2]s {\n", family, nftTable)
	for _, c := range chains {
		fmt.Fprintf(&b, "\tchain %s {\n\t\t%s\n", c.name, c.head())
		for _, r := range c.rules {
			fmt.Fprintf(&b, "\t\t%s\n", r.text)
		}
		b.WriteString("\t}\n")
	}
	b.WriteString("}\n")
	return b.String()
}
