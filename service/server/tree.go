package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/metadata"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

const (
	scopeCloudPlatform = "https://www.googleapis.com/auth/cloud-platform"
	scopeEmail         = "https://www.googleapis.com/auth/userinfo.email"

	// maxTokenText bounds an audience, or scopes together: cache and audit trail keep them.
	maxTokenText = 4096 // bytes
)

// NewTree returns what the configuration has pods see. accounts and tokens are asked for the
// caller's own; they may be nil where the Tree is only to be checked. The error says which path of
// extraMetadata is in the way of what GKE serves.
func NewTree(c config.Config, accounts Accounts, tokens Tokens) (*metadata.Tree, error) {
	root, err := tree(c, identity{accounts, tokens, c.EmailForUnlinked, c.WorkloadIdentity.PoolName})
	if err != nil {
		return nil, err
	}
	return metadata.New(root)
}

// Accounts reads what the annotations of a ServiceAccount say; with maxAge < 0 any age will do.
type Accounts interface {
	Account(ctx context.Context, sa workload.ServiceAccount, maxAge time.Duration) (workload.Account, error)
}

// Tokens returns tokens. caller is whom what they cost counts for.
type Tokens interface {
	Ask(ctx context.Context, caller string, r token.Request) (token.Token, error)
}

// tree is what GKE's metadata server serves, and nothing more (E-13), but for what the operator
// added. A value that is not configured is not there at all: clients take a mere 200 for an answer
// (E-16).
func tree(c config.Config, identity identity) (metadata.Node, error) {
	root := metadata.Node{Open: true, Kids: []metadata.Node{ // E-02: / waits for nobody
		{Name: "computeMetadata", Kids: []metadata.Node{
			{Name: "v1", Kids: []metadata.Node{
				{Name: "instance", Kids: present(
					metadata.Node{Name: "attributes", Verbatim: true, Kids: present( // E-15
						value("cluster-location", c.Cluster.Location),
						value("cluster-name", c.Cluster.Name),
						value("cluster-uid", c.Cluster.UID),
					)},
					value("hostname", c.Instance.Hostname),
					number("id", c.Instance.ID),
					value("name", c.Instance.Name), // E-12
					metadata.Node{Name: "service-accounts", Per: identity.names, Each: "default", Kids: []metadata.Node{
						{Name: "aliases", Get: metadata.Value([]string{"default"})},                     // E-27
						{Name: "email", Get: identity.email},                                            // E-23, E-24, E-25
						{Name: "identity", Get: identity.idToken, Secret: true},                         // I-
						{Name: "scopes", Get: metadata.Value([]string{scopeCloudPlatform, scopeEmail})}, // E-28
						{Name: "token", Get: identity.accessToken, Secret: true},                        // T-
					}},
					value("zone", zone(c)), // E-11
				)},
				{Name: "project", Kids: present(
					number("numeric-project-id", c.Project.Number), // E-07
					value("project-id", c.Project.ID),              // E-06
				)},
				{Name: "universe", Kids: []metadata.Node{
					value("universe-domain", c.Google.UniverseDomain), // E-30
				}},
			}},
		}},
	}}
	for _, path := range slices.Sorted(maps.Keys(c.ExtraMetadata)) { // U-17
		var err error
		if root, err = metadata.Graft(root, "computeMetadata/v1/"+path, metadata.Value(c.ExtraMetadata[path])); err != nil {
			return metadata.Node{}, err
		}
	}
	return root, nil
}

// unconfigured is the tree while there is no configuration.
func unconfigured() metadata.Node {
	return metadata.Node{Open: true, Kids: []metadata.Node{{Name: "computeMetadata", Kids: []metadata.Node{}}}}
}

func present(nodes ...metadata.Node) []metadata.Node {
	return slices.DeleteFunc(nodes, func(n metadata.Node) bool { return n.Name == "" })
}

func value(name, v string) metadata.Node {
	if v == "" {
		return metadata.Node{}
	}
	return metadata.Node{Name: name, Get: metadata.Value(v)}
}

// number serves decimal digits that are a number in JSON (H-10).
func number(name, digits string) metadata.Node {
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil {
		return metadata.Node{} // config has checked it: "" it is
	}
	return metadata.Node{Name: name, Get: metadata.Value(n)}
}

// zone is the full path: fluent-bit counts its slashes, .NET parses it (E-11).
func zone(c config.Config) string {
	if c.Instance.Zone == "" {
		return ""
	}
	return "projects/" + c.Project.Number + "/zones/" + c.Instance.Zone
}

// identity serves instance/service-accounts/: the caller's own account, under two names.
type identity struct {
	accounts      Accounts
	tokens        Tokens
	unlinkedEmail string // E-24
	poolName      string // for E-25; "" where the provider has no principals of that form
}

// anyAge: what is known of an account's annotations is good enough to be listed (H-21).
const anyAge = -1

func (a identity) known(ctx context.Context, q metadata.Query) (workload.Account, error) {
	return a.accounts.Account(ctx, q.Caller.ServiceAccount, anyAge)
}

// names are the two names of the caller's account (E-18, E-22). Names that are not the caller's do
// not exist for it.
func (a identity) names(ctx context.Context, q metadata.Query) ([]string, error) {
	acct, err := a.known(ctx, q)
	if err != nil {
		return nil, err
	}
	return []string{"default", a.emailOf(q.Caller, acct)}, nil
}

func (a identity) email(ctx context.Context, q metadata.Query) (any, error) {
	acct, err := a.known(ctx, q)
	if err != nil {
		return nil, err
	}
	return a.emailOf(q.Caller, acct), nil
}

func (a identity) emailOf(c workload.Caller, acct workload.Account) string {
	switch {
	case acct.Linked():
		return acct.GoogleEmail // E-23
	case acct.PrincipalAsEmail && a.poolName != "":
		return "principal://iam.googleapis.com/" + a.poolName + "/subject/" + c.ServiceAccount.Subject() // E-25
	default:
		return a.unlinkedEmail // E-24
	}
}

// accessToken answers in the three fields of these types that C++, Rust and Java insist on (T-01).
func (a identity) accessToken(ctx context.Context, q metadata.Query) (any, error) {
	scopes := q.Values["scopes"] // T-03
	if n := len(strings.Join(scopes, " ")); n > maxTokenText {
		return nil, metadata.BadQuery("scopes of %d bytes: at most %d are accepted", n, maxTokenText)
	}
	t, of, err := a.issue(ctx, q, func(acct workload.Account) (token.Request, error) {
		return token.AccessToken(q.Caller.ServiceAccount, acct, scopes), nil
	})
	if err != nil {
		return nil, err
	}
	// T-02: rounded down, never 0 or negative.
	body := accessTokenJSON(t.Value, max(1, int64(time.Until(t.Expires)/time.Second)))
	return metadata.Raw{ContentType: metadata.JSON, Body: body, Issued: of}, nil
}

func accessTokenJSON(value string, seconds int64) []byte {
	b := make([]byte, 0, len(value)+96)
	b = append(b, `{"access_token":`...)
	b = appendJSON(b, value)
	b = append(b, `,"expires_in":`...)
	b = strconv.AppendInt(b, seconds, 10)
	return append(b, `,"token_type":"Bearer"}`...)
}

// appendJSON appends the JSON form of a token. Google's are made of characters that stand for
// themselves; package json sees to one that is not, at many times the cost.
func appendJSON(b []byte, s string) []byte {
	for i := range len(s) {
		if !plain[s[i]] {
			quoted, err := json.Marshal(s)
			if err != nil {
				panic("a string is always JSON") // and without the token
			}
			return append(b, quoted...)
		}
	}
	return append(append(append(b, '"'), s...), '"')
}

// plain are the characters of JWTs and of Google's opaque tokens.
var plain = func() (t [256]bool) {
	for _, c := range "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~+/=" {
		t[c] = true
	}
	return t
}()

// idToken answers with the bare JWT, as application/text without a charset: Ruby compares strings
// (I-01).
func (a identity) idToken(ctx context.Context, q metadata.Query) (any, error) {
	audience := q.Values.Get("audience")
	if audience == "" {
		return nil, errNoAudience
	}
	if len(audience) > maxTokenText {
		return nil, metadata.BadQuery("audience of %d bytes: at most %d are accepted", len(audience), maxTokenText)
	}
	t, of, err := a.issue(ctx, q, func(acct workload.Account) (token.Request, error) {
		if !acct.Linked() {
			return token.Request{},
				fmt.Errorf("ServiceAccount %s is %w, which ID tokens need: add the annotation "+
					"iam.gke.io/gcp-service-account",
					q.Caller.ServiceAccount, errNotLinked) // I-04
		}
		return token.IDToken(q.Caller.ServiceAccount, acct, audience), nil
	})
	if err != nil {
		return nil, err
	}
	return metadata.Raw{ContentType: metadata.Text, Body: []byte(t.Value), Issued: of}, nil
}

// issue asks for the token that the caller's annotations lead to. A mint reads them again; when
// they changed since they were listed, it is asked once more with what it found.
func (a identity) issue(
	ctx context.Context, q metadata.Query, requestOf func(workload.Account) (token.Request, error),
) (token.Token, issued, error) {
	for again := false; ; again = true {
		acct, err := a.known(ctx, q)
		if err != nil {
			return token.Token{}, issued{}, err
		}
		r, err := requestOf(acct)
		if err != nil {
			return token.Token{}, issued{}, err
		}
		t, err := a.tokens.Ask(ctx, q.Caller.ID(), r)
		if errors.Is(err, token.ErrAccountChanged) && !again {
			continue
		}
		return t, issued{r, t.Expires}, err
	}
}
