package routing

import (
	"context"
	"errors"
	"fmt"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/watch"
	"math/rand/v2"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/time/rate"
)

const (
	// sweepEvery is how often all is read for no reason, ± a sixth, so that the nodes of a cluster do
	// not do it at once.
	sweepEvery = 30 * time.Second
	// pollSilent is how often what tells nobody of a change is asked whether it has one: legacy tables
	// take 5 µs to say.
	pollSilent = 50 * time.Millisecond
	// burst and refill bound what others can make us do: repairs and, apart from them, reading the
	// mode's part.
	burst, refill = 5, time.Second
	// maxRepairWait is how long a repair that failed is left alone at most, unless something
	// happens.
	maxRepairWait = 30 * time.Second
)

// Watch keeps standing what was installed last. It looks when the kernel tells of a change, and
// besides now and then; it looks only at what the change can have touched, and reads the mode's
// part only if its rules, or those that lead to them, are other than they were.
//
// It obeys the desired state: what was removed stays removed, a closed guard stays closed, and what
// another process installs is what it keeps from then on. Only if nobody installed or
// removed anything since the node booted does it install what the configuration says. What it finds
// is published in the state file.
type Watch struct {
	// Load reads the configuration: what is to stand, as the closed guard's Plan if there is no valid
	// one.
	Load func() Plan
	// Load again; what it says is installed, unless the rules were removed or it is the closed guard's
	// Plan
	Reload <-chan os.Signal
	// called after the first check of the rules, and when the text changes; may be nil
	Report func(text string)
	Alive  func() // called at each turn, at least once a sweep; may be nil
	RunDir string // "" is DefaultRunDir
	Log    logrus.FieldLogger

	// Tests have others.
	sweep time.Duration // sweepEvery
	burst int           // burst
	read  func()        // called when the mode's part is read
}

// watcher is a Watch that runs.
type watcher struct {
	Watch
	events          *watch.Events
	listen          atomic.Value // []netip.Addr whose routes matter, for the readers of events
	repairs, checks *rate.Limiter

	pending   watch.Causes
	by        string    // the process behind the last change of nf_tables
	notBefore time.Time // no look until then: the bucket is empty
	rest      time.Time // nor until then at what is around the rules alone
	retry     time.Time // if nothing happens; zero: there is nothing to try again
	failures  int

	base    Plan // the configuration's, for what the state does not tell
	router  *router
	desired State      // what the router's Plan was made of
	node    *node      // what the router knows of the node; nil: open it again
	unread  bool       // the mode's part has to be read, whether or not it says that it changed
	bad     bool       // the last verdict
	was     *nodeFacts // of the node for which the rules were put; nil: it is as it was
	follows bool       // all that is missing is wanted since the node is not as it was

	asking   bool        // the cloud's metadata server
	answers  chan string // of it
	askAgain time.Time   // zero: when the network changes

	// disturbed is that something else was missing when the last repair was read back. Once is no
	// failure.
	disturbed bool

	reported string
	silent   string // what the log said sends no change events
	failed   string // the last failure that was logged
}

// Run watches the network namespace of the calling thread until ctx is done. It returns an error if
// it may not, and if there are no more events.
func (o Watch) Run(ctx context.Context) (err error) {
	w := &watcher{Watch: o}
	if w.sweep == 0 {
		w.sweep = sweepEvery
	}
	if w.burst == 0 {
		w.burst = burst
	}
	w.repairs, w.checks = rate.NewLimiter(rate.Every(refill), w.burst), rate.NewLimiter(rate.Every(refill), w.burst)
	w.listen.Store([]netip.Addr{metadataServer.Addr()})
	w.answers = make(chan string, 1)
	if w.events, err = watch.Listen(func() []netip.Addr { return w.listen.Load().([]netip.Addr) }); err != nil {
		return err
	}
	defer w.events.Close()

	w.begin(ctx)
	w.pending = watch.Start
	sweep := time.Now().Add(w.sweep)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		if now := time.Now(); w.pending != 0 && !now.Before(w.due()) {
			why := w.pending
			w.round(ctx)
			// where a thousand interfaces come and go, each look at them takes 10 ms: a tenth of the time is
			// for that
			if why&^watch.Around == 0 {
				w.rest = time.Now().Add(min(9*time.Since(now), time.Second))
			}
			w.askCloud(why)
		}
		if w.Alive != nil {
			w.Alive()
		}
		timer.Reset(time.Until(w.wake(sweep)))
		select {
		case <-ctx.Done():
			return nil
		case err := <-w.events.Failed:
			return err
		case <-w.Reload:
			w.reload(ctx)
			w.pending |= watch.Reload
		case <-w.events.Changed:
			c, by := w.events.Take()
			if w.pending |= c; by != "" {
				w.by = by
			}
		case found := <-w.answers:
			w.learn(ctx, found)
		case now := <-timer.C:
			if !now.Before(sweep) {
				w.pending |= watch.Sweep
				sweep = now.Add(w.sweep + rand.N(w.sweep/3) - w.sweep/6)
			}
			if !w.retry.IsZero() && !now.Before(w.retry) {
				w.retry, w.unread = time.Time{}, true
				w.pending |= watch.Retry
			}
			if !w.askAgain.IsZero() && !w.asking && !now.Before(w.askAgain) {
				w.askAgain = time.Time{}
				w.askCloud(watch.Retry)
			}
			if w.node.silent() != "" && w.node.changed() {
				cause, _ := w.node.wakes()
				w.pending |= cause
			}
		}
	}
}

// wake is when the loop goes on if nothing happens.
func (w *watcher) wake(sweep time.Time) time.Time {
	next := sweep
	if !w.retry.IsZero() && w.retry.Before(next) {
		next = w.retry
	}
	if !w.askAgain.IsZero() && !w.asking && w.askAgain.Before(next) {
		next = w.askAgain
	}
	if w.pending != 0 && w.due().Before(next) {
		next = w.due()
	}
	if poll := time.Now().Add(pollSilent); w.node.silent() != "" && poll.Before(next) {
		next = poll
	}
	return next
}

// due is when there may be a look at what is pending.
func (w *watcher) due() time.Time {
	if w.pending&^watch.Around == 0 && w.rest.After(w.notBefore) {
		return w.rest
	}
	return w.notBefore
}

// begin installs what the configuration says if nobody has desired anything yet: the rules are
// there before any interface is up.
func (w *watcher) begin(ctx context.Context) {
	w.base = w.Load()
	if s, err := ReadState(w.RunDir); err == nil && s.Desired != "" {
		return
	}
	if err := w.apply(ctx, w.base, State{}); err != nil {
		w.Log.WithError(err).Error("routing: the configured rules cannot be installed: only the guard is installed")
		closed := w.base
		closed.Closed, closed.Listen, closed.Listen6 = true, netip.AddrPort{}, netip.AddrPort{}
		w.fail(w.apply(ctx, closed, State{}))
		return
	}
	if s, err := ReadState(w.RunDir); err == nil && s.Desired == Installed {
		w.desired = s
		w.succeed() // they were read back: what waits for us as the node boots need not wait for another look
	}
}

// reload installs what the configuration says now. A broken configuration changes nothing.
func (w *watcher) reload(ctx context.Context) {
	p := w.Load()
	if p.Closed {
		return
	}
	w.base = p
	if s, err := ReadState(w.RunDir); err == nil && s.Desired == Installed {
		w.fail(w.apply(ctx, p, s))
	}
}

// apply installs the Plan unless it stands already or something else than before is desired by now.
func (w *watcher) apply(ctx context.Context, p Plan, before State) error {
	p.RunDir, p.Log = w.RunDir, w.Log
	r, err := newRouter(p)
	if err != nil {
		return err
	}
	if _, now := r.state(Installed); before.sameDesired(now) {
		return nil
	}
	n, err := r.install(ctx, &repair{of: before})
	if errors.Is(err, errOutdated) {
		return nil // whoever desired it has installed it
	}
	if s, failed := ReadState(w.RunDir); err == nil && failed == nil {
		if _, now := r.state(Installed); s.sameDesired(now) {
			w.router, w.desired = r, s // so that what changes around the rules from now on is seen as that
			w.hear(r.plan)
			w.know(n)
		}
	}
	return err
}

// plan makes the Plan of what the last Install wanted.
func (s State) plan(base Plan) (Plan, error) {
	p := base
	p.Mode, p.Reason, p.Closed, p.Guard = s.Mode, s.Reason, s.Closed, s.Guard
	p.Uplinks, p.ExcludeInterfaces = s.Uplinks, s.ExcludeInterfaces
	p.InterceptHostPods, p.Link, p.Force, p.DNS = s.HostPods, s.Link, s.Force, s.DNS
	p.Listen, p.Listen6 = netip.AddrPort{}, netip.AddrPort{}
	if s.Closed && s.Listen == "" {
		return p, nil
	}
	var err error
	if p.Listen, err = netip.ParseAddrPort(s.Listen); err != nil {
		return p, fmt.Errorf("routing state: listen: %w", err)
	}
	if s.Listen6 != "" {
		if p.Listen6, err = netip.ParseAddrPort(s.Listen6); err != nil {
			return p, fmt.Errorf("routing state: listen6: %w", err)
		}
	}
	return p, nil
}
