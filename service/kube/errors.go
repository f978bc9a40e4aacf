package kube

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

var (
	// ErrNotConfigured says that there is no kubeconfig, or none that can be used. On a first boot
	// kubelet has not written it yet: it is waited for.
	ErrNotConfigured = errors.New("no kubeconfig")

	// ErrNoPod says that no live pod of this node uses the ServiceAccount, so nothing is known of it (K-04)
	// and no token can be bound (N-07).
	ErrNoPod = errors.New("no live pod of this node uses the ServiceAccount")

	// ErrNotFound says that the ServiceAccount does not exist (any more).
	ErrNotFound = errors.New("no such ServiceAccount")
)

// AwayError says that the API server cannot be asked, or does not accept the node's credential.
type AwayError struct {
	Since time.Time // of the last contact; of the start when there was none
	Err   error     // what the last attempt said
}

func (e *AwayError) Error() string {
	return fmt.Sprintf("the Kubernetes API is away since %s: %v", e.Since.UTC().Format(time.RFC3339), e.Err)
}

func (e *AwayError) Unwrap() error { return e.Err }

// ForbiddenError says that the API server refused and that a grant can mend it (N-05).
type ForbiddenError struct {
	User      string // as the API server knows us; "" when unknown
	Verb      string
	Resource  string // "pods", "serviceaccounts", "serviceaccounts/token"; for a refused audience the audience
	Namespace string // "" for all
	Message   string // the API server's words

	audience string
	reason   refusal
	unbound  bool // it is for a process of the node
}

func (e *ForbiddenError) Error() string {
	s := fmt.Sprintf("Kubernetes refuses to %s %s", e.Verb, e.Resource)
	if e.Namespace != "" {
		s += " in namespace " + e.Namespace
	}
	switch {
	case e.reason == otherNode:
		return s + ": " + e.Message + " (does nodeName name the node of this credential?)"
	case e.nodeUnbound():
		return s + " for a process of the node: " + e.Message + " (missing grant: a node's own credential gets tokens for its pods only; hostIdentities need a kubeconfig of another identity, whose manifest `gke-metadata-emulator status` prints)"
	}
	return s + ": " + e.Message + " (missing grant; `gke-metadata-emulator status` prints the manifest)"
}

// Manifest returns the YAML that grants what is missing, ready for kubectl apply; "" when no grant mends it.
func (e *ForbiddenError) Manifest() string {
	switch {
	case e.reason == otherNode:
		return ""
	case e.nodeUnbound():
		return rbacDedicated
	}
	return manifest(e.User, e.audience, e.Verb == "get" && e.Resource == "serviceaccounts")
}

// nodeUnbound: NodeRestriction refuses what RBAC grants to nodes (N-07), so only another identity helps.
func (e *ForbiddenError) nodeUnbound() bool { return e.unbound && strings.HasPrefix(e.User, nodeUser) }

// AnnotationError says that a ServiceAccount's annotation cannot be believed (K-00).
type AnnotationError struct {
	ServiceAccount workload.ServiceAccount
	Key            string
	Reason         string // quotes the value, bounded
}

func (e *AnnotationError) Error() string {
	return fmt.Sprintf("ServiceAccount %s: annotation %s: %s", e.ServiceAccount, e.Key, e.Reason)
}

// call names one kind of request to the API server. Verb and resource are few enough to be metric labels.
type call struct {
	verb, resource, namespace string
	unbound                   bool // it is for a process of the node: no pod of this node has to do with it
}

// judge is where every answer of the API server passes: it counts it, keeps track of contact and of missing grants, and
// turns it into this package's errors. What only the caller can read (404, 409, 400, a refused pod) comes back as it was.
func (c *Cluster) judge(ctx context.Context, k call, err error) error {
	var status apierrors.APIStatus
	isStatus := errors.As(err, &status)
	switch {
	case err == nil:
		code := "200"
		if k.verb == "create" {
			code = "201"
		}
		c.count(k, code)
		c.contact()
		c.granted(k)
		return nil
	case ctx.Err() != nil && !isStatus:
		return ctx.Err() // the asker left; it says nothing about the API server
	case !isStatus:
		c.count(k, "error")
		return c.lost(err)
	}
	st := status.Status()
	c.count(k, fmt.Sprint(st.Code))
	switch {
	case apierrors.IsUnauthorized(err):
		// The certificate on disk may be newer than ours: look at once, not at the next poll.
		c.wake()
		return c.lost(fmt.Errorf("the credential of %s is not accepted: %w", c.kubeconfigInUse(), err))
	case apierrors.IsForbidden(err):
		c.contact()
		return c.forbidden(k, st)
	case st.Code == 429 || st.Code >= 500:
		return c.lost(err)
	}
	c.contact()
	return err
}

// forbidden turns a 403 into what it means.
func (c *Cluster) forbidden(k call, st metav1.Status) error {
	r := refusalOf(st.Message)
	if r == podGone || r == unrelated && !k.unbound {
		return &refusedPod{reason: r, message: st.Message}
	}
	f := &ForbiddenError{User: c.user(), Verb: k.verb, Resource: k.resource, Namespace: k.namespace, Message: st.Message, audience: c.audience, reason: r, unbound: k.unbound}
	if f.User == "" {
		f.User = userOf(st.Message)
	}
	if r == audienceRefused {
		f.Verb, f.Resource = audienceVerb, c.audience
	}
	c.missing(f)
	return f
}

const audienceVerb = "request-serviceaccounts-token-audience"

// refusedPod is a refusal that is about the pod, not about a grant: the pod went away, or the Node authorizer has
// not seen it yet (its graph is filled by watches of its own).
type refusedPod struct {
	reason  refusal
	message string
}

func (e *refusedPod) Error() string { return e.message }
func (e *refusedPod) Unwrap() error { return ErrNoPod }

// refusal is what a 403's text says beyond its reason code.
type refusal int

const (
	grantMissing    refusal = iota
	audienceRefused         // N-05
	podGone                 // N-07: deleted, made again, or elsewhere
	unrelated               // N-02: no pod of this node uses it, as far as the Node authorizer knows
	otherNode               // N-01: the field selector names another node
)

// refusalOf reads the API server's words. It is the only place that does: the Node authorizer and NodeRestriction
// put everything into one reason code, Forbidden.
func refusalOf(message string) refusal {
	for _, t := range []struct {
		text string
		is   refusal
	}{
		{"is not authorized to request tokens for audience", audienceRefused},
		{"does not match the UID in record", podGone},
		{"bound to a pod scheduled on a different node", podGone},
		{"no relationship found between node", unrelated},
		{"can only list/watch pods with spec.nodeName field selector", otherNode},
	} {
		if strings.Contains(message, t.text) {
			return t.is
		}
	}
	return grantMissing
}

var inUser = regexp.MustCompile(`\bUser "([^"]{1,253})" cannot `)

// userOf finds who the API server says we are: with exec plugins and tokens nobody else tells.
func userOf(message string) string {
	if m := inUser.FindStringSubmatch(message); m != nil {
		return m[1]
	}
	return ""
}
