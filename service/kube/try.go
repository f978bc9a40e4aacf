package kube

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// Attempt holds the outcome of each step from the credential to a pod's token, tried once. A step
// that was not tried has no error and no result.
type Attempt struct {
	Kubeconfig string // the file, and root's copy where that was read (R-27, copy of the credential)
	Credential string // its kind: client certificate, bearer token, plugin COMMAND
	Server     string
	User, Node string
	Mismatch   string // not "": nodeName is not the credential's node
	Reach      error  // *AwayError or ErrNotConfigured; nothing else was tried then

	Asked, Date time.Time // the time of the request, and the API server's clock then; zero: no Date header

	List, Watch error // of this node's pods
	Pods        int   // live ones with an address of their own
	HostPods    int   // live ones on the host network

	// Pod is one pod; "" = none. A pod linked to a Google service account is preferred, then a running
	// one.
	Pod            string
	ServiceAccount workload.ServiceAccount
	Get            error // of the ServiceAccount
	Account        workload.Account
	Mint           error // TokenRequest with Options.Audience
}

const (
	accountsToTry = 10 // ServiceAccounts that are read to find one that is linked
	watchProbe    = 5 * time.Second
)

// Try takes each step to a pod's token once, with the credential that a Cluster of these Options
// would use. It changes nothing. The API server issues one token, which is bound to the pod and
// expires in an hour; jwt returns it apart from what may be shown.
func Try(ctx context.Context, o Options) (a Attempt, jwt string) {
	c := New(o)
	defer c.end()
	ctx = withLogger(ctx, c.log)
	cred, err := c.find()
	if err != nil {
		a.Reach = err
		return a, ""
	}
	a.Kubeconfig, a.Server, a.Credential = cred.path, cred.server, cred.kind()
	k, err := newClient(cred.config, c.codec, c.userAgent)
	if err != nil {
		a.Reach = fmt.Errorf("%w: %s cannot be used: %w", ErrNotConfigured, cred.path, err)
		return a, ""
	}
	defer k.close()
	c.path, c.server = cred.path, cred.server
	if a.Reach = c.clock(ctx, k, &a); a.Reach != nil {
		return a, ""
	}
	if a.Node, a.User, a.Reach = c.identify(ctx, k, cred); a.Reach != nil {
		return a, ""
	}
	c.identity, c.node = a.User, a.Node
	if m := c.mismatch.Load(); m != nil {
		a.Mismatch = m.String()
	}

	selector := "spec.nodeName=" + a.Node
	list, err := c.listPods(ctx, k, metav1.ListOptions{FieldSelector: selector, ResourceVersion: "0"})
	a.List = c.classify(ctx, call{verb: "list", resource: "pods"}, err)
	a.Watch = c.tryWatch(ctx, k, selector)
	if a.List != nil {
		return a, ""
	}
	var pods []*pod
	for i := range list.Items {
		if !live(&list.Items[i]) {
			continue
		}
		p := convert(&list.Items[i])
		if pods = append(pods, p); p.caller.HostNetwork {
			a.HostPods++
		} else {
			a.Pods++
		}
	}
	slices.SortStableFunc(pods, func(p, q *pod) int { return p.rank() - q.rank() })
	p := c.choose(ctx, k, pods, &a)
	if p == nil {
		return a, ""
	}
	a.Pod, a.ServiceAccount = p.caller.PodName, p.caller.ServiceAccount
	if c.audience == "" {
		return a, "" // never a token for the API server itself
	}
	jwt, a.Mint = c.request(ctx, k, a.ServiceAccount, p)
	return a, jwt
}

// clock requests the API server's version, to see that it answers and to read its clock.
func (c *Cluster) clock(ctx context.Context, k *client, a *Attempt) error {
	cctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(cctx, http.MethodGet, k.core.Get().AbsPath("/version").URL().String(), nil)
	if err != nil {
		return err
	}
	a.Asked = time.Now()
	res, err := k.http.Do(req)
	if err != nil {
		return c.lost(brief(err))
	}
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, maxRefusal))
	_ = res.Body.Close()
	a.Date, _ = http.ParseTime(res.Header.Get("Date"))
	if res.StatusCode == http.StatusUnauthorized {
		return c.lost(fmt.Errorf("the API server does not accept the credential of %s: %s", a.Kubeconfig,
			http.StatusText(res.StatusCode)))
	}
	return nil
}

func (c *Cluster) tryWatch(ctx context.Context, k *client, selector string) error {
	cctx, cancel := context.WithTimeout(ctx, watchProbe)
	defer cancel()
	seconds := int64(1)
	w, err := c.watch(cctx, k, "", "pods", metav1.ListOptions{FieldSelector: selector, ResourceVersion: "0",
		TimeoutSeconds: &seconds})
	if err == nil {
		w.Stop()
	}
	return c.classify(ctx, call{verb: "watch", resource: "pods"}, err)
}

// choose reads ServiceAccounts until one is linked, and returns a pod of it, else a pod of the
// first.
func (c *Cluster) choose(ctx context.Context, k *client, pods []*pod, a *Attempt) (chosen *pod) {
	looked := map[workload.ServiceAccount]bool{}
	for _, p := range pods {
		sa := p.caller.ServiceAccount
		if looked[sa] {
			continue
		}
		looked[sa] = true
		obj, err := c.get(ctx, k, sa, false)
		var account workload.Account
		if err == nil {
			account, err = ParseAccount(sa, obj.Annotations)
		}
		if chosen == nil || a.Get != nil && err == nil || account.Linked() {
			chosen, a.Get, a.Account = p, err, account
		}
		if account.Linked() || len(looked) == accountsToTry {
			break
		}
	}
	return chosen
}
