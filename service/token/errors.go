package token

import (
	"errors"
	"fmt"
	"net/http"
	"time"
)

var (
	// ErrUnavailable: no usable answer could be had of Google, and it is nobody's refusal. To be asked again (T-09).
	ErrUnavailable = errors.New("no usable answer from Google")

	// ErrAccountChanged: the ServiceAccount's annotations are no longer what the asker saw. Read them and ask again.
	ErrAccountChanged = errors.New("the ServiceAccount's annotations have changed")
)

// GoogleError is a refusal in Google's own words (T-07).
type GoogleError struct {
	Step       string        // who refused: "STS" or "IAM"
	Status     int           // the HTTP status
	Message    string        // Google's words, bounded, never with a token in them
	Hint       string        // what to do about it, or ""
	RetryAfter time.Duration // what Google asked for, or 0

	code string // Google's own: "invalid_grant" and the like of STS, "PERMISSION_DENIED" and the like of IAM
	what string // "access token" or "ID token"
}

// Error is what Google's own metadata server says: tools match it (T-07). It ends with the hint.
func (e *GoogleError) Error() string {
	what := e.what
	if what == "" {
		what = "access token"
	}
	s := fmt.Sprintf("Unable to generate %s; %s returned %d %s: %s", what, e.Step, e.Status, http.StatusText(e.Status), e.Message)
	if e.Hint != "" {
		s += " Hint: " + e.Hint
	}
	return s
}

// Temporary reports whether the same request may well succeed later: a quota or Google's own trouble.
func (e *GoogleError) Temporary() bool { return retryable(e.Status) }

// final reports whether Google speaks of what this ServiceAccount may, so that its older token is not to be served any
// more: the Google service account is gone or the binding is (IAM), or the provider's attribute condition turns the
// ServiceAccount away (STS). All else that STS says is of the cluster's keys, the provider or this node's clock, and what
// has no code is a proxy's: it passes, or the operator mends it, and the older token is good until then.
func (e *GoogleError) final() bool {
	switch e.code {
	case "PERMISSION_DENIED", "NOT_FOUND":
		return e.Step == "IAM"
	case "unauthorized_client":
		return e.Step == "STS"
	}
	return false
}

// Unwrap makes a temporary refusal an ErrUnavailable (T-09).
func (e *GoogleError) Unwrap() error {
	if e.Temporary() {
		return ErrUnavailable
	}
	return nil
}

// of returns the error as that of a mint of r.
func (e *GoogleError) of(r Request) *GoogleError {
	c := *e
	c.what = r.what()
	return &c
}

// LimitError: a pod is over one of its limits.
type LimitError struct {
	Limit string // the key of the configuration
	Value int
}

func (e *LimitError) Error() string {
	return fmt.Sprintf("this pod is over limits.%s (%d): ask for fewer different tokens, or have the limit raised", e.Limit, e.Value)
}
