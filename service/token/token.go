// Package token answers one question: which Google token does a ServiceAccount get, and how long is
// it usable?
//
// A Source mints tokens. Google is a Source: it exchanges the ServiceAccount's Kubernetes token at
// Google's Security Token Service (STS) and, for a linked ServiceAccount, the result at IAM
// Credentials. Cache is a Source in front of a Source.
package token

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

const (
	cloudPlatform = "https://www.googleapis.com/auth/cloud-platform"
	userinfoEmail = "https://www.googleapis.com/auth/userinfo.email"

	// defaultScopes stand for no scope, for cloud-platform and for both scopes: most clients ask for
	// one of these. They share one token, which is prefetched (G-07, limits of STS; E-28, scopes).
	defaultScopes = cloudPlatform + " " + userinfoEmail
)

// Request identifies a token. It is comparable and is the key of the cache. AccessToken and IDToken
// make one, since a literal would lack the normalised scopes.
type Request struct {
	ServiceAccount workload.ServiceAccount
	Account        workload.Account // as the caller read it; a mint reads it again
	Scopes         string           // of an access token: sorted, without repeats, space separated; never ""
	Audience       string           // not "": an ID token for this audience

	// federated requests STS's token for the ServiceAccount itself, whatever its annotations say, so
	// its Account is zero. Impersonation starts from this token, and an unlinked ServiceAccount gets
	// it (T-08, unlinked accounts).
	federated bool
}

// AccessToken returns the Request for an access token. Scopes are normalised (G-07, limits of STS);
// no scope means the default ones.
func AccessToken(sa workload.ServiceAccount, a workload.Account, scopes []string) Request {
	return Request{ServiceAccount: sa, Account: a, Scopes: normalise(scopes)}
}

// IDToken returns the Request for an ID token for the audience, which must not be empty.
func IDToken(sa workload.ServiceAccount, a workload.Account, audience string) Request {
	// A copy, since the text is a part of a whole query, which it would keep in memory.
	return Request{ServiceAccount: sa, Account: a, Audience: strings.Clone(audience)}
}

// federatedToken returns the Request for STS's token with the scopes. Here the default set is
// cloud-platform alone, since a principal without an email needs no email scope. So all usual
// requests of a ServiceAccount share one exchange (G-07, limits of STS; G-14, scope of the
// exchange).
func federatedToken(sa workload.ServiceAccount, scopes string) Request {
	if scopes == defaultScopes {
		scopes = cloudPlatform
	}
	return Request{ServiceAccount: sa, Scopes: scopes, federated: true}
}

// normalise reads scopes as pods write them: separated by commas or white space, in one parameter
// or in several (T-03, scopes).
func normalise(scopes []string) string {
	var set []string
	for _, s := range scopes {
		set = append(set, strings.FieldsFunc(s, func(r rune) bool { return r == ',' || unicode.IsSpace(r) })...)
	}
	slices.Sort(set)
	set = slices.Compact(set)
	if len(set) == 0 || len(set) == 1 && set[0] == cloudPlatform {
		return defaultScopes
	}
	return strings.Clone(strings.Join(set, " ")) // as in IDToken; of one scope Join makes no copy
}

// what names the kind of token as Google's own server does (T-07, texts of refusals).
func (r Request) what() string {
	if r.Audience != "" {
		return "ID token"
	}
	return "access token"
}

// Token is a Google token. No way of printing or marshalling it shows Value.
type Token struct {
	Value   string
	Expires time.Time
	Minted  time.Time // when the answer arrived
}

// Source returns tokens, newly minted or cached.
type Source interface {
	Token(ctx context.Context, r Request) (Token, error)
}

// Kubernetes is the part of the cluster that minting needs.
type Kubernetes interface {
	// Account returns what sa's annotations say. A value older than maxAge is read again.
	Account(ctx context.Context, sa workload.ServiceAccount, maxAge time.Duration) (workload.Account, error)
	// Token returns a new Kubernetes token of sa for Google's audience.
	Token(ctx context.Context, sa workload.ServiceAccount) (string, error)
}

// String says when the token expires, and nothing else.
func (t Token) String() string {
	if t.Value == "" {
		return "no token"
	}
	return "token (expires " + t.Expires.UTC().Format(time.RFC3339) + ")"
}

// GoString is String.
func (t Token) GoString() string { return t.String() }

// Format is String for every verb: without it %+v, %#v, %x and %q would print Value.
func (t Token) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, t.String()) }

// MarshalText is String.
func (t Token) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// MarshalJSON returns the times only.
func (t Token) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		Minted  time.Time `json:"minted"`
		Expires time.Time `json:"expires"`
	}{t.Minted, t.Expires})
}
