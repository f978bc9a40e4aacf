package routing

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/watch"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/xtables"
)

// iptablesMode is mode iptables: DNAT by whichever backend the node uses.
type iptablesMode struct {
	plan   Plan
	use    string // the iptables command
	other  string // the other backend's, if rules of ours may be there
	legacy bool
	tables []*xtables.Tables // IPv4's, and IPv6's where they can be had
	noIPv6 error             // why they cannot

	read     reading
	standing string // the fingerprint when check found nothing missing; "": it did, or has not looked

	background sync.WaitGroup // what put began and check waits for
}

// reading is what stands of all chains.
type reading struct {
	states      map[netobj.Family]map[string]xtables.ChainState
	of          nodeFacts // what they were compared for
	fingerprint string    // while they were read; "": it changed meanwhile
}

// openIPTables looks for the commands. command is the one that Install chose: it is not chosen
// anew.
func openIPTables(p Plan, command string) (*iptablesMode, error) {
	m := &iptablesMode{plan: p, use: command}
	if b := p.Binary; b != "" && b != "iptables" {
		m.use = b
	}
	if m.use == "" {
		m.use, m.other = backends(p)
	}
	m.legacy = xtables.IsLegacy(m.use)
	x, err := xtables.Open(m.use, m.legacy, netobj.IPv4, metadataServer, metadataServer6)
	if err != nil {
		return nil, fmt.Errorf("mode %s: %w: install it, or use routing mode %s, which needs no command",
			ModeIPTables, err, ModeNFTables)
	}
	m.tables = []*xtables.Tables{x}
	if netobj.HaveIPv6() {
		if x, m.noIPv6 = xtables.Open(m.use, m.legacy, netobj.IPv6, metadataServer, metadataServer6); m.noIPv6 != nil {
			p.Log.WithError(m.noIPv6).Debug("routing: ip6tables cannot be used: no IPv6 rules")
		} else {
			m.tables = append(m.tables, x)
		}
	}
	return m, nil
}

func (m *iptablesMode) command() string { return m.use }

func (m *iptablesMode) wakes() (c watch.Causes, silent string) {
	if m.legacy {
		return watch.XTables, "legacy iptables"
	}
	return watch.NFTables, ""
}

func (m *iptablesMode) changed() bool {
	now := m.fingerprint()
	return now == "" || now != m.standing
}

// fingerprint is that of both families, "" if it cannot be had.
func (m *iptablesMode) fingerprint() string {
	var b strings.Builder
	for _, x := range m.tables {
		if x.Fingerprint(&b) != nil {
			return ""
		}
	}
	return b.String()
}

// readAll reads what stands, and returns what differs from the Plan. One family that cannot be read
// does not keep the other from it.
func (m *iptablesMode) readAll(ctx context.Context, s nodeFacts) (faults []error, err error) {
	m.read = reading{states: map[netobj.Family]map[string]xtables.ChainState{}, of: s}
	before := m.fingerprint()
	for _, x := range m.tables {
		states, failed := x.Read(ctx, chainsFor(m.plan, s, x.Family))
		m.read.states[x.Family], err = states, errors.Join(err, failed)
	}
	if err == nil && m.fingerprint() == before {
		m.read.fingerprint = before
	}
	return m.faults(), err
}

// faults are what of the last reading differs from the Plan.
func (m *iptablesMode) faults() (all []error) {
	for _, x := range m.tables {
		for _, c := range xtables.OwnChains() {
			all = append(all, m.read.states[x.Family][c.Name].Faults...)
		}
	}
	return all
}

// survey reads what stands, and refuses chains and redirections of others. A repair follows on a
// check: where nothing has changed since, what that read is good. The fingerprint of legacy tables
// does not show every change, so there all is read again.
func (m *iptablesMode) survey(ctx context.Context, s nodeFacts) (faults []error, err error) {
	now := m.fingerprint()
	if m.legacy || now == "" || now != m.read.fingerprint || !m.read.of.equal(s) {
		if _, err = m.readAll(ctx, s); err != nil {
			return nil, err
		}
	}
	var foreign []error
	for _, x := range m.tables {
		for _, c := range xtables.OwnChains() {
			state := m.read.states[x.Family][c.Name]
			foreign = append(foreign, state.Foreign, state.Redirection)
		}
	}
	return m.faults(), errors.Join(foreign...)
}

// put applies what differs from the survey, by one iptables-restore for each family.
func (m *iptablesMode) put(ctx context.Context, s nodeFacts) error {
	if len(m.tables) == 1 && s.listen6.IsValid() {
		return fmt.Errorf("install the IPv6 rules: %w", m.noIPv6)
	}
	for _, x := range slices.Backward(m.tables) {
		states := m.read.states[x.Family]
		chains := slices.DeleteFunc(chainsFor(m.plan, s, x.Family),
			func(c xtables.Chain) bool { return states[c.Name].Right(c) })
		if err := x.Restore(ctx, xtables.RestoreText(chains, states)); err != nil {
			return fmt.Errorf("install the %s rules: %w", x.Family, err)
		}
	}
	for _, x := range m.tables {
		if m.plan.target(s, x.Family).listen.IsValid() && len(m.read.states[x.Family]["GME-PRE"].Jumps) == 0 {
			forgetEstablished(m.plan, s, x.Family, &m.background) // for some time pods were not redirected
		}
	}
	if m.other != "" { // where an earlier choice of the backend may have left something
		if err := removeChains(ctx, openBackends(m.other), "nat", "filter", "raw"); err != nil {
			m.plan.Log.WithError(err).WithField("command", m.other).
				Warn("routing: chains GME-* of an earlier install may be left in the other iptables backend")
		}
	}
	return nil
}

// check reads all chains back.
func (m *iptablesMode) check(ctx context.Context, s nodeFacts) []error {
	defer m.background.Wait()
	m.standing = ""
	errs, err := m.readAll(ctx, s)
	if err != nil {
		return append(errs, err)
	}
	if len(errs) == 0 {
		m.standing = m.read.fingerprint // "" where somebody changed it while it was read
	}
	return errs
}

var counter = regexp.MustCompile(` -c (\d+) \d+`)

func (m *iptablesMode) redirected(family netobj.Family) *uint64 {
	for _, x := range m.tables {
		if exists, err := x.Has("nat"); x.Family != family || err != nil || !exists {
			continue
		}
		rules, err := x.ListWithCounters("nat", "GME-PRE")
		if err != nil {
			return nil
		}
		for _, rule := range rules {
			if m := counter.FindStringSubmatch(rule); m != nil && strings.Contains(rule, "-j DNAT") {
				if n, err := strconv.ParseUint(m[1], 10, 64); err == nil {
					return &n
				}
			}
		}
	}
	return nil
}

// backend is a backend's tables of one family, or why they cannot be had.
type backend struct {
	*xtables.Tables
	err error
}

// openBackends opens both families of the commands' backends. Who has no such command has no such
// rules.
func openBackends(commands ...string) (all []backend) {
	for _, command := range commands {
		for _, family := range netobj.Families {
			x, err := xtables.Open(command, xtables.IsLegacy(command), family, metadataServer, metadataServer6)
			if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) { // the second where the command is a path
				continue
			}
			all = append(all, backend{x, err})
		}
	}
	return all
}

// removeChains removes our chains of the tables. One family that cannot be read does not keep the
// other from it.
func removeChains(ctx context.Context, from []backend, tables ...string) error {
	var errs []error
	for _, b := range from {
		if b.err == nil {
			b.err = b.Remove(ctx, tables...)
		}
		errs = append(errs, b.err)
	}
	return errors.Join(errs...)
}

// removeIPTables removes our chains from both backends.
func removeIPTables(ctx context.Context, p Plan, instead bool) error {
	use, other := backends(p)
	commands := []string{use}
	if other != "" {
		commands = append(commands, other)
	}
	from := openBackends(commands...)
	// When nobody is redirected any more, those who were are told: as long as rules of ours have
	// conntrack translate what they are sent. Where another mode redirects instead they notice
	// nothing: conntrack goes on translating, by that mode's rules or (ebpf) by anybody's, as there
	// are on any node with kube-proxy or a network that masquerades.
	err := removeChains(ctx, from, "nat")
	if !instead || !p.redirects() {
		resetListeners()
	}
	return errors.Join(err, removeChains(ctx, from, "filter", "raw"))
}

// iptablesText is what iptables-restore gets on a node that has nothing of ours.
func iptablesText(p Plan, s nodeFacts, command string) string {
	var b strings.Builder
	for _, family := range slices.Backward(netobj.Families) {
		chains := chainsFor(p, s, family)
		if chains[0].Absent {
			continue
		}
		what, restore := "rules (IPv4)", command+"-restore"
		if family == netobj.IPv6 {
			what = map[bool]string{false: "guard (IPv6)", true: "rules (IPv6)"}[s.listen6.IsValid()]
			restore = xtables.IP6Tables(command) + "-restore"
		}
		chains = slices.DeleteFunc(chains, func(c xtables.Chain) bool { return c.Absent })
		fmt.Fprintf(&b, "\n# %s\n%s --wait --noflush <<'END'\n%sEND\n", what, restore, xtables.RestoreText(chains, nil))
	}
	return b.String()
}
