package routing

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os/exec"
	"slices"

	"golang.org/x/sys/unix"
)

// glance is what the kernel tells of one of our chains, and of the base chain that leads to it, without any process: 0.1 ms, where
// iptables takes 2 ms and on the legacy backend 20 ms beside 10,000 rules. What only a command can put into words is odd; then it is run.
type glance struct {
	exists  bool     // the chain
	rules   int      // in it
	jumps   []jumpAt // ours to it
	foreign error    // whoever else jumps to it, which is known after a survey
	odd     bool     // the base chain has a jump to it that install does not write, or a redirection of somebody's

	// unlisted is what a base chain that iptables cannot list has of somebody else's:
	// another jump to the chain, or a redirection of the metadata server. nil: nothing.
	unlisted error
}

// ruleGlance is one rule of a base chain.
type ruleGlance struct {
	to        string // the chain that it jumps or goes to
	ours      bool   // our comment is on it
	plain     bool   // it has nothing else
	redirects bool   // it changes where packets go
	server    bool   // it names an address of the metadata server
	handle    uint64 // nf_tables'
	offset    uint32 // of where it jumps to, in a legacy table
}

// at makes a glance of the rules of a base chain.
func (c chain) at(rules []ruleGlance) (g glance) {
	for i, r := range rules {
		switch {
		case r.to == c.name && r.ours:
			g.jumps = append(g.jumps, jumpAt{position: i + 1, rule: c.jump(), handle: r.handle})
			g.odd = g.odd || !r.plain
		case r.to == c.name, r.redirects && c.table == "nat":
			g.odd = true
			if rule := fmt.Sprintf("handle %d (a rule of nft's)", r.handle); r.to == c.name {
				g.unlisted = foreignChain(c, rule)
			} else if r.server {
				g.unlisted = foreignRedirection(c, rule)
			}
		}
	}
	return g
}

// glanceNFT looks at tables of nf_tables that iptables made.
func glanceNFT(c chain, six bool) (g glance, err error) {
	family := xtablesFamily(six)
	exists, err := nftChainExists(family, c.table, c.name)
	if err != nil {
		return g, err
	}
	messages, err := nftRules(family, c.table, c.base)
	if err != nil {
		return g, err
	}
	var rules []ruleGlance
	for _, m := range messages {
		rules = append(rules, parseNFTRule(m))
	}
	g = c.at(rules)
	if g.exists = exists; exists {
		own, err := nftRules(family, c.table, c.name)
		if err != nil {
			return g, err
		}
		g.rules = len(own)
	}
	return g, nil
}

func xtablesFamily(six bool) uint8 {
	if six {
		return unix.NFPROTO_IPV6
	}
	return unix.NFPROTO_IPV4
}

// parseNFTRule reads a rule that iptables-nft made.
func parseNFTRule(message []byte) (r ruleGlance) {
	if h := attribute(message, unix.NFTA_RULE_HANDLE); len(h) == 8 {
		r.handle = binary.BigEndian.Uint64(h)
	}
	var shape []string
	for _, e := range attributes(attribute(message, unix.NFTA_RULE_EXPRESSIONS)) {
		name, data := unix.ByteSliceToString(within(e.value, unix.NFTA_EXPR_NAME)), within(e.value, unix.NFTA_EXPR_DATA)
		switch name {
		case "immediate":
			verdict := within(within(data, unix.NFTA_IMMEDIATE_DATA), unix.NFTA_DATA_VERDICT)
			r.to = unix.ByteSliceToString(within(verdict, unix.NFTA_VERDICT_CHAIN))
			if code := within(verdict, unix.NFTA_VERDICT_CODE); len(code) == 4 && int32(binary.BigEndian.Uint32(code)) == unix.NFT_GOTO {
				name = "goto"
			}
		case "match":
			if unix.ByteSliceToString(within(data, unix.NFTA_MATCH_NAME)) == "comment" {
				name = "comment"
				r.ours = unix.ByteSliceToString(within(data, unix.NFTA_MATCH_INFO)) == comment
			}
		case "target":
			r.redirects = redirecting(unix.ByteSliceToString(within(data, unix.NFTA_TARGET_NAME)))
		case "nat", "redir":
			r.redirects = true
		case "cmp":
			value := within(within(data, unix.NFTA_CMP_DATA), unix.NFTA_DATA_VALUE)
			r.server = r.server || bytes.Equal(value, metadataServer.Addr().AsSlice()) || bytes.Equal(value, metadataServer6.Addr().AsSlice())
		}
		shape = append(shape, name)
	}
	r.plain = slices.Equal(shape, []string{"comment", "counter", "immediate"})
	return r
}

// as says whether the chain has as many rules as are wanted, and the one jump to it in its place.
func (g glance) as(c chain) bool {
	return g.exists && g.rules == len(c.rules) && !g.odd && len(g.jumps) == 1 && g.jumps[0].position == 1
}

// foreignRedirections finds who redirects the metadata server by rules of iptables, in either backend.
func foreignRedirections(ctx context.Context) error {
	var all []error
	for _, x := range []*xtables{{command: "iptables-nft"}, {command: "iptables-legacy", legacy: true}} {
		chains := slices.DeleteFunc(ownChains(), func(c chain) bool { return c.table != "nat" })
		stands, err := x.glances(chains)
		if err != nil {
			return err
		}
		odd := func(c chain) bool { return stands[c.name].odd }
		if _, err := exec.LookPath(x.command); err != nil || !slices.ContainsFunc(chains, odd) {
			continue
		}
		_, foreign, err := x.survey(ctx, chains)
		if err != nil {
			return err
		}
		all = append(all, foreign)
	}
	return errors.Join(all...)
}

// redirecting says whether a target of iptables changes where packets go.
func redirecting(target string) bool {
	return target == "DNAT" || target == "REDIRECT" || target == "NETMAP"
}

// glances looks at the chains of one family.
func (x *xtables) glances(chains []chain) (map[string]glance, error) {
	all := map[string]glance{}
	tables := map[string]legacyTableGlance{}
	for _, c := range chains {
		if !x.legacy {
			g, err := glanceNFT(c, x.six)
			if err != nil {
				return nil, err
			}
			all[c.name] = g
			continue
		}
		t, seen := tables[c.table]
		if !seen {
			var err error
			if t, err = glanceLegacy(c.table, x.six); err != nil {
				return nil, err
			}
			tables[c.table] = t
		}
		g := c.at(t.base[c.base])
		g.rules, g.exists = t.chains[c.name]
		all[c.name] = g
	}
	return all, nil
}
