// Package attest answers one question: who is behind this connection?
//
// The evidence is what the kernel's record of the client's socket says: the cgroup
// of the process that made it, and so the pod, or the unit of the node. [Kernel] asks it before a
// byte is read, and an [Attestor] looks it up in what Kubernetes says of this node's pods. An
// address is no evidence, but for pods that the operator says are known by nothing else.
package attest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// Why there is no caller, beside what [Kernel.Look] says.
var (
	// ErrUnknown says that Kubernetes has named no such pod on this node, or not yet (N-11).
	ErrUnknown = errors.New("the pod is not known yet")
	// ErrAmbiguous says that two live pods have the address: a refusal, never a guess (U-06).
	ErrAmbiguous = errors.New("more than one live pod of this node has the address")
	// ErrNotPod says that the client is known to be no pod, nor a process that hostIdentities name.
	ErrNotPod = errors.New("not a pod")
	// ErrNoAccount says that the pod is a static one: those have no ServiceAccount.
	ErrNoAccount = errors.New("a static pod has no ServiceAccount, and so no identity")
	// ErrReplaced says that the attestor that was asked is out of use: another one is to be asked.
	ErrReplaced = errors.New("the configuration changed during the request")
	// ErrChanged says that the evidence no longer names the caller that it named when the connection
	// was attested.
	ErrChanged = errors.New("the client's process or pod has ended; connect again")
)

// immediate are the errors that are returned at once, since waiting does not change them.
var immediate = []error{ErrNotPod, ErrNoAccount, ErrChanged, ErrSockets, ErrNoCgroup, ErrEmptyCgroup, ErrOwner, ErrPods,
	ErrSpared, ErrOtherNamespace}

func isImmediate(err error) bool {
	return slices.ContainsFunc(immediate, func(i error) bool { return errors.Is(err, i) })
}

// ByAddress is the kind of evidence that is none: the connection's source address.
const ByAddress = "source-ip"

// Hold is how long a request waits for its pod to become known. In 11 of 12 pods the first request
// came before the watch had the pod's address, up to 130 ms early (N-11, H-22); clients wait for 3
// s and more (H-21).
const Hold = 2 * time.Second

// Pods is this node's pods. Both channels are closed when another look may say more.
type Pods interface {
	// Of returns the live pod with the UID. An error says why one may be there that is not known.
	Of(uid string) (pod workload.Caller, known bool, changed <-chan struct{}, err error)
	// At returns the live pods that have the address. An error means that addresses cannot be believed
	// now.
	At(netip.Addr) (pods []workload.Caller, changed <-chan struct{}, err error)
}

// Witness says what the kernel knows of the other end of a connection: a [Kernel].
type Witness interface {
	Look(Conn) (*Evidence, error)
	Changes() <-chan struct{}
	Search() int64
	Searched(number int64) bool
}

// Options say what an Attestor goes by.
type Options struct {
	Pods   Pods
	Kernel Witness // nil: the address is all that is looked at
	// RuntimeClasses of pods that only their address can name; and NAMESPACE/NAME or NAMESPACE/*,
	// ServiceAccounts of pods whose address counts where the kernel finds no socket of theirs
	ByAddress []string
	// ServiceAccounts, NAMESPACE/NAME, of pods that ask for the pod whose network namespace they are
	// in
	Proxies  []string
	Hosts    []Host          // processes of the node that have an identity; the first that fits counts
	Replaced <-chan struct{} // when it is closed, those who are held get ErrReplaced
	Metrics  *Metrics        // nil: nobody reads what is counted
}

// Metrics are what Attestors count. They outlive each Attestor: a reload makes another one.
type Metrics struct{ attestations *prometheus.CounterVec }

// NewMetrics registers the metrics. It is to be called once for each Registerer.
func NewMetrics(r prometheus.Registerer) *Metrics {
	m := &Metrics{prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "gke_metadata_emulator_attestations_total",
		Help: "Connections whose asker was found out, and refusals, by evidence (cgroup, netns, proxy, source-ip; none) " +
			"and asker (pod, host; nobody).",
	}, []string{"evidence", "asker"})}
	for _, l := range [][]string{{ByCgroup, "pod"}, {ByCgroup, "host"}, {ByNamespace, "pod"}, {ByNamespace, "host"},
		{ByProxy, "pod"}, {ByAddress, "pod"}, {"none", "nobody"}} {
		m.attestations.WithLabelValues(l...)
	}
	r.MustRegister(m.attestations)
	return m
}

// Attestor finds who is behind connections.
type Attestor struct {
	Options
	ownAddrs func() ([]net.Addr, error)
}

// New returns an Attestor that believes what o names.
func New(o Options) *Attestor {
	if o.Metrics == nil {
		o.Metrics = NewMetrics(prometheus.NewRegistry())
	}
	return &Attestor{Options: o, ownAddrs: net.InterfaceAddrs}
}

// Look asks the kernel who is on the other end. It is to be called once, before a byte is read from
// the connection, and not from where connections are accepted: it takes some µs for each
// network namespace that has the client's address, and up to half a second for a client of which a
// packet was lost.
func (a *Attestor) Look(p *Peer) {
	if a.Kernel != nil {
		p.evidence, p.err = a.Kernel.Look(p.Conn)
	}
}

// Vouched reports, without waiting, whether p's client is known to be a pod or a unit of the node,
// whoever that is. What is not is an address, which somebody may have made up.
func (a *Attestor) Vouched(p *Peer) bool {
	if p.evidence != nil {
		return true
	}
	pods, _, err := a.Pods.At(p.Client.Addr())
	return err == nil && slices.ContainsFunc(pods,
		func(c workload.Caller) bool { return a.believesAddress(c) })
}

// Attest returns who is behind p, and waits up to [Hold] for a pod that is not known yet. The first
// answer binds the connection: whoever comes to be in the caller's place gets ErrChanged on it,
// never the first one's identity nor its own. Errors: those of this package, the index's own, and
// ctx's.
func (a *Attestor) Attest(ctx context.Context, p *Peer) (workload.Caller, error) {
	if b := p.binding.Load(); b != nil {
		return b.caller, a.Check(ctx, p)
	}
	var b binding
	err := a.hold(ctx, func() (changed <-chan struct{}, err error) {
		b, changed, err = a.find(p)
		return changed, err
	})
	if err != nil {
		if ctx.Err() == nil && !errors.Is(err, ErrReplaced) {
			a.Metrics.attestations.WithLabelValues("none", "nobody").Inc()
		}
		return workload.Caller{}, err
	}
	p.binding.Store(&b)
	asker := "pod"
	if b.caller.PodUID == "" {
		asker = "host"
	}
	a.Metrics.attestations.WithLabelValues(b.kind(), asker).Inc()
	return b.caller, nil
}

// Check reports whether the evidence still names the caller that Attest returned. It is asked after
// the evidence was used and before the answer is written, and makes no system call. Where an
// address is the evidence, it waits while the API server's next watch is opened.
func (a *Attestor) Check(ctx context.Context, p *Peer) error {
	b := p.binding.Load()
	if b == nil {
		return ErrUnknown
	}
	changed, err := a.check(p, b)
	if err == nil || changed == nil && !errors.Is(err, ErrNotRead) {
		return err
	}
	return a.hold(ctx, func() (<-chan struct{}, error) { return a.check(p, b) })
}

func (a *Attestor) check(p *Peer, b *binding) (changed <-chan struct{}, err error) {
	switch {
	case b.evidence == nil:
		if !a.believesAddress(b.caller) {
			return nil, ErrChanged
		}
		pods, changed, err := a.Pods.At(p.Client.Addr())
		if err != nil {
			return changed, err
		}
		if len(pods) != 1 || pods[0].PodUID != b.caller.PodUID {
			return nil, ErrChanged
		}
	case b.evidence.inDoubt(): // before the next: what is read anew may be dead
		return nil, ErrNotRead
	case !b.evidence.Alive():
		return nil, ErrChanged
	case b.evidence.PodUID == "":
		if c, ok := a.host(b.evidence); !ok || c != b.caller {
			return nil, ErrChanged
		}
	default:
		if by := b.evidence.proxy; by != nil {
			if proxy, known, _, _ := a.Pods.Of(by.PodUID); !known || !a.isProxy(proxy) {
				return nil, ErrChanged
			}
		}
		if _, known, _, _ := a.Pods.Of(b.evidence.PodUID); !known {
			return nil, ErrChanged
		}
	}
	return nil, nil
}

// hold tries until there is an answer, or an error that waiting does not mend, but no longer than
// [Hold].
func (a *Attestor) hold(ctx context.Context, try func() (changed <-chan struct{}, err error)) error {
	var timeout <-chan time.Time
	for {
		var looked <-chan struct{}
		if a.Kernel != nil {
			looked = a.Kernel.Changes() // before the look, so that no change falls between the two
		}
		changed, err := try()
		if err == nil || isImmediate(err) {
			return err
		}
		if timeout == nil { // the first time round
			t := time.NewTimer(Hold)
			defer t.Stop()
			timeout = t.C
		}
		select {
		case <-changed:
		case <-looked:
		case <-a.Replaced:
			return ErrReplaced
		case <-ctx.Done():
			return ctx.Err()
		case <-timeout:
			return err
		}
	}
}

// find looks once at what there is. An address counts only where nothing else can be had: where the
// operator wants no other evidence, and for pods that he named.
func (a *Attestor) find(p *Peer) (b binding, changed <-chan struct{}, err error) {
	if p.evidence == nil && a.Kernel != nil && !isImmediate(p.err) {
		if p.search == 0 {
			p.search = a.Kernel.Search() // before the look that has it begin
		}
		p.evidence, p.err = a.Kernel.Look(p.Conn)
	}
	var other *OtherNamespaceError
	switch e := p.evidence; {
	case errors.As(p.err, &other):
		b, changed, err = a.proxied(other)
	case e == nil && a.Kernel == nil:
		b.caller, changed, err = a.byAddress(p.Client.Addr())
	case errors.Is(p.err, ErrNoNamespace), errors.Is(p.err, ErrNoSocket):
		b.caller, changed, err = a.sandbox(p)
	case e == nil:
		err = p.err
	case e.inDoubt(): // before the next: what is read anew may be dead
		err = ErrNotRead
	case !e.Alive():
		err = ErrChanged
	case e.PodUID == "":
		var named bool
		if b.caller, named = a.host(e); !named {
			err = fmt.Errorf("%w: the client is a process of the node in %s, which hostIdentities does not list", ErrNotPod,
				placeOf(e))
		}
		b.evidence = e
	default:
		var known bool
		if b.caller, known, changed, err = a.Pods.Of(e.PodUID); err == nil && !known {
			err = fmt.Errorf("%w: the client is in pod %s", ErrUnknown, e.PodUID)
		}
		b.evidence = e
	}
	if err == nil && b.caller.ServiceAccount.Name == "" {
		err = fmt.Errorf("%s: %w", b.caller, ErrNoAccount)
	}
	return b, changed, err
}

// proxied returns the pod whose network namespace it is, where the operator named the pod that made
// the socket there.
func (a *Attestor) proxied(other *OtherNamespaceError) (b binding, changed <-chan struct{}, err error) {
	if len(a.Proxies) == 0 || other.Pod == "" {
		return b, nil, other
	}
	proxy, known, changed, err := a.Pods.Of(other.Cgroup.PodUID)
	switch {
	case err != nil:
		return b, changed, err
	case !known:
		return b, changed, fmt.Errorf("%w: %s", ErrUnknown, other)
	case !a.isProxy(proxy):
		return b, nil, other
	}
	b.evidence = &Evidence{Kind: ByProxy, PodUID: other.Pod, life: other.life, proxy: other.Cgroup}
	if b.caller, known, changed, err = a.Pods.Of(other.Pod); err == nil && !known {
		err = fmt.Errorf("%w: the client is a proxy in the network namespace of pod %s", ErrUnknown, other.Pod)
	}
	switch {
	case err != nil:
	case b.evidence.inDoubt():
		err = ErrNotRead
	case !b.evidence.Alive():
		err = ErrChanged
	}
	return b, changed, err
}

// isProxy reports whether the pod is one of those that ask for others.
func (a *Attestor) isProxy(pod workload.Caller) bool {
	return slices.Contains(a.Proxies, pod.ServiceAccount.String())
}

// sandbox returns the one live pod that has the client's address, if the operator named it: its
// RuntimeClass, since the node's kernel does not have such sandboxes' sockets, or its
// ServiceAccount, since containers that a pod runs itself are behind NAT in it. And if no namespace
// has the address (gVisor), or only the pod's own (Kata), or that of a process of no pod, as Kata's
// virtual machine is where it has a cgroup of its own. A search that began after the client came
// must have come to its end: the address may be another pod's already, whose namespace was not
// known yet.
func (a *Attestor) sandbox(p *Peer) (workload.Caller, <-chan struct{}, error) {
	pods, changed, err := a.Pods.At(p.Client.Addr())
	var held *NoSocketError
	switch {
	case err != nil && len(a.ByAddress) > 0:
		return workload.Caller{}, changed, fmt.Errorf("%w; the address is no evidence now: %w", p.err, err)
	case err != nil || len(pods) != 1 || errors.As(p.err, &held) && !held.Others && held.Holder != pods[0].PodUID:
		return workload.Caller{}, changed, p.err
	case !a.believesAddress(pods[0]):
		if pods[0].RuntimeClass == "" {
			return workload.Caller{}, changed, p.err
		}
		return workload.Caller{}, changed, fmt.Errorf("%w; it is the address of pod %s with RuntimeClass %s: "+
			"if this is a sandbox with its own network stack, add it to attestation.byAddress", p.err, pods[0],
			pods[0].RuntimeClass)
	case !a.AddressAlone(pods[0].RuntimeClass) && (held == nil || held.Holder != pods[0].PodUID):
		return workload.Caller{}, changed, p.err // such a pod has a namespace on this node, with the address
	case !a.Kernel.Searched(p.search):
		return workload.Caller{}, changed, p.err
	}
	return pods[0], changed, nil
}

// AddressAlone reports whether pods of the RuntimeClass are known by their address and nothing
// else.
func (a *Attestor) AddressAlone(runtimeClass string) bool {
	return a.Kernel == nil || runtimeClass != "" && slices.Contains(a.ByAddress, runtimeClass)
}

// believesAddress reports whether the address can be evidence for the pod.
func (a *Attestor) believesAddress(pod workload.Caller) bool {
	return a.AddressAlone(pod.RuntimeClass) || slices.ContainsFunc(a.ByAddress, func(named string) bool {
		return named == pod.ServiceAccount.String() || named == pod.ServiceAccount.Namespace+"/*"
	})
}

// byAddress returns the one live pod that has the address.
func (a *Attestor) byAddress(client netip.Addr) (workload.Caller, <-chan struct{}, error) {
	pods, changed, err := a.Pods.At(client)
	switch {
	case err != nil:
		return workload.Caller{}, changed, err
	case len(pods) == 1:
		return pods[0], changed, nil
	case len(pods) > 1:
		return workload.Caller{}, changed, fmt.Errorf("%w: %s belongs to %s and %s", ErrAmbiguous, client, pods[0], pods[1])
	case a.own(client):
		return workload.Caller{}, changed, fmt.Errorf("%w: %s is an address of the node: its processes and pods on the "+
			"host network cannot be distinguished by address", ErrNotPod, client)
	}
	return workload.Caller{}, changed, fmt.Errorf("%w: no pod has the address %s", ErrUnknown, client)
}

// own reports whether the address is one of the node's (N-14). Asked only of addresses that no pod
// has.
func (a *Attestor) own(client netip.Addr) bool {
	if client.IsLoopback() {
		return true
	}
	addrs, err := a.ownAddrs()
	if err != nil {
		return false // then it is a stranger like any other
	}
	for _, addr := range addrs {
		if n, ok := addr.(*net.IPNet); ok {
			if ip, ok := netip.AddrFromSlice(n.IP); ok && ip.Unmap() == client {
				return true
			}
		}
	}
	return false
}
