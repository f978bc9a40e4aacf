package metadata

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"testing"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

const (
	email     = "app@my-project.iam.gserviceaccount.com"
	principal = "principal://iam.googleapis.com/projects/123456789012/locations/global/workloadIdentityPools/pool/subject/system:serviceaccount:ns:plain"
	secret    = "ya29.secret" // in every answer that holds a credential, and in no other
)

// The two callers of the tests: one is linked to a Google service account, one is not and shows its
// principal (E-25).
var (
	linked = workload.Caller{PodUID: "u1", PodName: "p1", ServiceAccount: workload.ServiceAccount{Namespace: "ns",
		Name: "linked"}}
	unlinked = workload.Caller{PodUID: "u2", PodName: "p2", ServiceAccount: workload.ServiceAccount{Namespace: "ns",
		Name: "plain"}}
)

func emailOf(_ context.Context, q Query) (any, error) {
	switch q.Caller {
	case linked:
		return email, nil
	case unlinked:
		return principal, nil
	}
	return nil, errNobody
}

var errNobody = errors.New("asked without a caller")

// sample is GKE's tree as section 1 of the contract has it, out of order on purpose.
func sample() Node {
	return Node{Open: true, Kids: []Node{{Name: "computeMetadata", Kids: []Node{{Name: "v1", Kids: []Node{
		{Name: "universe", Kids: []Node{{Name: "universe-domain", Get: Value("googleapis.com")}}},
		{Name: "project", Kids: []Node{
			{Name: "project-id", Get: Value("my-project")},
			{Name: "numeric-project-id", Get: Value(json.Number("123456789012"))},
		}},
		{Name: "instance", Kids: []Node{
			{Name: "zone", Get: Value("projects/123456789012/zones/europe-west4-a")},
			{Name: "hostname", Get: Value("node-1.example")},
			{Name: "id", Get: Value(int64(9007199254740993))}, // 2^53 + 1: not a float64
			{Name: "attributes", Verbatim: true, Kids: []Node{
				{Name: "cluster-uid", Get: Value("0a1b")},
				{Name: "cluster-name", Get: Value("prod <&>")},
				{Name: "cluster-location", Get: Value("europe-west4")},
			}},
			{Name: "service-accounts",
				Per: func(ctx context.Context, q Query) ([]string, error) {
					name, err := emailOf(ctx, q)
					if err != nil {
						return nil, err
					}
					return []string{"default", name.(string)}, nil
				},
				Kids: []Node{
					{Name: "token", Secret: true, Get: func(_ context.Context, q Query) (any, error) {
						if q.Caller == (workload.Caller{}) {
							return nil, errNobody
						}
						return Raw{
							Body: []byte(
								fmt.Sprintf(`{"access_token":"%s of %s","expires_in":3599,"token_type":"Bearer"}`, secret, q.Caller),
							),
							ContentType: JSON,
						}, nil
					}},
					{Name: "scopes", Get: Value([]string{"https://www.googleapis.com/auth/cloud-platform",
						"https://www.googleapis.com/auth/userinfo.email"})},
					{Name: "identity", Secret: true, Get: func(_ context.Context, q Query) (any, error) {
						if q.Values.Get("audience") == "" {
							return nil, BadQuery("non-empty audience parameter required")
						}
						return Raw{Body: []byte(secret + "." + q.Values.Get("audience")), ContentType: Text}, nil
					}},
					{Name: "email", Get: emailOf},
					{Name: "aliases", Get: Value([]string{"default"})},
				}},
		}},
	}}}}}}
}

func newTree(t testing.TB, root Node) *Tree {
	t.Helper()
	tree, err := New(root)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// ask does what the server does with a request's path and query.
func ask(t testing.TB, tree *Tree, who workload.Caller, target string) (Match, Answer, error) {
	t.Helper()
	raw, query, _ := strings.Cut(target, "?")
	decoded, err := url.PathUnescape(raw)
	if err != nil {
		t.Fatal(err)
	}
	m := tree.Find(decoded)
	a, err := m.Answer(t.Context(), Query{Caller: who, Values: ParseQuery(query)})
	return m, a, err
}

func TestNewRefuses(t *testing.T) {
	leaf := Value("x")
	per := func(context.Context, Query) ([]string, error) { return nil, nil }
	for _, c := range []struct {
		name string
		root Node
		want string
	}{
		{"a named root", Node{Name: "x"}, `the root has the name "x"`},
		{"a value with something below it", Node{Kids: []Node{{Name: "a", Get: leaf, Kids: []Node{{Name: "b"}}}}},
			"a is a value and a directory"},
		{"two of one name", Node{Kids: []Node{{Name: "a", Get: leaf}, {Name: "a", Get: leaf}}}, `"a" and "a" are both "a"`},
		{"two of one key", Node{Kids: []Node{{Name: "a-b", Get: leaf}, {Name: "aB", Get: leaf}}},
			`"a-b" and "aB" are both "aB"`},
		{"no name", Node{Kids: []Node{{Get: leaf}}}, `below /: "" is not a name`},
		{"dots", Node{Kids: []Node{{Name: "a", Kids: []Node{{Name: "..", Get: leaf}}}}}, `below a/: ".." is not a name`},
		{"a slash", Node{Kids: []Node{{Name: "a/b", Get: leaf}}}, `"a/b" holds a slash`},
		{"a line break", Node{Kids: []Node{{Name: "a\nb", Get: leaf}}}, `holds a space or a control character`},
		{"a secret directory", Node{Kids: []Node{{Name: "a", Secret: true}}},
			"a/ is a directory and cannot be Secret"},
		{"an open dynamic directory", Node{Kids: []Node{{Name: "a", Open: true, Per: per}}},
			"a/ is Open, but Per needs the caller"},
		{"a directory below a dynamic name", Node{Kids: []Node{{Name: "a", Per: per, Kids: []Node{{Name: "b"}}}}},
			"a/*/b is a directory"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := New(c.root)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want it to say %q", err, c.want)
			}
		})
	}
}

func TestCamelCase_H10(t *testing.T) {
	for name, want := range map[string]string{
		"service-accounts": "serviceAccounts", "numeric-project-id": "numericProjectId", "zone": "zone",
		"computeMetadata": "computeMetadata",
		"":                "", "-": "", "a--b": "aB", "0": "0", "universe_domain": "universe_domain",
	} {
		if got := camelCase(name); got != want {
			t.Errorf("%q: got %q, want %q", name, got, want)
		}
	}
}
