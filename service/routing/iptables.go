package routing

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
)

// iptables is mode iptables: DNAT by whichever backend the node uses.
type iptables struct {
	plan      Plan
	use       string // the iptables command
	other     string // the other backend's, if rules of ours may be there
	four, six *xtables
	noSix     error // why there is no six
	legacy    bool

	stands    map[string]glance // what was surveyed of IPv4, by chain
	standsSix map[string]glance
	good      print           // of the chains that were as they should be when they were last read
	fresh     map[string]bool // chains that still were at the survey, by printKey
	written   map[string]bool // by put, and not looked at since

	background sync.WaitGroup // what put began and check waits for
}

// openIPTables looks for the commands. command is the one that Install chose: it is not chosen anew.
func openIPTables(p Plan, command string) (*iptables, error) {
	m := &iptables{plan: p, use: command}
	if b := p.Binary; b != "" && b != "iptables" {
		m.use = b
	}
	if m.use == "" {
		m.use, m.other = backends(p)
	}
	var err error
	m.legacy = isLegacy(m.use)
	if m.four, err = openXtables(m.use, m.legacy, false); err != nil {
		return nil, fmt.Errorf("mode %s: %w: install it, or use routing mode %s, which needs no command", ModeIPTables, err, ModeNFTables)
	}
	if netobj.HaveIPv6() {
		if m.six, m.noSix = openXtables(m.use, m.legacy, true); m.noSix != nil {
			p.Log.WithError(m.noSix).Debug("no IPv6 rules")
		}
	}
	return m, nil
}

func (m *iptables) command() string { return m.use }

func (m *iptables) wakes() (c causes, silent string) {
	if m.legacy {
		return causeXTables, "legacy iptables"
	}
	return causeNFTables, ""
}

func (m *iptables) forget() { m.good = print{} }

// survey finds what stands, and refuses chains and redirections of others. What is right already put leaves alone.
func (m *iptables) survey(ctx context.Context, s surroundings) (faults []error, err error) {
	m.fresh = map[string]bool{}
	repair := len(m.good.chains) > 0
	if repair {
		now := m.print()
		for key := range m.good.chains {
			m.fresh[key] = m.good.same(now, key)
		}
	}
	var foreign, foreignSix error
	if m.stands, foreign, err = m.four.survey(ctx, m.stale(ownChains(), false)); err != nil {
		return nil, err
	}
	if m.six != nil {
		if m.standsSix, foreignSix, err = m.six.survey(ctx, m.stale(ownChains(), true)); err != nil {
			return nil, err
		}
	}
	faults = m.flushed(s, repair)
	if len(m.good.chains) == 0 && len(m.stands["GME-FWD"].jumps) > 0 {
		// Not the first install: to find out what is right takes 10 ms, to replace what is takes 60 on nft and 100 on legacy.
		m.check(ctx, s)
		for _, six := range m.families() {
			for _, c := range ownChains() {
				key, at := printKey(c, six), m.standing(six)[c.name].jumps
				_, right := m.good.chains[key]
				m.fresh[key] = right && (len(at) == 0 || at[0].position == 1)
			}
		}
	}
	return faults, errors.Join(foreign, foreignSix)
}

func (m *iptables) xtables(six bool) *xtables {
	if six {
		return m.six
	}
	return m.four
}

func (m *iptables) standing(six bool) map[string]glance {
	if six {
		return m.standsSix
	}
	return m.stands
}

// stale are the chains that are not known to be as they should be.
func (m *iptables) stale(chains []chain, six bool) []chain {
	return slices.DeleteFunc(chains, func(c chain) bool { return m.fresh[printKey(c, six)] })
}

// flushed are the jumps that are not there, and for a repair the chains that have not as many rules
// as they should.
func (m *iptables) flushed(s surroundings, repair bool) (faults []error) {
	for _, six := range m.families() {
		x := m.xtables(six)
		for _, c := range m.stale(chainsFor(m.plan, s, six), six) {
			switch g := m.standing(six)[c.name]; {
			case c.absent:
			case len(g.jumps) == 0:
				faults = append(faults, flushed([]error{x.missing(c, "-I %s 1 %s", c.base, c.jump())})...)
			case repair && g.rules != len(c.rules):
				faults = append(faults, x.missing(c, "-A %s: %d of its rules, where %d stand", c.name, len(c.rules), g.rules))
			}
		}
	}
	return faults
}

func (m *iptables) put(ctx context.Context, s surroundings) error {
	if m.six == nil && s.listen6.IsValid() {
		return fmt.Errorf("install the IPv6 rules: %w", m.noSix)
	}
	m.written = map[string]bool{}
	if m.six != nil {
		if err := m.restore(ctx, s, true); err != nil {
			return fmt.Errorf("install the IPv6 rules: %w", err)
		}
	}
	if err := m.restore(ctx, s, false); err != nil {
		return fmt.Errorf("install the rules: %w", err)
	}
	m.clean(ctx, s)
	return nil
}

// restore writes the chains of one family that are not known to be as they should be.
func (m *iptables) restore(ctx context.Context, s surroundings, six bool) error {
	chains := m.stale(chainsFor(m.plan, s, six), six)
	if err := m.xtables(six).restore(ctx, restoreText(chains, m.standing(six))); err != nil {
		return err
	}
	for _, c := range chains {
		m.written[printKey(c, six)] = true
	}
	return nil
}

// clean does what the Plan can do without.
func (m *iptables) clean(ctx context.Context, s surroundings) {
	for _, six := range m.families() {
		if !m.plan.way(s, six).listen.IsValid() || len(m.standing(six)["GME-PRE"].jumps) > 0 || len(m.stale([]chain{{name: "GME-PRE"}}, six)) == 0 {
			continue // else for some time pods were not redirected
		}
		forgetEstablished(m.plan, s, six, &m.background)
	}
	if m.other != "" { // where an earlier choice of the backend may have left something
		if err := openRemoval(m.other).all(ctx); err != nil {
			m.plan.Log.WithError(err).WithField("command", m.other).Warn("rules of ours may be left in the other iptables backend")
		}
	}
}

// check reads back the chains that are not known to be as they should be, and remembers in good those that are. Of chains that iptables-restore
// wrote a moment ago it counts the rules: that takes 0.1 ms, where to have them all listed takes 12 on nf_tables and 60 on a legacy backend
// with 10,000 rules. The next sweep reads them.
func (m *iptables) check(ctx context.Context, s surroundings) (errs []error) {
	defer m.background.Wait()
	before, right := m.print(), map[string]bool{}
	var readings []*reading
	for _, six := range m.families() {
		var unsure []chain
		chains := chainsFor(m.plan, s, six)
		told := func(c chain) bool { return c.absent || m.written[printKey(c, six)] } // by a look, and no command is run
		stands, err := m.xtables(six).glances(slices.DeleteFunc(slices.Clone(chains), func(c chain) bool { return !told(c) }))
		for _, c := range chains {
			key, g := printKey(c, six), stands[c.name]
			is := g.as(c)
			if c.absent {
				is = !g.exists && !g.odd && len(g.jumps) == 0
			}
			if right[key] = told(c) && err == nil && is || m.good.same(before, key); !right[key] {
				unsure = append(unsure, c)
			}
		}
		readings = append(readings, m.xtables(six).startCheck(ctx, unsure))
	}
	for _, r := range readings {
		faults, err := r.end(ctx)
		for _, c := range r.chains {
			errs = append(errs, faults[c.name]...)
			right[printKey(c, r.six)] = err == nil && len(faults[c.name]) == 0
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	m.written = nil
	now := m.print()
	m.good = print{generation: now.generation, chains: map[string]string{}}
	for key := range right {
		if right[key] && before.same(now, key) { // else somebody changed it while it was read
			m.good.chains[key] = now.chains[key]
		}
	}
	return errs
}

// removeIPTables removes our chains from both backends.
func removeIPTables(ctx context.Context, p Plan, instead bool) error {
	use, other := backends(p)
	removals := []*removal{openRemoval(use)}
	if other != "" {
		removals = append(removals, openRemoval(other))
	}
	var errs []error
	step := func(part ...string) {
		for _, r := range removals {
			errs = append(errs, r.remove(ctx, part...))
		}
	}
	// When nobody is redirected any more, those who were are told: as long as rules of ours have conntrack translate what they are sent.
	// Where another mode redirects instead they notice nothing: conntrack goes on translating, by that mode's rules or (ebpf) by anybody's, as
	// there are on any node with kube-proxy or a network that masquerades.
	step("nat")
	if !instead || !p.redirects() {
		resetListeners()
	}
	step("filter", "raw")
	for _, r := range removals {
		errs = append(errs, r.err)
		r.close()
	}
	return errors.Join(errs...)
}

// iptablesText is what iptables-restore gets on a node that has nothing of ours.
func iptablesText(p Plan, s surroundings, command string) string {
	var b strings.Builder
	for _, six := range []bool{true, false} {
		chains := chainsFor(p, s, six)
		if chains[0].absent {
			continue
		}
		what, restore := "the way to the emulator", command+"-restore"
		if six {
			what = map[bool]string{false: "the guard of the other family", true: "the way by IPv6"}[s.listen6.IsValid()]
			restore = sixCommand(command) + "-restore"
		}
		var present []chain
		for _, c := range chains {
			if !c.absent {
				present = append(present, c)
			}
		}
		fmt.Fprintf(&b, "\n# %s\n%s --wait --noflush <<'END'\n%sEND\n", what, restore, restoreText(present, nil))
	}
	return b.String()
}
