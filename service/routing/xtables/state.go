package xtables

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/nft"
)

// ChainState is what stands of one of our chains.
type ChainState struct {
	Exists bool
	Rules  []string // as iptables -S prints them, without -A and the chain
	Jumps  []JumpAt // ours to it
	before []string // rules of the base chain that a packet meets before the first of them
	Faults []error  // what the Plan wants and is not there, or stands and should not

	unlisted    bool  // it holds a rule that iptables cannot list
	Foreign     error // who else jumps to it
	Redirection error // who else redirects the metadata server in the base chain
}

// Right says whether install has nothing to do. Install moves a jump up; that it is not the first
// rule is no fault.
func (s ChainState) Right(c Chain) bool {
	if c.Absent {
		return !s.Exists && len(s.Jumps) == 0
	}
	return len(s.Faults) == 0 && s.Jumps[0].Position == 1
}

// Read reads the chains back, and compares them with what is wanted.
func (x *Tables) Read(ctx context.Context, chains []Chain) (map[string]ChainState, error) {
	return x.each(chains, func(c Chain) (ChainState, error) {
		s, err := x.State(ctx, c)
		if err == nil {
			s.Faults, err = x.compare(ctx, c, s)
		}
		return s, err
	})
}

// State reads one chain and what leads to it.
//
// A chain with one of our names is somebody else's when somebody jumps to it without our comment.
// What is in it says nothing: it may be what an older version or half a flush left, and is
// replaced.
func (x *Tables) State(ctx context.Context, c Chain) (s ChainState, err error) {
	s.Rules, s.Exists, err = x.ListRules(ctx, c.Table, c.Name)
	if errors.Is(err, ErrIncompatible) {
		s.Exists, s.unlisted, err = true, true, nil
	}
	if err == nil && (s.Exists || c.Table == "nat" && x.Family == netobj.IPv4) { // see Redirection
		err = x.readBase(ctx, c, &s)
	}
	return s, err
}

// readBase reads what leads to the chain.
func (x *Tables) readBase(ctx context.Context, c Chain, s *ChainState) error {
	base, _, err := x.ListRules(ctx, c.Table, c.Base)
	if errors.Is(err, ErrIncompatible) {
		return x.readJumps(c, s)
	}
	var foreign string
	if s.Jumps, foreign = Jumps(base, c.Name); foreign != "" {
		s.Foreign = foreignChain(c, foreign)
	}
	if len(s.Jumps) > 0 {
		s.before = base[:s.Jumps[0].Position-1]
	}
	if rule := x.Redirection(base); c.Table == "nat" && rule != "" {
		s.Redirection = x.foreignRedirection(c, "-t nat -A "+c.Base+" "+rule)
	}
	return err
}

// readJumps reads the jumps of a base chain from nf_tables. iptables cannot list a chain that holds
// a rule of nft's.
func (x *Tables) readJumps(c Chain, s *ChainState) error {
	messages, err := nft.Rules(x.Family, c.Table, c.Base)
	for i, m := range messages {
		r := ParseNFTRule(m, x.Servers)
		text := fmt.Sprintf("handle %d (a rule of nft's)", r.Handle)
		switch {
		case r.To == c.Name && r.Ours:
			s.Jumps = append(s.Jumps, JumpAt{Position: i + 1, Rule: c.Jump()})
		case r.To == c.Name:
			s.Foreign = foreignChain(c, text)
		case r.redirects && r.server && c.Table == "nat":
			s.Redirection = x.foreignRedirection(c, text)
		}
	}
	return err
}

func foreignChain(c Chain, rule string) error {
	return fmt.Errorf("chain %s of table %s %w, who jumps to it by -A %s %s", c.Name, c.Table, fault.ErrForeign, c.Base,
		rule)
}

func (x *Tables) foreignRedirection(c Chain, rule string) error {
	return fmt.Errorf("%s %w, who redirects it by %s in chain %s: "+
		"this may be GKE, or another metadata server; remove that first", x.Servers[0], fault.ErrForeign, rule, c.Base)
}

// Redirection finds a rule that redirects the metadata server by itself. Ours never stand in a base
// chain.
func (x *Tables) Redirection(base []string) string {
	for _, rule := range base {
		toServer := func(s netip.AddrPort) bool {
			return s.Addr().Is4() && strings.Contains(rule, "-d "+s.Addr().String()+"/32 ")
		}
		if slices.ContainsFunc(x.Servers, toServer) &&
			(strings.Contains(rule, "-j DNAT ") || strings.Contains(rule, "-j REDIRECT")) {
			return rule
		}
	}
	return ""
}

// ForeignRedirections finds who redirects the metadata server by rules of iptables, in either
// backend.
func ForeignRedirections(ctx context.Context, servers ...netip.AddrPort) error {
	var all []error
	for _, command := range []string{"iptables-nft", "iptables-legacy"} {
		x, err := Open(command, IsLegacy(command), netobj.IPv4, servers...)
		if err != nil {
			continue // who has no such command has no such rules
		}
		for _, c := range OwnChains() {
			if c.Table != "nat" {
				continue
			}
			s, err := x.State(ctx, c)
			if err != nil {
				return err
			}
			all = append(all, s.Foreign, s.Redirection)
		}
	}
	return errors.Join(all...)
}

// compare names what of the chain is not there, too much, or in the wrong order.
func (x *Tables) compare(ctx context.Context, c Chain, s ChainState) (errs []error, err error) {
	if c.Absent {
		if len(s.Jumps) > 0 {
			errs = append(errs, x.missing(c, "-A %s %s should not be there any more", c.Base, s.Jumps[0].Rule))
		}
		return errs, nil
	}
	// Others insert before our jump and do so again and again (Calico): to insist on the first
	// place is a fight that nobody wins. Install moves the jump up, Check does not complain. An
	// ACCEPT before ours can open one of the two checks of R-05, not both, and the guard does not
	// depend on it.
	switch n := len(s.Jumps); {
	case n == 0:
		errs = append(errs, fault.Flushed([]error{x.missing(c, "-I %s 1 %s", c.Base, c.Jump())})...)
	case n > 1:
		errs = append(errs, x.missing(c, "-A %s %s should be there once, not %d times", c.Base, s.Jumps[0].Rule, n))
	}
	before := ""
	switch {
	case c.Table == "raw":
		before, err = x.untracks(ctx, c, s.before)
	case c.Queries:
		before, err = x.redirectsQueries(ctx, c, s.before)
	}
	if err != nil {
		return nil, err
	}
	if before != "" {
		errs = append(errs, x.missing(c, "-I %s 1 %s before %s", c.Base, c.Jump(), before))
	}
	if s.unlisted {
		return append(errs, x.missing(c, "the rules of %s are not ours alone: nft put one there", c.Name)), nil
	}
	more, err := x.compareRules(ctx, c, s.Rules)
	return append(errs, more...), err
}

// untracks finds a rule that a packet meets before our jump, and that says how conntrack is to take
// it: of two such rules the first one counts.
func (x *Tables) untracks(ctx context.Context, c Chain, before []string) (rule string, err error) {
	seen := map[string]bool{c.Name: true}
	var walk func(name string, rules []string) error
	walk = func(name string, rules []string) error {
		for _, r := range rules {
			target := targetOf(r)
			if target == "CT" || target == "NOTRACK" {
				rule = "-A " + name + " " + r
				return nil
			}
			if target == "" || seen[target] {
				continue
			}
			seen[target] = true
			of, _, err := x.ListRules(ctx, c.Table, target)
			if err != nil && !errors.Is(err, ErrIncompatible) {
				return err
			}
			if err := walk(target, of); err != nil || rule != "" {
				return err
			}
		}
		return nil
	}
	err = walk(c.Base, before)
	return rule, err
}

// redirectsQueries finds a rule for DNS queries that a packet meets before our jump, such as that
// of kube-proxy for the cluster's DNS: of two such rules the first one counts. Chains behind the
// next ones are not looked at: kube-proxy has thousands.
func (x *Tables) redirectsQueries(ctx context.Context, c Chain, before []string) (rule string, err error) {
	queries := func(rules []string) string {
		for _, r := range rules {
			if of := " " + r + " "; strings.Contains(of, " -p udp ") && strings.Contains(of, " --dport 53 ") {
				return r
			}
		}
		return ""
	}
	if r := queries(before); r != "" {
		return "-A " + c.Base + " " + r, nil
	}
	for _, r := range before {
		target := targetOf(r)
		if target == "" {
			continue
		}
		of, _, err := x.ListRules(ctx, c.Table, target)
		if err != nil && !errors.Is(err, ErrIncompatible) {
			return "", err
		}
		if r := queries(of); r != "" {
			return "-A " + target + " " + r, nil
		}
	}
	return "", nil
}

// targetOf is the target or chain that a rule leads to; "" if there is none.
func targetOf(rule string) string {
	words := strings.Fields(rule)
	at := max(slices.Index(words, "-j"), slices.Index(words, "-g"))
	if at < 0 || at+1 >= len(words) {
		return ""
	}
	return words[at+1]
}

// compareRules names what of the chain's rules is not there, too much, or in the wrong order.
func (x *Tables) compareRules(ctx context.Context, c Chain, standing []string) (errs []error, err error) {
	if slices.Equal(c.Rules, standing) {
		return nil, nil
	}
	reworded := 0
	for _, rule := range c.Rules {
		if slices.Contains(standing, rule) {
			continue
		}
		yes := false
		if len(standing) > 0 {
			if yes, err = x.hasRule(ctx, c.Table, c.Name, rule); err != nil {
				return nil, err
			}
		}
		if yes {
			reworded++
		} else {
			errs = append(errs, x.missing(c, "-A %s %s", c.Name, rule))
		}
	}
	var extra []string
	for _, rule := range standing {
		if !slices.Contains(c.Rules, rule) {
			extra = append(extra, rule)
		}
	}
	if len(extra) > reworded {
		for _, rule := range extra {
			errs = append(errs, x.missing(c, "-A %s %s should not be there", c.Name, rule))
		}
	}
	if len(errs) == 0 && (reworded == 0 || len(standing) != len(c.Rules)) {
		errs = append(errs, x.missing(c, "the rules of %s are doubled or not in order", c.Name))
	}
	return errs, nil
}

func (x *Tables) layer() string {
	if x.Family == netobj.IPv6 {
		return fault.IP6Tables
	}
	return fault.IPTables
}

// missing names the command and table in front of the rule, so that the text can be typed.
func (x *Tables) missing(c Chain, format string, args ...any) error {
	return fault.Missing(x.layer(), "%s -t %s %s", x.command, c.Table, fmt.Sprintf(format, args...))
}

// Jumps returns the jumps to a chain of ours that are ours, and whether somebody else jumps there
// too.
func Jumps(base []string, name string) (ours []JumpAt, foreign string) {
	for i, rule := range base {
		words := strings.Fields(rule)
		at := slices.Index(words, "-j")
		if at < 0 {
			at = slices.Index(words, "-g")
		}
		if at < 0 || at+1 >= len(words) || words[at+1] != name {
			continue
		}
		if c := slices.Index(words, "--comment"); c < 0 || c+1 >= len(words) || words[c+1] != Comment {
			foreign = rule
			continue
		}
		ours = append(ours, JumpAt{Position: i + 1, Rule: rule})
	}
	return ours, foreign
}

// Remove removes our chains of the tables, the redirecting ones first. Chains that somebody else
// jumps to are emptied and named.
func (x *Tables) Remove(ctx context.Context, tables ...string) (err error) {
	for range 3 { // what was seen may have been flushed meanwhile
		var foreign error
		if foreign, err = x.tryRemove(ctx, tables); err == nil {
			return foreign
		}
	}
	return err
}

func (x *Tables) tryRemove(ctx context.Context, tables []string) (foreign, err error) {
	chains := slices.DeleteFunc(OwnChains(), func(c Chain) bool { return !slices.Contains(tables, c.Table) })
	slices.Reverse(chains)
	states, err := x.each(chains, func(c Chain) (s ChainState, err error) {
		if s.Exists, err = x.hasChain(ctx, c.Table, c.Name); err != nil || !s.Exists {
			return s, err
		}
		if !x.legacy { // without a command: until the last is removed, pods are refused
			err = x.readJumps(c, &s)
		}
		if x.legacy || err == nil && s.Foreign != nil { // the error names that rule
			s = ChainState{Exists: true}
			err = x.readBase(ctx, c, &s)
		}
		return s, err
	})
	if err != nil {
		return nil, err
	}
	for _, c := range chains {
		foreign = errors.Join(foreign, states[c.Name].Foreign)
	}
	return foreign, x.Restore(ctx, RestoreText(chains, states))
}

// Fingerprint is a text that tells, without a command, whether the chains are as they were when it
// was taken. It has the handles of the rules of nf_tables: a rule never changes under its handle,
// no table gives one twice, and a table that was made anew has another handle itself. A legacy
// table tells how many rules it has and where its base chains begin. That does not show every
// change (two rules swapped), which a sweep finds.
func (x *Tables) Fingerprint(b *strings.Builder) error {
	tables := map[string]string{}
	for _, c := range OwnChains() {
		if _, asked := tables[c.Table]; !asked {
			text, err := x.tableFingerprint(c.Table)
			if err != nil {
				return err
			}
			tables[c.Table] = text
			fmt.Fprintf(b, "\n%s %s %s", x.Family, c.Table, text)
		}
		if x.legacy || tables[c.Table] == "" {
			continue
		}
		for _, name := range []string{c.Base, c.Name} {
			fmt.Fprintf(b, " %s", name)
			rules, err := nft.Rules(x.Family, c.Table, name)
			if err != nil {
				return err
			}
			for _, r := range rules {
				fmt.Fprintf(b, " %x", nft.Attribute(r, unix.NFTA_RULE_HANDLE))
			}
		}
	}
	return nil
}

// tableFingerprint is a table's part of a fingerprint, "" if there is no such table.
func (x *Tables) tableFingerprint(table string) (string, error) {
	if !x.legacy {
		return nft.TableHandle(x.Family, table)
	}
	return legacyCount(table, x.Family)
}

// NFTRule is what a rule that iptables-nft made, or nft in a chain of iptables', says of our
// chains.
type NFTRule struct {
	To        string // the chain that it jumps or goes to
	Ours      bool   // our comment is on it
	redirects bool   // it changes where packets go
	server    bool   // it names an address of the metadata server
	Handle    uint64
}

// ParseNFTRule reads what of a rule concerns our chains. Chains that iptables cannot list are read
// so.
func ParseNFTRule(message []byte, servers []netip.AddrPort) (r NFTRule) {
	if h := nft.Attribute(message, unix.NFTA_RULE_HANDLE); len(h) == 8 {
		r.Handle = binary.BigEndian.Uint64(h)
	}
	for _, e := range nft.Attributes(nft.Attribute(message, unix.NFTA_RULE_EXPRESSIONS)) {
		data := nft.Within(e.Value, unix.NFTA_EXPR_DATA)
		switch unix.ByteSliceToString(nft.Within(e.Value, unix.NFTA_EXPR_NAME)) {
		case "immediate":
			verdict := nft.Within(nft.Within(data, unix.NFTA_IMMEDIATE_DATA), unix.NFTA_DATA_VERDICT)
			r.To = unix.ByteSliceToString(nft.Within(verdict, unix.NFTA_VERDICT_CHAIN))
		case "match":
			r.Ours = r.Ours || unix.ByteSliceToString(nft.Within(data, unix.NFTA_MATCH_NAME)) == "comment" &&
				unix.ByteSliceToString(nft.Within(data, unix.NFTA_MATCH_INFO)) == Comment
		case "target":
			switch unix.ByteSliceToString(nft.Within(data, unix.NFTA_TARGET_NAME)) {
			case "DNAT", "REDIRECT", "NETMAP":
				r.redirects = true
			}
		case "nat", "redir":
			r.redirects = true
		case "cmp":
			value := nft.Within(nft.Within(data, unix.NFTA_CMP_DATA), unix.NFTA_DATA_VALUE)
			r.server = r.server || slices.ContainsFunc(servers, func(s netip.AddrPort) bool {
				return bytes.Equal(value, s.Addr().AsSlice())
			})
		}
	}
	return r
}
