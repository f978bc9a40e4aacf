package token

import (
	"errors"
	"fmt"
	"net/http"
	"time"
)

var (
	// ErrUnavailable: Google did not give a usable answer, and did not refuse. The caller may try
	// again (T-09, temporary errors).
	ErrUnavailable = errors.New("no usable answer from Google")

	// ErrAccountChanged: the ServiceAccount's annotations differ from Request.Account. The caller
	// reads them and asks again.
	ErrAccountChanged = errors.New("the ServiceAccount's annotations have changed")
)

// lateError is an ErrUnavailable of a mint that ended before its last step: perhaps Google was
// never asked.
type lateError struct{ err error }

func (e *lateError) Error() string   { return "no new token in time: " + e.err.Error() }
func (e *lateError) Unwrap() []error { return []error{ErrUnavailable, e.err} }

// GoogleError is a refusal with Google's message (T-07, texts of refusals).
type GoogleError struct {
	Step       string        // the service that refused: "STS" or "IAM"
	Status     int           // the HTTP status
	Message    string        // Google's message, of bounded length and without any token
	Hint       string        // what to do, or ""
	RetryAfter time.Duration // Google's Retry-After, or 0

	code   string // Google's code: of STS such as "invalid_grant", of IAM such as "PERMISSION_DENIED"
	reason string // what IAM says beside the code, such as "SERVICE_DISABLED"; it is compared, and never shown
	what   string // "access token" or "ID token"
}

// Error returns the text of Google's own metadata server, which tools match (T-07, texts of
// refusals), and then the hint.
func (e *GoogleError) Error() string {
	what := e.what
	if what == "" {
		what = "access token"
	}
	s := fmt.Sprintf("Unable to generate %s; %s returned %d %s: %s", what, e.Step, e.Status, http.StatusText(e.Status),
		e.Message)
	if e.Hint != "" {
		s += " Hint: " + e.Hint
	}
	return s
}

// Temporary reports whether the same request may succeed later: a quota, or an error of Google's
// own.
func (e *GoogleError) Temporary() bool { return retryable(e.Status) }

// final reports whether the refusal is about this ServiceAccount's rights, so that an older token
// must not be served. Then IAM says that the Google service account or its binding is gone, or STS
// says that the provider's attribute condition excludes the ServiceAccount.
//
// All other refusals of STS are about the cluster's keys, the provider or this node's clock. A
// refusal without a code is a proxy's. Such errors pass, or the operator corrects them, and an
// older token stays usable until then.
func (e *GoogleError) final() bool {
	switch e.code {
	case "PERMISSION_DENIED", "NOT_FOUND":
		return e.Step == "IAM"
	case "unauthorized_client":
		return e.Step == "STS"
	}
	return false
}

// Unwrap makes a temporary refusal an ErrUnavailable (T-09, temporary errors).
func (e *GoogleError) Unwrap() error {
	if e.Temporary() {
		return ErrUnavailable
	}
	return nil
}

// of returns the error as an error of a mint of r.
func (e *GoogleError) of(r Request) *GoogleError {
	c := *e
	c.what = r.what()
	return &c
}

// LimitError: a pod is at one of its limits.
type LimitError struct {
	Limit string // the configuration key below limits
	Value int
}

func (e *LimitError) Error() string {
	return fmt.Sprintf("this pod has reached limits.%s (%d): request fewer different tokens, or raise limits.%[1]s",
		e.Limit, e.Value)
}
