package token

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/sirupsen/logrus/hooks/test"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// What keeps all tokens of a ServiceAccount from being minted is one line a minute, and not one a
// token.
func TestAFailureIsLoggedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, lines := test.NewNullLogger()
		g, err := NewGoogle(GoogleOptions{Log: log})
		if err != nil {
			t.Fatal(err)
		}
		missing, other := errors.New("missing grant"), errors.New("no binding")
		a, b := workload.ServiceAccount{Namespace: "default", Name: "a"}, workload.ServiceAccount{Namespace: "default",
			Name: "b"}
		logged := func(sa workload.ServiceAccount, err error, want int) {
			t.Helper()
			lines.Reset()
			for _, scopes := range []string{"x", "y", "z"} {
				g.report(AccessToken(sa, workload.Account{}, []string{scopes}), time.Now(), Token{}, err)
			}
			n := 0
			for _, e := range lines.AllEntries() {
				if e.Level == logrus.WarnLevel {
					n++
				}
			}
			if n != want {
				t.Errorf("%s, %v: %d lines, want %d", sa, err, n, want)
			}
		}
		logged(a, missing, 1)
		logged(b, missing, 1)
		logged(a, missing, 0)
		logged(a, other, 1)
		time.Sleep(sayAgain)
		logged(a, other, 1)
	})
}

// An unlinked ServiceAccount's access token is its federated token: one exchange, and one entry of
// status. A linked one has two tokens.
func TestStatusOfAnUnlinkedServiceAccount(t *testing.T) {
	c := NewCache(CacheOptions{Source: &fakeSource{lifetime: time.Hour}})
	sa := workload.ServiceAccount{Namespace: "default", Name: "plain"}
	for _, scopes := range [][]string{nil, {"https://www.googleapis.com/auth/devstorage.read_only"}} {
		r := AccessToken(sa, workload.Account{}, scopes)
		for _, r := range []Request{r, federatedToken(sa, r.Scopes)} {
			if _, err := c.Token(t.Context(), r); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, e := range c.Status() {
		if e.Federated {
			t.Errorf("%+v", e)
		}
	}
	if n := len(c.Status()); n != 2 {
		t.Errorf("%d entries of 2 sets of scopes", n)
	}
	linked := workload.ServiceAccount{Namespace: "default", Name: "linked"}
	r := AccessToken(linked, workload.Account{GoogleEmail: "a@p.iam.gserviceaccount.com"}, nil)
	for _, r := range []Request{r, federatedToken(linked, r.Scopes)} {
		if _, err := c.Token(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(c.Status()); n != 4 {
		t.Errorf("%d entries, want the 2 of before and 2 of a linked ServiceAccount", n)
	}
}
