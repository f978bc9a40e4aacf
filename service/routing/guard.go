package routing

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
)

// The guard that does not depend on netfilter. ip rule prints, for every guarded address:
//
//	97: from all to 169.254.169.254 iif lo goto 98 proto kernel
//	97: from all to 169.254.169.254 ipproto tcp dport 80 prohibit proto kernel
//	97: from all to 169.254.169.254 ipproto tcp dport 1-79 goto 98 proto kernel
//	97: from all to 169.254.169.254 ipproto tcp dport 81-65534 goto 98 proto kernel
//	97: from all to 169.254.169.254 ipproto tcp prohibit proto kernel
//	98: from all nop proto kernel
//
// Rules of one preference are asked in the order in which they were added. Packets that DNAT or a
// program redirected have another destination by the time they are routed, so these rules see only
// what would leak; a mode that keeps the destination needs a rule before these, as loopback has.
// What may pass goes on behind the guard, so the host's own policy routing holds for it. DNS at
// 169.254.169.254:53 passes. "not iif lo … prohibit" would negate the whole selector and cut pods
// off.
//
// A rule that names a port matches no fragment, not even the first, which holds the port, and a pod
// may send fragments of its own making. Netfilter puts fragments together before they are routed,
// if it does anything at all. So the server's other ports are let go on by name, and the rest of
// TCP is prohibited; of IPv6, where headers can lie between the fragment's and TCP's, the rest of
// everything.
//
// A rule of somebody else's with a lower preference bypasses the guard (R-33: AWS's network has
// 1, 10 and 20 for security groups of pods). So the guard stands before every rule that can match
// what pods send to a guarded address, at 97 or lower: see place. Where it had to move, table local
// may come later than others' rules, so the emulator's address is led there by a first rule:
//
//	8: from all to 169.254.169.252 ipproto tcp dport 988 lookup local proto kernel
//
// R-10b: iif lo is all that this host sends, its own daemons and pods on the host network alike.
// Those pods reach the real server when only these rules are left; for them the promise holds while
// the netfilter rules stand.
//
// In mode loopback the rules bring requests to the emulator, too: what pods send to the
// metadata server's port is this node's own, and what other hosts send there is refused, which does
// not depend on netfilter either.
//
//	97: from all to 169.254.169.254 iif lo goto 98 proto kernel
//	97: from all to 169.254.169.254 iif eth0 ipproto tcp dport 80 prohibit proto kernel
//	97: from all to 169.254.169.254 ipproto tcp dport 80 lookup 988 proto kernel
//	97: from all to 169.254.169.254 ipproto tcp dport 80 prohibit proto kernel
//
// proto kernel keeps networkd ≥ 248 from deleting the rules, and with the preference and the shape
// shows whose they are.
const (
	usualPref = 97    // of the guard, where no rule of somebody else's stands before; its end is at the next one
	lastPref  = 103   // of a rule that any version of ours has made
	ourTable  = 988   // where mode loopback has its route
	lastPort  = 65534 // that a rule can name
)

// guardRules are the Plan's at their usual preference, in the order in which they are asked. The
// first of each family is the end of the guard, to which others go: it is added first and deleted
// last. Mode loopback needs the uplinks.
func guardRules(p Plan, s nodeFacts) (rules []netobj.Rule) {
	loopback := p.traits().localServer
	guarded := p.Guard
	if loopback {
		guarded = append(slices.Clone(guarded), metadataServer) // else the host's own requests came to us too
	}
	add := func(r netobj.Rule) {
		if r.Pref = usualPref; r.Action == unix.FR_ACT_GOTO {
			r.Arg = usualPref + 1
		}
		if !slices.Contains(rules, r) {
			rules = append(rules, r)
		}
	}
	for _, g := range guarded {
		end := netobj.Rule{Pref: usualPref + 1, To: netobj.Any(g.Addr()), Action: unix.FR_ACT_NOP}
		if !slices.Contains(rules, end) {
			rules = append(rules, end)
		}
	}
	for _, g := range guarded {
		for _, name := range append([]string{"lo"}, p.ExcludeInterfaces...) {
			add(netobj.Rule{To: netobj.Host(g.Addr()), IIF: name, Action: unix.FR_ACT_GOTO})
		}
	}
	if loopback {
		to, port := netobj.Host(metadataServer.Addr()), metadataServer.Port()
		for _, name := range s.uplinks {
			if !strings.HasSuffix(name, "+") { // policy rules know no pattern
				add(netobj.Rule{To: to, IIF: name, Port: port, Action: unix.FR_ACT_PROHIBIT})
			}
		}
		add(netobj.Rule{To: to, Port: port, Action: unix.FR_ACT_TO_TBL, Arg: ourTable})
	}
	for _, g := range guarded { // in mode loopback the server's, where the table is empty
		add(netobj.Rule{To: netobj.Host(g.Addr()), Port: g.Port(), Action: unix.FR_ACT_PROHIBIT})
	}
	restRules(guarded, add)
	return rules
}

// restRules prohibit what is sent to the guarded addresses and of which no rule can tell the port,
// behind what passes.
func restRules(guarded []netip.AddrPort, add func(netobj.Rule)) {
	var order []netip.Addr
	ports := map[netip.Addr][]uint16{}
	for _, g := range guarded {
		if !slices.Contains(order, g.Addr()) {
			order = append(order, g.Addr())
		}
		ports[g.Addr()] = append(ports[g.Addr()], g.Port())
	}
	for _, a := range order {
		to := netobj.Host(a)
		rest := netobj.Rule{To: to, Proto: unix.IPPROTO_TCP, Action: unix.FR_ACT_PROHIBIT}
		if a.Is6() {
			rest.Proto = 0
			add(netobj.Rule{To: to, Proto: unix.IPPROTO_UDP, Action: unix.FR_ACT_GOTO})
			add(netobj.Rule{To: to, Proto: unix.IPPROTO_ICMPV6, Action: unix.FR_ACT_GOTO})
		}
		slices.Sort(ports[a])
		from := uint16(1)
		for _, port := range append(ports[a], lastPort+1) {
			switch {
			case port == from+1:
				add(netobj.Rule{To: to, Port: from, Action: unix.FR_ACT_GOTO})
			case port > from:
				add(netobj.Rule{To: to, Port: from, Last: port - 1, Action: unix.FR_ACT_GOTO})
			}
			from = max(from, port+1)
		}
		add(rest)
	}
}

// place moves the rules of one family before the rules of others that can match what they guard.
// Two preferences below, since others may delete theirs by the preference alone. At preference 0
// the guard stands behind table local's rule, or before all where that has another place; there is
// no lower one. There the rules of others may come before table local's, too: then reach leads to
// the emulator.
func place(usual, reach, standing []netobj.Rule) []netobj.Rule {
	base := uint32(usualPref)
	for _, r := range standing {
		if !ourRule(r) && meets(r, usual) {
			base = min(base, max(r.Pref, 2)-2)
		}
	}
	if base < usualPref {
		usual = slices.Concat(usual[:1], reach, usual[1:]) // behind the end of the guard
	}
	return at(base, usual)
}

// reachRules make the emulator's address this node's own before rules of others can lead elsewhere.
// Where it is another's they decide nothing.
func reachRules(p Plan, s nodeFacts) (rules []netobj.Rule) {
	for _, l := range []netip.AddrPort{p.Listen, s.listen6} {
		a := l.Addr()
		if p.traits().localServer || !l.IsValid() || a.IsUnspecified() || a.IsLoopback() {
			continue
		}
		rules = append(rules, netobj.Rule{Pref: usualPref, To: netobj.Host(a), Port: l.Port(),
			Action: unix.FR_ACT_TO_TBL, Arg: unix.RT_TABLE_LOCAL})
	}
	return rules
}

// at are the rules of guardRules with another preference than the usual one.
func at(base uint32, rules []netobj.Rule) (moved []netobj.Rule) {
	for _, r := range rules {
		r.Pref = r.Pref + base - usualPref
		if r.Action == unix.FR_ACT_GOTO {
			r.Arg = base + 1
		}
		moved = append(moved, r)
	}
	return moved
}

// meets says whether somebody else's rule can decide about what the guard's rules are for.
func meets(r netobj.Rule, guard []netobj.Rule) bool {
	return slices.ContainsFunc(guard, func(g netobj.Rule) bool { return g.To.IsSingleIP() && r.Diverts(g.To.Addr()) })
}

// ourRule says whether a version of ours makes rules of this form.
func ourRule(r netobj.Rule) bool {
	if r.Foreign != "" || r.Pref > lastPref || r.Last != 0 && r.Last <= r.Port {
		return false
	}
	alone := r.IIF == "" && r.Port == 0 && r.Proto == 0
	switch {
	case r.Action == unix.FR_ACT_NOP:
		return alone && (r.To.Bits() == 0 || r.To.IsSingleIP())
	case !r.To.IsSingleIP():
		return false
	case r.Action == unix.FR_ACT_TO_TBL: // the first versions had the host's own requests look into table main
		return (r.Looks(ourTable) || r.Looks(unix.RT_TABLE_LOCAL)) && r.Port != 0 && r.IIF == "" ||
			r.Looks(unix.RT_TABLE_MAIN) && r.Port == 0 && r.IIF != ""
	case r.Action == unix.FR_ACT_GOTO, r.Action == unix.FR_ACT_PROHIBIT:
		return slices.Contains([]uint8{0, unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_ICMPV6}, r.Proto)
	}
	return false
}

// guard is what stands of one family, and what the Plan wants there.
type guard struct {
	standing []netobj.Rule // ours and others'
	usual    []netobj.Rule // wanted, at the usual preference
	want     []netobj.Rule // wanted where it is to stand
}

// guards are those of the families that the Plan has something to guard in.
func guards(p Plan, s nodeFacts, have netobj.Snapshot) (both []guard) {
	for _, family := range netobj.Families {
		other := func(r netobj.Rule) bool { return !family.Has(r.To.Addr()) }
		g := guard{standing: have.Rules(uint8(family)), usual: slices.DeleteFunc(guardRules(p, s), other)}
		if len(g.usual) == 0 || family == netobj.IPv6 && !netobj.HaveIPv6() {
			continue // nothing can leak where there is no IPv6
		}
		g.want = place(g.usual, slices.DeleteFunc(reachRules(p, s), other), g.standing)
		both = append(both, g)
	}
	return both
}

// before are the rules of others that are asked before the first of ours, but for the end of the
// guard.
func (g guard) before() (others []netobj.Rule) {
	for _, r := range g.standing {
		if ourRule(r) && r.Action != unix.FR_ACT_NOP {
			break
		}
		if !ourRule(r) {
			others = append(others, r)
		}
	}
	return others
}

// faults names the rules that are not there, and whose rule bypasses the guard.
func (g guard) faults() (errs []error) {
	lacks := func(want []netobj.Rule) []netobj.Object {
		missing, _ := netobj.Diff(netobj.Objects(want), netobj.Objects(g.standing), ours)
		return missing
	}
	if len(lacks(g.want)) == 0 {
		return nil
	}
	command, pref := g.want[0].Command(), g.want[len(g.want)-1].Pref
	stands := slices.DeleteFunc(slices.Clone(g.standing), func(r netobj.Rule) bool { return !ourRule(r) })
	if n := len(stands); n > 0 && len(lacks(at(stands[n-1].Pref-1, g.usual))) == 0 {
		text := fmt.Sprintf("the guard at preference %d, not at %d", pref, stands[n-1].Pref-1)
		for _, r := range g.before() {
			if meets(r, g.want) {
				text += ": it is bypassed by " + r.String()
			}
		}
		return []error{fault.Missing(fault.Rule, "%s: %s", command, text)}
	}
	for _, r := range g.want {
		if !slices.Contains(stands, r) {
			errs = append(errs, fault.Missing(fault.Rule, "%s: %s", command, r))
		}
	}
	if len(errs) == 0 {
		const text = "%s: the rules of the guard at preference %d are not in order"
		errs = append(errs, fault.Missing(fault.Rule, text, command, pref))
	}
	return errs
}

// bypasses are the rules of others that bypass the guard, and that it cannot be put before; and
// the routes that lead what is guarded off the node by table local, where that is asked first.
func bypasses(p Plan, s nodeFacts) (texts []string) {
	have, _ := netobj.Read() // what cannot be read Check tells
	for _, g := range guards(p, s, have) {
		before := g.before()
		if slices.ContainsFunc(before, func(r netobj.Rule) bool { return r.Looks(unix.RT_TABLE_LOCAL) }) {
			for _, r := range g.want {
				for _, route := range have.Routes(unix.RT_TABLE_LOCAL, r.To.Addr()) {
					text := route.Command() + ": " + route.String()
					if r.To.IsSingleIP() && route.Type == unix.RTN_UNICAST && !slices.Contains(texts, text) {
						texts = append(texts, text)
					}
				}
			}
		}
		for _, r := range before {
			if r.Pref == 0 && meets(r, g.want) {
				texts = append(texts, r.Command()+": "+r.String())
			}
		}
	}
	return texts
}
