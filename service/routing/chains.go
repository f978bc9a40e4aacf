package routing

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
)

// survey lists the base chains of the chains: the jumps that are ours, by chain of ours, and as foreign who else uses our chains or redirects
// the metadata server.
//
// A chain with one of our names is somebody else's when somebody jumps to it without our comment. What is in it says nothing: it may be
// what an older version or half a flush left, and is replaced.
func (x *xtables) survey(ctx context.Context, chains []chain) (ours map[string][]jumpAt, foreign, err error) {
	ours = map[string][]jumpAt{}
	var all []error
	for _, c := range chains {
		base, _, err := x.list(ctx, c.table, c.base)
		if err != nil {
			return nil, nil, err
		}
		at, by := jumps(base, c.name)
		if len(at) > 0 {
			ours[c.name] = at
		}
		if by != "" {
			all = append(all, foreignChain(c, by))
		}
		if rule := redirection(base); c.table == "nat" && rule != "" {
			all = append(all, fmt.Errorf("%s %w, who redirects it by -t nat -A %s %s: this may be GKE, or another metadata server; remove that first",
				metadataServer, ErrForeign, c.base, rule))
		}
	}
	return ours, errors.Join(all...), nil
}

func foreignChain(c chain, rule string) error {
	return fmt.Errorf("chain %s of table %s %w, who jumps to it by -A %s %s", c.name, c.table, ErrForeign, c.base, rule)
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

// check compares every chain of ours with the kernel's, and names every rule.
func (x *xtables) check(ctx context.Context, chains []chain) (errs []error) {
	for _, c := range chains {
		base, _, err := x.list(ctx, c.table, c.base)
		if err != nil {
			return append(errs, err)
		}
		ours, _ := jumps(base, c.name)
		switch {
		case c.absent && len(ours) > 0:
			errs = append(errs, x.missing(c, "-A %s %s should not be there any more", c.base, ours[0].rule))
		case c.absent:
		case len(ours) == 0:
			errs = append(errs, x.missing(c, "-I %s 1 %s", c.base, c.jump()))
		case len(ours) > 1:
			errs = append(errs, x.missing(c, "-A %s %s should be there once, not %d times", c.base, ours[0].rule, len(ours)))
		}
		// Others insert before our jump and do so again and again (Calico): to insist on the first place is a fight that nobody
		// wins. Install moves the jump up, Check does not complain. An ACCEPT before ours can open one of the two doors
		// of R-05, not both, and the guard does not depend on it.
		if c.absent {
			continue
		}
		rules, _, err := x.list(ctx, c.table, c.name)
		if err != nil {
			return append(errs, err)
		}
		more, err := x.compare(ctx, c, rules)
		if err != nil {
			return append(errs, err)
		}
		errs = append(errs, more...)
	}
	return errs
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

// missing names the command and table in front of the rule, so that the text can be typed.
func (x *xtables) missing(c chain, format string, args ...any) error {
	layer := layerIPTables
	if x.six {
		layer = layerIP6Tables
	}
	return missing(layer, "%s -t %s %s", x.command, c.table, fmt.Sprintf(format, args...))
}

// removeChains removes our chains of the tables (none: all) and of both families from one backend, the redirecting ones first.
func removeChains(ctx context.Context, command string, tables ...string) error {
	var errs []error
	for _, six := range []bool{false, true} {
		x, err := openXtables(command, six)
		if errors.Is(err, exec.ErrNotFound) {
			continue // who has no such command has no such rules
		}
		if err == nil {
			err = x.removeAll(ctx, tables...)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (x *xtables) removeAll(ctx context.Context, tables ...string) error {
	legacy := isLegacy(x.command)
	var errs []error
	for _, c := range slices.Backward(ownChains(x.six)) {
		if len(tables) > 0 && !slices.Contains(tables, c.table) {
			continue
		}
		if legacy && !legacyTable(c.table, x.six) {
			continue // and listing it would make it
		}
		errs = append(errs, x.remove(ctx, c))
	}
	return errors.Join(errs...)
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

// remove takes out the jumps of ours and then the chain.
func (x *xtables) remove(ctx context.Context, c chain) error {
	base, exists, err := x.list(ctx, c.table, c.base)
	if err != nil || !exists {
		return err
	}
	ours, foreign := jumps(base, c.name)
	for _, j := range ours {
		if err := x.retry(ctx, func() error { return x.Delete(c.table, c.base, strings.Fields(j.rule)...) }); err != nil {
			return err
		}
	}
	if foreign != "" {
		return foreignChain(c, foreign)
	}
	return x.retry(ctx, func() error { return x.ClearAndDeleteChain(c.table, c.name) })
}
