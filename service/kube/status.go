package kube

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// Status is what `status` shows of Kubernetes. It holds no secret.
type Status struct {
	Kubeconfig      string      `json:"kubeconfig,omitempty"` // in use
	Server          string      `json:"server,omitempty"`
	User            string      `json:"user,omitempty"`
	NodeName        string      `json:"nodeName,omitempty"`
	NodeNameProblem string      `json:"nodeNameProblem,omitempty"`
	Audience        string      `json:"audience,omitempty"`    // of the tokens that are asked for
	Synced          bool        `json:"synced"`                // the pods were listed
	Watching        bool        `json:"watching"`              // a watch is open now
	LastContact     *time.Time  `json:"lastContact,omitempty"` // of the pod watch
	Problem         string      `json:"problem,omitempty"`     // why pods cannot be seen
	Pods            []PodStatus `json:"pods"`
	LastError       string      `json:"lastError,omitempty"`
	LastErrorAt     *time.Time  `json:"lastErrorAt,omitempty"`
	MissingGrants   []Grant     `json:"missingGrants,omitempty"`
}

// PodStatus is one live pod of this node.
type PodStatus struct {
	Namespace      string       `json:"namespace"`
	Name           string       `json:"name"`
	UID            string       `json:"uid"`
	Addresses      []netip.Addr `json:"addresses,omitempty"`
	HostNetwork    bool         `json:"hostNetwork,omitempty"`
	Terminating    bool         `json:"terminating,omitempty"`
	ServiceAccount string       `json:"serviceAccount"`
	GoogleEmail    string       `json:"googleServiceAccount,omitempty"`
	AccountRead    *time.Time   `json:"serviceAccountRead,omitempty"`
	AccountError   string       `json:"serviceAccountError,omitempty"`
}

// Status returns a picture of now.
func (c *Cluster) Status() Status {
	x := c.pods.current.Load()
	s := Status{Audience: c.audience, Synced: x.synced, Watching: c.pods.watching.Load(), Pods: make([]PodStatus, 0, len(x.pods))}
	s.LastContact = moment(time.Unix(0, c.pods.touched.Load()))
	if s.Watching {
		s.LastContact = moment(time.Now())
	}
	if m := c.mismatch.Load(); m != nil {
		s.NodeNameProblem = m.String()
	}
	c.accounts.mu.Lock()
	for _, p := range x.pods {
		q := PodStatus{Namespace: p.caller.ServiceAccount.Namespace, Name: p.caller.PodName, UID: p.caller.PodUID, Addresses: p.addrs,
			HostNetwork: p.hostNetwork, Terminating: p.terminating, ServiceAccount: p.caller.ServiceAccount.Name}
		if a := c.accounts.known[p.caller.ServiceAccount]; a != nil {
			q.GoogleEmail, q.AccountRead = a.value.GoogleEmail, moment(a.read)
			q.AccountError = text(cmp.Or(a.failure, a.err))
		}
		s.Pods = append(s.Pods, q)
	}
	c.accounts.mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	s.Kubeconfig, s.Server, s.User, s.NodeName = c.path, c.server, c.identity, c.node
	s.Problem, s.LastError, s.LastErrorAt = text(c.trouble), c.lastError, moment(c.lastErrorAt)
	for _, g := range c.grants {
		s.MissingGrants = append(s.MissingGrants, *g)
	}
	slices.SortFunc(s.MissingGrants, func(a, b Grant) int {
		return cmp.Or(cmp.Compare(a.Resource, b.Resource), cmp.Compare(a.Verb, b.Verb))
	})
	return s
}

func (m *nameMismatch) String() string {
	return fmt.Sprintf("nodeName is %q, but the credential is node %q's", m.configured, m.credential)
}

// moment is nil for a time that never was.
func moment(t time.Time) *time.Time {
	if t.IsZero() || t.UnixNano() == 0 {
		return nil
	}
	return &t
}
