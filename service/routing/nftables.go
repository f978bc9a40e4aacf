package routing

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"sync"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/nft"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/watch"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/xtables"
)

// nfTables is our table of nf_tables: all of modes nftables, loopback and none, and the chains that
// keep others out in mode ebpf. Mode nftables has DNAT in it. firewall-cmd --reload, and
// others that know only iptables, leave it alone. It is put up and read by netlink, without
// a process: about a millisecond.
type nfTables struct {
	plan     Plan
	standing string // what stood when check found nothing missing; "": it did, or has not looked

	background sync.WaitGroup // what put began and check waits for
}

func (m *nfTables) command() string { return "" }

func (m *nfTables) wakes() (c watch.Causes, silent string) { return watch.NFTables, "" }

func (m *nfTables) changed() bool {
	now, err := nft.Read()
	return err != nil || m.standing == "" || now.Fingerprint() != m.standing
}

func (m *nfTables) survey(ctx context.Context, s nodeFacts) (faults []error, err error) {
	faults = m.check(ctx, s)
	now, err := nft.Read()
	if err != nil {
		return nil, err
	}
	chain := "forward" // where nothing is translated
	if m.plan.dnats() {
		chain = "prerouting"
	}
	if len(now[0].Rules[chain]) == 0 {
		faults = fault.Flushed(faults)
	}
	return faults, xtables.ForeignRedirections(ctx, metadataServer, metadataServer6)
}

// put replaces all in one transaction, so that a packet sees the rules of before or of after
//
func (m *nfTables) put(ctx context.Context, s nodeFacts) error {
	before, err := nft.Read()
	if err != nil || m.standing != "" && before.Fingerprint() == m.standing {
		return err
	}
	c, err := nft.Transactions()
	if err != nil {
		return err
	}
	defer nft.CloseTransactions(c)
	if !m.plan.redirects() {
		if err := endRedirection(c, before); err != nil {
			return err
		}
	}
	for _, family := range netobj.Families {
		chains, err := nftChainsFor(m.plan, s, family)
		if err != nil {
			return err
		}
		before.Replace(c, family, chains)
	}
	if err := c.Flush(); err != nil {
		hint := ""
		if s.hostPods {
			hint = " (rules that tell pods on the host network from the node's daemons need Linux 5.13: " +
				"set routing.interceptHostPods to off, or routing.mode to iptables)"
		}
		return fmt.Errorf("install table %s%s: %w", nft.TableName, hint, fault.Permission(err))
	}
	for _, family := range netobj.Families {
		if !m.plan.dnats() || !m.plan.target(s, family).listen.IsValid() || len(before.Of(family).Rules["prerouting"]) > 0 {
			continue // else for some time pods were not redirected
		}
		forgetEstablished(m.plan, s, family, &m.background)
	}
	return nil
}

func (m *nfTables) check(_ context.Context, s nodeFacts) (errs []error) {
	defer m.background.Wait()
	m.standing = ""
	now, err := nft.Read()
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
		errs = append(errs, now.Of(family).Compare(family.NFT(), chains)...)
	}
	if len(errs) == 0 {
		m.standing = now.Fingerprint()
	}
	return errs
}

func (m *nfTables) redirected(family netobj.Family) *uint64 {
	if !m.plan.dnats() {
		return nil
	}
	rules, err := nft.Rules(family, nft.TableName, "prerouting")
	if err != nil {
		return nil
	}
	for _, m := range rules {
		for _, e := range nft.Attributes(nft.Attribute(m, unix.NFTA_RULE_EXPRESSIONS)) {
			if unix.ByteSliceToString(nft.Within(e.Value, unix.NFTA_EXPR_NAME)) != "counter" {
				continue
			}
			if packets := nft.Within(nft.Within(e.Value, unix.NFTA_EXPR_DATA), unix.NFTA_COUNTER_PACKETS); len(packets) == 8 {
				n := binary.BigEndian.Uint64(packets)
				return &n
			}
		}
	}
	return nil
}

// removeNFTables deletes our tables. A kernel without nf_tables has none.
func removeNFTables(_ context.Context, p Plan, instead bool) error {
	all, err := nft.Read()
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil // a kernel without nf_tables
	}
	if err != nil || !all[0].Exists && !all[1].Exists {
		return err
	}
	c, err := nft.Transactions()
	if err != nil {
		return err
	}
	defer nft.CloseTransactions(c)
	if !instead || !p.redirects() {
		err = endRedirection(c, all)
	}
	return errors.Join(err, all.Each(c, "delete", func(t *nftables.Table, _ nft.State) { c.DelTable(t) }))
}

// endRedirection has nobody redirected any more, and resets the connections of those who were: as
// long as chains of type nat stand, conntrack translates what they are sent.
func endRedirection(c *nftables.Conn, t nft.Tables) error {
	redirected, err := t.EndRedirection(c)
	if redirected {
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
		what := "rules (IPv4)"
		if family == netobj.IPv6 {
			what = map[bool]string{false: "guard (IPv6)", true: "rules (IPv6)"}[s.listen6.IsValid()]
		}
		if len(chains) > 0 {
			fmt.Fprintf(&b, "\n# %s\nnft -f - <<'END'\n%sEND\n", what, nft.Text(chains, family.NFT()))
		}
	}
	return b.String(), nil
}
