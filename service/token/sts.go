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

// longestSubject is what google.subject may be long, in bytes, after the provider's mapping (G-06).
const longestSubject = 127

// exchange gets the federated token of sa for its Kubernetes token (G-01).
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
	header := http.Header{ // no Authorization (G-02)
		"Content-Type": {"application/x-www-form-urlencoded"},
		"Accept":       {"application/json"},
	}
	a, err := post(ctx, g.client, g.sts, header, []byte(form.Encode()))
	if err != nil {
		return Token{}, unavailable("STS", err, subject)
	}
	if a.status != http.StatusOK {
		e := a.refusal("STS", subject)
		if e.Status == http.StatusBadRequest && len(sa.Subject()) > longestSubject {
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
	errNotJSON  = errors.New("its answer is not the JSON that was expected")
	errNoToken  = errors.New("its answer holds no token that could be used")
	errNoExpiry = errors.New("its answer does not say how long the token lives, or says that it has expired; is the clock right?")
	errRedirect = errors.New("it answered with a redirect, which is not followed: a token goes to the configured host only")
)

// newToken checks what is about to be handed to a pod: it is going to stand in a header there.
func newToken(step, value string, lives time.Duration) (Token, error) {
	if !printable(value) {
		return Token{}, unavailable(step, errNoToken)
	}
	if lives <= 0 {
		return Token{}, unavailable(step, errNoExpiry)
	}
	now := time.Now().Round(0) // by the clock on the wall: the monotonic one stands still while the machine is suspended, and the token's life does not
	return Token{Value: value, Minted: now, Expires: now.Add(lives)}, nil
}

// printable reports whether the value can stand in a header.
func printable(value string) bool {
	return value != "" && !strings.ContainsFunc(value, func(r rune) bool { return r <= ' ' || r >= 0x7f })
}

// seconds is a number, or a string of one, as a duration.
type seconds time.Duration

// longestLife is more than any of Google's tokens lives (12 hours): what is longer is cut, so that nothing overflows.
const longestLife = 24 * time.Hour

func (s *seconds) UnmarshalJSON(b []byte) error {
	f, err := strconv.ParseFloat(string(bytes.Trim(b, `"`)), 64)
	if err != nil || f != f {
		return nil // as if it were missing
	}
	*s = seconds(max(-1, min(f, longestLife.Seconds())) * float64(time.Second))
	return nil
}

// refusal is a without a token in it.
func (a answer) refusal(step string, secrets ...string) *GoogleError {
	message, code := words(a.body, secrets...)
	return &GoogleError{Step: step, Status: a.status, Message: message, RetryAfter: retryAfter(a.header), code: code}
}

// orUnavailable returns the refusal, or what an answer is that Google would not give: a redirect, a 200 without sense.
func (e *GoogleError) orUnavailable() error {
	if e.Status < 400 {
		return unavailable(e.Step, errRedirect)
	}
	return e
}
