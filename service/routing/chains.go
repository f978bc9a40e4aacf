package routing

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// survey looks at what leads to the chains: what stands of ours, by chain of ours, and as foreign who else uses our chains or redirects the
// metadata server.
//
// A chain with one of our names is somebody else's when somebody jumps to it without our comment. What is in it says nothing: it may be
// what an older version or half a flush left, and is replaced.
func (x *xtables) survey(ctx context.Context, chains []chain) (stands map[string]glance, foreign, err error) {
	if stands, err = x.glances(chains); err != nil {
		return nil, nil, err
	}
	var all []error
	for _, c := range chains {
		g := stands[c.name]
		if !g.odd {
			continue
		}
		listed, err := x.list(ctx, nil, c.table, c.base)
		if errors.Is(err, errIncompatible) {
			g.odd = false // iptables has no words for it: what netlink tells is all that is known
			g.foreign = g.unlisted
			stands[c.name] = g
			all = append(all, g.unlisted)
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		base := listed[c.base]
		ours, by := jumps(base, c.name)
		if len(ours) >= len(g.jumps) { // else it could not be listed: to put a jump that stands is to have two
			g.jumps = ours
		}
		if by != "" {
			g.foreign = foreignChain(c, by)
			all = append(all, g.foreign)
		}
		stands[c.name] = g
		if rule := redirection(base); c.table == "nat" && rule != "" {
			all = append(all, foreignRedirection(c, "-t nat -A "+c.base+" "+rule))
		}
	}
	return stands, errors.Join(all...), nil
}

func foreignChain(c chain, rule string) error {
	return fmt.Errorf("chain %s of table %s %w, who jumps to it by -A %s %s", c.name, c.table, ErrForeign, c.base, rule)
}

func foreignRedirection(c chain, rule string) error {
	return fmt.Errorf("%s %w, who redirects it by %s in chain %s: this may be GKE, or another metadata server; remove that first",
		metadataServer, ErrForeign, rule, c.base)
}

// redirection finds a rule that redirects the metadata server by itself. Ours never stand in a base chain.
func redirection(base []string) string {
	for _, rule := range base {
		if strings.Contains(rule, "-d "+metadataServer.Addr().String()+"/32 ") && (strings.Contains(rule, "-j DNAT ") || strings.Contains(rule, "-j REDIRECT")) {
			return rule
		}
	}
	return ""
}

// reading is a check that has begun: all listings run at once, on nf_tables one for each chain of ours, which is all that cannot be seen
// without, and on the legacy backend one for each table, which it reads as a whole in any case.
type reading struct {
	*xtables
	chains   []chain
	stands   map[string]glance              // of nf_tables
	listings map[string]*runningCommand     // by chain, or by table of the legacy backend
	tables   map[string]map[string][]string // what is in them, by chain
	err      error
}

func (x *xtables) startCheck(ctx context.Context, chains []chain) *reading {
	r := &reading{xtables: x, chains: chains, listings: map[string]*runningCommand{}, tables: map[string]map[string][]string{}}
	if !x.legacy {
		r.stands, r.err = x.glances(chains)
	}
	for _, c := range chains {
		switch _, started := r.listings[c.table]; {
		case r.err != nil, c.absent && !x.legacy:
		case !x.legacy && r.stands[c.name].exists:
			r.listings[c.name] = x.startList(ctx, c.table, c.name)
		case x.legacy && !started && legacyTable(c.table, x.six): // else listing it would make it
			r.listings[c.table] = x.startList(ctx, c.table)
		}
	}
	return r
}

// end compares every chain of ours with the kernel's, and names every rule that is missing or too much.
func (r *reading) end(ctx context.Context) (faults map[string][]error, err error) {
	faults, err = map[string][]error{}, r.err
	for _, c := range r.chains {
		if err == nil {
			faults[c.name], err = r.endChain(ctx, c)
		}
	}
	for _, l := range r.listings { // those that nobody waited for
		_, _ = l.end()
	}
	return faults, err
}

// listed are the rules of one of the chains that were listed, by the listing's key.
func (r *reading) listed(ctx context.Context, key, table string, chain ...string) (rules map[string][]string, err error) {
	if l := r.listings[key]; l != nil {
		delete(r.listings, key)
		if r.tables[key], err = r.list(ctx, l, table, chain...); err != nil {
			return nil, err
		}
	}
	return r.tables[key], nil
}

// standing are the rules of the chain, and the jumps of ours to it.
func (r *reading) standing(ctx context.Context, c chain) (rules []string, at []jumpAt, err error) {
	if r.legacy {
		table, err := r.listed(ctx, c.table, c.table)
		at, _ = jumps(table[c.base], c.name)
		return table[c.name], at, err
	}
	own, err := r.listed(ctx, c.name, c.table, c.name)
	if err != nil {
		return nil, nil, err
	}
	g := r.stands[c.name]
	if g.odd {
		base, err := r.list(ctx, nil, c.table, c.base)
		if err != nil && !errors.Is(err, errIncompatible) {
			return nil, nil, err
		}
		if ours, _ := jumps(base[c.base], c.name); len(ours) >= len(g.jumps) {
			g.jumps = ours
		}
	}
	return own[c.name], g.jumps, nil
}

func (r *reading) endChain(ctx context.Context, c chain) (errs []error, err error) {
	rules, at, err := r.standing(ctx, c)
	if err != nil {
		return nil, err
	}
	if c.absent {
		if len(at) > 0 {
			errs = append(errs, r.missing(c, "-A %s %s should not be there any more", c.base, at[0].rule))
		}
		return errs, nil
	}
	// Others insert before our jump and do so again and again (Calico): to insist on the first place is a fight that nobody
	// wins. Install moves the jump up, Check does not complain. An ACCEPT before ours can open one of the two doors
	// of R-05, not both, and the guard does not depend on it.
	switch {
	case len(at) == 0:
		errs = append(errs, r.missing(c, "-I %s 1 %s", c.base, c.jump()))
	case len(at) > 1:
		errs = append(errs, r.missing(c, "-A %s %s should be there once, not %d times", c.base, at[0].rule, len(at)))
	}
	if c.table == "raw" && len(at) > 0 && at[0].position > 1 {
		before, err := r.untracks(ctx, c, at[0].position)
		if err != nil {
			return nil, err
		}
		if before != "" {
			errs = append(errs, r.missing(c, "-I %s 1 %s before %s", c.base, c.jump(), before))
		}
	}
	more, err := r.compare(ctx, c, rules)
	return append(errs, more...), err
}

// untracks finds a rule that a packet meets before the jump at the position, and that says how
// conntrack is to take it: of two such rules the first one counts.
func (x *xtables) untracks(ctx context.Context, c chain, position int) (rule string, err error) {
	table, err := x.list(ctx, nil, c.table)
	if err != nil {
		if errors.Is(err, errIncompatible) {
			err = nil
		}
		return "", err
	}
	seen := map[string]bool{c.name: true}
	var walk func(name string, rules []string)
	walk = func(name string, rules []string) {
		for _, r := range rules {
			words := strings.Fields(r)
			at := max(slices.Index(words, "-j"), slices.Index(words, "-g"))
			if at < 0 || at+1 >= len(words) {
				continue
			}
			target := words[at+1]
			if rule == "" && (target == "CT" || target == "NOTRACK") {
				rule = "-A " + name + " " + r
			}
			if !seen[target] {
				seen[target] = true
				walk(target, table[target])
			}
		}
	}
	walk(c.base, table[c.base][:min(position-1, len(table[c.base]))])
	return rule, nil
}

// compare names what of the chain's rules is not there, too much, or in the wrong order.
func (x *xtables) compare(ctx context.Context, c chain, standing []string) (errs []error, err error) {
	if slices.Equal(c.rules, standing) {
		return nil, nil
	}
	reworded := 0
	for _, rule := range c.rules {
		if slices.Contains(standing, rule) {
			continue
		}
		yes := false
		if len(standing) > 0 {
			if yes, err = x.has(ctx, c.table, c.name, rule); err != nil {
				return nil, err
			}
		}
		if yes {
			reworded++
		} else {
			errs = append(errs, x.missing(c, "-A %s %s", c.name, rule))
		}
	}
	var extra []string
	for _, rule := range standing {
		if !slices.Contains(c.rules, rule) {
			extra = append(extra, rule)
		}
	}
	if len(extra) > reworded {
		for _, rule := range extra {
			errs = append(errs, x.missing(c, "-A %s %s should not be there", c.name, rule))
		}
	}
	if len(errs) == 0 && (reworded == 0 || len(standing) != len(c.rules)) {
		errs = append(errs, x.missing(c, "the rules of %s are doubled or not in order", c.name))
	}
	return errs, nil
}

func (x *xtables) layer() string {
	if x.six {
		return layerIP6Tables
	}
	return layerIPTables
}

// missing names the command and table in front of the rule, so that the text can be typed.
func (x *xtables) missing(c chain, format string, args ...any) error {
	return missing(x.layer(), "%s -t %s %s", x.command, c.table, fmt.Sprintf(format, args...))
}

// jumps returns the jumps to a chain of ours that are ours, and whether somebody else jumps there too.
func jumps(base []string, name string) (ours []jumpAt, foreign string) {
	for i, rule := range base {
		words := strings.Fields(rule)
		at := slices.Index(words, "-j")
		if at < 0 {
			at = slices.Index(words, "-g")
		}
		if at < 0 || at+1 >= len(words) || words[at+1] != name {
			continue
		}
		if c := slices.Index(words, "--comment"); c < 0 || c+1 >= len(words) || words[c+1] != comment {
			foreign = rule
			continue
		}
		ours = append(ours, jumpAt{position: i + 1, rule: rule})
	}
	return ours, foreign
}
