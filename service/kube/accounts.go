package kube

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/singleflight"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

const (
	// refreshEvery is spread by ±20 %. A fleet of 5,000 nodes with 30 ServiceAccounts each then
	// makes 250 reads a second from the API server's cache.
	refreshEvery = 10 * time.Minute

	readsAtOnce   = 16
	retryRead     = time.Second // the shortest wait after a read that failed
	retryReadMax  = 5 * time.Minute
	watchAgain    = 50 * time.Second // after the API server refused to let us watch ServiceAccounts
	watchLifetime = 5 * time.Minute
)

// account is what is known of one ServiceAccount that live pods use.
type account struct {
	value   workload.Account
	err     error // *AnnotationError or ErrNotFound; also an answer of the API server
	version string
	read    time.Time // zero: never
	asked   time.Time // when the last consistent read began

	failure  error // of the last attempt, when it failed
	failedAt time.Time
}

type accounts struct {
	mu      sync.Mutex
	known   map[workload.ServiceAccount]*account
	changed chan struct{}
	reads   singleflight.Group
	slots   chan struct{}

	probe         sync.Mutex // held by the goroutine that finds out whether a watch is allowed
	mayWatch      atomic.Bool
	watchDeniedAt atomic.Int64
}

func newAccounts() *accounts {
	return &accounts{known: map[workload.ServiceAccount]*account{}, changed: make(chan struct{}),
		slots: make(chan struct{}, readsAtOnce)}
}

// Account returns what the ServiceAccount's annotations say. It reads them anew where what is known
// is older than maxAge, or older than the newest pod of the ServiceAccount: after an annotation and
// a rollout, each new pod has the new identity. With maxAge < 0 any age serves pods that are not
// new, and a failed read leaves what was known. Otherwise a failed read is the error: an annotation
// that was taken away must not be honoured because the API server is away. Concurrent reads
// coalesce. Errors: *AnnotationError, ErrNotFound, ErrNoPod, *ForbiddenError, *AwayError,
// ErrNotConfigured.
func (c *Cluster) Account(
	ctx context.Context,
	sa workload.ServiceAccount,
	maxAge time.Duration,
) (workload.Account, error) {
	newest := c.pods.current.Load().newest[sa]
	a := c.knownAccount(sa)
	old := a.read.IsZero() || maxAge >= 0 && time.Since(a.read) > maxAge
	// A read that was under way when the newest pod appeared is joined, and followed by another.
	for ; old || a.asked.Before(newest); old = false {
		now, err := a, a.failure
		if err == nil || time.Since(a.failedAt) >= retryRead {
			now, err = c.readAccount(ctx, sa, true)
		}
		switch {
		case err == nil:
			a = now
		case maxAge < 0 && !a.read.IsZero() && ctx.Err() == nil:
			return a.value, a.err
		default:
			return workload.Account{}, err
		}
	}
	return a.value, a.err
}

// knownAccount returns a copy of what is known, the zero account where nothing is.
func (c *Cluster) knownAccount(sa workload.ServiceAccount) account {
	c.accounts.mu.Lock()
	defer c.accounts.mu.Unlock()
	if a := c.accounts.known[sa]; a != nil {
		return *a
	}
	return account{}
}

// Changes is closed when the annotations of an account change, or are first known.
func (c *Cluster) Changes() <-chan struct{} {
	c.accounts.mu.Lock()
	defer c.accounts.mu.Unlock()
	return c.accounts.changed
}

// readAccount reads a ServiceAccount that live pods use. With fresh the read is consistent.
// Without, the API server answers from its cache, at almost no cost. The read continues when ctx
// ends.
func (c *Cluster) readAccount(ctx context.Context, sa workload.ServiceAccount, fresh bool) (account, error) {
	x := c.pods.current.Load()
	if !x.synced {
		return account{}, fmt.Errorf("ServiceAccount %s: %w", sa, c.problem())
	}
	if !x.uses(sa) {
		return account{}, fmt.Errorf("%w %s", ErrNoPod, sa)
	}
	read := c.accounts.reads.DoChan(sa.String()+" "+strconv.FormatBool(fresh), func() (any, error) {
		select {
		case c.accounts.slots <- struct{}{}:
			defer func() { <-c.accounts.slots }()
		case <-c.life.Done():
			return account{}, c.life.Err()
		}
		return c.getAccount(c.life, sa, fresh)
	})
	select {
	case <-ctx.Done():
		return account{}, ctx.Err()
	case r := <-read:
		return r.Val.(account), r.Err
	}
}

func (c *Cluster) getAccount(ctx context.Context, sa workload.ServiceAccount, fresh bool) (account, error) {
	k, err := c.reach()
	if err != nil {
		return account{}, fmt.Errorf("ServiceAccount %s: %w", sa, err)
	}
	asked := time.Now()
	obj, err := c.get(ctx, k, sa, fresh)
	// The Node authorizer sees a new pod through its own watch, which may be behind ours.
	var refused *refusedPod
	for wait := 50 * time.Millisecond; errors.As(err, &refused) && refused.reason == unrelated &&
		wait < retryRead; wait *= 2 {
		if !sleep(ctx, wait) {
			break
		}
		asked = time.Now()
		obj, err = c.get(ctx, k, sa, fresh)
	}
	if !fresh {
		asked = time.Time{}
	}
	switch {
	case err == nil:
		return c.store(sa, obj, fresh, asked), nil
	case apierrors.IsNotFound(err) && !fresh:
		return c.getAccount(ctx, sa, true) // the API server's cache may be behind
	case apierrors.IsNotFound(err):
		return c.store(sa, nil, true, asked), nil
	case ctx.Err() != nil:
		return account{}, ctx.Err()
	}
	err = fmt.Errorf("ServiceAccount %s: %w", sa, err)
	c.accounts.mu.Lock()
	defer c.accounts.mu.Unlock()
	if a := c.entry(sa); a != nil {
		a.failure, a.failedAt = err, time.Now()
	}
	return account{}, err
}

func (c *Cluster) get(ctx context.Context, k *client, sa workload.ServiceAccount,
	fresh bool) (*corev1.ServiceAccount, error) {
	cctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var o metav1.GetOptions
	if !fresh {
		o.ResourceVersion = "0"
	}
	obj := new(corev1.ServiceAccount)
	err := brief(k.core.Get().MaxRetries(retryOnce).Namespace(sa.Namespace).Resource("serviceaccounts").Name(sa.Name).
		VersionedParams(&o, c.codec).Do(cctx).Into(obj))
	unbound := len(c.pods.current.Load().byAccount[sa]) == 0 && slices.Contains(c.pods.hosts, sa)
	return obj, c.classify(ctx, call{verb: "get", resource: "serviceaccounts", namespace: sa.Namespace, unbound: unbound},
		err)
}

// store keeps what the API server says of a ServiceAccount; nil is that it does not exist. asked is
// when a consistent read began, zero for all other news.
func (c *Cluster) store(sa workload.ServiceAccount, obj *corev1.ServiceAccount, fresh bool, asked time.Time) account {
	now := account{read: time.Now().Round(0), asked: asked} // by the clock on the wall: time spent suspended counts
	if obj == nil {
		now.err = fmt.Errorf("%w: %s", ErrNotFound, sa)
	} else {
		now.version = obj.ResourceVersion
		now.value, now.err = ParseAccount(sa, obj.Annotations)
	}
	c.accounts.mu.Lock()
	defer c.accounts.mu.Unlock()
	a := c.entry(sa)
	if a == nil {
		return now // its last pod went away while we read
	}
	if asked.Before(a.asked) {
		now.asked = a.asked
	}
	if !fresh && older(now.version, a.version) {
		return *a // the API server's cache was behind
	}
	if a.read.IsZero() || a.value != now.value || errorText(a.err) != errorText(now.err) {
		if now.err != nil {
			c.log.WithError(now.err).Warn("ServiceAccount cannot be used: its pods are refused")
		}
		close(c.accounts.changed)
		c.accounts.changed = make(chan struct{})
	}
	*a = now
	return now
}

// entry returns the stored state of sa, which it makes where there is none. It returns nil when no
// live pod uses sa (K-04, only accounts in use). It reads the index under the accounts' lock, so
// unused entries are dropped later and not concurrently.
func (c *Cluster) entry(sa workload.ServiceAccount) *account {
	if !c.pods.current.Load().uses(sa) {
		return nil
	}
	a := c.accounts.known[sa]
	if a == nil {
		a = new(account)
		c.accounts.known[sa] = a
	}
	return a
}

// forget drops everything, because it belongs to another cluster.
func (a *accounts) forget() {
	a.mu.Lock()
	defer a.mu.Unlock()
	clear(a.known)
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// older compares two resource versions. Versions that are not numbers cannot be compared.
func older(a, b string) bool {
	x, errX := strconv.ParseUint(a, 10, 64)
	y, errY := strconv.ParseUint(b, 10, 64)
	return errX == nil && errY == nil && x < y
}

// followAccounts runs followAccount for every ServiceAccount that live pods use, and drops the
// others.
func (c *Cluster) followAccounts(ctx context.Context) {
	running := map[workload.ServiceAccount]context.CancelFunc{}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer func() {
		for stop := range maps.Values(running) {
			stop()
		}
	}()
	for {
		x := c.pods.current.Load()
		for sa, stop := range running {
			if !x.uses(sa) {
				stop()
				delete(running, sa)
			}
		}
		c.accounts.mu.Lock()
		maps.DeleteFunc(c.accounts.known, func(sa workload.ServiceAccount, _ *account) bool { return !x.uses(sa) })
		c.accounts.mu.Unlock()
		for _, sa := range x.accounts {
			if running[sa] == nil {
				kctx, stop := context.WithCancel(ctx)
				running[sa] = stop
				wg.Go(func() { c.followAccount(kctx, sa) })
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-x.changed:
		}
	}
}

// followAccount keeps one ServiceAccount fresh: it is read when its first pod appears, then watched
// where that is granted, else read every ten minutes.
func (c *Cluster) followAccount(ctx context.Context, sa workload.ServiceAccount) {
	delay := retryRead / 2
	for fresh := true; ; fresh = false {
		_, err := c.readAccount(ctx, sa, fresh)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			// One cause is a Node authorizer that has not seen the pod yet.
			if !sleep(ctx, jitter(delay)) {
				return
			}
			delay = min(2*delay, retryReadMax)
			continue
		}
		delay = retryRead / 2
		if !c.watchUntilOld(ctx, sa) {
			return
		}
	}
}

// watchUntilOld watches the ServiceAccount where that is granted, and returns when it has to be
// read anew: after a watch at once, else after c.refresh. A grant that comes later is noticed
// within a minute. It returns false when ctx is done.
func (c *Cluster) watchUntilOld(ctx context.Context, sa workload.ServiceAccount) bool {
	old := time.Now().Add(jitter(c.refresh))
	for {
		if c.watchAccount(ctx, sa) {
			return sleep(ctx, jitter(2*retryRead)) // the watch ended, as watches do every few minutes
		}
		left := time.Until(old)
		if left <= 0 {
			return ctx.Err() == nil
		}
		if !sleep(ctx, min(left, jitter(c.watchAgain))) {
			return false
		}
	}
}

// jitter returns d ±20 %, so that many nodes do not act at the same moment.
func jitter(d time.Duration) time.Duration {
	return d*8/10 + time.Duration(rand.Int64N(int64(d)*4/10+1))
}

// watchAccount watches one ServiceAccount by name, as kubelet does with Secrets. It reports whether
// a watch was open. One refusal stands for all accounts: a node with 100 ServiceAccounts does not
// ask 100 times.
func (c *Cluster) watchAccount(ctx context.Context, sa workload.ServiceAccount) bool {
	denied := func() bool { return time.Since(time.Unix(0, c.accounts.watchDeniedAt.Load())) < c.watchAgain }
	if denied() {
		return false
	}
	probes := !c.accounts.mayWatch.Load()
	if probes {
		c.accounts.probe.Lock()
		if denied() {
			c.accounts.probe.Unlock()
			return false
		}
	}
	w, err := c.openAccountWatch(ctx, sa)
	if err == nil {
		c.accounts.mayWatch.Store(true)
		c.accounts.watchDeniedAt.Store(0)
	}
	if apierrors.IsForbidden(err) {
		c.accounts.mayWatch.Store(false)
		c.accounts.watchDeniedAt.Store(time.Now().UnixNano())
		c.log.Debug(
			"ServiceAccounts cannot be watched: they are read every 10 minutes, for each new pod, and before each mint",
		)
	}
	if probes {
		c.accounts.probe.Unlock()
	}
	if err != nil {
		return !apierrors.IsForbidden(err)
	}
	defer w.Stop()
	for {
		select {
		case <-ctx.Done():
			return true
		case e, open := <-w.ResultChan():
			if !open || e.Type == watch.Error {
				return true
			}
			obj, is := e.Object.(*corev1.ServiceAccount)
			if !is || obj.Namespace != sa.Namespace || obj.Name != sa.Name {
				continue
			}
			switch e.Type {
			case watch.Added, watch.Modified:
				c.store(sa, obj, false, time.Time{})
			case watch.Deleted:
				c.store(sa, nil, true, time.Time{})
			}
		}
	}
}

func (c *Cluster) openAccountWatch(ctx context.Context, sa workload.ServiceAccount) (watch.Interface, error) {
	k, err := c.reach()
	if err != nil {
		return nil, err
	}
	seconds := int64(jitter(2 * watchLifetime).Seconds())
	w, err := c.watch(ctx, k, sa.Namespace, "serviceaccounts", metav1.ListOptions{
		// From version 0, so that the watch begins with the present state: the object's own version
		// may be months old and expired (410 Gone).
		FieldSelector: "metadata.name=" + sa.Name, ResourceVersion: "0", AllowWatchBookmarks: true, TimeoutSeconds: &seconds})
	code := "200"
	var status apierrors.APIStatus
	if errors.As(err, &status) {
		code = fmt.Sprint(status.Status().Code)
	} else if err != nil {
		code = "error"
	}
	// Not recorded as a missing grant: a refusal is the usual case (N-03, nodes may not watch).
	c.count(call{verb: "watch", resource: "serviceaccounts"}, code)
	return w, err
}
