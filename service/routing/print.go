package routing

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// print is what tells, without running iptables, whether chains are still those that were read: a text for each of ours that stands for
// what is in it and in the chain that jumps to it.
//
// nf_tables: the generation counts every transaction (3 µs to ask); when it has moved, the handles of the rules (0.3 ms) tell whether
// that was about us. A rule never changes under its handle, and no handle of a table is given twice; a table that was deleted and made
// anew has another handle itself.
//
// Legacy tables know no events and no generations. How many rules a table has, and where its base chains begin, costs 1 µs a table to
// ask; a change that leaves all of that as it was (two rules swapped) is found by the slow sweep only.
type print struct {
	generation uint32
	chains     map[string]string // by printKey
}

func printKey(c chain, six bool) string { return fmt.Sprint(c.name, six) }

// same says whether p and now know the chain, and as the same.
func (p print) same(now print, key string) bool {
	text, ok := p.chains[key]
	return ok && text == now.chains[key]
}

// print takes the chains' print; an empty one, which is like no other, if it cannot be had.
func (m *iptables) print() print {
	p := print{chains: map[string]string{}}
	var err error
	if m.legacy {
		err = legacyPrint(m, p.chains)
	} else {
		p.generation, err = nftPrint(m, p.chains)
	}
	if err != nil {
		return print{}
	}
	return p
}

// changed says whether a chain may not be as it was when it was last found to be right.
func (m *iptables) changed() bool {
	var keys []string
	for _, six := range m.families() {
		for _, c := range ownChains() {
			keys = append(keys, printKey(c, six))
		}
	}
	if !m.legacy && len(m.good.chains) == len(keys) {
		if g, err := generation(); err == nil && g == m.good.generation {
			return false
		}
	}
	now := m.print()
	if slices.ContainsFunc(keys, func(key string) bool { return !m.good.same(now, key) }) {
		return true
	}
	m.good = now
	return false
}

func (m *iptables) families() []bool {
	if m.six == nil {
		return []bool{false}
	}
	return []bool{false, true}
}

func nftPrint(m *iptables, chains map[string]string) (uint32, error) {
	g, err := generation()
	if err != nil {
		return 0, err
	}
	for _, six := range m.families() {
		tables := map[string]string{}
		for _, c := range ownChains() {
			table, known := tables[c.table]
			if !known {
				if table, err = nftTableHandle(c.table, six); err != nil {
					return 0, err
				}
				tables[c.table] = table
			}
			if chains[printKey(c, six)], err = nftHandles(c, six, table); err != nil {
				return 0, err
			}
		}
	}
	return g, nil
}

// nftTableHandle is a table's handle, "" if there is no such table.
func nftTableHandle(name string, six bool) (string, error) {
	tables, err := askNFT(unix.NFT_MSG_GETTABLE, 0, unix.NFT_MSG_NEWTABLE, xtablesFamily(six), nl.NewRtAttr(unix.NFTA_TABLE_NAME, nl.ZeroTerminated(name)))
	if errors.Is(err, unix.ENOENT) || err == nil && len(tables) == 0 {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("table %x", attribute(tables[0], nftaTableHandle)), nil
}

// nftHandles are those of the chain's table, of what jumps to it with all around that, and of what is in it; "" where there is no table.
func nftHandles(c chain, six bool, table string) (string, error) {
	if table == "" {
		return "", nil
	}
	family := xtablesFamily(six)
	var text strings.Builder
	text.WriteString(table)
	for _, name := range []string{c.base, c.name} {
		fmt.Fprintf(&text, " %s", name)
		rules, err := nftRules(family, c.table, name)
		if err != nil {
			return "", err
		}
		for _, r := range rules {
			fmt.Fprintf(&text, " %x", attribute(r, unix.NFTA_RULE_HANDLE))
		}
	}
	return text.String(), nil
}

// legacyPrint asks only for tables that are there: asking for another one would make it.
func legacyPrint(m *iptables, chains map[string]string) error {
	for _, six := range m.families() {
		s, level, err := legacySocket(six)
		if err != nil {
			return err
		}
		tables := map[string]string{}
		for _, c := range ownChains() {
			if _, asked := tables[c.table]; !asked && legacyTable(c.table, six) {
				var info tableInfo
				if info, err = legacyTableInfo(s, level, c.table); err != nil {
					break
				}
				tables[c.table] = fmt.Sprint(info.HookEntry, info.Underflow, info.Entries, info.Size)
			}
			chains[printKey(c, six)] = tables[c.table] // "" is a table that is not there: nothing of ours is in it
		}
		_ = unix.Close(s)
		if err != nil {
			return err
		}
	}
	return nil
}
