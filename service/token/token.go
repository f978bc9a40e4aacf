// Package token answers one question: which Google token does a ServiceAccount get, and how long is it good for?
//
// A Source mints one: Google does, from the ServiceAccount's own Kubernetes token by way of Google's Security Token
// Service and, for a linked ServiceAccount, IAM Credentials. Cache is a Source in front of a Source.
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

	// defaultScopes is the set that most clients mean, whether they ask for none, for cloud-platform or for both:
	// they share one token, which is the one that is fetched ahead (G-07, E-28).
	defaultScopes = cloudPlatform + " " + userinfoEmail
)

// Request says whose token, and which. It is comparable: it is the cache's key.
// AccessToken and IDToken make one; a literal would miss the normalised scopes.
type Request struct {
	ServiceAccount workload.ServiceAccount
	Account        workload.Account // what the asker saw; a mint reads it again
	Scopes         string           // of an access token: sorted, without repeats, space separated; never ""
	Audience       string           // of an ID token when not ""

	// federated asks for what STS gives for the ServiceAccount itself, whatever its annotations say, so its Account is
	// always zero. It is what impersonation starts from, and the token of a ServiceAccount that is not linked (T-08).
	federated bool
}

// AccessToken asks for an access token. Scopes are normalised (G-07); none means the default ones.
func AccessToken(sa workload.ServiceAccount, a workload.Account, scopes []string) Request {
	return Request{ServiceAccount: sa, Account: a, Scopes: normalise(scopes)}
}

// IDToken asks for an ID token for the audience, which must not be empty.
func IDToken(sa workload.ServiceAccount, a workload.Account, audience string) Request {
	return Request{ServiceAccount: sa, Account: a, Audience: audience}
}

// federatedToken asks STS for a token with the scopes. The default set is cloud-platform alone here: an email scope
// says nothing of a principal without an email, and so all the usual requests of a ServiceAccount share one exchange
// (G-07, G-14).
func federatedToken(sa workload.ServiceAccount, scopes string) Request {
	if scopes == defaultScopes {
		scopes = cloudPlatform
	}
	return Request{ServiceAccount: sa, Scopes: scopes, federated: true}
}

// normalise reads scopes as pods write them: a list with commas or with white space, in one parameter or in many (T-03).
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
	return strings.Join(set, " ")
}

// what names the kind of token in Google's own server's words (T-07).
func (r Request) what() string {
	if r.Audience != "" {
		return "ID token"
	}
	return "access token"
}

// Token is a Google token. Printing or marshalling it in any way does not show Value.
type Token struct {
	Value   string
	Expires time.Time
	Minted  time.Time // when the answer came that held it
}

// Source mints tokens, or knows somebody who does.
type Source interface {
	Token(ctx context.Context, r Request) (Token, error)
}

// Kubernetes is what the minting needs of the cluster.
type Kubernetes interface {
	// Account returns what the annotations of sa say, read again when what is known is older than maxAge.
	Account(ctx context.Context, sa workload.ServiceAccount, maxAge time.Duration) (workload.Account, error)
	// Token returns a new token of sa for Google's audience.
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

// Format is String for every verb: %+v, %#v, %x and %q would print the fields else.
func (t Token) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, t.String()) }

// MarshalText is String.
func (t Token) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// MarshalJSON gives the times alone.
func (t Token) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		Minted  time.Time `json:"minted"`
		Expires time.Time `json:"expires"`
	}{t.Minted, t.Expires})
}
