package kube

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
)

func TestTry(t *testing.T) {
	const audience = "//iam.googleapis.com/x"
	forbidden := func(verb, resource string) func(error) bool {
		return func(err error) bool {
			var f *ForbiddenError
			return errors.As(err, &f) && f.Verb == verb && f.Resource == resource
		}
	}
	none := func(err error) bool { return err == nil }
	for _, c := range []struct {
		name                       string
		change                     func(s *kubetest.Server, o *Options)
		reach, list, get, mint     func(error) bool
		pods, hostPods             int
		serviceAccount, credential string
		linked, mismatch, noJWT    bool
	}{
		{name: "all is well", reach: none, list: none, get: none, mint: none, pods: 3, hostPods: 1, serviceAccount: "linked",
			linked: true, credential: "client certificate"},
		{name: "no kubeconfig", change: func(_ *kubetest.Server, o *Options) { o.Kubeconfig += ".absent" },
			reach: func(err error) bool { return errors.Is(err, ErrNotConfigured) }, list: none, get: none, mint: none,
			noJWT: true},
		{name: "away", change: func(s *kubetest.Server, _ *Options) { s.Refuse() },
			reach: func(err error) bool { var e *AwayError; return errors.As(err, &e) }, list: none, get: none, mint: none,
			noJWT: true, credential: "client certificate"},
		{name: "the audience is not granted", change: func(s *kubetest.Server, _ *Options) { s.RevokeAudience(audience) },
			reach: none, list: none, get: none, mint: forbidden(audienceVerb, audience), pods: 3, hostPods: 1,
			serviceAccount: "linked", linked: true, noJWT: true, credential: "client certificate"},
		{name: "ServiceAccounts are not granted", change: func(s *kubetest.Server,
			_ *Options) {
			s.DenyServiceAccountGet(true)
		},
			reach: none, list: none, get: forbidden("get", "serviceaccounts"), mint: none, pods: 3, hostPods: 1,
			serviceAccount: "plain", credential: "client certificate"},
		{name: "another node's name", change: func(_ *kubetest.Server, o *Options) { o.NodeName = "other" },
			reach: none, list: forbidden("list", "pods"), get: none, mint: none, mismatch: true, noJWT: true,
			credential: "client certificate"},
		{name: "no pods", change: func(s *kubetest.Server, _ *Options) {
			for _, p := range []string{"plain", "linked", "second", "host"} {
				s.DeletePod("ns", p)
			}
		}, reach: none, list: none, get: none, mint: none, noJWT: true, credential: "client certificate"},
		{name: "by a plugin", change: func(s *kubetest.Server, o *Options) {
			s.AddToken("abc", "system:node:n1", "system:nodes")
			text, err := s.ExecKubeconfig("sh", "-c", `echo '{"apiVersion":"client.authentication.k8s.io/v1",`+
				`"kind":"ExecCredential","status":{"token":"abc"}}'`)
			if err == nil {
				err = os.WriteFile(o.Kubeconfig, text, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}, reach: none, list: none, get: none, mint: none, pods: 3, hostPods: 1, serviceAccount: "linked", linked: true,
			credential: "plugin sh"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newServer(t, kubetest.Options{})
			s.GrantAudience(audience)
			s.SetServiceAccount("ns", "plain", nil)
			s.SetServiceAccount(
				"ns",
				"linked",
				map[string]string{"iam.gke.io/gcp-service-account": "a@p.iam.gserviceaccount.com"},
			)
			for _, p := range []kubetest.Pod{
				{Name: "plain", ServiceAccount: "plain", Addresses: []string{"10.0.0.1"}},
				{Name: "ended", ServiceAccount: "plain", Addresses: []string{"10.0.0.1"}, Phase: "Succeeded"},
				{Name: "second", ServiceAccount: "plain", Addresses: []string{"10.0.0.2"}},
				{Name: "linked", ServiceAccount: "linked", Addresses: []string{"10.0.0.3"}},
				{Name: "host", ServiceAccount: "plain", Addresses: []string{"192.0.2.1"}, HostNetwork: true},
			} {
				p.Namespace, p.Node = "ns", "n1"
				s.SetPod(p)
			}
			kubeconfig, err := s.Kubeconfig("n1")
			if err != nil {
				t.Fatal(err)
			}
			o := Options{Kubeconfig: filepath.Join(t.TempDir(), "kubeconfig"), Audience: audience}
			if err := os.WriteFile(o.Kubeconfig, kubeconfig, 0o600); err != nil {
				t.Fatal(err)
			}
			if c.change != nil {
				c.change(s, &o)
			}
			a, jwt := Try(t.Context(), o)
			for what, e := range map[string]struct {
				err  error
				want func(error) bool
			}{"reach": {a.Reach, c.reach}, "list": {a.List, c.list}, "get": {a.Get, c.get}, "mint": {a.Mint, c.mint}} {
				if !e.want(e.err) {
					t.Errorf("%s: %v", what, e.err)
				}
			}
			if a.Pods != c.pods || a.HostPods != c.hostPods || a.ServiceAccount.Name != c.serviceAccount ||
				a.Account.Linked() != c.linked || a.Credential != c.credential ||
				(a.Mismatch != "") != c.mismatch || (jwt == "") != c.noJWT {
				t.Errorf("%+v, a token: %t", a, jwt != "")
			}
			if a.Reach == nil && (a.Date.IsZero() || a.Date.Sub(a.Asked).Abs() > time.Minute || a.Server != s.URL()) {
				t.Errorf("%s says %s, asked at %s", a.Server, a.Date, a.Asked)
			}
			if jwt != "" && strings.Contains(fmt.Sprintf("%+v", a), jwt) {
				t.Error("the token can be printed")
			}
			var f *ForbiddenError
			if errors.As(errors.Join(a.Get, a.Mint), &f) && !strings.Contains(f.Manifest(), "kind: ClusterRole") {
				t.Errorf("no manifest for %v", f)
			}
		})
	}
}
