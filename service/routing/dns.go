package routing

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/nft"
)

// With Plan.DNS what pods ask any name server over UDP for metadata.google.internal is redirected
// to the emulator, to the port of its listener: a query by its question, whoever it was sent to.
//
// NAT is decided by the first packet of a connection, and to conntrack all packets between two
// ports are one connection. But resolvers ask for several names from one port: CoreDNS and other
// forwarders, and clients that keep their socket. So queries for the name are in a zone of
// conntrack of their own: there they are another connection than other queries between the same
// ports, and each packet goes where its name says. Packets are given the zone where they are
// matched, in raw. In mode iptables answers are in everybody's zone, so that those of a name server
// find their way where somebody else's DNAT comes first (kube-proxy's, once it starts). In mode
// nftables nobody comes first, and the answers from the emulator's UDP port are given the zone.
//
// Where a query comes from nobody can tell: a pod can send one in another's name. No answer leaves
// the node by an uplink.
//
// What is matched in raw has to be matched in nat as well: with both directions in the zone, the
// answer to a query that was not redirected would be unknown to conntrack. So interfaces and
// cgroups that are spared in nat are spared in raw.
//
// With listen 169.254.169.252:988 and the uplink eth0 iptables -S prints, behind the rules of
// package xtables' Chain and with PROGRAM for dnsProgram,
//
//	*filter
//	-A GME-IN -d 169.254.169.252/32 -i eth0 -p udp -m udp --dport 988 -j DROP
//	-A GME-IN -d 169.254.169.252/32 -p udp -m udp --dport 988 -m conntrack --ctstate DNAT -j ACCEPT
//	-A GME-IN -d 169.254.169.252/32 ! -i lo -p udp -m udp --dport 988 -j DROP
//	-A GME-LOCAL -s 169.254.169.252/32 -o eth0 -p udp -m udp --sport 988 -j DROP
//	-A GME-LOCAL -s 169.254.169.252/32 -p udp -m udp --sport 988 -j ACCEPT
//	-A GME-LOCAL -d 169.254.169.252/32 -p udp -m udp --dport 988 -j ACCEPT
//	*raw
//	-A GME-RAW -d 169.254.169.252/32 ! -i lo -p udp -m udp --dport 988 -j DROP
//	-A GME-RAW -i lo -j RETURN
//	-A GME-RAW -i eth0 -j RETURN
//	-A GME-RAW -p udp -m udp --dport 53 -m bpf --bytecode "PROGRAM" -j CT --zone-orig 988
//	*nat
//	-A GME-PRE -p udp -m udp --dport 53 -m bpf --bytecode "PROGRAM" -j DNAT --to-destination 169.254.169.252:988
//
// NOTRACK of others, such as that of NodeLocal DNSCache for its own address, comes behind
// our rules and is overruled by the zone.

const (
	// dnsZone is the port of the default listener, as the table of mode loopback's route is. A zone is
	// nothing but a number; no other program is known to use this one.
	dnsZone = 988

	dnsName   = "metadata.google.internal"
	dnsLabels = "\x08metadata\x06google\x08internal"
)

// answersDNS says whether queries for the name are redirected on this node.
func (p Plan) answersDNS(s nodeFacts) bool { return s.dns && p.traits().readsQueries }

// dnsAround says whether queries are to be redirected, or why they are not though the Plan wants
// it.
func (r *router) dnsAround(install bool) (dns bool, why string) {
	switch l := r.plan.Listen; {
	case r.plan.Closed || !r.plan.DNS:
		return false, ""
	case !r.plan.traits().readsQueries:
		return false, NoDNS(r.plan.Mode)
	case install && Listener(l).At.IsValid():
		// The service is there: does it take queries? Else they would lead to nobody, or to somebody else.
		const restart = "systemctl daemon-reload && systemctl restart gke-metadata-emulator.socket"
		switch by := QueryListener(l); {
		case !by.At.IsValid():
			return false, fmt.Sprintf("no process listens on UDP %s: %s", l, restart)
		case by.HoldsFrom(l):
			return false, fmt.Sprintf("UDP %s is held by %s at %s: stop it or change listen, then run %s", l, by, by.At, restart)
		}
	}
	return r.dnsRefused == "", r.dnsRefused
}

// NoDNS says why a mode does not answer queries, and what to do; "": it does, or it is not known
// yet.
func NoDNS(mode string) string {
	t := Plan{Mode: mode}.traits()
	if t.readsQueries || t.mode == "" {
		return ""
	}
	return "mode " + mode + " does not see the name in a DNS query: " + DNSRemedy
}

// DNSRemedy is what to do where queries for the name are not answered by the node.
const DNSRemedy = "set routing.mode to iptables or nftables, or add a record of " + dnsName +
	" to the cluster's DNS, hostAliases or GCE_METADATA_HOST to the pods"

// putAll is put, without DNS or IPv6 if that is what fails.
func (r *router) putAll(ctx context.Context, n *node) error {
	err := r.putIPv6Optional(ctx, n)
	if err == nil || !n.dns {
		return err
	}
	with := *n
	why, _, _ := strings.Cut(err.Error(), "\n")
	n.dns, n.whyNotDNS = false, why
	if _, again := n.survey(ctx, n.nodeFacts); again != nil || r.putIPv6Optional(ctx, n) != nil {
		n.nodeFacts = with.nodeFacts // it was not DNS
		return err
	}
	r.dnsRefused = n.whyNotDNS
	r.plan.Log.WithError(err).Warn("routing: DNS queries for " + dnsName + " cannot be redirected on this node: " +
		DNSRemedy)
	return nil
}

// asksDNS matches queries for the name as iptables -S prints it.
func asksDNS(server netip.Addr) string {
	return `-p udp -m udp --dport 53 -m bpf --bytecode "` + dnsProgram(server.Is6()) + `"`
}

// inDNSZone is a zone of conntrack for queries. The first target CT that a packet meets counts.
var inDNSZone = fmt.Sprintf(" -j CT --zone-orig %d", dnsZone)

func toUDP(l netip.AddrPort) string {
	return fmt.Sprintf("-d %s -p udp -m udp --dport %d", single(l), l.Port())
}

func fromUDP(l netip.AddrPort) string {
	return fmt.Sprintf("-s %s -p udp -m udp --sport %d", single(l), l.Port())
}

func notLocalUDP(l netip.AddrPort) string {
	return fmt.Sprintf("-d %s ! -i lo -p udp -m udp --dport %d", single(l), l.Port())
}

// dnsRules are the rules of one chain that redirect queries. They come behind those for requests.
func dnsRules(p Plan, s nodeFacts, w redirectTarget, chain string) (rules []string) {
	if !p.answersDNS(s) {
		return nil
	}
	asks := asksDNS(w.server.Addr())
	redirect := asks + " -j DNAT --to-destination " + w.listen.String()
	others := spared(p, s)[1:] // all but lo
	for _, name := range others {
		switch chain {
		case "GME-IN": // else an answer to whom somebody's DNAT leads here
			rules = append(rules, udpBy(w.listen, "-d", "-i", name))
		case "GME-LOCAL", "GME-FWD":
			rules = append(rules, udpBy(w.listen, "-s", "-o", name))
		}
	}
	switch chain {
	case "GME-FWD": // to an emulator that lives elsewhere, and back
		rules = append(rules, toUDP(w.listen)+" -m conntrack --ctstate DNAT -j ACCEPT",
			fromUDP(w.listen)+" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT")
	case "GME-IN": // two checks, as for requests
		rules = append(rules, toUDP(w.listen)+" -m conntrack --ctstate DNAT -j ACCEPT", notLocalUDP(w.listen)+" -j DROP")
	case "GME-LOCAL":
		rules = append(rules, fromUDP(w.listen)+" -j ACCEPT", toUDP(w.listen)+" -j ACCEPT")
	case "GME-RAW":
		for _, name := range spared(p, s) {
			rules = append(rules, "-i "+name+" -j RETURN")
		}
		rules = append(rules, asks+inDNSZone)
	case "GME-RAW-OUT":
		if s.hostPods {
			for _, slice := range s.slices {
				rules = append(rules, "-m cgroup --path "+slice+" -j RETURN")
			}
			rules = append(rules, asks+inDNSZone)
		}
	case "GME-OUT":
		if s.hostPods {
			rules = append(rules, redirect)
		}
	case "GME-PRE":
		rules = append(rules, redirect)
	}
	return rules
}

// udpBy drops UDP from or to the listener by an interface.
func udpBy(l netip.AddrPort, end, direction, name string) string {
	port := map[string]string{"-s": "--sport", "-d": "--dport"}[end]
	return fmt.Sprintf("%s %s %s %s -p udp -m udp %s %d -j DROP", end, single(l), direction, name, port, l.Port())
}

// dnsParts are the same of nft, of which an accept is final for its own chain only.
func dnsParts(p Plan, s nodeFacts, w redirectTarget, chain string) (rules []nft.Rule, err error) {
	if !p.answersDNS(s) {
		return nil, nil
	}
	add := func(parts ...nft.Part) { rules = append(rules, nft.NewRule(parts...)) }
	asks := nft.Asks(dnsLabels, dnsName)
	others := spared(p, s)[1:]
	switch chain {
	case "input":
		for _, name := range others {
			add(nft.ByInterface(name), nft.ToUDP(w.listen), nft.Drop())
		}
		add(nft.ToUDP(w.listen), nft.DestinationTranslated(), nft.Accept())
		add(nft.NotLoopback(), nft.ToUDP(w.listen), nft.Drop())
	case "local", "forward":
		for _, name := range others {
			add(nft.ToInterface(name), nft.FromUDP(w.listen), nft.Drop())
		}
	case "raw":
		add(nft.FromUDP(w.listen), nft.InZone(dnsZone))
		for _, name := range spared(p, s) {
			add(nft.ByInterface(name), nft.Return())
		}
		add(asks, nft.InZone(dnsZone))
	case "raw-output":
		add(nft.FromUDP(w.listen), nft.InZone(dnsZone))
		if s.hostPods {
			for _, slice := range s.slices {
				of, err := nft.OfCgroup(p.CgroupRoot, slice)
				if err != nil {
					return nil, err
				}
				add(of, nft.Return())
			}
			add(asks, nft.InZone(dnsZone))
		}
	case "output", "prerouting":
		add(asks, nft.DNAT(w.listen))
	}
	return rules, nil
}

// dnsProgram matches a query for the name by classic BPF, which sees the packet from its IP header
// on. Red Hat's kernels have no module of u32 since version 9, and a match of string would take the
// octets at a later place too.
func dnsProgram(ipv6 bool) string {
	type instruction struct {
		code   uint16
		jt, jf uint8
		k      uint32
	}
	const ( // linux/bpf_common.h, relative to register X
		loadByte, loadHalf, loadWord = 0x50, 0x48, 0x40
		headerLength, constant       = 0xb1, 0x01 // into X: 4*(octet&0xf), k
		and, equal, ret              = 0x54, 0x15, 0x06
	)
	code := []instruction{{code: headerLength}} // IPv4's
	if ipv6 {
		code[0] = instruction{code: constant, k: 40} // a query with extension headers is left alone
	}
	test := func(load uint16, at, mask, value uint32) {
		code = append(code, instruction{code: load, k: at})
		if all := uint32(1<<(8*map[uint16]int{loadByte: 1, loadHalf: 2, loadWord: 4}[load]) - 1); mask != all {
			code = append(code, instruction{code: and, k: mask})
		}
		code = append(code, instruction{code: equal, k: value})
	}
	if ipv6 { // the protocol behind the header of 40 octets
		code = append(code, instruction{code: 0x30, k: 6}, instruction{code: equal, k: 17})
	}
	const header = 8                    // of UDP
	test(loadHalf, header+2, 0xf800, 0) // QR and opcode
	test(loadHalf, header+4, 0xffff, 1) // questions
	value, mask := bytes.ToUpper([]byte(dnsLabels)), nft.CaseMask(dnsLabels)
	at := 0
	for ; at+4 <= len(value); at += 4 {
		test(loadWord, uint32(header+12+at), binary.BigEndian.Uint32(mask[at:]), binary.BigEndian.Uint32(value[at:]))
	}
	for ; at < len(value); at++ {
		test(loadByte, uint32(header+12+at), uint32(mask[at]), uint32(value[at]))
	}
	code = append(code, instruction{code: ret, k: 1<<16 - 1}, instruction{code: ret})
	text := fmt.Sprint(len(code))
	for i, c := range code {
		if c.code == equal {
			c.jf = uint8(len(code) - 2 - i) // to the last instruction, which returns 0
		}
		text += fmt.Sprintf(",%d %d %d %d", c.code, c.jt, c.jf, c.k)
	}
	return text
}
