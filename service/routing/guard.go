package routing

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
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
// Rules of one preference are asked in the order in which they were added. Redirected packets have
// another destination by the time they are routed, so these rules see only what would leak. What
// may pass goes on behind the guard, so the host's own policy routing holds for it. DNS at
// 169.254.169.254:53 passes. "not iif lo … prohibit" would negate the whole selector and cut pods
// off.
//
// A rule that names a port matches no fragment, not even the first, which holds the port, and a pod
// may send fragments of its own making. Netfilter puts fragments together before they are routed,
// if it does anything at all. So the server's other ports are let go on by name, and the rest of
// TCP is prohibited; of IPv6, where headers can lie between the fragment's and TCP's, the rest of
// everything.
//
// A rule of somebody else's with a lower preference walks round the guard (R-33: AWS's network has
// 1, 10 and 20 for security groups of pods). So the guard stands before every rule that can match
// what pods send to a guarded address, at 97 or lower: see place. Where it had to move, table local
// may come later than others' rules, so the emulator's address is led there by a first rule:
//
//	8: from all to 169.254.169.252 ipproto tcp dport 988 lookup local proto kernel
//
// R-10b: iif lo is all that this host sends, its own daemons and pods on the host network alike. Those pods reach the real
// server when only these rules are left; for them the promise holds while the netfilter rules stand.
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
// proto kernel keeps networkd ≥ 248 from deleting the rules, and with the preference and the shape shows whose they are.
const (
	usualPref = 97    // of the guard, where no rule of somebody else's stands before; its end is at the next one
	lastPref  = 103   // of a rule that any version of ours has made
	ourTable  = 988   // where mode loopback has its route
	lastPort  = 65534 // that a rule can name
)

// guardRules are the Plan's at their usual preference, in the order in which they are asked. The
// first of each family is the end of the guard, to which others go: it is added first and deleted
// last. Mode loopback needs the uplinks.
func guardRules(p Plan, s nodeFacts) (rules []policyRule) {
	loopback := p.traits().localServer && !p.Closed
	guarded := p.Guard
	if loopback {
		guarded = append(slices.Clone(guarded), metadataServer) // else the host's own requests came to us too
	}
	add := func(r policyRule) {
		r.six = r.to.Is6()
		if r.pref = usualPref; r.action == unix.FR_ACT_GOTO {
			r.arg = usualPref + 1
		}
		if !slices.Contains(rules, r) {
			rules = append(rules, r)
		}
	}
	for _, g := range guarded {
		end := policyRule{pref: usualPref + 1, six: g.Addr().Is6(), action: unix.FR_ACT_NOP}
		if !slices.Contains(rules, end) {
			rules = append(rules, end)
		}
	}
	for _, g := range guarded {
		for _, name := range append([]string{"lo"}, p.Spare...) {
			add(policyRule{to: g.Addr(), iif: name, action: unix.FR_ACT_GOTO})
		}
	}
	if loopback {
		to, port := metadataServer.Addr(), metadataServer.Port()
		for _, name := range s.uplinks {
			if !strings.HasSuffix(name, "+") { // policy rules know no pattern
				add(policyRule{to: to, iif: name, port: port, action: unix.FR_ACT_PROHIBIT})
			}
		}
		add(policyRule{to: to, port: port, action: unix.FR_ACT_TO_TBL, arg: ourTable})
	}
	for _, g := range guarded { // in mode loopback the server's, where the table is empty
		add(policyRule{to: g.Addr(), port: g.Port(), action: unix.FR_ACT_PROHIBIT})
	}
	restRules(guarded, add)
	return rules
}

// restRules prohibit what is sent to the guarded addresses and of which no rule can tell the port,
// behind what passes.
func restRules(guarded []netip.AddrPort, add func(policyRule)) {
	var order []netip.Addr
	ports := map[netip.Addr][]uint16{}
	for _, g := range guarded {
		if !slices.Contains(order, g.Addr()) {
			order = append(order, g.Addr())
		}
		ports[g.Addr()] = append(ports[g.Addr()], g.Port())
	}
	for _, to := range order {
		rest := policyRule{to: to, proto: unix.IPPROTO_TCP, action: unix.FR_ACT_PROHIBIT}
		if to.Is6() {
			rest.proto = 0
			add(policyRule{to: to, proto: unix.IPPROTO_UDP, action: unix.FR_ACT_GOTO})
			add(policyRule{to: to, proto: unix.IPPROTO_ICMPV6, action: unix.FR_ACT_GOTO})
		}
		slices.Sort(ports[to])
		from := uint16(1)
		for _, port := range append(ports[to], lastPort+1) {
			switch {
			case port == from+1:
				add(policyRule{to: to, port: from, action: unix.FR_ACT_GOTO})
			case port > from:
				add(policyRule{to: to, port: from, last: port - 1, action: unix.FR_ACT_GOTO})
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
func place(want, reach, others []policyRule) []policyRule {
	base := uint32(usualPref)
	for _, o := range others {
		if o.meets(want) {
			base = min(base, max(o.pref, 2)-2)
		}
	}
	if base < usualPref {
		want = slices.Concat(want[:1], reach, want[1:]) // behind the end of the guard
	}
	return at(base, want)
}

// reachRules make the emulator's address this node's own before rules of others can lead elsewhere.
// Where it is another's they decide nothing.
func reachRules(p Plan, s nodeFacts, six bool) (rules []policyRule) {
	for _, l := range []netip.AddrPort{p.Listen, s.listen6} {
		a := l.Addr()
		if p.Closed || p.traits().localServer || !l.IsValid() || a.Is6() != six || a.IsUnspecified() || a.IsLoopback() {
			continue
		}
		rules = append(rules, policyRule{pref: usualPref, six: six, to: a, port: l.Port(),
			action: unix.FR_ACT_TO_TBL, arg: unix.RT_TABLE_LOCAL})
	}
	return rules
}

// at are the rules of guardRules with another preference than the usual one.
func at(base uint32, rules []policyRule) (moved []policyRule) {
	for _, r := range rules {
		r.pref = r.pref + base - usualPref
		if r.action == unix.FR_ACT_GOTO {
			r.arg = base + 1
		}
		moved = append(moved, r)
	}
	return moved
}

// ruleList are the rules of one of the kernel's two families, in the order in which they are asked.
type ruleList struct {
	ours, others []policyRule
	before       []policyRule // those of others that are asked before the first of ours, but for the end of the guard
}

// readRules lists the rules of one family.
func readRules(six bool) (l ruleList, err error) {
	all, err := standingRules(six)
	first := true
	for _, r := range all {
		switch {
		case !r.ours():
			l.others = append(l.others, r)
			if first {
				l.before = append(l.before, r)
			}
			continue
		case r.action != unix.FR_ACT_NOP:
			first = false
		}
		l.ours = append(l.ours, r)
	}
	return l, err
}

// surplus are those that are not wanted, in the order in which to delete them: of several equal
// ones the first. The kernel deletes the first rule that has all that it is told of, so one that
// names a port goes before one that names none; and what is closed goes before what passes.
func (l ruleList) surplus(want []policyRule) (surplus []policyRule) {
	left := slices.Clone(want)
	for _, r := range slices.Backward(l.ours) {
		if i := slices.Index(left, r); i >= 0 {
			left = slices.Delete(left, i, i+1)
		} else {
			surplus = append(surplus, r)
		}
	}
	slices.Reverse(surplus)
	slices.SortStableFunc(surplus, func(a, b policyRule) int { return cmp.Compare(a.deletion(), b.deletion()) })
	return surplus
}

// deletion is the rule's place in the order of surplus.
func (r policyRule) deletion() int {
	switch {
	case r.action == unix.FR_ACT_NOP:
		return 4
	case r.iif != "" && r.port == 0:
		return 3
	case r.port == 0 && r.action == unix.FR_ACT_PROHIBIT:
		return 2
	case r.iif == "":
		return 1
	}
	return 0
}

// stands says whether the wanted rules are all there, in their order.
func (l ruleList) stands(want []policyRule) bool {
	left := slices.Clone(l.ours)
	for _, r := range l.surplus(want) {
		i := slices.Index(left, r)
		left = slices.Delete(left, i, i+1)
	}
	want = slices.Clone(want)
	slices.SortStableFunc(want, func(a, b policyRule) int { return cmp.Compare(a.pref, b.pref) })
	return slices.Equal(left, want)
}

// guard is what stands of one family, and what the Plan wants there.
type guard struct {
	have  ruleList
	usual []policyRule // at the usual preference
	want  []policyRule // where it is to stand
}

func readGuard(p Plan, s nodeFacts) (both []guard, err error) {
	rules := guardRules(p, s)
	for _, six := range []bool{false, true} {
		if six && !haveIPv6() {
			continue // nothing can leak where there is no IPv6
		}
		var g guard
		if g.have, err = readRules(six); err != nil {
			return both, err
		}
		g.usual = slices.DeleteFunc(slices.Clone(rules), func(r policyRule) bool { return r.six != six })
		g.want = place(g.usual, reachRules(p, s, six), g.have.others)
		both = append(both, g)
	}
	return both, nil
}

// addGuard adds the rules where they do not stand, behind all that do: what is closed stays closed
// in between.
func addGuard(p Plan, s nodeFacts) error {
	both, err := readGuard(p, s)
	if err != nil {
		return err
	}
	for _, g := range both {
		if len(g.want) == 0 || g.have.stands(g.want) {
			continue
		}
		for _, r := range g.want {
			if err := r.change(unix.RTM_NEWRULE, unix.NLM_F_CREATE); err != nil {
				if r.six && noIPv6(err) {
					break
				}
				return fmt.Errorf("%s rule add %s: %w", r.ip(), r, permission(err))
			}
		}
	}
	return nil
}

// trimGuard deletes what the Plan does not want. What others do meanwhile may have it delete
// another one of ours: then the rest is looked at again.
func trimGuard(p Plan, s nodeFacts) error {
	for range 5 {
		both, err := readGuard(p, s)
		errs, more := []error{err}, false
		for _, g := range both {
			surplus := g.have.surplus(g.want)
			more = more || len(surplus) > 0
			errs = append(errs, deleteRules(surplus))
		}
		if err := errors.Join(errs...); err != nil || !more {
			return err
		}
		if err := addGuard(p, s); err != nil {
			return err
		}
	}
	return nil
}

// installGuard adds what is missing, and then deletes what an earlier Plan wanted. That of mode
// loopback stays until another mode's rules stand: see removeEarlier.
func installGuard(p Plan, s nodeFacts) error {
	if err := addGuard(p, s); err != nil {
		return err
	}
	l, err := readRules(false)
	if err != nil || !p.traits().localServer && slices.ContainsFunc(l.ours, policyRule.serves) {
		return err
	}
	return trimGuard(p, s)
}

// removeGuard deletes all rules of the guard, whoever's Plan they were.
func removeGuard() error { return trimGuard(Plan{}, nodeFacts{}) }

// checkGuard names the rules that are not there, and whose rule walks round the guard.
func checkGuard(p Plan, s nodeFacts) (errs []error) {
	both, err := readGuard(p, s)
	if err != nil {
		return []error{err}
	}
	for _, g := range both {
		if len(g.want) == 0 || g.have.stands(g.want) {
			continue
		}
		pref, before := g.want[len(g.want)-1].pref, len(errs)
		if n := len(g.have.ours); n > 0 && g.have.stands(at(g.have.ours[n-1].pref-1, g.usual)) {
			fault := fmt.Sprintf("the guard at preference %d, not at %d", pref, g.have.ours[n-1].pref-1)
			for _, o := range g.have.before {
				if o.meets(g.want) {
					fault += ": it is walked round by " + o.String()
				}
			}
			errs = append(errs, missing(layerRule, "%s rule: %s", g.want[0].ip(), fault))
			continue
		}
		for _, r := range g.want {
			if !slices.Contains(g.have.ours, r) {
				errs = append(errs, missing(layerRule, "ip rule: %s", r))
			}
		}
		if len(errs) == before {
			const fault = "%s rule: the rules of the guard at preference %d are not in order"
			errs = append(errs, missing(layerRule, fault, g.want[0].ip(), pref))
		}
	}
	return errs
}

// bypasses are the rules of others that walk round the guard, and that it cannot be put before; and
// the routes that lead what is guarded off the node by table local, where that is asked first.
func bypasses(p Plan, s nodeFacts) (texts []string) {
	both, _ := readGuard(p, s) // what cannot be read checkGuard tells
	for _, g := range both {
		if slices.ContainsFunc(g.have.before, policyRule.looksLocal) {
			texts = append(texts, localRoutes(g.want)...)
		}
		for _, o := range g.have.before {
			if o.pref == 0 && o.meets(g.want) {
				texts = append(texts, o.ip()+" rule: "+o.String())
			}
		}
	}
	return texts
}

// localRoutes are the routes of table local by which what the rules guard leaves the node.
func localRoutes(guard []policyRule) (texts []string) {
	if len(guard) == 0 {
		return nil
	}
	family := netlink.FAMILY_V4
	if guard[0].six {
		family = netlink.FAMILY_V6
	}
	routes, _ := retryDump(func() ([]netlink.Route, error) {
		of := &netlink.Route{Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_UNICAST}
		return netlink.RouteListFiltered(family, of, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
	})
	for _, route := range routes {
		leads := func(r policyRule) bool {
			return r.to.IsValid() && (route.Dst == nil || route.Dst.Contains(r.to.AsSlice()))
		}
		if slices.ContainsFunc(guard, leads) {
			to := "default"
			if route.Dst != nil {
				to = route.Dst.String()
			}
			texts = append(texts, guard[0].ip()+" route: "+to+" table local")
		}
	}
	return texts
}

// deleteRules deletes them in the order in which they are given.
func deleteRules(rules []policyRule) error {
	var errs []error
	for _, r := range rules {
		if err := r.change(unix.RTM_DELRULE, 0); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("%s rule del %s: %w", r.ip(), r, permission(err)))
		}
	}
	return errors.Join(errs...)
}
