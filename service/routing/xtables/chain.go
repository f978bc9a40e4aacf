package xtables

import (
	"fmt"
	"slices"
	"strings"
)

// Comment marks the jumps from the base chains into ours: whose they are can be seen without
// memory.
const Comment = "gke-metadata-emulator"

// Chain is one chain of ours, what jumps to it, and what is in it.
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
type Chain struct {
	Table, Base, Name string
	Rules             []string // as iptables -S prints them, without -A and the chain
	Absent            bool     // this Plan has no such chain
	Queries           bool     // its rules redirect DNS queries, before others do
}

// Jump is what stands at position 1 of the base chain.
func (c Chain) Jump() string { return "-m comment --comment " + Comment + " -j " + c.Name }

// OwnChains are all chains that any Plan can have made in either family, in the order in which they
// are put up: closed before open. Removing goes the other way round.
func OwnChains() []Chain {
	return []Chain{
		{Table: "filter", Base: "FORWARD", Name: "GME-FWD", Absent: true},
		{Table: "filter", Base: "INPUT", Name: "GME-IN", Absent: true},
		{Table: "filter", Base: "OUTPUT", Name: "GME-LOCAL", Absent: true},
		{Table: "raw", Base: "PREROUTING", Name: "GME-RAW", Absent: true},
		{Table: "raw", Base: "OUTPUT", Name: "GME-RAW-OUT", Absent: true},
		{Table: "nat", Base: "OUTPUT", Name: "GME-OUT", Absent: true},
		{Table: "nat", Base: "PREROUTING", Name: "GME-PRE", Absent: true},
	}
}

// RestoreText is what iptables-restore --noflush gets: every chain of ours emptied and filled anew,
// or taken away if it is absent; jumps that stand elsewhere than once at position 1 taken out and
// put there. One COMMIT a table makes each table's change atomic: a packet sees the rules of before
// or of after, and 0 of 9762 requests were lost. stands is what is there now, by chain name.
// "" is nothing to do.
func RestoreText(chains []Chain, stands map[string]ChainState) string {
	var b strings.Builder
	chains = slices.DeleteFunc(slices.Clone(chains), func(c Chain) bool {
		g := stands[c.Name]
		return c.Absent && !g.Exists && len(g.Jumps) == 0
	})
	for start := 0; start < len(chains); {
		end := start
		for end < len(chains) && chains[end].Table == chains[start].Table {
			end++
		}
		var body strings.Builder
		for _, c := range chains[start:end] {
			fmt.Fprintf(&body, ":%s - [0:0]\n", c.Name)
		}
		for _, c := range chains[start:end] {
			for _, r := range c.Rules {
				fmt.Fprintf(&body, "-A %s %s\n", c.Name, r)
			}
		}
		for _, c := range chains[start:end] {
			g := stands[c.Name]
			if len(g.Jumps) == 1 && g.Jumps[0].Position == 1 && !c.Absent {
				continue
			}
			for _, j := range g.Jumps {
				fmt.Fprintf(&body, "-D %s %s\n", c.Base, j.Rule)
			}
			switch {
			case !c.Absent:
				fmt.Fprintf(&body, "-I %s 1 %s\n", c.Base, c.Jump())
			case g.Foreign == nil: // else somebody else's rule holds it
				fmt.Fprintf(&body, "-X %s\n", c.Name)
			}
		}
		fmt.Fprintf(&b, "*%s\n%sCOMMIT\n", chains[start].Table, body.String())
		start = end
	}
	return b.String()
}

// JumpAt is a jump of ours in a base chain.
type JumpAt struct {
	Position int    // from 1
	Rule     string // without -A and the base chain
}
