// Package report is what a pod of the node ring says of one request, and what became of it.
package report

import "time"

// Report is one request. A pod sends it with the token that it got. The world, which knows whose
// each token is, puts the outcome in the token's place.
type Report struct {
	Tag       string        `json:"tag"` // of the test that made the pod
	Namespace string        `json:"namespace"`
	Pod       string        `json:"pod"`
	Account   string        `json:"account"` // the pod's ServiceAccount
	Email     string        `json:"email"`   // the linked Google service account; "" = none
	Address   string        `json:"address"` // that it asked from
	N         int           `json:"n"`       // the pod's first request is 0
	At        time.Time     `json:"at"`
	Took      time.Duration `json:"took"`

	Status int    `json:"status"` // 0 = no answer
	Text   string `json:"text"`   // of a refusal, or why there is no answer
	Token  string `json:"token,omitempty"`

	Outcome Outcome `json:"outcome"`
	Whose   string  `json:"whose"` // ServiceAccount and Google service account behind the token
}

// Outcome is what became of a request.
type Outcome string

const (
	OK      Outcome = "ok"      // a token, and it is the pod's own
	Wrong   Outcome = "wrong"   // a token of somebody else, or one that Google never issued
	Refused Outcome = "refused" // an HTTP error
	Lost    Outcome = "lost"    // no answer
)
