package routing

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/xtables"
)

// chainsFor is the Plan as chains of one family. IPv6 has the guard's alone where nothing is
// redirected there.
func chainsFor(p Plan, s nodeFacts, family netobj.Family) []xtables.Chain {
	chains, w := xtables.OwnChains(), p.target(s, family)
	for i := range chains {
		c := &chains[i]
		switch {
		case c.Name == "GME-FWD":
			if family == netobj.IPv4 || s.reachesIPv6 || w.listen.IsValid() {
				c.Rules = forwardRules(p, w, family)
				if w.listen.IsValid() { // behind what is excluded, before what is reset
					c.Rules = slices.Insert(c.Rules, len(p.ExcludeInterfaces), dnsRules(p, s, w, c.Name)...)
				}
			}
		case !w.listen.IsValid():
		case c.Name == "GME-IN":
			// A-18 (port clash): a connection whose source conntrack changed has another port here
			// than in the client's socket, and that port may be another client's. The SYN of a
			// process of the node has gone through POSTROUTING and is refused at once. R-05: only
			// what was redirected is accepted, never what was sent here directly.
			c.Rules = []string{
				to(w.listen) + " -m conntrack --ctstate SNAT -j REJECT --reject-with tcp-reset",
				to(w.listen) + " -m conntrack --ctorigdst " + w.server.Addr().String() + " -j ACCEPT",
				notLocal(w.listen) + " -j DROP",
			}
		case c.Name == "GME-LOCAL":
			// A-18 again: the SYN of a pod is translated behind the INPUT chain, so the listener's
			// answer is dropped, but for the RST of the refusal above. A network that masquerades
			// what its pods send to the node is not served: whose socket it is nobody can tell.
			// R-34 (rejects in OUTPUT): what the node sends to the listener, and its answers, are
			// no business of rules for other services.
			c.Rules = []string{
				from(w.listen) + " ! --tcp-flags RST RST -m conntrack --ctstate SNAT -j DROP",
				from(w.listen) + " -j ACCEPT",
				to(w.listen) + " -j ACCEPT",
			}
		case c.Name == "GME-RAW":
			// R-05, the second check: before DNAT nobody has a reason to send to the listen address.
			c.Rules = []string{notLocal(w.listen) + " -j DROP"}
			if p.answersDNS(s) {
				c.Rules = append(c.Rules, notLocalUDP(w.listen)+" -j DROP")
			}
			for _, name := range p.ExcludeInterfaces {
				c.Rules = append(c.Rules, "-i "+name+" -j RETURN")
			}
			c.Rules = append(c.Rules, to(w.server)+track, from(w.listen)+track)
		case c.Name == "GME-RAW-OUT":
			if s.hostPods {
				c.Rules = []string{to(w.server) + track}
			}
			c.Rules = append(c.Rules, from(w.listen)+track)
		case c.Name == "GME-OUT":
			// all of the host but its own slices, which leaves pods on the host network.
			// Without a slice to spare (no cgroup v2: R-22) there is no such chain.
			if s.hostPods {
				for _, slice := range s.slices {
					c.Rules = append(c.Rules, "-m cgroup --path "+slice+" -j RETURN")
				}
				c.Rules = append(c.Rules, w.redirect())
			}
		case c.Name == "GME-PRE":
			for _, name := range spared(p, s) {
				c.Rules = append(c.Rules, "-i "+name+" -j RETURN")
			}
			c.Rules = append(c.Rules, w.redirect())
		}
		if w.listen.IsValid() && c.Name != "GME-FWD" {
			c.Rules = append(c.Rules, dnsRules(p, s, w, c.Name)...)
			c.Queries = c.Table == "nat" && p.answersDNS(s)
		}
		c.Absent = len(c.Rules) == 0
	}
	return chains
}

// forwardRules let redirected packets through to an emulator that lives in another namespace,
// container or machine of the node, and back; and reset what still talks to a real metadata server
// connections that were opened before).
func forwardRules(p Plan, w redirectTarget, family netobj.Family) (rules []string) {
	for _, name := range p.ExcludeInterfaces {
		rules = append(rules, "-i "+name+" -j RETURN")
	}
	ports := map[netip.Addr][]uint16{}
	guard := p.Guard
	if w.listen.IsValid() {
		rules = append(rules,
			to(w.listen)+" -m conntrack --ctstate NEW,RELATED,ESTABLISHED -j ACCEPT",
			from(w.listen)+" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT")
		// 443 and 8080 are the metadata server's other ports (H-25, H-26). DNS on 53 passes.
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

// track has conntrack see a packet, and in the zone of everybody: the kernel obeys the first target
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
	for _, name := range slices.Concat(p.ExcludeInterfaces, s.uplinks) {
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
