package routing

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/messageid"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/watch"
)

var (
	// errOutdated is returned by the repair of what is not desired any more.
	errOutdated = errors.New("something else is desired by now")
	// errLater is returned by a look for which there is no token.
	errLater = errors.New("later")
)

// round looks at what is pending and repairs what is missing, at most as often as the buckets
// allow.
func (w *watcher) round(ctx context.Context) {
	why, by := w.pending, w.by
	w.pending, w.by = 0, ""
	later := func(bucket *rate.Limiter) {
		w.pending |= why
		if w.by == "" {
			w.by = by
		}
		w.notBefore = next(bucket)
	}
	errs, err := w.look(ctx, why)
	switch {
	case errors.Is(err, errLater):
		later(w.checks)
		return
	case ctx.Err() != nil || w.router == nil && err == nil:
		return
	case err != nil:
		errs = append(errs, err)
	}
	switch {
	case len(errs) == 0:
		w.publish(ctx, why, nil)
		w.succeed()
		return
	case len(fault.Layers(errs)) == 0: // what could not be read
		w.publish(ctx, why, errs)
		w.fail(errors.Join(errs...))
		return
	case !w.repairs.Allow():
		w.publish(ctx, why, errs)
		w.unread = true
		later(w.repairs)
		return
	}
	start := time.Now()
	r := &repair{of: w.desired, why: why, faults: errs, node: w.node, mode: w.unread}
	if w.follows {
		r.follows = fault.Layers(errs)
	}
	for _, layer := range fault.Layers(errs) {
		r.mode = r.mode || !slices.Contains(fault.Shared, layer)
	}
	w.node, err = w.router.install(ctx, r)
	switch {
	case errors.Is(err, errOutdated):
		w.pending |= why
		return
	case errors.Is(err, fault.ErrMissing) && !w.disturbed: // somebody went on flushing meanwhile
		w.report(r, by, start)
		w.bad, w.unread, w.disturbed = true, true, true
		w.pending |= why
		if w.by == "" {
			w.by = by
		}
		return
	case err != nil:
		w.bad = true
		w.fail(fmt.Errorf("repair: %w", err))
		return
	}
	w.bad, w.unread = false, false
	w.report(r, by, start)
	w.succeed()
}

// report logs what a repair put back, or what it had follow the node's interfaces and cgroups.
func (w *watcher) report(r *repair, by string, start time.Time) {
	found := slices.Collect(maps.Values(r.causes()))
	slices.Sort(found)
	fields := logrus.Fields{"layer": strings.Join(fault.Layers(r.faults), ","),
		"took": time.Since(start).Round(100 * time.Microsecond).String()}
	if len(found) == 0 {
		fields["changed"] = strings.Join(texts(r.faults), "; ")
		w.Log.WithFields(fields).Info("routing: the rules follow the interfaces and cgroups of the node")
		return
	}
	fields[messageid.Field] = string(messageid.RulesRepaired)
	fields["cause"], fields["missing"] = strings.Join(slices.Compact(found), ","), strings.Join(texts(r.faults), "; ")
	if by != "" && slices.Contains(found, watch.NFTables.String()) {
		fields["by"] = by
	}
	w.Log.WithFields(fields).Warn("routing: missing rules were put back")
}

// next is when the bucket has a token again.
func next(bucket *rate.Limiter) time.Time {
	r := bucket.Reserve()
	defer r.Cancel()
	return time.Now().Add(r.Delay())
}

// look reads back what the causes can have touched, and returns all that is missing of it. It waits
// for an Install or Remove of another process to be over. Without a router there is nothing to
// keep.
func (w *watcher) look(ctx context.Context, why watch.Causes) (errs []error, err error) {
	unlock, err := lock(ctx, w.RunDir, unix.LOCK_SH)
	if err != nil {
		return nil, err
	}
	defer unlock()
	state, err := ReadState(w.RunDir)
	if err != nil || state.Desired == "" { // somebody cleared the directory: what was desired before still is
		state = w.desired
	}
	if state.Desired != Installed {
		w.forget(state)
		return nil, nil
	}
	w.follows = false
	all := why&watch.Everything != 0 || w.bad
	if w.router == nil || !w.desired.sameDesired(state) || w.desired.Command != state.Command {
		all = true
		if err := w.follow(state); err != nil {
			return nil, err
		}
	}
	w.router.remember(state)
	p := w.router.plan
	read := all || w.unread
	around := !p.guardAlone() && (all || why&watch.Kernel&^watch.Rule != 0)
	moved := false
	if around && w.node != nil {
		was := w.node.nodeFacts
		if moved, err = w.router.lookAgain(w.node); err != nil {
			return nil, err
		}
		if moved && w.was == nil {
			w.was = &was
		}
		read = read || moved
	}
	if all || moved || why&watch.Kernel != 0 {
		if p.guardAlone() || w.node == nil { // the rest is looked at when the node is opened
			errs = append(errs, checkGuard(p, w.node.around())...)
		} else {
			errs = append(errs, checkObjects(p, w.node.nodeFacts)...)
		}
	}
	if p.guardAlone() {
		return errs, nil
	}
	read = read || w.node == nil
	if !read {
		cause, _ := w.node.wakes()
		read = why&cause != 0 && w.node.changed()
	}
	if !read {
		return errs, nil
	}
	w.unread = true // until it was read
	if !w.checks.Allow() {
		if len(errs) > 0 {
			return errs, nil // to install is to read
		}
		return nil, errLater
	}
	if w.read != nil {
		w.read()
	}
	if w.node == nil {
		n, err := w.router.open(ctx, state.Command, false)
		if err != nil {
			return errs, err
		}
		w.know(n)
		errs = checkObjects(p, n.nodeFacts) // all of it, with what is known now
	}
	// nothing has gone where all stands that was wanted for the node as it was
	w.follows = w.was != nil && len(checkObjects(p, *w.was)) == 0 && len(w.node.check(ctx, *w.was)) == 0
	errs = append(errs, w.node.check(ctx, w.node.nodeFacts)...)
	w.unread = false
	return errs, nil
}

// follow makes a router of what is desired now.
func (w *watcher) follow(state State) error {
	w.router, w.node, w.desired, w.was = nil, nil, state, nil
	p, err := state.plan(w.base)
	if err != nil {
		return err
	}
	p.RunDir, p.Log = w.RunDir, w.Log
	if w.router, err = newRouter(p); err != nil {
		return err
	}
	w.hear(p)
	return nil
}

// hear has the events of the addresses read where the Plan redirects to.
func (w *watcher) hear(p Plan) {
	if p.Listen.IsValid() {
		w.listen.Store([]netip.Addr{metadataServer.Addr(), p.Listen.Addr(), p.Listen6.Addr()})
	}
}

// know takes over what was found out of the node.
func (w *watcher) know(n *node) {
	if w.node = n; n.silent() != "" && n.silent() != w.silent {
		w.silent = n.silent()
		w.Log.Infof("routing: %s sends no change events: polling every %v, full check every %v",
			n.silent(), pollSilent, w.sweep)
	}
}

// forget lets everything be: it was removed, or is not there yet.
func (w *watcher) forget(state State) {
	w.router, w.node, w.desired, w.bad, w.failures, w.retry = nil, nil, state, false, 0, time.Time{}
	if state.Desired == Removed {
		w.logState("the rules were removed, and stay so")
	} else {
		w.logState("nothing was installed yet")
	}
}

// publish writes down what stands, for those who may not read it.
func (w *watcher) publish(ctx context.Context, why watch.Causes, errs []error) {
	was := w.bad
	if w.bad = len(errs) > 0; why&watch.Everything == 0 && !w.bad && !was {
		return // that is what was published
	}
	unlock, err := lock(ctx, w.RunDir, unix.LOCK_EX)
	if err != nil {
		w.Log.WithError(err).Warn("routing: the state file cannot be written")
		return
	}
	defer unlock()
	s, err := ReadState(w.RunDir)
	if err != nil || !s.sameDesired(w.desired) {
		return
	}
	if w.node != nil {
		if m, counts := w.node.mode.(interface{ observed() ([]Observation, error) }); counts && !w.bad {
			if s.Observed, err = m.observed(); err != nil {
				w.Log.WithError(err).Warn("routing: the counts of mode observe cannot be read")
			}
			s.Observed = s.Observed[:min(len(s.Observed), publishedAtMost)]
		}
	}
	s.Standing = Standing{Time: time.Now().UTC(), Good: !w.bad}
	if w.bad {
		s.Standing.Faults = strings.Split(errors.Join(errs...).Error(), "\n")
	}
	if err := writeState(w.RunDir, s); err != nil {
		w.Log.WithError(err).Warn("routing: the state file cannot be written")
	}
}

// fail has what failed tried again, a little later each time, and logged unless it was before.
func (w *watcher) fail(err error) {
	if err == nil {
		return
	}
	w.retry = time.Now().Add(min(refill<<min(w.failures, 10), maxRepairWait))
	w.failures++
	w.node, w.was = nil, nil
	if text := err.Error(); text != w.failed {
		w.failed = text
		messageid.RulesNotInstalled.In(w.Log).WithError(err).Error("routing: rules may be missing")
	}
	first, _, _ := strings.Cut(err.Error(), "\n")
	w.announce("rules may be missing: " + first)
}

func (w *watcher) succeed() {
	w.failures, w.retry, w.failed, w.disturbed, w.was = 0, time.Time{}, "", false, nil
	switch {
	case w.desired.Closed && Plan{Mode: w.desired.Mode}.traits().observes:
		w.logState("there is no valid configuration: nothing is redirected, as in mode observe")
	case w.desired.Closed && w.desired.Listen == "":
		w.logState("the closed guard stands alone: there is no valid configuration")
	case w.desired.Closed:
		w.logState("the rules stand: there is no valid configuration: pods are answered 503 with the reason")
	default:
		w.logState("the rules stand")
	}
}

func (w *watcher) logState(text string) {
	if text != w.reported {
		w.Log.Info("routing: " + text)
	}
	w.announce(text)
}

func (w *watcher) announce(text string) {
	if text != w.reported && w.Report != nil {
		w.Report(text)
	}
	w.reported = text
}

func texts(errs []error) (all []string) {
	for _, err := range errs {
		all = append(all, strings.TrimPrefix(err.Error(), fault.ErrMissing.Error()+": "))
	}
	return all
}

func (s nodeFacts) equal(o nodeFacts) bool {
	return slices.Equal(s.uplinks, o.uplinks) && slices.Equal(s.slices, o.slices) &&
		s.hostPods == o.hostPods && s.reachesIPv6 == o.reachesIPv6 && s.listen6 == o.listen6 && s.dns == o.dns
}

// askCloud has somebody wait for the answer of the cloud's metadata server, where it matters and
// the network may have changed.
func (w *watcher) askCloud(why watch.Causes) {
	const network = watch.Address | watch.Route | watch.Link | watch.Everything
	if w.router == nil || !w.router.asksCloud() || why&network == 0 {
		return
	}
	if w.asking {
		w.askAgain = time.Now() // when that question is answered: the network has changed under it
		return
	}
	w.askAgain = time.Time{}
	q := askCloud() // on this thread, which is in the network namespace
	if q == noQuestion {
		return // the kernel tells when there is a network
	}
	w.asking = true
	go func() { w.answers <- q.answer() }()
}

// learn has the rules follow what was found. Silence is asked again, a little later each time.
func (w *watcher) learn(ctx context.Context, found string) {
	w.asking = false
	if w.router == nil || !w.router.asksCloud() {
		return
	}
	if c := w.router.cloud.with(found, time.Now()); c != w.router.cloud {
		n, err := w.router.install(ctx, &repair{of: w.desired, node: w.node, mode: true, found: found})
		if w.node = n; errors.Is(err, errOutdated) {
			w.pending |= watch.Retry
			return
		}
		if w.fail(err); err == nil {
			w.Log.Info("routing: pods on the host network are " + n.hostWhy)
		}
	}
	if w.askAgain.IsZero() && w.router.asksCloud() {
		wait := answerWait
		if c := w.router.cloud; c.Found == cloudSilent {
			wait = min(max(time.Since(c.Since), wait), sweepEvery)
		}
		w.askAgain = time.Now().Add(wait)
	}
}
