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
	// ErrNotConfigured: there is no usable kubeconfig. On a first boot kubelet has not written its
	// kubeconfig yet; Run waits for it.
	ErrNotConfigured = errors.New("no usable kubeconfig")

	// ErrNoPod: no live pod of this node uses the ServiceAccount. So its state is not kept (K-04, only
	// accounts in use), and no token can be bound to a pod (N-07, unbound requests).
	ErrNoPod = errors.New("no live pod of this node uses the ServiceAccount")

	// ErrNotFound: the ServiceAccount does not exist.
	ErrNotFound = errors.New("no such ServiceAccount")
)

// AwayError: the API server does not answer, or does not accept the node's credential.
type AwayError struct {
	Since time.Time // the last contact, or the start of this process
	Err   error     // of the last attempt
}

// Unavailable is how the text of every AwayError begins.
const Unavailable = "the Kubernetes API is unavailable"

func (e *AwayError) Error() string {
	return fmt.Sprintf("%s since %s: %v", Unavailable, e.Since.UTC().Format(time.RFC3339), e.Err)
}

func (e *AwayError) Unwrap() error { return e.Err }

// ForbiddenError: the API server refused a request, and a grant would allow it (N-05, missing
// grants).
type ForbiddenError struct {
	User      string // as the API server knows us; "" when unknown
	Verb      string
	Resource  string // "pods", "serviceaccounts", "serviceaccounts/token", or a refused audience
	Namespace string // "" for all namespaces
	Message   string // of the API server

	audience string
	reason   refusal
	unbound  bool // the request is for a process of the node
}

func (e *ForbiddenError) Error() string {
	s := fmt.Sprintf("Kubernetes refuses to %s %s", e.Verb, e.Resource)
	if e.Namespace != "" {
		s += " in namespace " + e.Namespace
	}
	switch {
	case e.reason == otherNode:
		return s + ": " + e.Message + ": set nodeName to the node of this credential, or remove nodeName"
	case e.nodeUnbound():
		return "missing grant: " + s + " for a process of the node: " + e.Message +
			": set kubeconfig to an identity other than the node's: `gke-metadata-emulator status` prints its manifest"
	}
	return "missing grant: " + s + ": " + e.Message + ": apply the manifest that `gke-metadata-emulator status` prints"
}

// Manifest returns the YAML that grants what is missing, ready for kubectl apply. It returns ""
// when no grant would help.
func (e *ForbiddenError) Manifest() string {
	switch {
	case e.reason == otherNode:
		return ""
	case e.nodeUnbound():
		return rbacDedicated
	}
	return manifest(e.User, e.audience, e.Verb == "get" && e.Resource == "serviceaccounts")
}

// nodeUnbound reports a token for a process of the node that was requested with the node's own
// credential. NodeRestriction refuses it whatever RBAC grants (N-07, unbound requests), so only
// another identity helps.
func (e *ForbiddenError) nodeUnbound() bool { return e.unbound && strings.HasPrefix(e.User, nodeUser) }

// AnnotationError: a ServiceAccount's annotation is not valid (K-00, untrusted annotations).
type AnnotationError struct {
	ServiceAccount workload.ServiceAccount
	Key            string
	Reason         string // quotes the value, bounded
}

func (e *AnnotationError) Error() string {
	return fmt.Sprintf("ServiceAccount %s: annotation %s: %s", e.ServiceAccount, e.Key, e.Reason)
}

// call names one kind of request to the API server. The pairs of verb and resource are few enough
// for metric labels.
type call struct {
	verb, resource, namespace string
	unbound                   bool // for a process of the node and not for a pod
}

// calls are all that there are.
var calls = []call{
	{verb: "list", resource: "pods"}, {verb: "watch", resource: "pods"},
	{verb: "get", resource: "serviceaccounts"}, {verb: "watch", resource: "serviceaccounts"},
	{verb: "create", resource: tokens}, {verb: "create", resource: "selfsubjectreviews"},
}

// done is the code of success.
func (k call) done() string {
	if k.verb == "create" {
		return "201"
	}
	return "200"
}

// classify handles the outcome of every request to the API server. It counts the request, records
// contact and missing grants, and returns one of this package's errors. Errors that only the caller
// understands (404, 409, 400, a refused pod) are returned unchanged.
func (c *Cluster) classify(ctx context.Context, k call, err error) error {
	var status apierrors.APIStatus
	isStatus := errors.As(err, &status)
	switch {
	case err == nil:
		c.count(k, k.done())
		c.contact()
		c.granted(k)
		return nil
	case ctx.Err() != nil && !isStatus:
		return ctx.Err() // the caller left; the API server is not at fault
	case !isStatus:
		c.count(k, "error")
		return c.lost(err)
	}
	st := status.Status()
	c.count(k, fmt.Sprint(st.Code))
	switch {
	case apierrors.IsUnauthorized(err):
		// The certificate on disk may be newer: read it at once, not at the next poll.
		c.wake()
		return c.lost(fmt.Errorf("the API server does not accept the credential of %s: %w", c.kubeconfigInUse(), err))
	case apierrors.IsForbidden(err):
		c.contact()
		return c.forbidden(k, st)
	case st.Code == 429 || st.Code >= 500:
		return c.lost(err)
	}
	c.contact()
	return err
}

// forbidden returns the error that a 403 stands for.
func (c *Cluster) forbidden(k call, st metav1.Status) error {
	r := refusalOf(st.Message)
	if r == podGone || r == unrelated && !k.unbound {
		return &refusedPod{reason: r, message: st.Message}
	}
	f := &ForbiddenError{User: c.user(), Verb: k.verb, Resource: k.resource, Namespace: k.namespace, Message: st.Message,
		audience: c.audience, reason: r, unbound: k.unbound}
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

// refusedPod is a refusal of one pod, which no grant changes. The pod is gone, or the Node
// authorizer has not seen it yet, since its graph is filled by its own watches.
type refusedPod struct {
	reason  refusal
	message string
}

func (e *refusedPod) Error() string { return e.message }
func (e *refusedPod) Unwrap() error { return ErrNoPod }

// refusal is the cause that the text of a 403 names, beyond its reason code.
type refusal int

const (
	grantMissing    refusal = iota
	audienceRefused         // N-05, missing grants
	podGone                 // N-07: the pod was deleted, replaced, or is on another node
	unrelated               // N-02: the Node authorizer knows no pod of this node that uses the account
	otherNode               // N-01: the field selector names another node
)

// refusalOf matches the API server's text. It is the only place that does: the Node authorizer and
// NodeRestriction use one reason code, Forbidden, for everything.
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

// userOf returns the user name in the API server's message. With exec plugins and tokens there is
// no other source.
func userOf(message string) string {
	if m := inUser.FindStringSubmatch(message); m != nil {
		return m[1]
	}
	return ""
}
