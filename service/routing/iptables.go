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

	surveyed map[netobj.Family]map[string]xtables.ChainState
	standing string // the fingerprint when check found nothing missing; "": it did, or has not looked

	background sync.WaitGroup // what put began and check waits for
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

// survey reads what stands, and refuses chains and redirections of others.
func (m *iptablesMode) survey(ctx context.Context, s nodeFacts) (faults []error, err error) {
	var foreign []error
	m.surveyed = map[netobj.Family]map[string]xtables.ChainState{}
	for _, x := range m.tables {
		chains := chainsFor(m.plan, s, x.Family)
		states, err := x.Read(ctx, chains)
		if err != nil {
			return nil, err
		}
		m.surveyed[x.Family] = states
		for _, c := range chains {
			faults = append(faults, states[c.Name].Faults...)
			foreign = append(foreign, states[c.Name].Foreign, states[c.Name].Redirection)
		}
	}
	return faults, errors.Join(foreign...)
}

// put applies what differs from the survey, by one iptables-restore for each family.
func (m *iptablesMode) put(ctx context.Context, s nodeFacts) error {
	if len(m.tables) == 1 && s.listen6.IsValid() {
		return fmt.Errorf("install the IPv6 rules: %w", m.noIPv6)
	}
	for _, x := range slices.Backward(m.tables) {
		states := m.surveyed[x.Family]
		chains := slices.DeleteFunc(chainsFor(m.plan, s, x.Family),
			func(c xtables.Chain) bool { return states[c.Name].Right(c) })
		if err := x.Restore(ctx, xtables.RestoreText(chains, states)); err != nil {
			return fmt.Errorf("install the %s rules: %w", x.Family, err)
		}
	}
	for _, x := range m.tables {
		if m.plan.target(s, x.Family).listen.IsValid() && len(m.surveyed[x.Family]["GME-PRE"].Jumps) == 0 {
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
func (m *iptablesMode) check(ctx context.Context, s nodeFacts) (errs []error) {
	defer m.background.Wait()
	before := m.fingerprint()
	for _, x := range m.tables {
		chains := chainsFor(m.plan, s, x.Family)
		states, err := x.Read(ctx, chains)
		if err != nil {
			errs = append(errs, err)
		}
		for _, c := range chains {
			errs = append(errs, states[c.Name].Faults...)
		}
	}
	m.standing = ""
	if len(errs) == 0 && m.fingerprint() == before { // else somebody changed it while it was read
		m.standing = before
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
