package routing

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
)

// chainState is what stands of one of our chains.
type chainState struct {
	exists bool
	rules  []string // as iptables -S prints them, without -A and the chain
	jumps  []jumpAt // ours to it
	before []string // rules of the base chain that a packet meets before the first of them
	faults []error  // what the Plan wants and is not there, or stands and should not

	unlisted    bool  // it holds a rule that iptables cannot list
	foreign     error // who else jumps to it
	redirection error // who else redirects the metadata server in the base chain
}

// right says whether install has nothing to do. Install moves a jump up; that it is not the first
// rule is no fault.
func (s chainState) right(c chain) bool {
	if c.absent {
		return !s.exists && len(s.jumps) == 0
	}
	return len(s.faults) == 0 && s.jumps[0].position == 1
}

// read reads the chains back, and compares them with what is wanted.
func (x *xtables) read(ctx context.Context, chains []chain) (map[string]chainState, error) {
	states := map[string]chainState{}
	for _, c := range chains {
		s, err := x.state(ctx, c)
		if err == nil {
			s.faults, err = x.compare(ctx, c, s)
		}
		if err != nil {
			return nil, err
		}
		states[c.name] = s
	}
	return states, nil
}

// state reads one chain and what leads to it.
//
// A chain with one of our names is somebody else's when somebody jumps to it without our comment.
// What is in it says nothing: it may be what an older version or half a flush left, and is
// replaced.
func (x *xtables) state(ctx context.Context, c chain) (s chainState, err error) {
	s.rules, s.exists, err = x.list(ctx, c.table, c.name)
	if errors.Is(err, errIncompatible) {
		s.exists, s.unlisted, err = true, true, nil
	}
	if err == nil && (s.exists || c.table == "nat") {
		err = x.readBase(ctx, c, &s)
	}
	return s, err
}

// readBase reads what leads to the chain.
func (x *xtables) readBase(ctx context.Context, c chain, s *chainState) error {
	base, _, err := x.list(ctx, c.table, c.base)
	if errors.Is(err, errIncompatible) {
		return x.readUnlisted(c, s)
	}
	var foreign string
	if s.jumps, foreign = jumps(base, c.name); foreign != "" {
		s.foreign = foreignChain(c, foreign)
	}
	if len(s.jumps) > 0 {
		s.before = base[:s.jumps[0].position-1]
	}
	if rule := redirection(base); c.table == "nat" && rule != "" {
		s.redirection = foreignRedirection(c, "-t nat -A "+c.base+" "+rule)
	}
	return err
}

// readUnlisted reads the jumps of a base chain that iptables cannot list (R-35: a rule of nft's in
// it).
func (x *xtables) readUnlisted(c chain, s *chainState) error {
	messages, err := nftRules(x.family, c.table, c.base)
	for i, m := range messages {
		r := parseNFTRule(m)
		text := fmt.Sprintf("handle %d (a rule of nft's)", r.handle)
		switch {
		case r.to == c.name && r.ours:
			s.jumps = append(s.jumps, jumpAt{position: i + 1, rule: c.jump()})
		case r.to == c.name:
			s.foreign = foreignChain(c, text)
		case r.redirects && r.server && c.table == "nat":
			s.redirection = foreignRedirection(c, text)
		}
	}
	return err
}

func foreignChain(c chain, rule string) error {
	return fmt.Errorf("chain %s of table %s %w, who jumps to it by -A %s %s", c.name, c.table, fault.ErrForeign, c.base, rule)
}

func foreignRedirection(c chain, rule string) error {
	return fmt.Errorf("%s %w, who redirects it by %s in chain %s: "+
		"this may be GKE, or another metadata server; remove that first", metadataServer, fault.ErrForeign, rule, c.base)
}

// redirection finds a rule that redirects the metadata server by itself. Ours never stand in a base
// chain.
func redirection(base []string) string {
	for _, rule := range base {
		if strings.Contains(rule, "-d "+metadataServer.Addr().String()+"/32 ") &&
			(strings.Contains(rule, "-j DNAT ") || strings.Contains(rule, "-j REDIRECT")) {
			return rule
		}
	}
	return ""
}

// foreignRedirections finds who redirects the metadata server by rules of iptables, in either
// backend.
func foreignRedirections(ctx context.Context) error {
	var all []error
	for _, command := range []string{"iptables-nft", "iptables-legacy"} {
		x, err := openXtables(command, isLegacy(command), netobj.IPv4)
		if err != nil {
			continue // who has no such command has no such rules
		}
		for _, c := range ownChains() {
			if c.table != "nat" {
				continue
			}
			s, err := x.state(ctx, c)
			if err != nil {
				return err
			}
			all = append(all, s.foreign, s.redirection)
		}
	}
	return errors.Join(all...)
}

// compare names what of the chain is not there, too much, or in the wrong order.
func (x *xtables) compare(ctx context.Context, c chain, s chainState) (errs []error, err error) {
	if c.absent {
		if len(s.jumps) > 0 {
			errs = append(errs, x.missing(c, "-A %s %s should not be there any more", c.base, s.jumps[0].rule))
		}
		return errs, nil
	}
	// Others insert before our jump and do so again and again (Calico): to insist on the first
	// place is a fight that nobody wins. Install moves the jump up, Check does not complain. An
	// ACCEPT before ours can open one of the two doors of R-05, not both, and the guard does not
	// depend on it.
	switch n := len(s.jumps); {
	case n == 0:
		errs = append(errs, fault.Flushed([]error{x.missing(c, "-I %s 1 %s", c.base, c.jump())})...)
	case n > 1:
		errs = append(errs, x.missing(c, "-A %s %s should be there once, not %d times", c.base, s.jumps[0].rule, n))
	}
	if c.table == "raw" {
		before, err := x.untracks(ctx, c, s.before)
		if err != nil {
			return nil, err
		}
		if before != "" {
			errs = append(errs, x.missing(c, "-I %s 1 %s before %s", c.base, c.jump(), before))
		}
	}
	if s.unlisted {
		return append(errs, x.missing(c, "the rules of %s are not ours alone: nft put one there", c.name)), nil
	}
	more, err := x.compareRules(ctx, c, s.rules)
	return append(errs, more...), err
}

// untracks finds a rule that a packet meets before our jump, and that says how conntrack is to take
// it: of two such rules the first one counts.
func (x *xtables) untracks(ctx context.Context, c chain, before []string) (rule string, err error) {
	seen := map[string]bool{c.name: true}
	var walk func(name string, rules []string) error
	walk = func(name string, rules []string) error {
		for _, r := range rules {
			words := strings.Fields(r)
			at := max(slices.Index(words, "-j"), slices.Index(words, "-g"))
			if at < 0 || at+1 >= len(words) {
				continue
			}
			target := words[at+1]
			if target == "CT" || target == "NOTRACK" {
				rule = "-A " + name + " " + r
				return nil
			}
			if seen[target] {
				continue
			}
			seen[target] = true
			of, _, err := x.list(ctx, c.table, target)
			if err != nil && !errors.Is(err, errIncompatible) {
				return err
			}
			if err := walk(target, of); err != nil || rule != "" {
				return err
			}
		}
		return nil
	}
	err = walk(c.base, before)
	return rule, err
}

// compareRules names what of the chain's rules is not there, too much, or in the wrong order.
func (x *xtables) compareRules(ctx context.Context, c chain, standing []string) (errs []error, err error) {
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
			if yes, err = x.hasRule(ctx, c.table, c.name, rule); err != nil {
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
	if x.family == netobj.IPv6 {
		return fault.IP6Tables
	}
	return fault.IPTables
}

// missing names the command and table in front of the rule, so that the text can be typed.
func (x *xtables) missing(c chain, format string, args ...any) error {
	return fault.Missing(x.layer(), "%s -t %s %s", x.command, c.table, fmt.Sprintf(format, args...))
}

// jumps returns the jumps to a chain of ours that are ours, and whether somebody else jumps there
// too.
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

// remove removes our chains of the tables, the redirecting ones first. Chains that somebody else
// jumps to are emptied and named.
func (x *xtables) remove(ctx context.Context, tables ...string) (err error) {
	for range 3 { // what was seen may have been flushed meanwhile
		var foreign error
		if foreign, err = x.tryRemove(ctx, tables); err == nil {
			return foreign
		}
	}
	return err
}

func (x *xtables) tryRemove(ctx context.Context, tables []string) (foreign, err error) {
	states := map[string]chainState{}
	var chains []chain
	for _, c := range slices.Backward(ownChains()) {
		var s chainState
		if !slices.Contains(tables, c.table) {
			continue
		}
		if s.exists, err = x.hasChain(ctx, c.table, c.name); err == nil && s.exists {
			err = x.readBase(ctx, c, &s)
		}
		if err != nil {
			return nil, err
		}
		chains, states[c.name] = append(chains, c), s
		foreign = errors.Join(foreign, s.foreign)
	}
	return foreign, x.restore(ctx, restoreText(chains, states))
}

// fingerprint is a text that tells, without a command, whether the chains are as they were when it
// was taken. It has the handles of the rules of nf_tables: a rule never changes under its handle,
// no table gives one twice, and a table that was made anew has another handle itself. A legacy
// table tells how many rules it has and where its base chains begin. That does not show every
// change (two rules swapped), which a sweep finds.
func (x *xtables) fingerprint(b *strings.Builder) error {
	tables := map[string]string{}
	for _, c := range ownChains() {
		if _, asked := tables[c.table]; !asked {
			text, err := x.tablePrint(c.table)
			if err != nil {
				return err
			}
			tables[c.table] = text
			fmt.Fprintf(b, "\n%s %s %s", x.family, c.table, text)
		}
		if x.legacy || tables[c.table] == "" {
			continue
		}
		for _, name := range []string{c.base, c.name} {
			fmt.Fprintf(b, " %s", name)
			rules, err := nftRules(x.family, c.table, name)
			if err != nil {
				return err
			}
			for _, r := range rules {
				fmt.Fprintf(b, " %x", attribute(r, unix.NFTA_RULE_HANDLE))
			}
		}
	}
	return nil
}

// tablePrint is a table's part of a fingerprint, "" if there is no such table.
func (x *xtables) tablePrint(table string) (string, error) {
	if !x.legacy {
		return nftTableHandle(x.family, table)
	}
	return legacyCount(table, x.family)
}
