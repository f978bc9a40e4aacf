package routing

import (
	"context"
	"errors"
	"io/fs"
	"os/exec"
	"slices"

	"github.com/google/nftables"
)

// removal takes our chains of one backend away, of both families.
type removal struct {
	families []*xtables
	stands   []map[string]glance // by family; nil: it has to be surveyed
	conn     *nftables.Conn      // one, since nobody waits between transactions then
	err      error               // of commands that are there and cannot be run
}

func openRemoval(command string) *removal {
	r := &removal{}
	legacy := isLegacy(command)
	for _, six := range []bool{false, true} {
		x, err := openXtables(command, legacy, six)
		switch {
		case errors.Is(err, exec.ErrNotFound), errors.Is(err, fs.ErrNotExist): // the second where the command is a path
			continue // who has no such command has no such rules
		case err != nil:
			r.err = errors.Join(r.err, err)
			continue
		}
		r.families = append(r.families, x)
	}
	return r
}

// all removes all.
func (r *removal) all(ctx context.Context) error {
	defer r.close()
	return errors.Join(r.err, r.remove(ctx, "nat", "filter", "raw"))
}

// remove removes the chains of the tables, the redirecting ones first. Where nothing of ours stands no command is run.
func (r *removal) remove(ctx context.Context, tables ...string) (err error) {
	chains := slices.DeleteFunc(ownChains(), func(c chain) bool { return !slices.Contains(tables, c.table) })
	slices.Reverse(chains)
	for range 3 { // what was seen may have been flushed meanwhile
		if err = errors.Join(r.survey(ctx), r.try(ctx, chains)); err == nil {
			return r.foreign(chains)
		}
		r.stands = nil
		r.close() // answers may be left in it
	}
	return err
}

// survey looks at all chains, unless they are known. A family that cannot be read does not keep the
// other from being removed.
func (r *removal) survey(ctx context.Context) error {
	if r.stands != nil {
		return nil
	}
	var all []map[string]glance
	var errs []error
	for _, x := range r.families {
		stands, _, err := x.survey(ctx, ownChains())
		errs = append(errs, err)
		all = append(all, stands) // nil: nothing is known to stand
	}
	r.stands = all
	return errors.Join(errs...)
}

func (r *removal) try(ctx context.Context, chains []chain) error {
	var errs []error
	for i, x := range r.families {
		stands := r.stands[i]
		if x.legacy || slices.ContainsFunc(chains, func(c chain) bool { return stands[c.name].odd }) {
			errs = append(errs, x.restore(ctx, restoreText(chains, stands)))
			continue
		}
		for _, c := range chains {
			errs = append(errs, r.queue(c, stands[c.name], x.six))
		}
	}
	if r.conn != nil {
		errs = append(errs, permission(r.conn.Flush()))
	}
	return errors.Join(errs...)
}

// queue removes a chain of nf_tables, and the jumps to it by their handles, in the next transaction: a millisecond for all, where
// iptables-restore takes 40, since it has a transaction for each table and each waits until nobody reads what the one before deleted.
func (r *removal) queue(c chain, g glance, six bool) (err error) {
	if !g.exists && len(g.jumps) == 0 {
		return nil
	}
	if r.conn == nil {
		if r.conn, err = transactions(); err != nil {
			return err
		}
	}
	table := &nftables.Table{Name: c.table, Family: nftables.TableFamily(xtablesFamily(six))}
	for _, j := range g.jumps {
		if err := r.conn.DelRule(&nftables.Rule{Table: table, Chain: &nftables.Chain{Name: c.base}, Handle: j.handle}); err != nil {
			return err
		}
	}
	if g.exists {
		r.conn.FlushChain(&nftables.Chain{Name: c.name, Table: table})
		if g.foreign == nil { // else somebody else's rule holds it
			r.conn.DelChain(&nftables.Chain{Name: c.name, Table: table})
		}
	}
	return nil
}

// foreign tells which of the chains somebody else jumps to, so that they could not be removed.
func (r *removal) foreign(chains []chain) error {
	var all []error
	for _, stands := range r.stands {
		for _, c := range chains {
			all = append(all, stands[c.name].foreign)
		}
	}
	return errors.Join(all...)
}

func (r *removal) close() {
	if r.conn != nil {
		closeTransactions(r.conn)
		r.conn = nil
	}
}
