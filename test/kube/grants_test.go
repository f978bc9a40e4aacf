package kube_test

import (
	"errors"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/test/api"
)

// grants are a shipped manifest: a ClusterRole and its binding. The zero value grants nothing.
type grants struct {
	role, binding map[string]any
	rules         []rule
}

// rule is one verb on one resource: the unit that the tests revoke.
type rule struct{ verb, resource string }

func (r rule) String() string { return r.verb + " " + r.resource }

const (
	placeholderAudience = "//iam.googleapis.com/projects/NUMBER/locations/global/workloadIdentityPools/POOL/providers/PROVIDER"
	audienceVerb        = "request-serviceaccounts-token-audience"
)

// load reads a manifest of packaging/, with the audience of the cases in place of the placeholder.
// Optional lines, which are comments in the file, are uncommented.
func load(t *testing.T, file string, optional ...string) *grants {
	t.Helper()
	if file == "" {
		return new(grants)
	}
	b, err := os.ReadFile("../../packaging/" + file)
	if err != nil {
		t.Fatal(err)
	}
	text := strings.ReplaceAll(string(b), placeholderAudience, kubetest.CaseAudience)
	for _, line := range optional {
		if !strings.Contains(text, "\n# "+line) {
			t.Fatalf("%s has no optional line %s", file, line)
		}
		text = strings.Replace(text, "\n# "+line, "\n"+line, 1)
	}
	g := parse(t, text)
	if g.role == nil || g.binding == nil || len(g.rules) == 0 {
		t.Fatalf("%s has no ClusterRole with rules, or no ClusterRoleBinding", file)
	}
	return g
}

func parse(t *testing.T, manifest string) *grants {
	t.Helper()
	g := new(grants)
	for d := yaml.NewDecoder(strings.NewReader(manifest)); ; {
		var o map[string]any
		err := d.Decode(&o)
		switch {
		case errors.Is(err, io.EOF):
			return g
		case err != nil:
			t.Fatalf("%v in\n%s", err, manifest)
		case o["kind"] == "ClusterRole":
			g.role, g.rules = o, rulesOf(o)
		case o["kind"] == "ClusterRoleBinding":
			g.binding = o
		default:
			t.Fatalf("the manifest has a %v, which this test cannot apply", o["kind"])
		}
	}
}

func rulesOf(role map[string]any) (rs []rule) {
	for _, r := range role["rules"].([]any) {
		r := r.(map[string]any)
		for _, resource := range r["resources"].([]any) {
			for _, verb := range r["verbs"].([]any) {
				rs = append(rs, rule{verb.(string), resource.(string)})
			}
		}
	}
	return rs
}

func path(o map[string]any) string {
	plural := strings.ToLower(o["kind"].(string)) + "s"
	return "/apis/rbac.authorization.k8s.io/v1/" + plural + "/" + o["metadata"].(map[string]any)["name"].(string)
}

// apply is `kubectl apply --server-side`.
func (g *grants) apply(t *testing.T) {
	t.Helper()
	for _, o := range []map[string]any{g.role, g.binding} {
		if o == nil {
			continue
		}
		if err := theCluster.admin.Patch(t.Context(), path(o)+"?fieldManager=test&force=true", api.Apply, o); err != nil {
			t.Fatal(err)
		}
	}
}

func (g *grants) remove(t *testing.T) {
	t.Helper()
	for _, o := range []map[string]any{g.role, g.binding} {
		if o == nil {
			continue
		}
		if err := theCluster.admin.Delete(t.Context(), path(o), nil); err != nil {
			t.Error(err)
		}
	}
}

// without returns the manifest without one rule.
func (g *grants) without(gone rule) *grants {
	rules := []any{}
	for _, r := range g.rules {
		if r != gone {
			rules = append(
				rules,
				map[string]any{"apiGroups": []string{""}, "resources": []string{r.resource}, "verbs": []string{r.verb}},
			)
		}
	}
	less := *g
	less.role = maps.Clone(g.role)
	less.role["rules"] = rules
	return &less
}

// unbound returns the manifest with a binding that names nobody.
func (g *grants) unbound() *grants {
	less := *g
	less.binding = maps.Clone(g.binding)
	less.binding["subjects"] = []any{}
	return &less
}

// subject is the name in the manifest's binding.
func (g *grants) subject() string {
	return g.binding["subjects"].([]any)[0].(map[string]any)["name"].(string)
}

// tried has, for each rule, the step of kube.Try, which doctor uses, that fails without the rule.
// No step needs the watch of ServiceAccounts: without it annotations are read at intervals.
var tried = map[rule]func(kube.Attempt) error{
	{"list", "pods"}:                      func(a kube.Attempt) error { return a.List },
	{"watch", "pods"}:                     func(a kube.Attempt) error { return a.Watch },
	{"get", "serviceaccounts"}:            func(a kube.Attempt) error { return a.Get },
	{"watch", "serviceaccounts"}:          nil,
	{"create", "serviceaccounts/token"}:   func(a kube.Attempt) error { return a.Mint },
	{audienceVerb, kubetest.CaseAudience}: func(a kube.Attempt) error { return a.Mint },
}

// TestGrants revokes each rule of the shipped manifests, one at a time. Each time at least one case
// must get another answer, otherwise the rule is superfluous. The stand-in must give the same
// answers as the real server, and doctor must name the rule. With all rules no step of doctor may
// fail, otherwise a rule is missing.
func TestGrants(t *testing.T) {
	for _, id := range identities {
		if id.manifest == "" {
			continue
		}
		t.Run(id.manifest, func(t *testing.T) {
			all := load(t, id.manifest)
			cases := casesOf(t, id.name)
			target := theCluster.target(t, id.credential)
			server, stand := standIn(t, id.credential)
			if id.manifest == "rbac.yaml" {
				server.GrantAudience(kubetest.CaseAudience)
			}
			all.apply(t)
			defer all.remove(t)
			settle(t, target, cases)
			t.Run("with all", func(t *testing.T) {
				a := attempt(t, id.credential)
				if err := errors.Join(a.Reach, a.List, a.Watch, a.Get, a.Mint); err != nil {
					t.Errorf("with all rules of %s: %v", id.manifest, err)
				}
				if a.Pod == "" || !a.Account.Linked() {
					t.Errorf("kube.Try used the pod %q, linked: %v; want a linked pod", a.Pod, a.Account.Linked())
				}
			})
			for _, r := range all.rules {
				t.Run("without "+r.String(), func(t *testing.T) {
					server.Revoke(all.subject(), r.verb, r.resource)
					defer server.Allow(all.subject(), r.verb, r.resource)
					all.without(r).apply(t)
					defer all.apply(t)
					compare(t, cases, target, stand)
					step, known := tried[r]
					switch {
					case !known:
						t.Errorf("the table tried has no entry for %s: add the step that fails without it", r)
					case step != nil:
						namesMissing(t, step(attempt(t, id.credential)), r)
					}
				})
			}
			t.Run("without the subject", func(t *testing.T) {
				for _, r := range all.rules {
					server.Revoke(all.subject(), r.verb, r.resource)
				}
				all.unbound().apply(t)
				compare(t, cases, target, stand)
			})
		})
	}
}

// TestOptionalGrants uncomments the optional lines of rbac.yaml: the API server accepts them, and
// they grant what their comments say.
func TestOptionalGrants(t *testing.T) {
	g := load(t, "rbac.yaml", `- {apiGroups: [""], resources: ["serviceaccounts"], verbs: ["get"]}`,
		`- {apiGroups: [""], resources: ["serviceaccounts"], verbs: ["watch"]}`)
	server, stand := standIn(t, nodeCredential)
	server.GrantAudience(kubetest.CaseAudience)
	server.GrantServiceAccountWatch()
	server.Allow(g.subject(), "get", "serviceaccounts")
	g.apply(t)
	defer g.remove(t)
	changed := compare(t, casesOf(t, "node+audience"), theCluster.target(t, nodeCredential), stand)
	for _, want := range []string{"watch ns1/serviceaccounts fields=metadata.name=ksa",
		"get ns1/serviceaccounts/ksa-unused"} {
		if !slices.ContainsFunc(changed, func(c kubetest.Case) bool { return c.Ask == want }) {
			t.Errorf("%s: the optional lines do not change the answer", want)
		}
	}
}

// compare sends the cases to both servers. Their answers must be the same, and some must differ
// from the table. It returns the cases that differ.
func compare(t *testing.T, cases []kubetest.Case, target, stand kubetest.Target) (changed []kubetest.Case) {
	t.Helper()
	want := make([]string, len(cases))
	for i, c := range cases {
		if want[i] = answer(t, c, stand); want[i] != c.Want {
			changed = append(changed, c)
		}
	}
	if len(changed) == 0 {
		t.Error("no case gets another answer than with all rules: the rule is superfluous")
		return nil
	}
	// The real server's authorizer sees the change by a watch.
	first := slices.IndexFunc(cases, func(c kubetest.Case) bool { return c == changed[0] })
	poll(t, func() bool { return answer(t, cases[first], target) == want[first] })
	for i, c := range cases {
		if got := answer(t, c, target); got != want[i] {
			t.Errorf("%s: the servers' answers differ\nreal     %s\nstand-in %s", c.Ask, got, want[i])
		}
	}
	t.Logf("%d cases get another answer, the first: %s => %s", len(changed), changed[0].Ask, want[first])
	return changed
}

// attempt runs the steps to a pod's token, as doctor does.
func attempt(t *testing.T, credential string) kube.Attempt {
	t.Helper()
	a, _ := kube.Try(
		t.Context(),
		kube.Options{Kubeconfig: theCluster.Kubeconfig(credential), NodeName: "node1", Audience: kubetest.CaseAudience},
	)
	return a
}

// namesMissing checks that the error names the rule, and that its manifest grants the rule.
func namesMissing(t *testing.T, err error, r rule) {
	t.Helper()
	var f *kube.ForbiddenError
	if !errors.As(err, &f) {
		t.Errorf("without %s doctor reports no missing grant: %v", r, err)
		return
	}
	if f.Verb != r.verb || f.Resource != r.resource {
		t.Errorf("without %s doctor names %s %s", r, f.Verb, f.Resource)
	}
	if !slices.Contains(parse(t, f.Manifest()).rules, r) {
		t.Errorf("doctor's manifest for %s does not grant it:\n%s", r, f.Manifest())
	}
}
