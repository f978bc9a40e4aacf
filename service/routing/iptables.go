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

// missing is a fault that Check reports.
func missing(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrMissing, fmt.Sprintf(format, args...))
}

func (r *iptablesRouter) Install(ctx context.Context) error {
	unlock, err := lock(ctx, r.plan.RunDir, unix.LOCK_EX)
	if err != nil {
		return errors.Join(err, addGuard(r.plan)) // closed, whatever else is not to be had
	}
	defer unlock()
	before, state := r.state(Installed)
	var n *node
	if !r.plan.Closed {
		if n, err = r.survey(ctx); errors.Is(err, ErrForeign) {
			return err // nothing was changed, and nothing is
		}
		state.Command = n.command
		if err == nil && before.Desired == Installed && !before.Closed && r.jumpMissing(n) {
			state.Repairs++
		}
	}
	state.Installs++
	// The state first: whoever repairs must not take what follows for a flush, nor undo it.
	if err := errors.Join(err, writeState(r.plan.RunDir, state)); err != nil || r.plan.Closed {
		// Closed leaves alone what stands besides the guard: rules that a good configuration installed still lead pods to
		// the emulator, which tells them the reason. And a node whose rules cannot be made is closed too.
		if err = errors.Join(err, addGuard(r.plan)); err == nil {
			err = errors.Join(checkGuard(r.plan)...)
		}
		return r.readBack(state, err)
	}
	if err := r.put(ctx, n); err != nil {
		return r.readBack(state, err)
	}
	r.clean(ctx, n)
	return r.readBack(state, r.check(ctx, n))
}

// node is what an Install must know of where it is.
type node struct {
	surroundings
	command, other string // the iptables command to use; the other backend's, if rules of ours may be there
	four, six      *xtables
	jumps          map[string][]jumpAt // ours of IPv4, by chain
	jumpsSix       map[string][]jumpAt
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
	if haveIPv6() {
		if n.six, err = openXtables(n.command, true); err != nil {
			r.plan.Log.WithError(err).Debug("no IPv6 rules")
		}
	}
	return n, nil
}

// survey looks at everything that Install depends on, and changes nothing. It refuses what belongs to somebody else.
func (r *iptablesRouter) survey(ctx context.Context) (n *node, err error) {
	if n, err = r.open(ctx, "", true); err != nil {
		return n, err
	}
	var foreign, foreignSix error
	if n.jumps, foreign, err = n.four.survey(ctx); err != nil {
		return n, err
	}
	if n.six != nil {
		if n.jumpsSix, foreignSix, err = n.six.survey(ctx); err != nil {
			return n, err
		}
	}
	listen := r.plan.Listen
	l, err := readAddress(listen.Addr())
	if err != nil {
		return n, err
	}
	if l.local || l.wants(listen.Addr()) {
		foreign = errors.Join(foreign, foreignListener(listen))
	} else {
		r.plan.Log.WithField("listen", listen).Info("the listen address is not this node's own: requests are forwarded there")
	}
	return n, errors.Join(foreign, foreignSix)
}

// jumpMissing reports whether a chain that should be jumped to is not: somebody flushed it.
func (r *iptablesRouter) jumpMissing(n *node) bool {
	missing := func(six bool, ours map[string][]jumpAt) bool {
		return slices.ContainsFunc(chainsFor(r.plan, n.surroundings, six), func(c chain) bool { return !c.absent && len(ours[c.name]) == 0 })
	}
	return missing(false, n.jumps) || n.six != nil && missing(true, n.jumpsSix)
}

// put makes the Plan stand, closed before open: whatever fails on the way leaves pods without an answer, not with the real server's.
func (r *iptablesRouter) put(ctx context.Context, n *node) error {
	if err := installAddress(r.plan.Listen.Addr()); err != nil {
		return err
	}
	if err := installGuard(r.plan); err != nil {
		return err
	}
	if n.six != nil { // the other family has the guard's reset only
		if chains := chainsFor(r.plan, n.surroundings, true); !chains[0].absent {
			if err := n.six.restore(ctx, restoreText(chains, n.jumpsSix)); err != nil {
				return fmt.Errorf("install the IPv6 rules: %w", err)
			}
		} else if err := n.six.removeAll(ctx); err != nil {
			return err
		}
	}
	if err := n.four.restore(ctx, restoreText(chainsFor(r.plan, n.surroundings, false), n.jumps)); err != nil {
		return fmt.Errorf("install the rules: %w", err)
	}
	return installRoute(r.plan, n.surroundings)
}

// clean does what the Plan can do without.
func (r *iptablesRouter) clean(ctx context.Context, n *node) {
	if len(n.jumps["GME-PRE"]) == 0 { // for some time pods were not redirected
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
	command := state.Command // the backend that Install chose is not chosen anew
	if b := r.plan.Binary; b != "" && b != "iptables" {
		command = b
	}
	n, err := r.open(ctx, command, false)
	if err != nil {
		return errors.Join(append(checkGuard(r.plan), err)...)
	}
	return r.check(ctx, n)
}

// check reads everything back.
func (r *iptablesRouter) check(ctx context.Context, n *node) error {
	errs := slices.Concat(checkGuard(r.plan), checkAddress(r.plan), n.four.check(ctx, chainsFor(r.plan, n.surroundings, false)))
	if n.six != nil {
		errs = append(errs, n.six.check(ctx, chainsFor(r.plan, n.surroundings, true))...)
	}
	return errors.Join(append(errs, checkRoute(r.plan, n.surroundings)...)...)
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
	errs := []error{removeChains(ctx, use)}
	if other != "" {
		errs = append(errs, removeChains(ctx, other))
	}
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
