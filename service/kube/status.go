package kube

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// Status is the part of `status` about Kubernetes. It holds no secret.
type Status struct {
	Kubeconfig      string       `json:"kubeconfig,omitempty"` // in use
	Credential      string       `json:"credential,omitempty"` // client certificate | bearer token | plugin COMMAND | none
	Server          string       `json:"server,omitempty"`
	User            string       `json:"user,omitempty"`
	NodeName        string       `json:"nodeName,omitempty"`
	NodeNameProblem string       `json:"nodeNameProblem,omitempty"`
	Audience        string       `json:"audience,omitempty"`    // of requested tokens
	Synced          bool         `json:"synced"`                // the pods were listed
	Watching        bool         `json:"watching"`              // a watch is open and current
	LastContact     *time.Time   `json:"lastContact,omitempty"` // of the pod watch
	Problem         string       `json:"problem,omitempty"`     // why pods are not followed now
	Pods            []PodStatus  `json:"pods"`
	Hosts           []HostStatus `json:"hosts,omitempty"` // of Options.Hosts
	LastError       string       `json:"lastError,omitempty"`
	LastErrorAt     *time.Time   `json:"lastErrorAt,omitempty"`
	MissingGrants   []Grant      `json:"missingGrants,omitempty"`
}

// PodStatus is one live pod of this node.
type PodStatus struct {
	Namespace      string       `json:"namespace"`
	Name           string       `json:"name"`
	UID            string       `json:"uid"`
	Addresses      []netip.Addr `json:"addresses,omitempty"`
	HostNetwork    bool         `json:"hostNetwork,omitempty"`
	Terminating    bool         `json:"terminating,omitempty"`
	RuntimeClass   string       `json:"runtimeClass,omitempty"`
	ServiceAccount string       `json:"serviceAccount"`     // "" for a static pod
	Evidence       string       `json:"evidence,omitempty"` // what identifies its connections; package service sets it
	AccountStatus
}

// HostStatus is one ServiceAccount of processes of the node.
type HostStatus struct {
	ServiceAccount string `json:"serviceAccount"` // namespace/name
	AccountStatus
}

// AccountStatus is what is known of a ServiceAccount.
type AccountStatus struct {
	GoogleEmail  string     `json:"googleServiceAccount,omitempty"`
	AccountRead  *time.Time `json:"serviceAccountRead,omitempty"`
	AccountError string     `json:"serviceAccountError,omitempty"`
}

// Status returns the present state.
func (c *Cluster) Status() Status {
	x := c.pods.current.Load()
	s := Status{Audience: c.audience, Synced: x.synced, Watching: c.pods.watching.Load(),
		Pods: make([]PodStatus, 0, len(x.pods))}
	s.LastContact = timeOrNil(time.Unix(0, c.pods.touched.Load()))
	if s.Watching {
		s.LastContact = timeOrNil(time.Now())
	}
	if m := c.mismatch.Load(); m != nil {
		s.NodeNameProblem = m.String()
	}
	c.accounts.mu.Lock()
	for _, p := range x.pods {
		s.Pods = append(s.Pods, PodStatus{Namespace: p.caller.ServiceAccount.Namespace, Name: p.caller.PodName,
			UID: p.caller.PodUID, Addresses: p.addrs,
			HostNetwork: p.caller.HostNetwork, Terminating: p.terminating, RuntimeClass: p.caller.RuntimeClass,
			ServiceAccount: p.caller.ServiceAccount.Name,
			AccountStatus:  c.accounts.known[p.caller.ServiceAccount].status()})
	}
	for _, sa := range c.pods.hosts {
		s.Hosts = append(s.Hosts, HostStatus{sa.String(), c.accounts.known[sa].status()})
	}
	c.accounts.mu.Unlock()
	problem := errorText(c.trouble())
	c.mu.Lock()
	defer c.mu.Unlock()
	s.Kubeconfig, s.Credential, s.Server, s.User, s.NodeName = c.path, c.kind, c.server, c.identity, c.node
	s.Problem, s.LastError, s.LastErrorAt = problem, c.lastError, timeOrNil(c.lastErrorAt)
	for _, g := range c.grants {
		s.MissingGrants = append(s.MissingGrants, *g)
	}
	slices.SortFunc(s.MissingGrants, func(a, b Grant) int {
		return cmp.Or(cmp.Compare(a.Resource, b.Resource), cmp.Compare(a.Verb, b.Verb))
	})
	return s
}

func (a *account) status() AccountStatus {
	if a == nil {
		return AccountStatus{}
	}
	return AccountStatus{a.value.GoogleEmail, timeOrNil(a.read), errorText(cmp.Or(a.failure, a.err))}
}

func (m *nameMismatch) String() string {
	return fmt.Sprintf("nodeName is %q, but the credential belongs to node %q", m.configured, m.credential)
}

// timeOrNil returns nil for the zero time and for the Unix epoch.
func timeOrNil(t time.Time) *time.Time {
	if t.IsZero() || t.UnixNano() == 0 {
		return nil
	}
	return &t
}
