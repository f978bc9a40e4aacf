package token

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// maxSubject bounds google.subject after the provider's mapping, in bytes (G-06, length of
// google.subject).
const maxSubject = 127

// exchange gets a federated token for sa's Kubernetes token (G-01, token exchange).
func (g *Google) exchange(ctx context.Context, sa workload.ServiceAccount, scopes string) (Token, error) {
	subject, err := g.subjectToken(ctx, sa)
	if err != nil {
		return Token{}, err
	}
	began := time.Now()
	t, err := g.askSTS(ctx, sa, scopes, subject)
	g.metrics.observe(stepSTS, began, err)
	return t, err
}

func (g *Google) askSTS(ctx context.Context, sa workload.ServiceAccount, scopes, subject string) (Token, error) {
	form := url.Values{
		"grant_type":           {"urn:ietf:params:oauth:grant-type:token-exchange"},
		"audience":             {g.o.Audience},
		"scope":                {scopes},
		"requested_token_type": {"urn:ietf:params:oauth:token-type:access_token"},
		"subject_token":        {subject},
		"subject_token_type":   {"urn:ietf:params:oauth:token-type:jwt"},
	}
	header := http.Header{ // without Authorization (G-02, STS takes no credential)
		"Content-Type": {"application/x-www-form-urlencoded"},
		"Accept":       {"application/json"},
	}
	a, err := post(ctx, g.client, g.sts, header, []byte(form.Encode()))
	if err != nil {
		return Token{}, unavailable("STS", err, subject)
	}
	if a.status != http.StatusOK {
		e := a.refusal("STS", subject)
		if e.Status == http.StatusBadRequest && len(sa.Subject()) > maxSubject {
			e.Hint = longSubjectHint(sa)
		}
		return Token{}, e.orUnavailable()
	}
	var got struct {
		AccessToken string  `json:"access_token"`
		ExpiresIn   seconds `json:"expires_in"`
	}
	if json.Unmarshal(a.body, &got) != nil {
		return Token{}, unavailable("STS", errNotJSON)
	}
	return newToken("STS", got.AccessToken, time.Duration(got.ExpiresIn))
}

var (
	errNotJSON  = errors.New("the answer is not the expected JSON")
	errNoToken  = errors.New("the answer holds no usable token")
	errNoExpiry = errors.New("the token has no expiry or has expired: check this node's clock: timedatectl")
	errRedirect = errors.New("the answer is a redirect, and a token goes to the configured host only: correct " +
		"google.stsURL or google.iamCredentialsURL")
)

// newToken checks a token before it is issued to a pod, which sends it in a header.
func newToken(step, value string, lives time.Duration) (Token, error) {
	if !printable(value) {
		return Token{}, unavailable(step, errNoToken)
	}
	if lives <= 0 {
		return Token{}, unavailable(step, errNoExpiry)
	}
	now := time.Now().Round(0) // wall clock: time spent suspended counts
	return Token{Value: value, Minted: now, Expires: now.Add(lives)}, nil
}

// printable reports whether the value can stand in a header.
func printable(value string) bool {
	return value != "" && !strings.ContainsFunc(value, func(r rune) bool { return r <= ' ' || r >= 0x7f })
}

// seconds is a number, or a string of one, as a duration.
type seconds time.Duration

// maxLife is longer than any of Google's tokens lives (12 hours). It bounds arithmetic.
const maxLife = 24 * time.Hour

func (s *seconds) UnmarshalJSON(b []byte) error {
	f, err := strconv.ParseFloat(string(bytes.Trim(b, `"`)), 64)
	if err != nil || f != f {
		return nil // treated as missing
	}
	*s = seconds(max(-1, min(f, maxLife.Seconds())) * float64(time.Second))
	return nil
}

// refusal returns the answer as an error, without the secrets.
func (a answer) refusal(step string, secrets ...string) *GoogleError {
	message, code, reason := refusalMessage(a.body, secrets...)
	return &GoogleError{Step: step, Status: a.status, Message: message, RetryAfter: retryAfter(a.header), code: code,
		reason: reason}
}

// orUnavailable returns e, or for a status below 400 the error of a server that is not Google's.
func (e *GoogleError) orUnavailable() error {
	if e.Status < 400 {
		return unavailable(e.Step, errRedirect)
	}
	return e
}
