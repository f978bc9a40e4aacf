package routing

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// iptablesRouter is mode iptables.
type iptablesRouter struct {
	plan        Plan
	hostCgroups []string
}

func (r *iptablesRouter) Install(ctx context.Context) error {
	_, err := r.install(ctx, nil)
	return err
}

// install is Install. With a repair it is the watcher's: then it changes nothing if meanwhile something else is desired than what was
// found to be missing, and the node that it returns knows what to compare with.
func (r *iptablesRouter) install(ctx context.Context, why *repair) (n *node, err error) {
	unlock, err := lock(ctx, r.plan.RunDir, unix.LOCK_EX)
	if err != nil {
		if why == nil { // without the lock the watcher cannot know what is desired
			err = errors.Join(err, addGuard(r.plan)) // closed, whatever else is not to be had
		}
		return nil, err
	}
	defer unlock()
	before, state := r.state(Installed)
	if why != nil && before.Desired != "" && !before.wants(why.of) {
		return nil, errOutdated
	}
	if !r.plan.Closed {
		if why.light() {
			return why.node, r.repairLight(why, state)
		}
		if n, err = r.survey(ctx, why); errors.Is(err, ErrForeign) {
			return n, err // nothing was changed, and nothing is
		}
		state.Command = n.command
		if why == nil && err == nil && before.Desired == Installed && !before.Closed {
			why = &repair{causes: map[string]string{}}
			for _, layer := range r.jumpsMissing(n) {
				why.causes[layer] = "install"
			}
		}
	}
	state.count(why)
	state.Installs++
	// The state first: whoever repairs must not take what follows for a flush, nor undo it.
	if err := errors.Join(err, writeState(r.plan.RunDir, state)); err != nil || r.plan.Closed {
		// Closed leaves alone what stands besides the guard: rules that a good configuration installed still lead pods to
		// the emulator, which tells them the reason. And a node whose rules cannot be made is closed too.
		if err = errors.Join(err, addGuard(r.plan)); err == nil {
			err = errors.Join(checkGuard(r.plan)...)
		}
		return n, r.readBack(state, err)
	}
	if err := r.put(ctx, n); err != nil {
		return n, r.readBack(state, err)
	}
	r.clean(ctx, n)
	return n, r.readBack(state, errors.Join(r.check(ctx, n)...))
}

// node is what an Install must know of where it is.
type node struct {
	surroundings
	command, other string // the iptables command to use; the other backend's, if rules of ours may be there
	four, six      *xtables
	jumps          map[string][]jumpAt // ours of IPv4, by chain
	jumpsSix       map[string][]jumpAt
	legacy         bool
	good           print           // of the chains that were as they should be when they were last read
	fresh          map[string]bool // chains that still are, by printKey
}

// open looks around without asking for rules.
func (r *iptablesRouter) open(ctx context.Context, command string, say bool) (n *node, err error) {
	n = &node{command: command}
	if command == "" {
		n.command, n.other = backends(ctx, r.plan)
	}
	if n.surroundings, err = r.look(say); err != nil {
		return n, err
	}
	if n.four, err = openXtables(n.command, false); err != nil {
		return n, err
	}
	n.legacy = isLegacy(n.command)
	if haveIPv6() {
		if n.six, err = openXtables(n.command, true); err != nil {
			r.plan.Log.WithError(err).Debug("no IPv6 rules")
		}
	}
	return n, nil
}

// survey looks at everything that Install depends on, and changes nothing. It refuses what belongs to somebody else.
func (r *iptablesRouter) survey(ctx context.Context, why *repair) (n *node, err error) {
	if why != nil && why.node != nil {
		n = why.node // neither the backend is chosen anew nor its version asked for again: some ten processes less
		err = r.lookAgain(n)
	} else {
		n, err = r.open(ctx, "", why == nil)
	}
	if err != nil {
		return n, err
	}
	var foreign, foreignSix error
	now := n.print()
	n.fresh = map[string]bool{}
	for _, six := range n.families() {
		for _, c := range ownChains(six) {
			key := printKey(c, six)
			n.fresh[key] = n.good.same(now, key)
		}
	}
	if n.jumps, foreign, err = n.four.survey(ctx, n.stale(ownChains(false), false)); err != nil {
		return n, err
	}
	if n.six != nil {
		if n.jumpsSix, foreignSix, err = n.six.survey(ctx, n.stale(ownChains(true), true)); err != nil {
			return n, err
		}
	}
	listen := r.plan.Listen
	l, err := readAddress(listen.Addr())
	if err != nil {
		return n, err
	}
	if l.local || l.wants(listen.Addr()) {
		if why == nil { // the watcher has not the privilege to see whose a socket is, not even systemd's
			foreign = errors.Join(foreign, foreignListener(listen))
		}
	} else if why == nil {
		r.plan.Log.WithField("listen", listen).Info("the listen address is not this node's own: requests are forwarded there")
	}
	return n, errors.Join(foreign, foreignSix)
}

// stale are the chains that are not known to be as they should be.
func (n *node) stale(chains []chain, six bool) []chain {
	return slices.DeleteFunc(chains, func(c chain) bool { return n.fresh[printKey(c, six)] })
}

// lookAgain notices what has changed around the rules since they were read: then they all have to be read anew.
func (r *iptablesRouter) lookAgain(n *node) error {
	now, err := r.look(false)
	if err == nil && !now.equal(n.surroundings) {
		n.surroundings, n.good = now, print{}
	}
	return err
}

// jumpsMissing are the layers in which a chain that should be jumped to is not: somebody flushed it.
func (r *iptablesRouter) jumpsMissing(n *node) (layers []string) {
	missing := func(six bool, ours map[string][]jumpAt) bool {
		return slices.ContainsFunc(chainsFor(r.plan, n.surroundings, six), func(c chain) bool { return !c.absent && len(ours[c.name]) == 0 })
	}
	if missing(false, n.jumps) {
		layers = append(layers, layerIPTables)
	}
	if n.six != nil && missing(true, n.jumpsSix) {
		layers = append(layers, layerIP6Tables)
	}
	return layers
}

// put makes the Plan stand, closed before open: whatever fails on the way leaves pods without an answer, not with the real server's.
func (r *iptablesRouter) put(ctx context.Context, n *node) error {
	if err := r.putClosed(); err != nil {
		return err
	}
	if n.six != nil { // the other family has the guard's reset only
		if chains := n.stale(chainsFor(r.plan, n.surroundings, true), true); len(chains) == 0 {
			// nobody touched it
		} else if !chains[0].absent {
			if err := n.six.restore(ctx, restoreText(chains, n.jumpsSix)); err != nil {
				return fmt.Errorf("install the IPv6 rules: %w", err)
			}
		} else if err := n.six.removeAll(ctx); err != nil {
			return err
		}
	}
	if chains := n.stale(chainsFor(r.plan, n.surroundings, false), false); len(chains) > 0 {
		if err := n.four.restore(ctx, restoreText(chains, n.jumps)); err != nil {
			return fmt.Errorf("install the rules: %w", err)
		}
	}
	return installRoute(r.plan, n.surroundings)
}

func (r *iptablesRouter) putClosed() error {
	if err := installAddress(r.plan.Listen.Addr()); err != nil {
		return err
	}
	return installGuard(r.plan)
}

// repairLight puts back what iptables has no part in: a millisecond instead of fifty.
func (r *iptablesRouter) repairLight(why *repair, state State) error {
	state.count(why)
	state.Installs++
	err := r.putClosed()
	if err == nil {
		err = installRoute(r.plan, why.node.surroundings)
	}
	if err == nil {
		err = errors.Join(slices.Concat(checkGuard(r.plan), checkAddress(r.plan), checkRoute(r.plan, why.node.surroundings))...)
	}
	return r.readBack(state, err)
}

// clean does what the Plan can do without.
func (r *iptablesRouter) clean(ctx context.Context, n *node) {
	if len(n.jumps["GME-PRE"]) == 0 && len(n.stale([]chain{{name: "GME-PRE"}}, false)) > 0 { // for some time pods were not redirected
		if err := forgetEstablished(r.plan, n.surroundings); err != nil {
			r.plan.Log.WithError(err).Warn("connections to the real metadata server from before are closed, but their clients may wait for an answer")
		}
	}
	if n.other != "" { // where an earlier choice of the backend may have left something
		if err := removeChains(ctx, n.other); err != nil {
			r.plan.Log.WithError(err).WithField("command", n.other).Warn("rules of ours may be left in the other iptables backend")
		}
	}
}

func (r *iptablesRouter) Check(ctx context.Context) error {
	unlock, err := lock(ctx, r.plan.RunDir, unix.LOCK_SH)
	if err != nil {
		return err
	}
	defer unlock()
	if r.plan.Closed {
		return errors.Join(checkGuard(r.plan)...)
	}
	state, err := ReadState(r.plan.RunDir)
	if err != nil {
		return err
	}
	n, err := r.open(ctx, r.command(state), false)
	if err != nil {
		return errors.Join(append(checkGuard(r.plan), err)...)
	}
	return errors.Join(r.check(ctx, n)...)
}

// command is the backend that Install chose: it is not chosen anew.
func (r *iptablesRouter) command(s State) string {
	if b := r.plan.Binary; b != "" && b != "iptables" {
		return b
	}
	return s.Command
}

// check reads everything back.
func (r *iptablesRouter) check(ctx context.Context, n *node) []error {
	return slices.Concat(checkGuard(r.plan), checkAddress(r.plan), r.checkChains(ctx, n), checkRoute(r.plan, n.surroundings))
}

// checkChains reads back the chains that are not known to be as they should be, and remembers in n.good those that are.
func (r *iptablesRouter) checkChains(ctx context.Context, n *node) (errs []error) {
	before, right := n.print(), map[string]bool{}
	for _, six := range n.families() {
		x := n.four
		if six {
			x = n.six
		}
		for _, c := range chainsFor(r.plan, n.surroundings, six) {
			key := printKey(c, six)
			if !n.good.same(before, key) {
				found := x.check(ctx, []chain{c})
				errs = append(errs, found...)
				right[key] = len(found) == 0
			} else {
				right[key] = true
			}
		}
	}
	now := n.print()
	n.good = print{generation: now.generation, chains: map[string]string{}}
	for key := range right {
		if right[key] && before.same(now, key) { // else somebody changed it while it was read
			n.good.chains[key] = now.chains[key]
		}
	}
	return errs
}

func (r *iptablesRouter) Remove(ctx context.Context) error {
	unlock, err := lock(ctx, r.plan.RunDir, unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer unlock()
	_, state := r.state(Removed)
	if err := writeState(r.plan.RunDir, state); err != nil {
		return err
	}
	use, other := backends(ctx, r.plan)
	var errs []error
	remove := func(tables ...string) {
		errs = append(errs, removeChains(ctx, use, tables...))
		if other != "" {
			errs = append(errs, removeChains(ctx, other, tables...))
		}
	}
	// When nobody is redirected any more, those who were are told: as long as rules of ours have conntrack translate what they are sent.
	remove("nat")
	resetConnections(netip.Addr{})
	remove()
	if err := errors.Join(errs...); err != nil {
		// The guard stays: as long as rules of ours may stand, closed is better than open.
		return r.readBack(state, fmt.Errorf("remove the rules: %w", err))
	}
	return r.readBack(state, errors.Join(removeRoute(), removeGuard(), removeAddress(netip.Addr{})))
}

// look finds out what the rules must know of the node.
func (r *iptablesRouter) look(say bool) (s surroundings, err error) {
	log := r.plan.Log
	s.uplinks = slices.Clone(r.plan.Uplinks)
	if len(s.uplinks) == 0 {
		devices, err := readDevices()
		if err != nil {
			return s, err
		}
		var remarks []string
		s.uplinks, remarks = uplinks(devices)
		for _, remark := range remarks {
			if say {
				log.Warn(remark)
			}
		}
		if len(s.uplinks) == 0 && say {
			log.Warn("no uplink found: hosts behind an interface that comes later are kept out only after the next install")
		}
	}
	if r.plan.InterceptHostPods == "on" {
		s.slices = existing(r.hostCgroups)
		if len(s.slices) == 0 && say {
			log.Error("pods on the host network are not redirected: none of the host's own cgroups was found, which needs cgroup v2 (R-22)")
		}
	}
	if say {
		log.WithFields(map[string]any{"uplinks": strings.Join(s.uplinks, " "), "spare": strings.Join(r.plan.Spare, " "),
			"host_pods": interceptsHost(r.plan, s)}).Info("routing: installing")
	}
	return s, nil
}

// state is what the Plan wants from now on.
func (r *iptablesRouter) state(desired string) (before, now State) {
	p := r.plan
	s := State{Desired: desired, Closed: p.Closed, Mode: p.Mode, Guard: p.Guard, Since: time.Now().UTC().Truncate(time.Second)}
	if !p.Closed && p.Listen.IsValid() {
		s.Listen, s.Uplinks, s.Spare, s.HostPods = p.Listen.String(), p.Uplinks, p.Spare, p.InterceptHostPods
	}
	old, err := ReadState(p.RunDir)
	if err != nil {
		return State{}, s // it is written anew
	}
	s.Installs, s.Repairs = old.Installs, old.Repairs
	if old.Desired == desired {
		s.Since = old.Since
	}
	return old, s
}

// readBack writes down what stands, err being what was read, and returns err.
func (r *iptablesRouter) readBack(s State, err error) error {
	s.Standing = Standing{Time: time.Now().UTC(), Good: err == nil}
	if err != nil {
		s.Standing.Faults = strings.Split(err.Error(), "\n")
	}
	return errors.Join(err, writeState(r.plan.RunDir, s))
}
