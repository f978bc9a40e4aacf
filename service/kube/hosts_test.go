package kube

import (
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// A ServiceAccount of processes of the node is known without a pod; its tokens are bound to a pod
// where there is one, else to nothing.
func TestHosts(t *testing.T) {
	puller := workload.ServiceAccount{Namespace: "kube-system", Name: "image-puller"}
	s := newServer(t, kubetest.Options{})
	s.SetServiceAccount("kube-system", "image-puller",
		map[string]string{AnnotationEmail: "puller@p.iam.gserviceaccount.com"})
	s.AddUser("gme", "dedicated-secret")
	b := run(t, s, func(b *testNode, o *Options) {
		o.NodeName, o.Kubeconfig, o.Hosts = "node1", filepath.Join(b.dir, "conf"), []workload.ServiceAccount{puller}
		write(t, o.Kubeconfig, must(t)(s.TokenKubeconfig("dedicated-secret")))
		write(t, filepath.Join(b.dir, "x.token"), []byte("dedicated-secret"))
	})
	b.at(t, "10.1.0.11", "p1")
	if sas, _ := b.ServiceAccounts(); !slices.Equal(sas, []workload.ServiceAccount{puller, ksa}) {
		t.Errorf("ServiceAccounts %v", sas)
	}
	b.account(t, puller, -1, workload.Account{GoogleEmail: "puller@p.iam.gserviceaccount.com"})
	pod := func() string {
		jwt, err := b.Token(t.Context(), puller)
		if err != nil {
			t.Fatal(err)
		}
		if to := claims(t, s, jwt).K.Pod; to != nil {
			return to.Name
		}
		return ""
	}
	if to := pod(); to != "" {
		t.Errorf("bound to %q", to)
	}
	s.SetPod(kubetest.Pod{Namespace: "kube-system", Name: "puller", Node: "node1", ServiceAccount: "image-puller",
		Addresses: []string{"10.1.0.12"}})
	b.at(t, "10.1.0.12", "puller")
	if to := pod(); to != "puller" {
		t.Errorf("bound to %q", to)
	}
}

// N-07: a node's own credential gets no token for its processes, whatever RBAC grants; the error,
// the log and the status say what would.
func TestHostsNeedAnotherIdentity_N07(t *testing.T) {
	puller := workload.ServiceAccount{Namespace: "kube-system", Name: "image-puller"}
	s := newServer(t, kubetest.Options{})
	s.SetServiceAccount("kube-system", "image-puller", nil)
	b := run(t, s, func(_ *testNode, o *Options) { o.Hosts = []workload.ServiceAccount{puller} })
	b.at(t, "10.1.0.11", "p1")
	refused := func(what string, ask func() error) {
		t.Helper()
		var f *ForbiddenError
		if err := ask(); !errors.As(err, &f) || !strings.Contains(err.Error(), "set kubeconfig to an identity other than") ||
			f.Manifest() != rbacDedicated {
			t.Errorf("%s: %v", what, err)
		}
	}
	account := func() error { _, err := b.Account(t.Context(), puller, -1); return err }
	token := func() error { _, err := b.Token(t.Context(), puller); return err }
	refused("account", account)
	refused("token", token)
	s.Allow("system:nodes", "get", "serviceaccounts")
	s.Allow("system:nodes", "create", "serviceaccounts/token")
	refused("token, with the grant", token)
	s.GrantAudience(provider)
	if _, err := b.Token(t.Context(), ksa); err != nil { // of a pod: what is missing for others is still missing
		t.Error(err)
	}
	if g := b.Status().MissingGrants; !slices.ContainsFunc(g,
		func(g Grant) bool { return g.Resource == tokens && g.Manifest == rbacDedicated }) {
		t.Errorf("status: %+v", g)
	}
}
