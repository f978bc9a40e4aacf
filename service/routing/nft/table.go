package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"syscall"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// MarkType is the type of the userdata that holds a rule's mark: none that nft knows, so that it
// passes over it.
const MarkType userdata.Type = 77

// Compare names what is not there, too much, or in the wrong order.
func (t State) Compare(family string, chains []Chain) (errs []error) {
	add := func(format string, args ...any) {
		errs = append(errs, fault.Missing(fault.NFTables, "nft "+format, args...))
	}
	if len(chains) == 0 {
		if t.Exists {
			add("table %s %s should not be there any more", family, TableName)
		}
		return errs
	}
	rules := map[string][]StandingRule{}
	for name, of := range t.Rules {
		rules[name] = of
	}
	for _, c := range chains {
		if head := t.heads[c.Name]; head != c.head() {
			add("add chain %s %s %s { %s }", family, TableName, c.Name, c.head())
		}
		var have, want []string
		for _, r := range rules[c.Name] {
			have = append(have, r.Mark)
		}
		for _, r := range c.Rules {
			if want = append(want, r.Mark); !slices.Contains(have, r.Mark) {
				add("add rule %s %s %s %s", family, TableName, c.Name, r.text)
			}
		}
		before := len(errs)
		for _, r := range rules[c.Name] {
			if !slices.Contains(want, r.Mark) {
				add("rule %s %s %s handle %d should not be there", family, TableName, c.Name, r.Handle)
			}
		}
		if len(errs) == before && len(have) >= len(want) && !slices.Equal(have, want) {
			add("the rules of %s %s %s are doubled or not in order", family, TableName, c.Name)
		}
		delete(rules, c.Name)
	}
	for name := range rules {
		add("chain %s %s %s should not be there", family, TableName, name)
	}
	return errs
}

// State is what stands of our table in one family.
type State struct {
	Exists bool
	flags  string            // with the table's handle: whether it is dormant
	heads  map[string]string // of the chains that we know of, as Chain.head
	Rules  map[string][]StandingRule
}

type StandingRule struct {
	Mark   string // "" is a rule of somebody else's
	Handle uint64
}

// Tables are those of families ip and ip6.
type Tables [2]State

func (s Tables) Of(family netobj.Family) State {
	if family == netobj.IPv6 {
		return s[1]
	}
	return s[0]
}

// Fingerprint tells whether anything is other than it was.
func (s Tables) Fingerprint() string { return fmt.Sprint(s) }

func Read() (s Tables, err error) {
	for i, family := range netobj.Families {
		if s[i], err = readTable(family); err != nil {
			return s, fmt.Errorf("read table %s: %w", TableName, fault.Permission(err))
		}
	}
	return s, nil
}

func readTable(family netobj.Family) (t State, err error) {
	tables, err := Ask(unix.NFT_MSG_GETTABLE, 0, unix.NFT_MSG_NEWTABLE, uint8(family),
		NameAttr(unix.NFTA_TABLE_NAME, TableName))
	if errors.Is(err, unix.ENOENT) {
		return t, nil
	}
	if err != nil {
		return t, err
	}
	t = State{Exists: true, heads: map[string]string{}, Rules: map[string][]StandingRule{}}
	for _, m := range tables {
		t.flags = fmt.Sprintf("%x %x", Attribute(m, tableHandle), Attribute(m, unix.NFTA_TABLE_FLAGS))
		if f := Attribute(m, unix.NFTA_TABLE_FLAGS); len(f) == 4 && binary.BigEndian.Uint32(f)&unix.NFT_TABLE_F_DORMANT != 0 {
			return t, nil // as if nothing were in it
		}
	}
	for _, name := range []string{"raw", "raw-output", "forward", "input", "local", "output", "prerouting"} {
		chains, err := Ask(unix.NFT_MSG_GETCHAIN, 0, unix.NFT_MSG_NEWCHAIN, uint8(family),
			NameAttr(unix.NFTA_CHAIN_TABLE, TableName), NameAttr(unix.NFTA_CHAIN_NAME, name))
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return t, err
		}
		for _, m := range chains {
			t.heads[name], t.Rules[name] = ParseChain(m), nil
		}
	}
	rules, err := Ask(unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP, unix.NFT_MSG_NEWRULE, uint8(family),
		NameAttr(unix.NFTA_RULE_TABLE, TableName))
	for _, m := range rules {
		if unix.ByteSliceToString(Attribute(m, unix.NFTA_RULE_TABLE)) != TableName {
			continue // old kernels tell all rules of the family
		}
		name := unix.ByteSliceToString(Attribute(m, unix.NFTA_RULE_CHAIN))
		t.Rules[name] = append(t.Rules[name], ParseMarked(m))
	}
	return t, err
}

// ParseChain reads a base chain's message into the words of Chain.head.
func ParseChain(message []byte) string {
	hook := Attribute(message, unix.NFTA_CHAIN_HOOK)
	number, priority := Within(hook, unix.NFTA_HOOK_HOOKNUM), Within(hook, unix.NFTA_HOOK_PRIORITY)
	policy := Attribute(message, unix.NFTA_CHAIN_POLICY)
	if len(number) != 4 || len(priority) != 4 || len(policy) != 4 {
		return "no base chain"
	}
	c := Chain{Kind: unix.ByteSliceToString(Attribute(message, unix.NFTA_CHAIN_TYPE)), Hook: "?",
		Priority: int(int32(binary.BigEndian.Uint32(priority)))}
	for name, n := range hooks {
		if uint32(*n) == binary.BigEndian.Uint32(number) {
			c.Hook = name
		}
	}
	if nftables.ChainPolicy(binary.BigEndian.Uint32(policy)) != nftables.ChainPolicyAccept {
		return c.head() + " but with another policy"
	}
	return c.head()
}

// ParseMarked reads a rule's handle, and our mark of it.
func ParseMarked(message []byte) (r StandingRule) {
	if h := Attribute(message, unix.NFTA_RULE_HANDLE); len(h) == 8 {
		r.Handle = binary.BigEndian.Uint64(h)
	}
	// A list of type, length, value, of one byte each but for the value.
	for u := Attribute(message, unix.NFTA_RULE_USERDATA); len(u) >= 2 && len(u) >= 2+int(u[1]); u = u[2+int(u[1]):] {
		if userdata.Type(u[0]) == MarkType {
			r.Mark = string(u[2 : 2+int(u[1])])
		}
	}
	return r
}

// Each changes the tables that are there, in one transaction.
func (s Tables) Each(c *nftables.Conn, what string, change func(*nftables.Table, State)) error {
	for i, family := range netobj.Families {
		if s[i].Exists {
			change(&nftables.Table{Name: TableName, Family: nftables.TableFamily(family)}, s[i])
		}
	}
	if err := c.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("%s table %s: %w", what, TableName, fault.Permission(err))
	}
	return nil
}

// EndRedirection empties the chains that redirect, and says whether there were any.
func (s Tables) EndRedirection(c *nftables.Conn) (redirected bool, err error) {
	err = s.Each(c, "change", func(t *nftables.Table, was State) {
		for _, name := range []string{"prerouting", "output"} {
			if len(was.Rules[name]) > 0 {
				redirected = true
				c.FlushChain(&nftables.Chain{Name: name, Table: t})
			}
		}
	})
	return redirected, err
}

func inode(info fs.FileInfo) (uint64, error) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, fmt.Errorf("%s has no inode", info.Name())
	}
	return st.Ino, nil
}

// Replace has the transaction c put the chains in the place of what stands; none: no table.
func (s Tables) Replace(c *nftables.Conn, family netobj.Family, chains []Chain) {
	t := &nftables.Table{Name: TableName, Family: nftables.TableFamily(family)}
	if len(chains) == 0 && !s.Of(family).Exists {
		return
	}
	c.AddTable(t)
	if s.Of(family).Exists {
		c.DelTable(t) // which is an error where there is none any more, but for the line before
		if len(chains) > 0 {
			c.AddTable(t)
		}
	}
	for _, chain := range chains {
		policy, priority := nftables.ChainPolicyAccept, nftables.ChainPriority(chain.Priority)
		to := c.AddChain(&nftables.Chain{Name: chain.Name, Table: t, Type: nftables.ChainType(chain.Kind),
			Hooknum: hooks[chain.Hook], Priority: &priority, Policy: &policy})
		for _, r := range chain.Rules {
			c.AddRule(&nftables.Rule{Table: t, Chain: to, Exprs: r.exprs,
				UserData: userdata.Append(nil, MarkType, []byte(r.Mark))})
		}
	}
}
