package service

import (
	"errors"
	"net/http"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/metadata"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token"
)

// refusal is an answer that is not what was asked for. Its reason goes to the pod (U-18) and never holds a secret.
type refusal struct {
	Status int
	Reason string
	Retry  bool   // Retry-After: 1
	Allow  string // with 405
	Close  bool   // the connection is of no more use
}

func (r refusal) Error() string { return r.Reason }

var (
	errNotLinked  = errors.New("not linked to a Google service account")
	errNoAudience = errors.New("non-empty audience parameter required") // I-02, in GKE's words
)

// refusals says what is answered when something is wrong. The first row that fits decides; an error that fits none is
// ours, and 503: clients retry it, while a 4xx ends them (T-09).
var refusals = []struct {
	when    func(error) bool
	refusal refusal
}{
	{is(metadata.ErrNotFound), refusal{Status: http.StatusNotFound, Reason: "Not Found"}}, // H-15
	{is(metadata.ErrBadQuery), refusal{Status: http.StatusBadRequest}},
	{is(errNoAudience), refusal{Status: http.StatusBadRequest}},                            // I-02
	{is(errNotLinked), refusal{Status: http.StatusNotFound}},                               // I-04
	{is(attest.ErrUnknown), refusal{Status: http.StatusServiceUnavailable, Retry: true}},   // H-22
	{is(attest.ErrAmbiguous), refusal{Status: http.StatusServiceUnavailable, Retry: true}}, // U-06
	{is(attest.ErrChanged), refusal{Status: http.StatusServiceUnavailable, Retry: true, Close: true}},
	{is(attest.ErrNoNamespace), refusal{Status: http.StatusServiceUnavailable, Retry: true}},
	{is(attest.ErrHelperAway), refusal{Status: http.StatusServiceUnavailable, Retry: true}},
	{is(attest.ErrUnknownCgroup), refusal{Status: http.StatusServiceUnavailable, Retry: true}},
	{is(attest.ErrNotPod), refusal{Status: http.StatusForbidden}},
	{is(attest.ErrNoAccount), refusal{Status: http.StatusForbidden}},
	{is(attest.ErrNoSocket), refusal{Status: http.StatusServiceUnavailable, Retry: true}},
	{is(attest.ErrEmptyCgroup), refusal{Status: http.StatusServiceUnavailable, Retry: true, Close: true}},
	{is(attest.ErrOwner), refusal{Status: http.StatusForbidden}},
	{is(attest.ErrSockets), refusal{Status: http.StatusServiceUnavailable, Retry: true, Close: true}}, // A-12; another port may be nobody else's
	{is(attest.ErrSpared), refusal{Status: http.StatusServiceUnavailable, Retry: true, Close: true}},
	{is(attest.ErrNoCgroup), refusal{Status: http.StatusForbidden}},
	{is(attest.ErrPods), refusal{Status: http.StatusForbidden}},
	{as[*kube.AnnotationError], refusal{Status: http.StatusBadRequest}},        // K-00
	{as[*kube.ForbiddenError], refusal{Status: http.StatusServiceUnavailable}}, // the operator can mend it
	{is(kube.ErrNotConfigured), refusal{Status: http.StatusServiceUnavailable}},
	{as[*kube.AwayError], refusal{Status: http.StatusServiceUnavailable}},
	{as[*token.LimitError], refusal{Status: http.StatusServiceUnavailable, Retry: true}},
	{is(token.ErrUnavailable), refusal{Status: http.StatusServiceUnavailable}},         // T-09, and 429 of Google
	{googleSays("IAM", http.StatusBadRequest), refusal{Status: http.StatusBadRequest}}, // T-07
	{googleSays("IAM", http.StatusForbidden), refusal{Status: http.StatusForbidden}},   // T-07
	{googleSays("IAM", http.StatusNotFound), refusal{Status: http.StatusNotFound}},     // T-07
	{googleSays("STS", anyStatus), refusal{Status: http.StatusForbidden}},
	{func(error) bool { return true }, refusal{Status: http.StatusServiceUnavailable}},
}

// refusalOf returns what a pod is told of err.
func refusalOf(err error) refusal {
	var r refusal
	if errors.As(err, &r) {
		return r
	}
	for _, row := range refusals {
		if row.when(err) {
			r = row.refusal
			break
		}
	}
	if r.Reason == "" {
		r.Reason = err.Error()
	}
	return r
}

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
