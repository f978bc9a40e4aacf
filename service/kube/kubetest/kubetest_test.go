package kubetest_test

import (
	"crypto/tls"
	"crypto/x509"
	"net/http"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
)

func start(t *testing.T, o kubetest.Options) *kubetest.Server {
	t.Helper()
	s, err := kubetest.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func client(t *testing.T, s *kubetest.Server, node string) *http.Client {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(s.CA())
	cfg := &tls.Config{RootCAs: roots}
	if node != "" {
		both, err := s.NodeCert(node)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := tls.X509KeyPair(both, both)
		if err != nil {
			t.Fatal(err)
		}
		cfg.Certificates = []tls.Certificate{cert}
	}
	tr := &http.Transport{TLSClientConfig: cfg, ForceAttemptHTTP2: true}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 10 * time.Second}
}

// TestAnswers holds this server against what the real one said, N-01 to N-10, word for word.
func TestAnswers(t *testing.T) {
	s := start(t, kubetest.Options{})
	const dedicated = "dedicated-token"
	if err := s.Populate(dedicated); err != nil {
		t.Fatal(err)
	}
	uids := map[string]string{}
	for _, p := range kubetest.CasePods() {
		uids[p.Name] = s.SetPod(p)
	}
	node := kubetest.Target{URL: s.URL(), Issuer: s.Issuer(), Client: client(t, s, "node1"),
		UID: func(_, pod string) string { return uids[pod] }}
	other := node
	other.Client, other.Token = client(t, s, ""), dedicated
	cases := kubetest.Cases()
	if len(cases) < 150 {
		t.Fatalf("the table has %d cases only", len(cases))
	}
	for _, c := range cases {
		t.Run(c.Identity+" "+c.Ask, func(t *testing.T) {
			target := node
			switch c.Identity {
			case "node+audience":
				s.GrantAudience(kubetest.CaseAudience)
				defer s.RevokeAudience(kubetest.CaseAudience)
			case "dedicated":
				target = other
			}
			got, err := c.Answer(t.Context(), target)
			if err != nil {
				t.Fatal(err)
			}
			if got != c.Want {
				t.Errorf("got  %s\nwant %s", got, c.Want)
			}
		})
	}
	for _, v := range s.IssuedTokens() {
		tok, err := jwt.ParseSigned(v, []jose.SignatureAlgorithm{jose.RS256})
		if err != nil {
			t.Fatal("an issued token cannot be parsed")
		}
		var c jwt.Claims
		if err := tok.Claims(s.JWKS(), &c); err != nil {
			t.Fatalf("an issued token is not signed by the JWKS: %v", err)
		}
	}
}
