package server

import (
	"errors"
	"net/http"
	"strings"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/metadata"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token"
)

// refusal is an answer that is not what was asked for. Its text goes to the pod (U-18) and never
// holds a secret, nor anything of another pod or process: that of attest's errors is a text of the
// table, and the error itself is for the log.
type refusal struct {
	Status int
	Text   string
	Retry  bool   // Retry-After: 1
	Allow  string // with 405
	Close  bool   // the connection is of no more use
	Label  string // the label reason of requests_refused_total; "": see reasonOf
}

func (r refusal) Error() string { return r.Text }

var (
	errNotLinked  = errors.New("not linked to a Google service account")
	errNoAudience = errors.New("non-empty audience parameter required") // I-02, in GKE's words
)

// sandbox is the remedy for clients whose sockets the node's kernel does not have, or has
// with another address.
const sandbox = "a container behind NAT inside the pod (Docker in a pod) needs the pod's own network, or the pod's " +
	"ServiceAccount in attestation.byAddress; a sandbox with its own network stack (gVisor, Kata) needs its " +
	"RuntimeClass in attestation.byAddress"

// wait refuses for now: the client asks again on the same connection.
func wait(text string) refusal {
	return refusal{Status: http.StatusServiceUnavailable, Retry: true, Text: text}
}

// reconnect refuses for now: the client asks again on another connection.
func reconnect(text string) refusal {
	return refusal{Status: http.StatusServiceUnavailable, Retry: true, Close: true, Text: text}
}

// forbid refuses for good.
func forbid(text string) refusal { return refusal{Status: http.StatusForbidden, Text: text} }

// refusalRow says what becomes of an error.
type refusalRow struct {
	when    func(error) bool
	label   string // reason in requests_refused_total: what is to be looked at
	refusal refusal
}

// refusals says what is answered when something is wrong. The first row that fits decides; an error
// that fits none is ours, and 503: clients retry it, while a 4xx ends them (T-09).
// docs/troubleshooting.md has a row for each text.
var refusals = []refusalRow{
	{is(metadata.ErrNotFound), "not-found", refusal{Status: http.StatusNotFound, Text: "Not Found"}}, // H-15
	{is(metadata.ErrBadQuery), reasonRequest, refusal{Status: http.StatusBadRequest}},
	{is(errNoAudience), reasonRequest, refusal{Status: http.StatusBadRequest}}, // I-02
	{is(errNotLinked), "not-linked", refusal{Status: http.StatusNotFound}},     // I-04
	{is(attest.ErrUnknown), "unknown-pod", // H-22
		wait("the pod is not known yet: the Kubernetes API has not listed it for this node; ask again")},
	{is(attest.ErrAmbiguous), "evidence", wait("more than one live pod of this node has the address; ask again")}, // U-06
	{is(attest.ErrChanged), "gone", reconnect(attest.ErrChanged.Error())},
	{is(attest.ErrNoNamespace), "unknown-pod",
		wait("no known network namespace has the client's address; ask again; " + sandbox)},
	{is(attest.ErrHelperAway), "helper-away", wait("no known network namespace has the client's address, and " +
		"gke-metadata-emulator-attest.service, which finds them, is not connected")},
	{is(attest.ErrUnknownCgroup), "unknown-pod", wait("the cgroup of the client's socket is not known; ask again")},
	{is(attest.ErrNotRead), "unknown-pod", wait("the cgroups of the node are being read again; ask again")},
	{is(attest.ErrNotPod), "no-pod", forbid("not a pod of this node, nor a process that hostIdentities lists")},
	{is(attest.ErrNoAccount), "no-pod", forbid(attest.ErrNoAccount.Error())},
	//
	{is(attest.ErrNoSocket), "evidence",
		reconnect("the kernel knows no socket at the other end of this connection; connect again; " + sandbox)},
	{is(attest.ErrEmptyCgroup), "gone",
		reconnect("no process is left in the cgroup of the client's socket; connect again")},
	{is(attest.ErrOwner), "evidence",
		forbid("the cgroup of the client's socket has a pod's name and was not created by kubelet")},
	// others can bring it about; another port may be nobody else's.
	{is(attest.ErrSockets), "evidence", reconnect("two sockets match the other end of this connection; connect again")},
	{is(attest.ErrSpared), "evidence",
		reconnect("the connection was redirected, but the client's socket belongs to a process of the node that is " +
			"not redirected; connect again")},
	{is(attest.ErrNamespaceOwner), "unknown-pod",
		wait("the owner of the client's network namespace is not known yet; ask again")},
	{is(attest.ErrOtherNamespace), "evidence",
		forbid("the client's socket is in another pod's network namespace than the process that created it: add the " +
			"mesh's node proxy to attestation.proxies")},
	{is(attest.ErrNoCgroup), "evidence", forbid("the kernel reports no cgroup of a pod for the client's socket")},
	{is(attest.ErrPods), "evidence", forbid("the kernel's record of the client's socket names two pods")},
	{as[*kube.AnnotationError], "annotation", refusal{Status: http.StatusBadRequest}},                     // K-00
	// the operator can mend it
	{as[*kube.ForbiddenError], "kubernetes-refused",
		refusal{Status: http.StatusServiceUnavailable}},
	{is(kube.ErrNotConfigured), "kubernetes-unavailable", refusal{Status: http.StatusServiceUnavailable}},
	{as[*kube.AwayError], "kubernetes-unavailable", refusal{Status: http.StatusServiceUnavailable}},
	{as[*token.LimitError], reasonLimit, refusal{Status: http.StatusServiceUnavailable, Retry: true}},
	// T-09, and 429 of Google
	{is(token.ErrUnavailable), "google-unavailable",
		refusal{Status: http.StatusServiceUnavailable}},
	{googleSays("IAM", http.StatusBadRequest), "google-refused", refusal{Status: http.StatusBadRequest}}, // T-07
	{googleSays("IAM", http.StatusForbidden), "google-refused", refusal{Status: http.StatusForbidden}},   // T-07
	{googleSays("IAM", http.StatusNotFound), "google-refused", refusal{Status: http.StatusNotFound}},     // T-07
	{googleSays("STS", anyStatus), "google-refused", refusal{Status: http.StatusForbidden}},
	// the API server's own text may name another pod of the ServiceAccount
	{is(kube.ErrNoPod), "gone", refusal{Status: http.StatusServiceUnavailable, Text: kube.ErrNoPod.Error() +
		", or the API server does not know of the pod yet"}},
	{is(kube.ErrNotFound), "gone", refusal{Status: http.StatusServiceUnavailable}},
	{as[*token.GoogleError], "google-refused", ours},
	{func(error) bool { return true }, "other", ours},
}

var ours = refusal{Status: http.StatusServiceUnavailable,
	Text: "internal error: the log of gke-metadata-emulator.service on the node has the cause"}

// refusalOf returns what a pod is told of err.
func refusalOf(err error) refusal {
	var r refusal
	if errors.As(err, &r) {
		return r
	}
	for _, row := range refusals {
		if row.when(err) {
			r, r.Label = row.refusal, row.label
			break
		}
	}
	if r.Text == "" {
		r.Text = err.Error()
	}
	if len(r.Text) > maxText { // each that is quoted in it is bounded; this is for the day when one is not
		r.Text = strings.ToValidUTF8(r.Text[:maxText], "") + "…"
	}
	return r
}

const maxText = 4096 // bytes of an answer that is a refusal

func is(target error) func(error) bool {
	return func(err error) bool { return errors.Is(err, target) }
}

func as[E error](err error) bool {
	var e E
	return errors.As(err, &e)
}

const anyStatus = 0

func googleSays(step string, status int) func(error) bool {
	return func(err error) bool {
		var e *token.GoogleError
		return errors.As(err, &e) && e.Step == step && (status == anyStatus || e.Status == status)
	}
}
