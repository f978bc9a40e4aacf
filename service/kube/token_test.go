package kube

import (
	"context"
	"errors"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"go.yaml.in/yaml/v3"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// bound is what matters of a token.
type bound struct {
	jwt.Claims
	K struct {
		Pod  *object `json:"pod"`
		Node *object `json:"node"`
	} `json:"kubernetes.io"`
}

type object struct {
	Name string `json:"name"`
	UID  string `json:"uid"`
}

func claims(t *testing.T, s *kubetest.Server, token string) bound {
	t.Helper()
	p, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.RS256})
	if err != nil {
		t.Fatal("not a JWT")
	}
	var c bound
	if err := p.Claims(s.JWKS(), &c); err != nil {
		t.Fatal(err)
	}
	return c
}

// N-04, G-17: audience, subject, one hour, bound to a live pod by name and UID.
func TestToken(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	s.GrantAudience(provider)
	b := run(t, s, nil)
	uid := b.at(t, "10.1.0.11", "p1")[0].PodUID
	v, err := b.Token(t.Context(), ksa)
	if err != nil {
		t.Fatal(err)
	}
	c := claims(t, s, v)
	if c.Subject != ksa.Subject() || len(c.Audience) != 1 || c.Audience[0] != provider || c.Issuer != s.Issuer() {
		t.Errorf("claims %+v", c.Claims)
	}
	if life := c.Expiry.Time().Sub(c.IssuedAt.Time()); life != time.Hour {
		t.Errorf("lives %v (N-09: never 3607 s)", life)
	}
	if c.K.Pod == nil || c.K.Pod.Name != "p1" || c.K.Pod.UID != uid || c.K.Node == nil || c.K.Node.Name != "node1" {
		t.Errorf("bound to %+v", c.K)
	}
}

// A running pod is preferred to a starting one, and either to one that terminates; ended ones are
// no candidates (N-04).
func TestTokenIsBoundToTheBestPod(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	s.GrantAudience(provider)
	set := func(name, phase string, terminating, ended bool) {
		s.SetPod(kubetest.Pod{Namespace: "ns1", Name: name, Node: "node1", ServiceAccount: "ksa", Phase: phase,
			Terminating: terminating, Ended: ended})
	}
	set("p1", "Succeeded", false, true)
	set("a-leaving", "Running", true, false)
	set("b-starting", "Pending", false, false)
	set("c-running", "Running", false, false)
	b := run(t, s, nil)
	for _, want := range []string{"c-running", "b-starting", "a-leaving"} {
		until(t, want, func() bool {
			v, err := b.Token(t.Context(), ksa)
			return err == nil && claims(t, s, v).K.Pod.Name == want
		})
		s.DeletePod("ns1", want)
	}
	until(t, "nobody", func() bool { _, err := b.Token(t.Context(), ksa); return errors.Is(err, ErrNoPod) })
}

// N-07, N-08: the pod went away and the watch has not said so yet. Another pod of the
// ServiceAccount will do.
func TestTokenWhenThePodIsGone(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*kubetest.Server)
	}{
		{"deleted", func(s *kubetest.Server) { s.DeletePod("ns1", "p1") }},
		{"made again", func(s *kubetest.Server) {
			s.DeletePod("ns1", "p1")
			s.SetPod(kubetest.Pod{Namespace: "ns1", Name: "p1", Node: "node1", ServiceAccount: "ksa"})
		}},
		{"made again elsewhere", func(s *kubetest.Server) {
			s.DeletePod("ns1", "p1")
			s.SetPod(kubetest.Pod{Namespace: "ns1", Name: "p1", Node: "node2", ServiceAccount: "ksa"})
		}},
		{"made again as somebody else", func(s *kubetest.Server) {
			s.DeletePod("ns1", "p1")
			s.SetPod(kubetest.Pod{Namespace: "ns1", Name: "p1", Node: "node1", ServiceAccount: "other"})
		}},
	} {
		for _, identity := range []string{"node", "dedicated"} {
			t.Run(c.name+", "+identity, func(t *testing.T) {
				s := newServer(t, kubetest.Options{})
				s.GrantAudience(provider)
				s.SetPod(kubetest.Pod{Namespace: "ns1", Name: "p2", Node: "node1", ServiceAccount: "ksa", Phase: "Pending"})
				b := run(t, s, func(b *testNode, o *Options) {
					if identity == "dedicated" {
						s.AddUser("gke-metadata-emulator", "dedicated-secret")
						o.NodeName, o.Kubeconfig = "node1", filepath.Join(b.dir, "conf")
						write(t, o.Kubeconfig, must(t)(s.TokenKubeconfig("dedicated-secret")))
					}
				})
				b.at(t, "10.1.0.11", "p1")
				// The watch says nothing more, so the index goes on believing in p1.
				t.Cleanup(s.Inject(kubetest.Fault{Verb: "watch", Resource: "pods", Hold: make(chan struct{})}))
				s.DropWatches()
				until(t, "the watch to hang", func() bool { return !b.pods.watching.Load() })
				c.change(s)
				v, err := b.Token(t.Context(), ksa)
				if err != nil {
					t.Fatal(err)
				}
				if p := claims(t, s, v).K.Pod.Name; p != "p2" {
					t.Errorf("bound to %s", p)
				}
				s.DeletePod("ns1", "p2")
				if _, err := b.Token(t.Context(), ksa); !errors.Is(err, ErrNoPod) {
					t.Errorf("with no pod left: %v", err)
				}
			})
		}
	}
}

func TestTokenErrors(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	s.GrantAudience(provider)
	s.SetPod(kubetest.Pod{Namespace: "ns1", Name: "none", Node: "node1", ServiceAccount: "none"})
	b := run(t, s, nil)
	b.at(t, "10.1.0.11", "p1")
	if _, err := b.Token(t.Context(), workload.ServiceAccount{Namespace: "ns1", Name: "none"}); !errors.Is(err,
		ErrNotFound) {
		t.Errorf("no ServiceAccount: %v", err)
	}
	if _, err := b.Token(t.Context(), workload.ServiceAccount{Namespace: "ns1", Name: "unused"}); !errors.Is(err,
		ErrNoPod) {
		t.Errorf("no pod: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := b.Token(ctx, ksa); !errors.Is(err, context.Canceled) {
		t.Errorf("the asker left: %v", err)
	}
	for _, f := range []kubetest.Fault{{Code: 429}, {Code: 500}, {Code: 503}, {Abort: true}, {Truncate: true}} {
		f.Verb, f.Resource = "create", "serviceaccounts/token"
		clear := s.Inject(f)
		var away *AwayError
		_, err := b.Token(t.Context(), ksa)
		if !errors.As(err, &away) {
			t.Errorf("%+v: %v", f, err)
		} else {
			for _, v := range s.IssuedTokens() {
				if strings.Contains(err.Error(), v) || strings.Contains(err.Error(), v[:len(v)/2]) {
					t.Errorf("%+v: the error holds the token", f)
				}
			}
		}
		clear()
	}
	if _, err := b.Token(t.Context(), ksa); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// N-05: a refused audience names the missing grant and prints it, once in the log, and is forgotten
// when it is granted.
func TestMissingAudienceGrant_N05(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	b := run(t, s, nil)
	b.at(t, "10.1.0.11", "p1")
	var f *ForbiddenError
	for range 3 {
		if _, err := b.Token(t.Context(), ksa); !errors.As(err, &f) {
			t.Fatalf("got %v", err)
		}
	}
	if f.User != "system:node:node1" || f.Verb != audienceVerb || f.Resource != provider ||
		!strings.Contains(f.Message, "is not authorized to request tokens for audience") {
		t.Errorf("%+v", f)
	}
	g := b.Status().MissingGrants
	if len(g) != 1 || g[0].Manifest != f.Manifest() {
		t.Fatalf("status: %+v", g)
	}
	if n := strings.Count(b.logs.String(), "missing grant"); n != 1 {
		t.Errorf("%d log lines", n)
	}
	role := parseManifest(t, f.Manifest())[0]
	if len(role.Rules) != 1 || role.Rules[0].Resources[0] != provider || role.Rules[0].Verbs[0] != audienceVerb {
		t.Errorf("manifest: %+v", role)
	}
	s.GrantAudience(provider)
	if _, err := b.Token(t.Context(), ksa); err != nil {
		t.Fatal(err)
	}
	if g := b.Status().MissingGrants; len(g) != 0 {
		t.Errorf("still missing: %+v", g)
	}
}

// N-02: Kubernetes 1.33 and older do not let a node read ServiceAccounts.
func TestMissingGetGrant_N02(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	s.DenyServiceAccountGet(true)
	b := run(t, s, nil)
	b.at(t, "10.1.0.11", "p1")
	var f *ForbiddenError
	until(t, "the refusal", func() bool { _, err := b.Account(t.Context(), ksa, -1); return errors.As(err, &f) })
	if f.Verb != "get" || f.Resource != "serviceaccounts" || f.Namespace != "ns1" {
		t.Errorf("%+v", f)
	}
	role := parseManifest(t, f.Manifest())[0]
	if len(role.Rules) != 2 || role.Rules[1].Resources[0] != "serviceaccounts" || role.Rules[1].Verbs[0] != "get" {
		t.Errorf("manifest: %+v", role)
	}
	s.Allow("system:nodes", "get", "serviceaccounts")
	b.account(t, ksa, -1, linked)
	until(t, "no missing grant", func() bool { return len(b.Status().MissingGrants) == 0 })
}

// A dedicated identity without its role: the manifest binds the role to it.
func TestMissingDedicatedGrants(t *testing.T) {
	for user, kind := range map[string]string{"gme": "User", "system:serviceaccount:kube-system:gme": "ServiceAccount"} {
		t.Run(kind, func(t *testing.T) {
			s := newServer(t, kubetest.Options{})
			s.AddToken("dedicated-secret", user)
			b := run(t, s, func(b *testNode, o *Options) {
				o.NodeName, o.Kubeconfig = "node1", filepath.Join(b.dir, "conf")
				write(t, o.Kubeconfig, must(t)(s.TokenKubeconfig("dedicated-secret")))
				write(t, filepath.Join(b.dir, "x.token"), []byte("dedicated-secret"))
			})
			var f *ForbiddenError
			until(t, "the refusal", func() bool {
				_, _, err := b.At(netip.MustParseAddr("10.1.0.11"))
				return errors.As(err, &f)
			})
			if f.User != user || f.Resource != "pods" {
				t.Errorf("%+v", f)
			}
			docs := parseManifest(t, f.Manifest())
			if len(docs[0].Rules) != 3 || len(docs[1].Subjects) != 1 || docs[1].Subjects[0].Kind != kind {
				t.Errorf("manifest: %+v", docs)
			}
			s.AddUser(user, "dedicated-secret")
			b.at(t, "10.1.0.11", "p1")
			if _, err := b.Token(t.Context(), ksa); err != nil {
				t.Errorf("Token: %v", err)
			}
		})
	}
}

type document struct {
	APIVersion string
	Kind       string
	Rules      []struct {
		APIGroups []string `yaml:"apiGroups"`
		Resources []string
		Verbs     []string
	}
	Subjects []struct{ Kind, Name, Namespace string }
}

func parseManifest(t *testing.T, text string) []document {
	t.Helper()
	var out []document
	d := yaml.NewDecoder(strings.NewReader(text))
	for {
		var x document
		if err := d.Decode(&x); err != nil {
			break
		}
		out = append(out, x)
	}
	if len(out) != 2 || out[0].Kind != "ClusterRole" || out[1].Kind != "ClusterRoleBinding" {
		t.Fatalf("not a ClusterRole and its binding:\n%s", text)
	}
	return out
}

// What the manifest is filled with cannot change its structure.
func TestManifestQuotes(t *testing.T) {
	evil := "x\"]\n  verbs: [\"*\"]\n- resources: [\"<&>"
	docs := parseManifest(t, manifest("system:node:n", evil, false))
	if len(docs[0].Rules) != 1 || docs[0].Rules[0].Resources[0] != evil {
		t.Errorf("%+v", docs[0])
	}
	docs = parseManifest(t, manifest(evil, provider, false))
	if len(docs[1].Subjects) != 1 || docs[1].Subjects[0].Name != evil {
		t.Errorf("%+v", docs[1])
	}
	for _, m := range []string{rbacNode, rbacDedicated} {
		parseManifest(t, m)
	}
	for _, p := range []struct{ in, what string }{{rbacNode, placeholderAudience}, {rbacNode, optionalGet},
		{rbacDedicated, placeholderSubject}} {
		if strings.Count(p.in, p.what) != 1 {
			t.Errorf("%q is not in the manifest once", p.what)
		}
	}
}

// The only place that reads the API server's words, against its real ones.
func TestRefusals(t *testing.T) {
	want := map[string]refusal{
		"is not authorized to request tokens for audience": audienceRefused,
		"does not match the UID in record":                 podGone,
		"scheduled on a different node":                    podGone,
		"no relationship found":                            unrelated,
		"spec.nodeName field selector":                     otherNode,
	}
	n := 0
	for _, c := range kubetest.Cases() {
		if !strings.HasPrefix(c.Want, "403 ") {
			continue
		}
		is := grantMissing
		for text, r := range want {
			if strings.Contains(c.Want, text) {
				is = r
				n++
			}
		}
		if got := refusalOf(c.Want); got != is {
			t.Errorf("%s: %d, want %d", c.Want, got, is)
		}
		if strings.Contains(c.Want, "User ") && userOf(c.Want) == "" {
			t.Errorf("no user in %s", c.Want)
		}
	}
	if n < 20 {
		t.Errorf("%d cases only", n)
	}
}
