package token

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

func TestG11AccessTokenOfALinkedServiceAccount(t *testing.T) {
	w := newWorld(t)
	sa, a := w.linked("team", "ana")
	before := time.Now()
	got, err := w.cache.Token(t.Context(), AccessToken(sa, a, nil))
	if err != nil {
		t.Fatal(err)
	}
	issued, ok := w.google.Lookup(got.Value)
	if !ok {
		t.Fatal("Google never issued the token")
	}
	if issued.Method != googletest.GenerateAccessToken || issued.Subject != sa.Subject() ||
		issued.Email != a.GoogleEmail ||
		!slices.Equal(issued.Scopes, []string{cloudPlatform, userinfoEmail}) {
		t.Errorf("somebody else's token: %+v", issued)
	}
	if d := issued.Expires.Sub(got.Expires).Abs(); d > 2*time.Second || got.Minted.Before(before) {
		t.Errorf("expires %v, Google says %v; minted %v", got.Expires, issued.Expires, got.Minted)
	}
	w.calls(t, 1, 1, 0)
	w.noSecrets(t)
	if !strings.Contains(w.lines.String(), `msg="token minted"`) || !strings.Contains(w.lines.String(),
		"service_account=team/ana") {
		t.Errorf("no audit line of the mint:\n%s", w.lines)
	}
}

func TestT08UnlinkedGetsTheFederatedToken(t *testing.T) {
	w := newWorld(t)
	got, err := w.cache.Token(t.Context(), AccessToken(ana, workload.Account{}, nil))
	if err != nil {
		t.Fatal(err)
	}
	issued, _ := w.google.Lookup(got.Value)
	if issued.Method != googletest.Exchange || issued.Subject != ana.Subject() ||
		!slices.Equal(issued.Scopes, []string{cloudPlatform}) {
		t.Errorf("not the ServiceAccount's own: %+v", issued)
	}
	w.calls(t, 1, 0, 0)

	const drive = "https://www.googleapis.com/auth/drive"
	got, err = w.cache.Token(t.Context(), AccessToken(ana, workload.Account{}, []string{drive}))
	if err != nil {
		t.Fatal(err)
	}
	if issued, _ := w.google.Lookup(got.Value); !slices.Equal(issued.Scopes, []string{drive}) {
		t.Errorf("scopes %v, want %v", issued.Scopes, drive)
	}
	w.calls(t, 2, 0, 0)
}

func TestG07OneExchangeForAllTokensOfAServiceAccount(t *testing.T) {
	w := newWorld(t)
	sa, a := w.linked("team", "ana")
	for _, r := range []Request{
		AccessToken(sa, a, nil),
		AccessToken(sa, a, []string{cloudPlatform}),
		AccessToken(sa, a, []string{"https://www.googleapis.com/auth/drive"}),
		IDToken(sa, a, "https://one"),
		IDToken(sa, a, "https://two"),
	} {
		if _, err := w.cache.Token(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	w.calls(t, 1, 2, 2)
}

func TestG13IDToken(t *testing.T) {
	w := newWorld(t)
	sa, a := w.linked("team", "ana")
	got, err := w.cache.Token(t.Context(), IDToken(sa, a, "https://service:8443/?a=b"))
	if err != nil {
		t.Fatal(err)
	}
	jws, err := jose.ParseSignedCompact(got.Value, []jose.SignatureAlgorithm{jose.RS256})
	if err != nil {
		t.Fatal(err)
	}
	raw, err := jws.Verify(w.google.JWKS())
	if err != nil {
		t.Fatal(err)
	}
	var claims struct {
		Aud, Email, Sub string
		EmailVerified   bool `json:"email_verified"`
		Exp             int64
	}
	if err := json.Unmarshal(raw, &claims); err != nil {
		t.Fatal(err)
	}
	// I-03
	if claims.Aud != "https://service:8443/?a=b" || claims.Email != a.GoogleEmail || !claims.EmailVerified ||
		len(claims.Sub) != 21 {
		t.Errorf("claims: %+v", claims)
	}
	if d := time.Unix(claims.Exp, 0).Sub(got.Expires).Abs(); d > 2*time.Second {
		t.Errorf("expires %v, exp says %v", got.Expires, time.Unix(claims.Exp, 0))
	}
	w.noSecrets(t)
}

func TestI04IDTokenOfAnUnlinkedServiceAccount(t *testing.T) {
	w := newWorld(t)
	_, err := w.cache.Token(t.Context(), IDToken(ana, workload.Account{}, "x"))
	if err == nil || !strings.Contains(err.Error(), "team/ana") {
		t.Errorf("error %v, want one that names the ServiceAccount", err)
	}
	w.calls(t, 0, 0, 0)
}

func TestAnnotationsAreReadAgainBeforeEachMint(t *testing.T) {
	w := newWorld(t)
	sa, a := w.linked("team", "ana")
	other := workload.Account{GoogleEmail: "other@project.iam.gserviceaccount.com"}
	for _, seen := range []workload.Account{other, {}, {GoogleEmail: a.GoogleEmail, QuotaProject: "p"}} {
		for _, r := range []Request{AccessToken(sa, seen, nil), IDToken(sa, seen, "x")} {
			if _, err := w.cache.Token(t.Context(), r); !errors.Is(err, ErrAccountChanged) {
				t.Errorf("asked with %+v: %v, want ErrAccountChanged", seen, err)
			}
		}
	}
	w.calls(t, 0, 0, 0)
	if _, err := w.cache.Token(t.Context(), AccessToken(sa, a, nil)); err != nil {
		t.Error(err)
	}
}

func TestG15QuotaProject(t *testing.T) {
	for _, c := range []struct{ annotation, option, want string }{{"", "", ""}, {"", "o", "o"}, {"a", "o", "a"},
		{"a", "", "a"}} {
		w := newWorld(t, func(g *GoogleOptions, _ *CacheOptions) { g.QuotaProject = c.option })
		sa, a := w.linked("team", "ana")
		a.QuotaProject = c.annotation
		w.annotate(sa, a)
		for _, r := range []Request{AccessToken(sa, a, nil), IDToken(sa, a, "x")} {
			got, err := w.cache.Token(t.Context(), r)
			if err != nil {
				t.Fatal(err)
			}
			if issued, _ := w.google.Lookup(got.Value); issued.QuotaProject != c.want {
				t.Errorf("annotation %q, option %q: x-goog-user-project %q, want %q", c.annotation, c.option, issued.QuotaProject,
					c.want)
			}
		}
	}
}

// K-00: whoever may edit a ServiceAccount writes the email, and kube checks it; here it cannot
// become another URL anyhow.
func TestK00HostileEmailStaysOneSegment(t *testing.T) {
	for _, email := range []string{
		"victim@p.iam.gserviceaccount.com:signBlob?x=", "../../../v1/token", "..", "a/b@c", "a%2Fb@c", "a#b", "a?b=c",
		"x:generateIdToken", "a b\r\nHost: x", "",
	} {
		w := newWorld(t)
		sa := workload.ServiceAccount{Namespace: "team", Name: "mallory"}
		a := workload.Account{GoogleEmail: email}
		if email == "" {
			continue
		}
		w.annotate(sa, a)
		w.google.Allow(sa.Subject(), email)
		got, err := w.cache.Token(t.Context(), AccessToken(sa, a, nil))
		if err != nil {
			t.Errorf("%q: %v", email, err)
			continue
		}
		if issued, _ := w.google.Lookup(got.Value); issued.Email != email {
			t.Errorf("%q reached Google as %q", email, issued.Email)
		}
	}
}

// A node's clock may be wrong: what a token has left is counted by Google's.
func TestExpireTimeByGooglesClock(t *testing.T) {
	google := time.Date(2031, 1, 1, 0, 0, 0, 0, time.UTC)
	w := newWorld(t)
	sa, a := w.linked("team", "ana")
	w.google.Break(googletest.GenerateAccessToken, googletest.Fault{Status: 200,
		Header: http.Header{"Date": {google.Format(http.TimeFormat)}},
		Body:   `{"accessToken":"t","expireTime":"` + google.Add(30*time.Minute).Format(time.RFC3339) + `"}`})
	got, err := w.cache.Token(t.Context(), AccessToken(sa, a, nil))
	if err != nil {
		t.Fatal(err)
	}
	if lives := got.Expires.Sub(got.Minted); lives != 30*time.Minute {
		t.Errorf("lives %v, want 30m", lives)
	}
}

func TestTransientFaultsAreRetried(t *testing.T) {
	for _, m := range googletest.Methods {
		for name, f := range map[string]googletest.Fault{
			"dropped": {Times: 1, Drop: true}, "truncated": {Times: 1, Truncate: true}, "503": {Times: 2, Status: 503},
			"429": {Times: 1, Status: 429},
		} {
			t.Run(string(m)+" "+name, func(t *testing.T) {
				t.Parallel()
				w := newWorld(t)
				sa, a := w.linked("team", "ana")
				w.google.Break(m, f)
				r := AccessToken(sa, a, nil)
				if m == googletest.GenerateIDToken {
					r = IDToken(sa, a, "x")
				}
				if _, err := w.cache.Token(t.Context(), r); err != nil {
					t.Error(err)
				}
				if got, want := w.google.Calls(m), f.Times+1; got < want {
					t.Errorf("%d calls, want %d", got, want)
				}
			})
		}
	}
}

func TestGoogleUnreachable(t *testing.T) {
	w := newWorld(t)
	sa, a := w.linked("team", "ana")
	w.google.Close()
	_, err := w.cache.Token(t.Context(), AccessToken(sa, a, nil))
	if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), w.google.STSURL()) {
		t.Errorf("error %v, want ErrUnavailable that names the URL", err)
	}
	var jwt string
	if jwt, err = w.Token(t.Context(), sa); err != nil || jwt == "" {
		t.Fatal(err)
	}
}

func TestRedirectsAreNotFollowed(t *testing.T) {
	var asked bool
	thief := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked = true }))
	defer thief.Close()
	w := newWorld(t)
	w.google.Break(googletest.Exchange, googletest.Fault{Status: 307, Header: http.Header{"Location": {thief.URL}}})
	_, err := w.cache.Token(t.Context(), AccessToken(ana, workload.Account{}, nil))
	if !errors.Is(err, ErrUnavailable) || !errors.Is(err, errRedirect) {
		t.Errorf("error %v", err)
	}
	if asked {
		t.Error("the token went to another host")
	}
}

func TestCAFile(t *testing.T) {
	w := newWorld(t)
	dir := t.TempDir()
	good, bad := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "bad.pem")
	if err := w.google.WriteCA(good); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(bad, []byte("no PEM"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{bad, filepath.Join(dir, "absent.pem")} {
		if _, err := NewGoogle(GoogleOptions{CAFile: path}); err == nil || !strings.Contains(err.Error(), "google.caFile") ||
			!strings.Contains(err.Error(), path) {
			t.Errorf("error %v, want one that names the key and %s", err, path)
		}
	}
	w = newWorld(t, func(g *GoogleOptions, _ *CacheOptions) { g.HTTPClient, g.CAFile = nil, good })
	defer w.minter.client.CloseIdleConnections()
	if err := w.google.WriteCA(good); err != nil { // each world has an authority of its own: this Google trusts the first
		t.Fatal(err)
	}
	if _, err := w.cache.Token(t.Context(), AccessToken(ana, workload.Account{}, nil)); !errors.Is(err, ErrUnavailable) {
		t.Errorf("error %v, want a certificate that is not trusted", err)
	}
	g, err := NewGoogle(GoogleOptions{Audience: testAudience, STSURL: w.google.URL(), IAMCredentialsURL: w.google.URL(),
		CAFile: good, Kubernetes: w})
	if err != nil {
		t.Fatal(err)
	}
	defer g.client.CloseIdleConnections()
	// G-08: the path is STS's own
	if _, err := g.Token(t.Context(), AccessToken(ana, workload.Account{}, nil)); err != nil {
		t.Error(err)
	}
}

func TestKubernetesErrorsPassThrough(t *testing.T) {
	w := newWorld(t)
	away := errors.New("API server away")
	w.err = away
	if _, err := w.minter.Token(t.Context(), AccessToken(ana, workload.Account{}, nil)); !errors.Is(err, away) {
		t.Errorf("error %v, want the cluster's own", err)
	}
}

func TestG03MemberOfAnIdentityNamespace(t *testing.T) {
	g, err := NewGoogle(GoogleOptions{Audience: "identitynamespace:p.svc.id.goog:https://issuer"})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := g.member(ana), "serviceAccount:p.svc.id.goog[team/ana]"; got != want {
		t.Errorf("member %q, want %q", got, want)
	}
}

func TestReloadCountsOn(t *testing.T) {
	w := newWorld(t)
	metrics := NewMetrics(prometheus.NewRegistry())
	for range 2 { // as a reload does
		g, err := NewGoogle(GoogleOptions{Audience: testAudience, STSURL: w.google.URL(),
			IAMCredentialsURL: w.google.URL(), Metrics: metrics})
		if err != nil {
			t.Fatal(err)
		}
		g.metrics.observe(stepSTS, time.Now(), nil)
		NewCache(CacheOptions{Source: g, Metrics: metrics}).metrics.hit.Inc()
	}
	for name, c := range map[string]prometheus.Counter{
		"mints": metrics.mints.outcome.WithLabelValues(stepSTS, "ok"), "cache": metrics.cache.hit,
	} {
		var now dto.Metric
		if err := c.Write(&now); err != nil || now.GetCounter().GetValue() != 2 {
			t.Errorf("%s: %v of 2 are counted, %v: another one begins at zero", name, now.GetCounter().GetValue(), err)
		}
	}
}
