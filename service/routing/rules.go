package routing

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
)

// comment marks the jumps from the base chains into ours: whose they are can be seen without
// memory.
const comment = "gke-metadata-emulator"

// chain is one chain of ours, what jumps to it, and what is in it.
//
// With listen 169.254.169.252:988, one uplink eth0, docker0 spared and the host intercepted,
// iptables -S prints (the listen address stands for whatever is configured; guards name its port
// too, so that nothing else on that address is touched):
//
//	*filter
//	-A GME-FWD -i docker0 -j RETURN
//	-A GME-FWD -d 169.254.169.252/32 -p tcp -m tcp --dport 988 -m conntrack --ctstate NEW,RELATED,ESTABLISHED -j ACCEPT
//	-A GME-FWD -s 169.254.169.252/32 -p tcp -m tcp --sport 988 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
//	-A GME-FWD -d 169.254.169.254/32 -p tcp -m multiport --dports 80,443,8080 -j REJECT --reject-with tcp-reset
//	-A GME-IN -d 169.254.169.252/32 -p tcp -m tcp --dport 988 -m conntrack --ctstate SNAT -j REJECT --reject-with tcp-reset
//	-A GME-IN -d 169.254.169.252/32 -p tcp -m tcp --dport 988 -m conntrack --ctorigdst 169.254.169.254 -j ACCEPT
//	-A GME-IN -d 169.254.169.252/32 ! -i lo -p tcp -m tcp --dport 988 -j DROP
//	-A GME-LOCAL -s 169.254.169.252/32 -p tcp -m tcp --sport 988 ! --tcp-flags RST RST -m conntrack --ctstate SNAT -j DROP
//	-A GME-LOCAL -s 169.254.169.252/32 -p tcp -m tcp --sport 988 -j ACCEPT
//	-A GME-LOCAL -d 169.254.169.252/32 -p tcp -m tcp --dport 988 -j ACCEPT
//	*raw
//	-A GME-RAW -d 169.254.169.252/32 ! -i lo -p tcp -m tcp --dport 988 -j DROP
//	-A GME-RAW -i docker0 -j RETURN
//	-A GME-RAW -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j CT
//	-A GME-RAW -s 169.254.169.252/32 -p tcp -m tcp --sport 988 -j CT
//	-A GME-RAW-OUT -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j CT
//	-A GME-RAW-OUT -s 169.254.169.252/32 -p tcp -m tcp --sport 988 -j CT
//	*nat
//	-A GME-OUT -m cgroup --path system.slice -j RETURN
//	-A GME-OUT -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 169.254.169.252:988
//	-A GME-PRE -i lo -j RETURN
//	-A GME-PRE -i docker0 -j RETURN
//	-A GME-PRE -i eth0 -j RETURN
//	-A GME-PRE -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 169.254.169.252:988
//
// Where IPv6 is served (H-24) ip6tables -S prints the same with fd20:ce::252 and fd20:ce::254.
type chain struct {
	table, base, name string
	rules             []string // as iptables -S prints them, without -A and the chain
	absent            bool     // this Plan has no such chain
}

// jump is what stands at position 1 of the base chain.
func (c chain) jump() string { return "-m comment --comment " + comment + " -j " + c.name }

// ownChains are all chains that any Plan can have made in either family, in the order in which they
// are put up: closed before open. Removing goes the other way round.
func ownChains() []chain {
	return []chain{
		{table: "filter", base: "FORWARD", name: "GME-FWD", absent: true},
		{table: "filter", base: "INPUT", name: "GME-IN", absent: true},
		{table: "filter", base: "OUTPUT", name: "GME-LOCAL", absent: true},
		{table: "raw", base: "PREROUTING", name: "GME-RAW", absent: true},
		{table: "raw", base: "OUTPUT", name: "GME-RAW-OUT", absent: true},
		{table: "nat", base: "OUTPUT", name: "GME-OUT", absent: true},
		{table: "nat", base: "PREROUTING", name: "GME-PRE", absent: true},
	}
}

// chainsFor is the Plan as chains of one family. IPv6 has the guard's alone where nothing is
// redirected there.
func chainsFor(p Plan, s nodeFacts, family netobj.Family) []chain {
	chains, w := ownChains(), p.target(s, family)
	for i := range chains {
		c := &chains[i]
		switch {
		case c.name == "GME-FWD":
			if family == netobj.IPv4 || s.six || w.listen.IsValid() {
				c.rules = forwardRules(p, w, family)
			}
		case !w.listen.IsValid():
		case c.name == "GME-IN":
			// A-18 (port clash): a connection whose source conntrack changed has another port here
			// than in the client's socket, and that port may be another client's. The SYN of a
			// process of the node has gone through POSTROUTING and is refused at once. R-05: only
			// what was redirected is accepted, never what was sent here directly.
			c.rules = []string{
				to(w.listen) + " -m conntrack --ctstate SNAT -j REJECT --reject-with tcp-reset",
				to(w.listen) + " -m conntrack --ctorigdst " + w.server.Addr().String() + " -j ACCEPT",
				notLocal(w.listen) + " -j DROP",
			}
		case c.name == "GME-LOCAL":
			// A-18 again: the SYN of a pod is translated behind the INPUT chain, so the listener's
			// answer is dropped, but for the RST of the refusal above. A network that masquerades
			// what its pods send to the node is not served: whose socket it is nobody can tell.
			// R-34 (rejects in OUTPUT): what the node sends to the listener, and its answers, are
			// no business of rules for other services.
			c.rules = []string{
				from(w.listen) + " ! --tcp-flags RST RST -m conntrack --ctstate SNAT -j DROP",
				from(w.listen) + " -j ACCEPT",
				to(w.listen) + " -j ACCEPT",
			}
		case c.name == "GME-RAW":
			// R-05, the second door: before DNAT nobody has a reason to send to the listen address.
			c.rules = []string{notLocal(w.listen) + " -j DROP"}
			for _, name := range p.Spare {
				c.rules = append(c.rules, "-i "+name+" -j RETURN")
			}
			c.rules = append(c.rules, to(w.server)+track, from(w.listen)+track)
		case c.name == "GME-RAW-OUT":
			if s.hostPods {
				c.rules = []string{to(w.server) + track}
			}
			c.rules = append(c.rules, from(w.listen)+track)
		case c.name == "GME-OUT":
			// all of the host but its own slices, which leaves pods on the host network.
			// Without a slice to spare (no cgroup v2: R-22) there is no such chain.
			if s.hostPods {
				for _, slice := range s.slices {
					c.rules = append(c.rules, "-m cgroup --path "+slice+" -j RETURN")
				}
				c.rules = append(c.rules, w.redirect())
			}
		case c.name == "GME-PRE":
			for _, name := range spared(p, s) {
				c.rules = append(c.rules, "-i "+name+" -j RETURN")
			}
			c.rules = append(c.rules, w.redirect())
		}
		c.absent = len(c.rules) == 0
	}
	return chains
}

// forwardRules let redirected packets through to an emulator that lives in another namespace,
// container or machine of the node, and back; and reset what still talks to a real metadata server
// connections that were opened before).
func forwardRules(p Plan, w redirectTarget, family netobj.Family) (rules []string) {
	for _, name := range p.Spare {
		rules = append(rules, "-i "+name+" -j RETURN")
	}
	ports := map[netip.Addr][]uint16{}
	guard := p.Guard
	if w.listen.IsValid() {
		rules = append(rules,
			to(w.listen)+" -m conntrack --ctstate NEW,RELATED,ESTABLISHED -j ACCEPT",
			from(w.listen)+" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT")
		// 443 and 8080 are the metadata server's other doors (H-25, H-26). DNS on 53 passes.
		ports[w.server.Addr()] = []uint16{80, 443, 8080}
		guard = append([]netip.AddrPort{w.server}, guard...)
	}
	var order []netip.Addr
	for _, g := range guard {
		if !family.Has(g.Addr()) {
			continue
		}
		if !slices.Contains(order, g.Addr()) {
			order = append(order, g.Addr())
		}
		if !slices.Contains(ports[g.Addr()], g.Port()) {
			ports[g.Addr()] = append(ports[g.Addr()], g.Port())
		}
	}
	if len(order) == 0 {
		return nil // nothing to guard in this family
	}
	for _, a := range order {
		slices.Sort(ports[a])
		for some := range slices.Chunk(ports[a], 15) { // multiport's limit
			rules = append(rules, fmt.Sprintf("-d %s -p tcp -m multiport --dports %s -j REJECT --reject-with tcp-reset",
				netip.PrefixFrom(a, a.BitLen()), join(some)))
		}
	}
	return rules
}

// single is the prefix of one address.
func single(l netip.AddrPort) netip.Prefix { return netip.PrefixFrom(l.Addr(), l.Addr().BitLen()) }

func to(l netip.AddrPort) string {
	return fmt.Sprintf("-d %s -p tcp -m tcp --dport %d", single(l), l.Port())
}

// track has conntrack see a packet, and in the zone of everybody: the kernel heeds the first target
// CT that a packet meets, so what others say of a pod's packets behind it (NOTRACK, which makes
// DNAT impossible, or a zone: R-36) is not done. It is no verdict: what others drop stays dropped.
const track = " -j CT"

func from(l netip.AddrPort) string {
	return fmt.Sprintf("-s %s -p tcp -m tcp --sport %d", single(l), l.Port())
}

func notLocal(l netip.AddrPort) string {
	return fmt.Sprintf("-d %s ! -i lo -p tcp -m tcp --dport %d", single(l), l.Port())
}

func (w redirectTarget) redirect() string {
	return to(w.server) + " -j DNAT --to-destination " + w.listen.String()
}

// spared are the interfaces from which no pod of this node speaks.
func spared(p Plan, s nodeFacts) []string {
	names := []string{"lo"}
	for _, name := range slices.Concat(p.Spare, s.uplinks) {
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

func join(ports []uint16) string {
	texts := make([]string, len(ports))
	for i, p := range ports {
		texts[i] = strconv.Itoa(int(p))
	}
	return strings.Join(texts, ",")
}

// restoreText is what iptables-restore --noflush gets: every chain of ours emptied and filled anew,
// or taken away if it is absent; jumps that stand elsewhere than once at position 1 taken out and
// put there. One COMMIT a table makes each table's change atomic: a packet sees the rules of before
// or of after, and 0 of 9762 requests were lost. stands is what is there now, by chain name.
// "" is nothing to do.
func restoreText(chains []chain, stands map[string]chainState) string {
	var b strings.Builder
	chains = slices.DeleteFunc(slices.Clone(chains), func(c chain) bool {
		g := stands[c.name]
		return c.absent && !g.exists && len(g.jumps) == 0
	})
	for start := 0; start < len(chains); {
		end := start
		for end < len(chains) && chains[end].table == chains[start].table {
			end++
		}
		var body strings.Builder
		for _, c := range chains[start:end] {
			fmt.Fprintf(&body, ":%s - [0:0]\n", c.name)
		}
		for _, c := range chains[start:end] {
			for _, r := range c.rules {
				fmt.Fprintf(&body, "-A %s %s\n", c.name, r)
			}
		}
		for _, c := range chains[start:end] {
			g := stands[c.name]
			if len(g.jumps) == 1 && g.jumps[0].position == 1 && !c.absent {
				continue
			}
			for _, j := range g.jumps {
				fmt.Fprintf(&body, "-D %s %s\n", c.base, j.rule)
			}
			switch {
			case !c.absent:
				fmt.Fprintf(&body, "-I %s 1 %s\n", c.base, c.jump())
			case g.foreign == nil: // else somebody else's rule holds it
				fmt.Fprintf(&body, "-X %s\n", c.name)
			}
		}
		fmt.Fprintf(&b, "*%s\n%sCOMMIT\n", chains[start].table, body.String())
		start = end
	}
	return b.String()
}

// jumpAt is a jump of ours in a base chain.
type jumpAt struct {
	position int    // from 1
	rule     string // without -A and the base chain
}
