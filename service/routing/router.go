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

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/watch"
)

// router is the one Router there is: what all modes share, around the mode of its Plan.
type router struct {
	plan        Plan
	hostCgroups []string
	cloud       CloudServer // as State has it
	asked       string      // what came of asking the cloud's metadata server
	ipv6Refused string      // why IPv6 cannot be redirected, which was found out
	dnsRefused  string      // the same of DNS queries
}

// Install of a closed Plan does not fail for what only the redirection needs: a configuration that
// is missing or broken is a state, and then the guard alone is closed enough.
func (r *router) Install(ctx context.Context) error {
	_, err := r.install(ctx, nil)
	if err == nil || !r.plan.Closed {
		return err
	}
	return r.guardOnly(ctx, err)
}

// guardOnly puts up the guard where a closed Plan cannot be installed: why. Where the rules of the
// last valid configuration are in force they stay desired, with its guard, which mode observe has
// not, and State says why they do not stand.
func (r *router) guardOnly(ctx context.Context, why error) error {
	unlock, err := lock(ctx, r.plan.RunDir, unix.LOCK_EX)
	if err != nil {
		return errors.Join(why, err)
	}
	alone := *r
	alone.plan.Listen, alone.plan.Listen6 = netip.AddrPort{}, netip.AddrPort{}
	before, _ := r.state(Installed)
	if before.Desired != Installed || before.Closed {
		unlock()
		r.plan.Log.WithError(why).Warn("routing: requests of pods cannot be redirected to the service, " +
			"which answers them 503 with the reason: only the guard is installed: connections of pods may hang")
		_, err := alone.install(ctx, nil)
		return err
	}
	defer unlock()
	r.plan.Log.WithError(why).Warnf("routing: the rules of the last valid configuration, mode %s, cannot be installed: "+
		"only its guard is", before.Mode)
	alone.plan.Guard, alone.plan.ExcludeInterfaces = before.Guard, before.ExcludeInterfaces
	if err = addObjects(alone.plan, nodeFacts{}, onlyRules); err == nil {
		err = errors.Join(checkGuard(alone.plan, nodeFacts{})...)
	}
	before.Standing = standing(errors.Join(why, err))
	return errors.Join(err, writeState(r.plan.RunDir, before))
}

// inForce is the Router of what was installed, for a Plan without a valid configuration.
func (r *router) inForce(s State) (*router, error) {
	if !r.plan.Closed || s.Desired != Installed {
		return r, nil
	}
	p, err := s.plan(r.plan)
	if err != nil {
		return nil, err
	}
	return newRouter(p)
}

// install is Install. With a repair it is the watcher's: then it changes nothing if meanwhile
// something else is desired than what was found to be missing, and the node that it returns
// knows what to compare with.
func (r *router) install(ctx context.Context, why *repair) (n *node, err error) {
	unlock, err := lock(ctx, r.plan.RunDir, unix.LOCK_EX)
	if err != nil {
		if why == nil { // without the lock the watcher cannot know what is desired
			err = errors.Join(err, addObjects(r.plan, nodeFacts{}, onlyRules)) // closed, whatever else is not to be had
		}
		return nil, err
	}
	defer unlock()
	plain := why == nil
	before, state := r.state(Installed)
	if before.Desired == Installed && !before.Closed && r.plan.Closed {
		// A configuration that broke changes nothing: rules of the last valid one go on leading pods to
		// the service, which tells them the reason.
		if r, err = r.inForce(before); err != nil {
			return nil, err
		}
		_, state = r.state(Installed)
	}
	if why != nil && before.Desired != "" && !before.sameDesired(why.of) {
		return nil, errOutdated
	}
	r.cloud = state.CloudServer
	same := before.Desired == Installed && before.Closed == r.plan.Closed && before.Listen != "" &&
		before.Mode == r.plan.Mode
	if !r.plan.guardAlone() {
		if why != nil {
			r.cloud = r.cloud.with(why.found, time.Now())
		} else if r.asksCloud() {
			r.cloud = r.cloud.with(r.ask(), time.Now()) // before the rules: the answer is the cloud's own
		}
		state.CloudServer = r.cloud
		if why.light() {
			why.add(checkObjects(r.plan, why.node.nodeFacts)...)
			return why.node, r.repairLight(why, state)
		}
		var faults []error
		if n, faults, err = r.survey(ctx, why); errors.Is(err, fault.ErrForeign) {
			return n, err // nothing was changed, and nothing is
		}
		if n.mode != nil {
			state.Command = n.command()
			state.HostNetwork, state.IPv6, state.DNSRefused = n.hostWhy, n.whyNot6, n.whyNotDNS
		}
		if why == nil && err == nil && same {
			why = &repair{why: watch.Install}
			for _, err := range faults {
				if f, ok := err.(*fault.Fault); ok && f.Flushed {
					why.faults = append(why.faults, f)
				}
			}
		} else if err == nil {
			why.add(append(checkObjects(r.plan, n.nodeFacts), faults...)...)
		}
	}
	state.count(why)
	state.Installs++
	// The state first: whoever repairs must not take what follows for a flush, nor undo it.
	if err := errors.Join(err, writeState(r.plan.RunDir, state)); err != nil || r.plan.guardAlone() {
		// A node whose rules cannot be made is closed too, and what stands besides the guard stays.
		if err = errors.Join(err, addObjects(r.plan, nodeFacts{}, onlyRules)); err == nil {
			err = errors.Join(checkGuard(r.plan, nodeFacts{})...)
		}
		return n, r.readBack(state, err)
	}
	err = r.putAll(ctx, n)
	if state.IPv6, state.DNSRefused = n.whyNot6, n.whyNotDNS; err != nil {
		return n, r.readBack(state, err)
	}
	changed := !same || plain && !before.Standing.Good
	if changed {
		// Of another mode something may stand, or may still where a change did not come to its end.
		// It goes last: until then requests had a way, by whichever of the two.
		for _, p := range removers {
			if slices.Contains(p.keptBy, r.plan.Mode) {
				continue
			}
			if err := p.remove(ctx, r.plan, true); err != nil {
				return n, r.readBack(state, fmt.Errorf("remove what mode %s left: %w", p.keptBy[0], err))
			}
		}
	}
	again := plain && !r.plan.dnats() && !r.plan.traits().observes // which leaves other people's redirections be
	if was := (Plan{Mode: before.Mode}); was.Mode != "" && (changed && !(was.dnats() && r.plan.dnats()) || again) {
		if err := forgetServed(ctx, r.plan, n.nodeFacts, was); err != nil {
			r.plan.Log.WithError(err).Warn("routing: conntrack entries of the previous mode cannot be deleted: " +
				"new connections that reuse a source port may fail for up to 2 minutes")
		}
	}
	if err := trimObjects(r.plan, n.nodeFacts, everything); err != nil {
		return n, r.readBack(state, err)
	}
	errs := r.check(ctx, n)
	// somebody flushed in between, and what was right, and so left alone, with it
	if plain && len(fault.Layers(errs)) > 0 {
		if err := r.putAgain(ctx, n); err != nil {
			return n, r.readBack(state, err)
		}
		errs = r.check(ctx, n)
	}
	r.warnOvertaken(bypasses(r.plan, n.nodeFacts))
	return n, r.readBack(state, errors.Join(errs...))
}

// warnOvertaken says which rules of others the guard (R-33, bypassing it) and what has pods tracked
// cannot be put before.
func (r *router) warnOvertaken(bypassing []string) {
	for _, chain := range untracking(r.plan) {
		r.plan.Log.Warn("routing: pods may not be redirected: " + chain +
			" comes before the rules and takes packets out of conntrack: " +
			"set routing.mode to nftables, whose rules overrule that")
	}
	for _, rule := range bypassing {
		r.plan.Log.Warn("routing: the guard is bypassed by: " + rule +
			": delete that rule and add it again with a preference of 1 or more, or that route to table main")
	}
}

// open looks around without asking for rules.
func (r *router) open(ctx context.Context, command string, say bool) (n *node, err error) {
	n = &node{}
	if n.nodeFacts, err = r.look(say); err != nil {
		return n, err
	}
	m, err := openMode(ctx, r.plan, command)
	if err == nil {
		n.mode = m
	}
	return n, err
}

// survey looks at everything that Install depends on, and changes nothing. It refuses what belongs
// to somebody else.
func (r *router) survey(ctx context.Context, why *repair) (n *node, faults []error, err error) {
	if why != nil && why.node != nil {
		n = why.node // nothing is opened anew
		_, err = r.lookAgain(n)
	} else {
		n, err = r.open(ctx, "", why == nil)
	}
	if err != nil {
		return n, nil, err
	}
	var foreign error
	if faults, err = n.survey(ctx, n.nodeFacts); errors.Is(err, fault.ErrForeign) {
		foreign = err
	} else if err != nil {
		return n, nil, err
	}
	have, err := netobj.Read()
	if err != nil {
		return n, nil, err
	}
	listen := r.plan.Listen
	begins := why == nil || why.of.Desired == ""
	if r.plan.traits().localServer {
		foreign = errors.Join(foreign, foreignAddress(have))
		if begins && !r.plan.Force {
			foreign = errors.Join(foreign, r.realServer())
		}
	}
	if isLocal(listen.Addr(), have) || !r.plan.redirects() {
		if why == nil { // the watcher has not the privilege to see whose a socket is, not even systemd's
			foreign = errors.Join(foreign, foreignListener(listen))
		}
	} else if why == nil {
		r.plan.Log.WithField("listen", listen).Info("routing: the listen address is not an address of this node: " +
			"requests are forwarded there")
	}
	if why == nil {
		r.refuseForeignIPv6Listener(n, have)
	}
	return n, faults, foreign
}

// lookAgain notices what has changed around the rules since they were read: then they all have to
// be read anew.
func (r *router) lookAgain(n *node) (changed bool, err error) {
	now, err := r.look(false)
	if err != nil {
		return false, err
	}
	if n.hostWhy = now.hostWhy; !now.equal(n.nodeFacts) {
		n.nodeFacts, changed = now, true
	}
	return changed, nil
}

// put makes the Plan stand, closed before open: whatever fails on the way leaves pods without an
// answer, not with the real server's.
func (r *router) put(ctx context.Context, n *node) error {
	if err := addClosed(r.plan, n.nodeFacts); err != nil {
		return err
	}
	if err := n.put(ctx, n.nodeFacts); err != nil {
		return err
	}
	return addObjects(r.plan, n.nodeFacts, everything)
}

// putAgain puts everything, whatever was found to be right.
func (r *router) putAgain(ctx context.Context, n *node) error {
	if _, err := n.survey(ctx, n.nodeFacts); err != nil {
		return err
	}
	return r.put(ctx, n)
}

// repairLight puts back what the mode has no part in: a millisecond, whatever the mode needs.
func (r *router) repairLight(why *repair, state State) error {
	state.count(why)
	state.Installs++
	err := addClosed(r.plan, why.node.nodeFacts)
	if err == nil {
		err = trimObjects(r.plan, why.node.nodeFacts, everything)
	}
	if err == nil {
		err = errors.Join(checkObjects(r.plan, why.node.nodeFacts)...)
	}
	return r.readBack(state, err)
}

func (r *router) Check(ctx context.Context) error {
	unlock, err := lock(ctx, r.plan.RunDir, unix.LOCK_SH)
	if err != nil {
		return err
	}
	defer unlock()
	state, err := ReadState(r.plan.RunDir)
	if err == nil {
		r, err = r.inForce(state)
	}
	if err != nil {
		return err
	}
	if r.plan.guardAlone() {
		return errors.Join(checkGuard(r.plan, nodeFacts{})...)
	}
	r.remember(state)
	n, err := r.open(ctx, state.Command, false)
	if err != nil {
		return errors.Join(append(checkGuard(r.plan, nodeFacts{}), err)...)
	}
	bypassing := bypasses(r.plan, n.nodeFacts)
	r.warnOvertaken(bypassing)
	errs := r.check(ctx, n)
	if r.plan.traits().localServer { // whose guard is what serves pods: no repair helps, so install only warns
		for _, rule := range bypassing {
			errs = append(errs, fmt.Errorf("pods are not served where this comes before the guard: %s"+
				": delete that rule and add it again with a preference of 1 or more, or that route to table main", rule))
		}
	}
	return errors.Join(errs...)
}

// check reads everything back.
func (r *router) check(ctx context.Context, n *node) []error {
	return append(checkObjects(r.plan, n.nodeFacts), n.check(ctx, n.nodeFacts)...)
}

func (r *router) Remove(ctx context.Context) error {
	unlock, full := lock(ctx, r.plan.RunDir, unix.LOCK_EX)
	switch {
	case full == nil:
		defer unlock()
	case !errors.Is(full, errFull):
		return full
	}
	_, state := r.state(Removed)
	if err := writeState(r.plan.RunDir, state); errors.Is(err, errFull) {
		full = errors.Join(full, err, errors.New("a routing watcher that runs may install the rules again: "+
			"stop it, or repeat the removal when there is space"))
	} else if err != nil {
		return err
	}
	return errors.Join(r.removeAll(ctx, state), full)
}

func (r *router) removeAll(ctx context.Context, state State) error {
	errs := []error{trimObjects(Plan{}, nodeFacts{}, onLinks)} // else the chains were gone before the address
	for _, p := range removers {
		errs = append(errs, p.remove(ctx, r.plan, false))
	}
	if err := errors.Join(errs...); err != nil {
		// The guard stays: as long as rules of ours may stand, closed is better than open.
		return r.readBack(state, fmt.Errorf("remove the rules: %w", err))
	}
	return r.readBack(state, trimObjects(Plan{}, nodeFacts{}, everything))
}

// asksCloud says whether something depends on the cloud's metadata server, and is not known. Once
// pods on the host network are redirected, a process outside the node's own cgroups is too: its
// question would get the emulator's answer.
func (r *router) asksCloud() bool {
	return !r.plan.guardAlone() && r.plan.InterceptHostPods == "auto" && !r.plan.traits().observes && !r.cloud.known() &&
		(r.cloud.Found == cloudUnknown || inOneOf(r.plan.CgroupRoot, r.hostCgroups))
}

// ask has the cloud's metadata server asked once, from the calling thread's network namespace.
func (r *router) ask() string {
	if r.asked == cloudUnknown {
		r.asked = askCloud().answer()
	}
	return r.asked
}

// look finds out what the rules must know of the node.
func (r *router) look(say bool) (s nodeFacts, err error) {
	log := r.plan.Log
	s.uplinks = slices.Clone(r.plan.Uplinks)
	if len(s.uplinks) == 0 && !r.plan.traits().observes {
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
			log.Warn("routing: no uplinks found: hosts behind an interface that appears later are kept out " +
				"after the next install")
		}
	}
	s.reachesIPv6 = reachesIPv6()
	if s.listen6, s.whyNot6 = r.ipv6Target(); s.whyNot6 != "" && say && !r.plan.Closed {
		log.Warn("routing: requests by IPv6 are not redirected: " + s.whyNot6)
	}
	if s.dns, s.whyNotDNS = r.dnsAround(say); s.whyNotDNS != "" && say {
		log.Warn("routing: DNS queries for " + dnsName + " are not answered by this node: " + s.whyNotDNS)
	}
	s.slices = existing(r.plan.CgroupRoot, r.hostCgroups)
	if s.hostPods, s.hostWhy = hostPods(r.plan, r.cloud, s.slices); !s.hostPods && !r.plan.traits().observes {
		s.slices = nil // whichever comes and goes
	}
	if say {
		log.WithFields(map[string]any{"uplinks": strings.Join(s.uplinks, " "),
			"exclude_interfaces": strings.Join(r.plan.ExcludeInterfaces, " "),
			"host_pods":          s.hostWhy}).Info("routing: installing")
	}
	return s, nil
}

// state is what the Plan wants from now on.
func (r *router) state(desired string) (before, now State) {
	p := r.plan
	s := State{Desired: desired, Closed: p.Closed, Mode: p.Mode, Reason: p.Reason, Guard: p.Guard,
		Uplinks: p.Uplinks, ExcludeInterfaces: p.ExcludeInterfaces, // the guard has those too
		Since: time.Now().UTC().Truncate(time.Second)}
	if p.Listen.IsValid() {
		s.Listen, s.HostPods = p.Listen.String(), p.InterceptHostPods
		s.Link, s.Force = p.Link, p.Force
		if p.Listen6.IsValid() {
			s.Listen6 = p.Listen6.String()
		}
		s.DNS = p.DNS
	}
	old, err := ReadState(p.RunDir)
	if err != nil {
		return State{}, s // it is written anew
	}
	s.Installs, s.Repairs, s.CloudServer = old.Installs, old.Repairs, old.CloudServer
	if old.Desired == desired {
		s.HostNetwork, s.IPv6, s.DNSRefused = old.HostNetwork, old.IPv6, old.DNSRefused
		if old.Mode == s.Mode && old.Closed == s.Closed {
			s.Since = old.Since
		}
	}
	if p.traits().observes {
		s.Observed = old.Observed
	}
	return old, s
}

// readBack writes down what stands, err being what was read, and returns err.
func (r *router) readBack(s State, err error) error {
	s.Standing = standing(err)
	return errors.Join(err, writeState(r.plan.RunDir, s))
}

// standing is what was read back: err.
func standing(err error) Standing {
	s := Standing{Time: time.Now().UTC(), Good: err == nil}
	if err != nil {
		s.Faults = strings.Split(err.Error(), "\n")
	}
	return s
}
