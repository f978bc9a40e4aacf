package kube

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"k8s.io/utils/clock"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// pod is the part of a live pod that this package keeps: a few hundred bytes of the API object's
// kilobytes.
type pod struct {
	caller               workload.Caller
	static               string       // the UID in a static pod's cgroup, which differs from the API's; "" otherwise
	addrs                []netip.Addr // none for a pod on the host network, whose address is the node's (N-14)
	running, terminating bool
	seen                 time.Time // when it was first heard of
}

func (p *pod) equal(q *pod) bool {
	return p.caller == q.caller && p.static == q.static && slices.Equal(p.addrs, q.addrs) && p.running == q.running &&
		p.terminating == q.terminating
}

// index is one generation of the known pods of this node. It never changes, so readers need no
// lock.
type index struct {
	synced    bool
	pods      []*pod // sorted by namespace and name
	byAddress map[netip.Addr][]workload.Caller
	byUID     map[string]workload.Caller // by the UID in the pod's cgroup
	byAccount map[workload.ServiceAccount][]*pod
	newest    map[workload.ServiceAccount]time.Time // when the newest pod that uses it was first heard of
	accounts  []workload.ServiceAccount             // sorted
	// closed when the next generation is there, or when the API server is in touch again
	changed chan struct{}
}

// pods is the store that the reflector fills. The reflector calls its methods from one goroutine at
// a time. The mutex is for reset and for the changes of the watch.
type pods struct {
	log     func(format string, args ...any) // at level debug
	hosts   []workload.ServiceAccount        // of processes of the node, always in use
	mu      sync.Mutex
	live    map[types.NamespacedName]*pod
	synced  bool
	open    bool // there is a watch, which may still be catching up
	current atomic.Pointer[index]

	watching atomic.Bool  // a watch is open and has caught up: the index is the API server's state
	touched  atomic.Int64 // Unix nanoseconds of the API server's last answer about pods
}

func newPods(hosts []workload.ServiceAccount, debugf func(string, ...any)) *pods {
	p := &pods{log: debugf, hosts: hosts, live: map[types.NamespacedName]*pod{}}
	p.current.Store(p.build())
	return p
}

// publish makes the present state visible, and wakes its waiters.
func (p *pods) publish() {
	old := p.current.Swap(p.build())
	close(old.changed)
}

func (p *pods) build() *index {
	x := &index{
		synced:    p.synced,
		pods:      make([]*pod, 0, len(p.live)),
		byAddress: make(map[netip.Addr][]workload.Caller, len(p.live)),
		byUID:     make(map[string]workload.Caller, len(p.live)),
		byAccount: make(map[workload.ServiceAccount][]*pod),
		newest:    make(map[workload.ServiceAccount]time.Time),
		changed:   make(chan struct{}),
	}
	for _, q := range p.live {
		x.pods = append(x.pods, q)
	}
	slices.SortFunc(x.pods, func(a, b *pod) int { return strings.Compare(a.caller.String(), b.caller.String()) })
	for _, sa := range p.hosts {
		x.use(sa, nil)
	}
	for _, q := range x.pods {
		for _, a := range q.addrs {
			x.byAddress[a] = append(x.byAddress[a], q.caller)
		}
		if q.static != "" {
			x.byUID[q.static] = q.caller
		}
		if q.caller.ServiceAccount.Name != "" {
			x.use(q.caller.ServiceAccount, q)
		}
	}
	for _, q := range x.pods { // after the static pods: a pod's own UID wins
		x.byUID[q.caller.PodUID] = q.caller
	}
	slices.SortFunc(x.accounts, func(a, b workload.ServiceAccount) int { return strings.Compare(a.String(), b.String()) })
	return x
}

// use notes that a pod uses the ServiceAccount. With nil a process of the node uses it.
func (x *index) use(sa workload.ServiceAccount, by *pod) {
	users, known := x.byAccount[sa]
	if !known {
		x.accounts = append(x.accounts, sa)
	}
	if by != nil {
		users = append(users, by)
		if by.seen.After(x.newest[sa]) {
			x.newest[sa] = by.seen
		}
	}
	x.byAccount[sa] = users
}

// uses reports whether live pods of this node, or processes of it, use the ServiceAccount.
func (x *index) uses(sa workload.ServiceAccount) bool {
	_, known := x.byAccount[sa]
	return known
}

// set takes one object's newest state and reports whether it matters. before is what was known of
// it.
func (p *pods) set(o *corev1.Pod, before map[types.NamespacedName]*pod) bool {
	key := types.NamespacedName{Namespace: o.Namespace, Name: o.Name}
	old, had := before[key]
	if !live(o) {
		delete(p.live, key)
		return had
	}
	q := convert(o)
	q.seen = time.Now()
	if had && old.caller.PodUID == q.caller.PodUID {
		q.seen = old.seen
	}
	p.live[key] = q
	return !had || !old.equal(q)
}

// live reports whether a pod counts. The phase decides, since a pod that ended keeps its
// status.podIP while another pod gets the address (N-12, reused addresses). A terminating pod keeps
// its identity while any of its containers may run (U-06, graceful termination).
func live(o *corev1.Pod) bool {
	if o.Status.Phase == corev1.PodSucceeded || o.Status.Phase == corev1.PodFailed {
		return false
	}
	if o.DeletionTimestamp == nil {
		return true
	}
	seen := false
	for _, cs := range [][]corev1.ContainerStatus{o.Status.InitContainerStatuses, o.Status.ContainerStatuses,
		o.Status.EphemeralContainerStatuses} {
		for i := range cs {
			if cs[i].State.Terminated == nil {
				return true
			}
			seen = true
		}
	}
	return !seen // no container has a status yet: the pod may be starting
}

func convert(o *corev1.Pod) *pod {
	p := &pod{
		caller: workload.Caller{PodUID: string(o.UID), PodName: o.Name, HostNetwork: o.Spec.HostNetwork,
			ServiceAccount: workload.ServiceAccount{Namespace: o.Namespace, Name: o.Spec.ServiceAccountName}},
		running:     o.Status.Phase == corev1.PodRunning,
		terminating: o.DeletionTimestamp != nil,
	}
	if o.Spec.RuntimeClassName != nil {
		p.caller.RuntimeClass = *o.Spec.RuntimeClassName
	}
	// A static pod's mirror cannot have a ServiceAccount. The annotation gives a pod that is not a
	// mirror no other cgroup.
	if p.caller.ServiceAccount.Name == "" {
		p.static = o.Annotations[corev1.MirrorPodAnnotationKey]
	}
	if p.caller.HostNetwork {
		return p
	}
	add := func(s string) {
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" {
			return // the API server validates addresses
		}
		if a = a.Unmap(); !slices.Contains(p.addrs, a) {
			p.addrs = append(p.addrs, a)
		}
	}
	for _, ip := range o.Status.PodIPs {
		add(ip.IP)
	}
	if o.Status.PodIP != "" {
		add(o.Status.PodIP)
	}
	return p
}

// strip drops unused fields on arrival: specs, environment variables, managed fields.
func strip(o any) (any, error) {
	p, is := o.(*corev1.Pod)
	if !is {
		return o, nil
	}
	states := func(in []corev1.ContainerStatus) []corev1.ContainerStatus {
		out := make([]corev1.ContainerStatus, len(in))
		for i := range in {
			out[i].State = in[i].State
		}
		return out
	}
	s := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name, UID: p.UID, ResourceVersion: p.ResourceVersion,
			DeletionTimestamp: p.DeletionTimestamp},
		Spec: corev1.PodSpec{ServiceAccountName: p.Spec.ServiceAccountName, HostNetwork: p.Spec.HostNetwork,
			RuntimeClassName: p.Spec.RuntimeClassName},
		Status: corev1.PodStatus{Phase: p.Status.Phase, PodIP: p.Status.PodIP, PodIPs: p.Status.PodIPs,
			InitContainerStatuses:      states(p.Status.InitContainerStatuses),
			ContainerStatuses:          states(p.Status.ContainerStatuses),
			EphemeralContainerStatuses: states(p.Status.EphemeralContainerStatuses)},
	}
	if mirror, is := p.Annotations[corev1.MirrorPodAnnotationKey]; is {
		s.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: mirror}
	}
	return s, nil
}

// reset forgets everything, because it belongs to another node or cluster.
func (p *pods) reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.live, p.synced = map[types.NamespacedName]*pod{}, false
	p.publish()
}

// The following methods are cache.TransformingStore and cache.ReflectorBookmarkStore.

func (p *pods) Transformer() cache.TransformFunc { return strip }

func (p *pods) Add(o any) error { return p.Update(o) }

func (p *pods) Update(o any) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.touched.Store(time.Now().UnixNano())
	if v, is := o.(*corev1.Pod); is && p.set(v, p.live) {
		p.log("pod %s/%s %s: phase %s, addresses %v", v.Namespace, v.Name, v.UID, v.Status.Phase, v.Status.PodIPs)
		p.publish()
	}
	return nil
}

func (p *pods) Delete(o any) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.touched.Store(time.Now().UnixNano())
	if v, is := o.(*corev1.Pod); is {
		key := types.NamespacedName{Namespace: v.Namespace, Name: v.Name}
		if _, had := p.live[key]; had {
			p.log("pod %s/%s %s is gone", v.Namespace, v.Name, v.UID)
			delete(p.live, key)
			p.publish()
		}
	}
	return nil
}

// Replace always makes a new generation, which ends waits for a first or newer list.
func (p *pods) Replace(os []any, _ string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.touched.Store(time.Now().UnixNano())
	before := p.live
	p.live = make(map[types.NamespacedName]*pod, len(os))
	for _, o := range os {
		if v, is := o.(*corev1.Pod); is {
			p.set(v, before)
		}
	}
	p.synced = true
	p.watching.Store(p.open) // the watch began with this state
	p.log("%d live pods", len(p.live))
	p.publish()
	return nil
}

func (p *pods) Resync() error { return nil }

func (p *pods) Bookmark(string) error {
	p.touched.Store(time.Now().UnixNano())
	return nil
}

// opened and closed follow the watch. While a watch is open, the absence of events means the
// absence of changes; HTTP/2's pings end a dead connection within 45 s. A watch that continues the
// previous one is current at once. A watch that starts anew (anew) is current after its initial
// events.
func (p *pods) opened(anew bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.touched.Store(time.Now().UnixNano())
	p.open = true
	if !anew && !p.watching.Swap(true) {
		p.publish() // wakes waiters for an address
	}
}

func (p *pods) closed() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.open = false
	if p.watching.Swap(false) {
		p.touched.Store(time.Now().UnixNano())
	}
}

// longGap is the longest time without a watch that a new watch may bridge. A new watch delivers
// missed events, but does not say when it has delivered all of them, so a longer gap needs a new
// list. Short gaps are normal: the API server ends every watch after five to ten minutes.
const longGap = 2 * time.Second

// outOfTouch returns the time of the API server's last answer about pods. It returns false while
// the index is current.
func (p *pods) outOfTouch() (time.Time, bool) {
	return time.Unix(0, p.touched.Load()), !p.watching.Load()
}

// openWatch tells the store when a watch ends. The reflector stops every watch that it no longer
// needs.
type openWatch struct {
	watch.Interface
	end func()
}

func (w *openWatch) Stop() {
	w.Interface.Stop()
	w.end()
}

// follow keeps the store current until ctx is done.
func (c *Cluster) follow(ctx context.Context, k *client, node string) {
	selector := "spec.nodeName=" + node
	lw := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = selector
			l, err := c.listPods(ctx, k, o)
			// The reflector needs the original error: it handles 410 Gone and others.
			return l, c.podsAnswer(ctx, call{verb: "list", resource: "pods"}, err)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = selector
			anew := o.SendInitialEvents != nil && *o.SendInitialEvents
			if since, lost := c.pods.outOfTouch(); !anew && lost && time.Since(since) > longGap {
				return nil, apierrors.NewResourceExpired("the known pods are too old: a new list is needed")
			}
			w, err := c.watch(ctx, k, "", "pods", o)
			if err := c.podsAnswer(ctx, call{verb: "watch", resource: "pods"}, err); err != nil {
				return nil, err
			}
			c.pods.opened(anew)
			return &openWatch{w, c.pods.closed}, nil
		},
	}
	backoff := c.backoff
	cache.NewReflectorWithOptions(lw, &corev1.Pod{}, c.pods, cache.ReflectorOptions{Name: "pods", Backoff: &backoff,
		Clock: untilDone{ctx: ctx}}).RunWithContext(ctx)
	c.pods.closed()
}

// untilDone is a clock whose waits end with ctx. Some waits of the reflector ignore its context,
// and would delay a stop or a new credential for half a minute.
type untilDone struct {
	clock.RealClock
	ctx context.Context
}

func (u untilDone) After(d time.Duration) <-chan time.Time {
	c := make(chan time.Time, 2)
	t := time.AfterFunc(d, func() { c <- time.Now() })
	context.AfterFunc(u.ctx, func() { t.Stop(); c <- time.Now() })
	return c
}

// podsAnswer stores why pods cannot be listed, and returns the error unchanged for the reflector.
func (c *Cluster) podsAnswer(ctx context.Context, k call, err error) error {
	if problem := c.classify(ctx, k, err); problem == nil || ctx.Err() == nil {
		c.setProblem(problem)
	}
	return err
}

// relist is the backoff for a lost watch. It spreads the load when an API server comes back to
// 5,000 nodes, and waits for half a minute at most.
func relist() wait.Backoff {
	return wait.Backoff{Duration: 800 * time.Millisecond, Factor: 2, Jitter: 0.5, Cap: 20 * time.Second, Steps: 10}
}
