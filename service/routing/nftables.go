package routing

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
)

// nfTables is mode nftables: DNAT by a table of our own, which firewall-cmd --reload and whoever
// else knows only iptables leave alone. It is put up and read by netlink, without a process:
// about a millisecond.
type nfTables struct {
	plan     Plan
	standing string // what stood when check found nothing missing; "": it did, or has not looked

	background sync.WaitGroup // what put began and check waits for
}

func (m *nfTables) command() string                  { return "" }
func (m *nfTables) wakes() (c causes, silent string) { return causeNFTables, "" }

func (m *nfTables) changed() bool {
	now, err := readNFTables()
	return err != nil || m.standing == "" || now.fingerprint() != m.standing
}

func (m *nfTables) survey(ctx context.Context, s nodeFacts) (faults []error, err error) {
	faults = m.check(ctx, s)
	now, err := readNFTables()
	if err != nil {
		return nil, err
	}
	chain := "forward" // where nothing is redirected
	if m.plan.dnats() {
		chain = "prerouting"
	}
	if len(now[0].rules[chain]) == 0 {
		faults = fault.Flushed(faults)
	}
	return faults, foreignRedirections(ctx)
}

// put replaces all in one transaction, so that a packet sees the rules of before or of after
//
func (m *nfTables) put(ctx context.Context, s nodeFacts) error {
	before, err := readNFTables()
	if err != nil || m.standing != "" && before.fingerprint() == m.standing {
		return err
	}
	c, err := transactions()
	if err != nil {
		return err
	}
	defer closeTransactions(c)
	if !m.plan.redirects() {
		if err := before.endRedirection(c); err != nil {
			return err
		}
	}
	for _, family := range netobj.Families {
		chains, err := nftChainsFor(m.plan, s, family)
		if err != nil {
			return err
		}
		t := &nftables.Table{Name: nftTable, Family: nftables.TableFamily(family)}
		if len(chains) == 0 && !before.of(family).exists {
			continue
		}
		c.AddTable(t)
		if before.of(family).exists {
			c.DelTable(t) // which is an error where there is none any more, but for the line before
			if len(chains) > 0 {
				c.AddTable(t)
			}
		}
		for _, chain := range chains {
			policy, priority := nftables.ChainPolicyAccept, nftables.ChainPriority(chain.priority)
			to := c.AddChain(&nftables.Chain{Name: chain.name, Table: t, Type: nftables.ChainType(chain.kind),
				Hooknum: hooks[chain.hook], Priority: &priority, Policy: &policy})
			for _, r := range chain.rules {
				c.AddRule(&nftables.Rule{Table: t, Chain: to, Exprs: r.exprs,
					UserData: userdata.Append(nil, markType, []byte(r.mark))})
			}
		}
	}
	if err := c.Flush(); err != nil {
		hint := ""
		if s.hostPods {
			hint = " (rules that tell pods on the host network from the node's daemons need Linux 5.13: " +
				"set routing.interceptHostPods to off, or routing.mode to iptables)"
		}
		return fmt.Errorf("install table %s%s: %w", nftTable, hint, fault.Permission(err))
	}
	for _, family := range netobj.Families {
		if !m.plan.dnats() || !m.plan.target(s, family).listen.IsValid() || len(before.of(family).rules["prerouting"]) > 0 {
			continue // else for some time pods were not redirected
		}
		forgetEstablished(m.plan, s, family, &m.background)
	}
	return nil
}

// markType is the type of the userdata that holds a rule's mark: none that nft knows, so that it
// passes over it.
const markType userdata.Type = 77

func (m *nfTables) check(_ context.Context, s nodeFacts) (errs []error) {
	defer m.background.Wait()
	m.standing = ""
	now, err := readNFTables()
	if err != nil {
		return []error{err}
	}
	for _, family := range netobj.Families {
		chains, err := nftChainsFor(m.plan, s, family)
		if errors.Is(err, fs.ErrNotExist) {
			continue // a cgroup that went away this moment: the next look does not ask for it
		} else if err != nil {
			return append(errs, err)
		}
		errs = append(errs, now.of(family).compare(family.NFT(), chains)...)
	}
	if len(errs) == 0 {
		m.standing = now.fingerprint()
	}
	return errs
}

func (m *nfTables) redirected(family netobj.Family) *uint64 {
	if !m.plan.dnats() {
		return nil
	}
	rules, err := nftRules(family, nftTable, "prerouting")
	if err != nil {
		return nil
	}
	for _, m := range rules {
		for _, e := range attributes(attribute(m, unix.NFTA_RULE_EXPRESSIONS)) {
			if unix.ByteSliceToString(within(e.value, unix.NFTA_EXPR_NAME)) != "counter" {
				continue
			}
			if packets := within(within(e.value, unix.NFTA_EXPR_DATA), unix.NFTA_COUNTER_PACKETS); len(packets) == 8 {
				n := binary.BigEndian.Uint64(packets)
				return &n
			}
		}
	}
	return nil
}

// compare names what is not there, too much, or in the wrong order.
func (t standingTable) compare(family string, chains []nftChain) (errs []error) {
	add := func(format string, args ...any) {
		errs = append(errs, fault.Missing(fault.NFTables, "nft "+format, args...))
	}
	if len(chains) == 0 {
		if t.exists {
			add("table %s %s should not be there any more", family, nftTable)
		}
		return errs
	}
	rules := map[string][]standingRule{}
	for name, of := range t.rules {
		rules[name] = of
	}
	for _, c := range chains {
		if head := t.heads[c.name]; head != c.head() {
			add("add chain %s %s %s { %s }", family, nftTable, c.name, c.head())
		}
		var have, want []string
		for _, r := range rules[c.name] {
			have = append(have, r.mark)
		}
		for _, r := range c.rules {
			if want = append(want, r.mark); !slices.Contains(have, r.mark) {
				add("add rule %s %s %s %s", family, nftTable, c.name, r.text)
			}
		}
		before := len(errs)
		for _, r := range rules[c.name] {
			if !slices.Contains(want, r.mark) {
				add("rule %s %s %s handle %d should not be there", family, nftTable, c.name, r.handle)
			}
		}
		if len(errs) == before && len(have) >= len(want) && !slices.Equal(have, want) {
			add("the rules of %s %s %s are doubled or not in order", family, nftTable, c.name)
		}
		delete(rules, c.name)
	}
	for name := range rules {
		add("chain %s %s %s should not be there", family, nftTable, name)
	}
	return errs
}

// standingTable is what stands of our table in one family.
type standingTable struct {
	exists bool
	flags  string            // with the table's handle: whether it is dormant
	heads  map[string]string // of the chains that we know of, as nftChain.head
	rules  map[string][]standingRule
}

type standingRule struct {
	mark   string // "" is a rule of somebody else's
	handle uint64
}

// standingTables are those of families ip and ip6.
type standingTables [2]standingTable

func (s standingTables) of(family netobj.Family) standingTable {
	if family == netobj.IPv6 {
		return s[1]
	}
	return s[0]
}

// fingerprint tells whether anything is other than it was.
func (s standingTables) fingerprint() string { return fmt.Sprint(s) }

func readNFTables() (s standingTables, err error) {
	for i, family := range netobj.Families {
		if s[i], err = readNFTable(family); err != nil {
			return s, fmt.Errorf("read table %s: %w", nftTable, fault.Permission(err))
		}
	}
	return s, nil
}

func readNFTable(family netobj.Family) (t standingTable, err error) {
	tables, err := askNFT(unix.NFT_MSG_GETTABLE, 0, unix.NFT_MSG_NEWTABLE, uint8(family),
		nftName(unix.NFTA_TABLE_NAME, nftTable))
	if errors.Is(err, unix.ENOENT) {
		return t, nil
	}
	if err != nil {
		return t, err
	}
	t = standingTable{exists: true, heads: map[string]string{}, rules: map[string][]standingRule{}}
	for _, m := range tables {
		t.flags = fmt.Sprintf("%x %x", attribute(m, nftaTableHandle), attribute(m, unix.NFTA_TABLE_FLAGS))
		if f := attribute(m, unix.NFTA_TABLE_FLAGS); len(f) == 4 && binary.BigEndian.Uint32(f)&unix.NFT_TABLE_F_DORMANT != 0 {
			return t, nil // as if nothing were in it
		}
	}
	for _, name := range []string{"raw", "raw-output", "forward", "input", "local", "output", "prerouting"} {
		chains, err := askNFT(unix.NFT_MSG_GETCHAIN, 0, unix.NFT_MSG_NEWCHAIN, uint8(family),
			nftName(unix.NFTA_CHAIN_TABLE, nftTable), nftName(unix.NFTA_CHAIN_NAME, name))
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return t, err
		}
		for _, m := range chains {
			t.heads[name], t.rules[name] = parseNFTChain(m), nil
		}
	}
	rules, err := askNFT(unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP, unix.NFT_MSG_NEWRULE, uint8(family),
		nftName(unix.NFTA_RULE_TABLE, nftTable))
	for _, m := range rules {
		if unix.ByteSliceToString(attribute(m, unix.NFTA_RULE_TABLE)) != nftTable {
			continue // old kernels tell all rules of the family
		}
		name := unix.ByteSliceToString(attribute(m, unix.NFTA_RULE_CHAIN))
		t.rules[name] = append(t.rules[name], parseMarked(m))
	}
	return t, err
}

// parseNFTChain reads a base chain's message into the words of nftChain.head.
func parseNFTChain(message []byte) string {
	hook := attribute(message, unix.NFTA_CHAIN_HOOK)
	number, priority := within(hook, unix.NFTA_HOOK_HOOKNUM), within(hook, unix.NFTA_HOOK_PRIORITY)
	policy := attribute(message, unix.NFTA_CHAIN_POLICY)
	if len(number) != 4 || len(priority) != 4 || len(policy) != 4 {
		return "no base chain"
	}
	c := nftChain{kind: unix.ByteSliceToString(attribute(message, unix.NFTA_CHAIN_TYPE)), hook: "?",
		priority: int(int32(binary.BigEndian.Uint32(priority)))}
	for name, n := range hooks {
		if uint32(*n) == binary.BigEndian.Uint32(number) {
			c.hook = name
		}
	}
	if nftables.ChainPolicy(binary.BigEndian.Uint32(policy)) != nftables.ChainPolicyAccept {
		return c.head() + " but with another policy"
	}
	return c.head()
}

// parseMarked reads a rule's handle, and our mark of it.
func parseMarked(message []byte) (r standingRule) {
	if h := attribute(message, unix.NFTA_RULE_HANDLE); len(h) == 8 {
		r.handle = binary.BigEndian.Uint64(h)
	}
	// A list of type, length, value, of one byte each but for the value.
	for u := attribute(message, unix.NFTA_RULE_USERDATA); len(u) >= 2 && len(u) >= 2+int(u[1]); u = u[2+int(u[1]):] {
		if userdata.Type(u[0]) == markType {
			r.mark = string(u[2 : 2+int(u[1])])
		}
	}
	return r
}

// removeNFTables deletes our tables. A kernel without nf_tables has none.
func removeNFTables(_ context.Context, p Plan, instead bool) error {
	all, err := readNFTables()
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil // a kernel without nf_tables
	}
	if err != nil || !all[0].exists && !all[1].exists {
		return err
	}
	c, err := transactions()
	if err != nil {
		return err
	}
	defer closeTransactions(c)
	if !instead || !p.redirects() {
		err = all.endRedirection(c)
	}
	return errors.Join(err, all.each(c, "delete", func(t *nftables.Table, _ standingTable) { c.DelTable(t) }))
}

// each changes the tables that are there, in one transaction.
func (s standingTables) each(c *nftables.Conn, what string, change func(*nftables.Table, standingTable)) error {
	for i, family := range netobj.Families {
		if s[i].exists {
			change(&nftables.Table{Name: nftTable, Family: nftables.TableFamily(family)}, s[i])
		}
	}
	if err := c.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("%s table %s: %w", what, nftTable, fault.Permission(err))
	}
	return nil
}

// endRedirection has nobody redirected any more, and tells those who were: as long as chains of
// type nat stand, conntrack translates what they are sent.
func (s standingTables) endRedirection(c *nftables.Conn) error {
	redirects := false
	err := s.each(c, "change", func(t *nftables.Table, was standingTable) {
		for _, name := range []string{"prerouting", "output"} {
			if len(was.rules[name]) > 0 {
				redirects = true
				c.FlushChain(&nftables.Chain{Name: name, Table: t})
			}
		}
	})
	if redirects {
		resetListeners()
	}
	return err
}

// nftablesText is what put does, as nft reads it.
func nftablesText(p Plan, s nodeFacts) (string, error) {
	var b strings.Builder
	for _, family := range netobj.Families {
		chains, err := nftChainsFor(p, s, family)
		if err != nil {
			return "", err
		}
		what := "the way to the emulator"
		if family == netobj.IPv6 {
			what = map[bool]string{false: "the guard of the other family", true: "the way by IPv6"}[s.listen6.IsValid()]
		}
		if len(chains) > 0 {
			fmt.Fprintf(&b, "\n# %s\nnft -f - <<'END'\n%sEND\n", what, nftText(chains, family.NFT()))
		}
	}
	return b.String(), nil
}

func inode(info fs.FileInfo) (uint64, error) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, fmt.Errorf("%s has no inode", info.Name())
	}
	return st.Ino, nil
}
