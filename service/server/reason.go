package server

import (
	"errors"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/metadata"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token"
)

// Reasons that no error of another package stands for.
const (
	reasonRequest      = "request"      // its method, header or query is not what a metadata server takes
	reasonPassthrough  = "passthrough"  // it is for another cloud's metadata server
	reasonUnconfigured = "unconfigured" // there is no configuration
	reasonLimit        = "limit"        // the pod has as much as limits.* allows
	reasonOther        = "other"
)

// reasons are the values of a metric's label: what is to be looked at where requests are refused.
// The first row that fits counts.
var reasons = []struct {
	when func(error) bool
	name string
}{
	{is(metadata.ErrNotFound), "not-found"},
	{is(metadata.ErrBadQuery), reasonRequest},
	{is(errNoAudience), reasonRequest},
	{is(errNotLinked), "not-linked"},
	{is(attest.ErrNotPod), "no-pod"},
	{is(attest.ErrNoAccount), "no-pod"},
	{is(attest.ErrHelperAway), "helper-away"},
	{is(attest.ErrUnknown), "unknown-pod"},
	{is(attest.ErrUnknownCgroup), "unknown-pod"},
	{is(attest.ErrNotRead), "unknown-pod"},
	{is(attest.ErrNoNamespace), "unknown-pod"},
	{is(attest.ErrNamespaceOwner), "unknown-pod"},
	{isOneOf(attest.ErrAmbiguous, attest.ErrChanged, attest.ErrNoSocket, attest.ErrEmptyCgroup, attest.ErrOwner,
		attest.ErrSockets, attest.ErrSpared, attest.ErrOtherNamespace, attest.ErrNoCgroup, attest.ErrPods), "evidence"},
	{as[*kube.AnnotationError], "annotation"},
	{as[*token.LimitError], reasonLimit},
	{as[*kube.ForbiddenError], "kubernetes-refused"},
	{as[*kube.AwayError], "kubernetes-unavailable"},
	{isOneOf(kube.ErrNotConfigured, kube.ErrNoPod, kube.ErrNotFound), "kubernetes-unavailable"},
	{is(token.ErrUnavailable), "google-unavailable"},
	{as[*token.GoogleError], "google-refused"},
}

// everyReason returns all values that reasonOf may return.
func everyReason() []string {
	all := []string{reasonRequest, reasonPassthrough, reasonUnconfigured, reasonLimit, reasonOther}
	for _, r := range reasons {
		all = append(all, r.name)
	}
	return all
}

// reasonOf returns why the request was refused.
func reasonOf(req *request, err error) string {
	var r refusal
	switch {
	case errors.As(err, &r) && r.Metric != "":
		return r.Metric
	case errors.As(err, &r) && req.foreign:
		return reasonPassthrough
	case errors.As(err, &r):
		return reasonRequest
	}
	for _, row := range reasons {
		if row.when(err) {
			return row.name
		}
	}
	return reasonOther
}

func isOneOf(targets ...error) func(error) bool {
	return func(err error) bool {
		for _, t := range targets {
			if errors.Is(err, t) {
				return true
			}
		}
		return false
	}
}
