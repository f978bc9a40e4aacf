package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// network makes a pod's network: on a link of its own or on the bridge, with the address of a
// killed pod if before is not nil.
func (w *world) network(name string, before *pod, routed bool) (*netnstest.NS, error) {
	if before != nil {
		return w.node.AddPodAs(name, before.ns)
	}
	if routed {
		ns, err := w.node.AddRoutedPod(name)
		if err == nil {
			err = w.serveOther(ns, netip.AddrPortFrom(ns.Addr, 10250).String())
		}
		return ns, err
	}
	return w.node.AddPod(name)
}

// churn runs n pods one after the other at one address. Each requests a token at its start, and is
// killed. Kubernetes learns of a pod up to a second late, and of its end after the next pod was
// answered.
func (w *world) churn(ctx context.Context, n int) (Counts, error) {
	all := Counts{Of: map[string]int{}}
	var wait sync.WaitGroup
	defer wait.Wait()
	var before *pod
	for i := range n {
		name := fmt.Sprintf("churn%d", i)
		ns, err := w.network(name, before, false)
		if err != nil {
			return all, err
		}
		p := w.newPod(name, ns)
		if err := p.start(); err != nil {
			return all, errors.Join(err, ns.Close())
		}
		known := make(chan struct{})
		wait.Go(func() {
			defer close(known)
			<-time.After(rand.N(time.Second))
			p.register()
		})
		began := time.Now()
		a, err := p.ask(ctx, tokenPath)
		all.Longest = max(all.Longest, time.Since(began))
		what, detail := unreachable, fmt.Sprint(err)
		if err == nil {
			what, detail = w.outcome(p, a)
		}
		all.Of[what]++
		if what != ok {
			all.Examples = append(all.Examples, fmt.Sprintf("%s %s: %s", name, what, detail))
		}
		<-known
		p.die()
		if before != nil {
			w.kube.DeletePod("default", before.Name)
		}
		before = p
		if err := errors.Join(ns.Unplug(), ns.Close()); err != nil {
			return all, err
		}
	}
	if before != nil {
		w.kube.DeletePod("default", before.Name)
	}
	return all, nil
}

// outcome classifies the answer to a pod's request for a token.
func (w *world) outcome(p *pod, a Answer) (what, detail string) {
	issued, _ := w.google.Lookup(accessToken(a.Body))
	switch {
	case a.Body == nodeSecret:
		return leaked, ""
	case a.Status != 200:
		return unavailable, a.Body
	case issued.Email != p.email:
		return wrong, fmt.Sprintf("a token of %q", issued.Email)
	}
	return ok, ""
}
