// Package report has the type of the reports that pods of test-node send: one request and its
// outcome.
package report

import "time"

// Report is one request. A pod sends it with the token that it got. The stand-in for Google, which
// knows the owner of each token, replaces the token by the outcome.
type Report struct {
	Tag       string        `json:"tag"` // names the test that made the pod
	Namespace string        `json:"namespace"`
	Pod       string        `json:"pod"`
	Account   string        `json:"account"` // the pod's ServiceAccount
	Email     string        `json:"email"`   // the linked Google service account; "" = none
	Address   string        `json:"address"` // the source address
	N         int           `json:"n"`       // number of the request, from 0
	At        time.Time     `json:"at"`
	Took      time.Duration `json:"took"`

	Status int    `json:"status"` // 0 = no answer
	Text   string `json:"text"`   // body of a refusal, or why there is no answer
	Token  string `json:"token,omitempty"`

	Outcome  Outcome `json:"outcome"`
	Identity string  `json:"identity"` // ServiceAccount and Google service account behind the token
}

// Outcome is the outcome of a request.
type Outcome string

const (
	OK      Outcome = "ok"      // a token, and it is the pod's own
	Wrong   Outcome = "wrong"   // a token of another pod, or one that Google never issued
	Refused Outcome = "refused" // an HTTP error
	Lost    Outcome = "lost"    // no answer
)
