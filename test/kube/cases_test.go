package kube_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/test/api"
)

// identities are the identities of the table of cases, each with its credential and its manifest.
var identities = []struct {
	name, credential string
	manifest         string // "" = a node's own rights
}{
	{"node", nodeCredential, ""},
	{"node+audience", nodeCredential, "rbac.yaml"},
	{"dedicated", dedicatedCredential, "rbac-dedicated.yaml"},
}

// TestCases compares the real server's status and text with the table, which the stand-in's own
// test uses too. A difference is an error in the table, and so in the stand-in.
func TestCases(t *testing.T) {
	for _, id := range identities {
		t.Run(id.name, func(t *testing.T) {
			g := load(t, id.manifest)
			g.apply(t)
			defer g.remove(t)
			cases := casesOf(t, id.name)
			target := theCluster.target(t, id.credential)
			settle(t, target, cases)
			for _, c := range cases {
				if got := answer(t, c, target); got != c.Want {
					t.Errorf("%s: the real server's answer differs from the table\nreal  %s\ntable %s", c.Ask, got, c.Want)
				}
			}
			t.Logf("%d cases", len(cases))
		})
	}
}

func casesOf(t *testing.T, identity string) []kubetest.Case {
	t.Helper()
	cs := slices.DeleteFunc(kubetest.Cases(), func(c kubetest.Case) bool { return c.Identity != identity })
	if len(cs) < 50 {
		t.Fatalf("the table has %d cases for %s, want 50 or more", len(cs), identity)
	}
	return cs
}

func answer(t *testing.T, c kubetest.Case, target kubetest.Target) string {
	t.Helper()
	got, err := c.Answer(t.Context(), target)
	if err != nil {
		t.Fatalf("%s: %v", c.Ask, err)
	}
	return got
}

func (c *cluster) target(t *testing.T, credential string) kubetest.Target {
	t.Helper()
	k, err := c.Client(credential)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.CloseIdleConnections)
	return kubetest.Target{URL: c.URL, Issuer: c.URL, Client: k, UID: func(_, pod string) string { return c.uids[pod] }}
}

// settle waits until the real server's authorizers have seen the last writes by their watches:
// until every case that the table allows is allowed. It does not fail: the caller compares the
// answers.
func settle(t *testing.T, target kubetest.Target, cases []kubetest.Case) {
	t.Helper()
	poll(t, func() bool {
		return !slices.ContainsFunc(cases, func(c kubetest.Case) bool {
			return strings.HasPrefix(c.Want, "20") && !strings.HasPrefix(answer(t, c, target), "20")
		})
	})
}

// poll waits until is returns true, for 10 s at most, which is many times the usual duration.
func poll(t *testing.T, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !is() && time.Now().Before(deadline); {
		select {
		case <-t.Context().Done():
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// standIn returns the stand-in with the same objects, and its target for a credential.
func standIn(t *testing.T, credential string) (*kubetest.Server, kubetest.Target) {
	t.Helper()
	s, err := kubetest.New(kubetest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	const token = "dedicated-token"
	if err := s.Populate(token); err != nil {
		t.Fatal(err)
	}
	uids := map[string]string{}
	for _, p := range kubetest.CasePods() {
		uids[p.Name] = s.SetPod(p)
	}
	target := kubetest.Target{URL: s.URL(), Issuer: s.Issuer(), UID: func(_, pod string) string { return uids[pod] }}
	var pair []byte
	if credential == nodeCredential {
		if pair, err = s.NodeCert("node1"); err != nil {
			t.Fatal(err)
		}
	} else {
		target.Token = token
	}
	if target.Client, err = api.NewClient(s.CA(), pair); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(target.Client.CloseIdleConnections)
	return s, target
}
