// Package attest answers one question: which pod is behind this connection?
//
// The evidence is the connection's source address: the one live pod of this node that Kubernetes says has it.
// An address alone cannot tell a dead pod from the next owner of its address, nor a spoofer on a shared bridge from
// its victim; the kernel's record of the client's socket can. Its place is [Accept], which runs
// before a byte is read, and [Peer], which carries the evidence through the rest of the service.
package attest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

var (
	// ErrUnknown says that no pod of this node has the address, or not yet (N-11).
	ErrUnknown = errors.New("no pod of this node has the address yet")
	// ErrAmbiguous says that two live pods have the address: a refusal, never a guess (U-06).
	ErrAmbiguous = errors.New("more than one live pod of this node has the address")
	// ErrNotPod says that the client is known not to be a pod with an address of its own.
	ErrNotPod = errors.New("not a pod")
	// ErrReplaced says that the attestor that was asked is out of use: another one is to be asked.
	ErrReplaced = errors.New("the configuration changed meanwhile")
	// ErrChanged says that the evidence no longer names the pod that it named when the connection was attested.
	ErrChanged = errors.New("the address changed hands while the connection was open; connect again")
)

// Hold is how long a request waits for its pod to become known. In 11 of 12 pods the first request came before the
// watch had the pod's address, up to 130 ms early (N-11, H-22); clients wait for 3 s and more (H-21).
const Hold = 2 * time.Second

// Pods is this node's pods by address.
type Pods interface {
	// At returns the live pods that have the address, and a channel that is closed when that may have changed.
	// An error means that the index cannot be believed now.
	At(netip.Addr) (pods []workload.Caller, changed <-chan struct{}, err error)
}

// Attestor finds the pods behind connections.
type Attestor struct {
	pods     Pods
	replaced <-chan struct{}
	ownAddrs func() ([]net.Addr, error)
}

// New returns an Attestor that believes what pods says. When replaced is closed, those whom it holds get ErrReplaced.
func New(pods Pods, replaced <-chan struct{}) *Attestor {
	return &Attestor{pods: pods, replaced: replaced, ownAddrs: net.InterfaceAddrs}
}

// Attest returns the pod behind p, and waits up to [Hold] for one that is not known yet. The first answer binds the
// connection: whoever has the address later gets ErrChanged on it, never the first one's identity nor its own.
// Errors: ErrUnknown, ErrAmbiguous, ErrNotPod, ErrChanged, ErrReplaced, the index's own, and ctx's.
func (a *Attestor) Attest(ctx context.Context, p *Peer) (workload.Caller, error) {
	if known := p.caller.Load(); known != nil {
		return *known, a.Check(p)
	}
	c, err := a.find(ctx, p.Client.Addr())
	if err != nil {
		return workload.Caller{}, err
	}
	p.caller.CompareAndSwap(nil, &c)
	return c, nil
}

// Check reports whether the evidence still names the pod that Attest returned. It is asked after the evidence was
// used and before the answer is written.
func (a *Attestor) Check(p *Peer) error {
	known := p.caller.Load()
	if known == nil {
		return ErrUnknown
	}
	pods, _, err := a.pods.At(p.Client.Addr())
	if err != nil {
		return err
	}
	if len(pods) != 1 || pods[0].PodUID != known.PodUID {
		return ErrChanged
	}
	return nil
}

// find waits up to [Hold] until exactly one pod has the address.
func (a *Attestor) find(ctx context.Context, client netip.Addr) (workload.Caller, error) {
	var timeout <-chan time.Time
	for {
		pods, changed, err := a.pods.At(client)
		if err == nil && len(pods) == 1 {
			return pods[0], nil
		}
		if timeout == nil { // the first time round
			if len(pods) == 0 && a.own(client) {
				return workload.Caller{}, fmt.Errorf("%w: %s is an address of the node itself, so a process of the node or a pod on the host network asks", ErrNotPod, client)
			}
			t := time.NewTimer(Hold)
			defer t.Stop()
			timeout = t.C
		}
		select {
		case <-changed:
		case <-a.replaced:
			return workload.Caller{}, ErrReplaced
		case <-ctx.Done():
			return workload.Caller{}, ctx.Err()
		case <-timeout:
			switch {
			case err != nil:
				return workload.Caller{}, err
			case len(pods) == 0:
				return workload.Caller{}, fmt.Errorf("%w: %s", ErrUnknown, client)
			default:
				return workload.Caller{}, fmt.Errorf("%w: %s belongs to %s and %s", ErrAmbiguous, client, pods[0], pods[1])
			}
		}
	}
}

// own reports whether the address is one of the node's (N-14). Asked only of addresses that no pod has.
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
