package kube_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/test/api"
)

// TestNode follows the pods of node1 with the product's own client, with each identity's shipped
// grants: addresses, completed and deleted pods, annotations and tokens.
func TestNode(t *testing.T) {
	for _, id := range identities {
		if id.manifest == "" {
			continue
		}
		t.Run(id.name, func(t *testing.T) {
			g := load(t, id.manifest)
			g.apply(t)
			defer g.remove(t)
			settle(t, theCluster.target(t, id.credential), casesOf(t, id.name))
			c := follow(t, id.credential)
			for _, p := range kubetest.CasePods() {
				var want []string
				if p.Node == "node1" && !p.Ended {
					want = []string{p.Name}
				}
				at(t, c, p.Addresses[0], want...)
			}
			sa := workload.ServiceAccount{Namespace: "ns1", Name: "ksa"}
			tokenOf(t, c, sa, "p1", "p1-proj")
			if _, err := c.Token(t.Context(), workload.ServiceAccount{Namespace: "ns1", Name: "ksa-node2"}); !errors.Is(
				err,
				kube.ErrNoPod,
			) {
				t.Errorf("a token of another node's ServiceAccount: got the error %v, want ErrNoPod", err)
			}
			t.Run("an address is reused", func(t *testing.T) { addressIsReused(t, c) })
			t.Run("an annotation changes", func(t *testing.T) {
				defer annotate(t, "ksa@p.iam.gserviceaccount.com")
				for _, email := range []string{"ksa@p.iam.gserviceaccount.com", "other@p.iam.gserviceaccount.com"} {
					annotate(t, email)
					if a, err := c.Account(t.Context(), sa, 0); err != nil || a.GoogleEmail != email {
						t.Errorf("Account: %+v, %v; want %s", a, err, email)
					}
				}
			})
			if s := c.Status(); !s.Watching || s.Problem != "" {
				t.Errorf("the client's status at the end is %+v, want watching without a problem", s)
			}
		})
	}
}

// addressIsReused: pods with the same name and address follow each other; one completes before it
// is deleted.
func addressIsReused(t *testing.T, c *kube.Cluster) {
	const address = "10.1.0.99"
	for _, owner := range []string{"ksa", "ksa-node1b", "ksa-unused"} {
		pod := kubetest.Pod{
			Namespace:      "ns1",
			Name:           "again",
			Node:           "node1",
			ServiceAccount: owner,
			Addresses:      []string{address},
		}
		if err := theCluster.createPod(t.Context(), pod); err != nil {
			t.Fatal(err)
		}
		if got := at(t, c, address, "again")[0]; got.ServiceAccount.Name != owner || got.PodUID != theCluster.uids["again"] {
			t.Errorf("%s is %+v, want ServiceAccount %s and UID %s", address, got, owner, theCluster.uids["again"])
		}
		tokenOf(t, c, workload.ServiceAccount{Namespace: "ns1", Name: owner})
		if owner == "ksa-node1b" { // it keeps its address in its status
			status := map[string]any{"status": map[string]any{"phase": "Succeeded"}}
			if err := theCluster.admin.Patch(t.Context(), "/api/v1/namespaces/ns1/pods/again/status", api.Merge,
				status); err != nil {
				t.Fatal(err)
			}
			at(t, c, address)
		}
		if err := theCluster.deletePod(t.Context(), "again"); err != nil {
			t.Fatal(err)
		}
		at(t, c, address)
	}
}

func annotate(t *testing.T, email string) {
	t.Helper()
	o := map[string]any{"metadata": map[string]any{"annotations": map[string]any{kube.AnnotationEmail: email}}}
	if err := theCluster.admin.Patch(t.Context(), "/api/v1/namespaces/ns1/serviceaccounts/ksa", api.Merge, o); err != nil {
		t.Fatal(err)
	}
}

// follow runs the product's client until the end of the test.
func follow(t *testing.T, credential string) *kube.Cluster {
	t.Helper()
	c := kube.New(
		kube.Options{Kubeconfig: theCluster.Kubeconfig(credential), NodeName: "node1", Audience: kubetest.CaseAudience},
	)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return c
}

// at waits until the address belongs to exactly these pods, and returns them.
func at(t *testing.T, c *kube.Cluster, address string, pods ...string) []workload.Caller {
	t.Helper()
	for deadline := time.After(waitLimit); ; {
		callers, changed, err := c.At(netip.MustParseAddr(address))
		var names []string
		for _, caller := range callers {
			names = append(names, caller.PodName)
		}
		if err == nil && slices.Equal(names, pods) {
			return callers
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("At(%s) = %v, %v; want %v", address, names, err, pods)
		}
	}
}

// tokenOf requests a token, and checks its ServiceAccount, its audience and the pod that it is
// bound to: one of pods, or any if there are none.
func tokenOf(t *testing.T, c *kube.Cluster, sa workload.ServiceAccount, pods ...string) {
	t.Helper()
	jwt, err := c.Token(t.Context(), sa)
	if err != nil {
		t.Errorf("token of %s: %v", sa, err)
		return
	}
	var claims struct {
		Sub string
		Aud []string
		K   struct{ Pod struct{ Name, UID string } } `json:"kubernetes.io"`
	}
	parts := strings.Split(jwt, ".")
	if len(parts) != 3 {
		t.Fatal("the token is no JWT")
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err == nil {
		err = json.Unmarshal(b, &claims)
	}
	pod := claims.K.Pod
	switch {
	case err != nil:
		t.Error("the token is no JWT")
	case claims.Sub != "system:serviceaccount:ns1:"+sa.Name || !slices.Equal(claims.Aud, []string{kubetest.CaseAudience}):
		t.Errorf("the token of %s has the subject %s and the audience %v", sa, claims.Sub, claims.Aud)
	case pod.UID != theCluster.uids[pod.Name] || len(pods) > 0 && !slices.Contains(pods, pod.Name):
		t.Errorf("the token of %s is bound to pod %s %s, want one of %v", sa, pod.Name, pod.UID, pods)
	}
}
