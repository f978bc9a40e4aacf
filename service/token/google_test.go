package token

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
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

func TestIAMRefusesTheFederatedToken(t *testing.T) {
	w := newWorld(t)
	sa, a := w.linked("team", "ana")
	if _, err := w.cache.Token(t.Context(), AccessToken(sa, a, nil)); err != nil {
		t.Fatal(err)
	}
	for _, secret := range w.google.Secrets() {
		if i, ok := w.google.Lookup(secret); ok && i.Method == googletest.Exchange {
			w.google.Revoke(secret)
		}
	}
	if _, err := w.cache.Token(t.Context(), IDToken(sa, a, "x")); err != nil {
		t.Errorf("the federated token was not replaced: %v", err)
	}
	w.calls(t, 2, 1, 2)

	w.google.Break(googletest.GenerateIDToken, googletest.Fault{Status: 401, Message: "no"})
	_, err := w.cache.Token(t.Context(), IDToken(sa, a, "y"))
	var refusal *GoogleError
	if !errors.As(err, &refusal) || refusal.Status != 401 {
		t.Errorf("error %v, want IAM's 401", err)
	}
	w.calls(t, 3, 1, 4) // once, not for ever
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

func TestGooglesRefusalsInGooglesWords(t *testing.T) {
	long := workload.ServiceAccount{Namespace: strings.Repeat("n", 63), Name: strings.Repeat("s", 100)}
	const binding = ` Hint: if the binding is missing: gcloud iam service-accounts add-iam-policy-binding ` +
		`ana@project.iam.gserviceaccount.com --role roles/iam.workloadIdentityUser --member ` +
		`"principal://iam.googleapis.com/projects/123/locations/global/workloadIdentityPools/pool/subject/system:serviceaccount:team:ana"`
	for _, c := range []struct {
		name   string
		fault  func(*world)
		ask    Request
		step   string
		status int
		text   string
	}{
		{"T-07 no binding", func(w *world) { w.google.Deny(ana.Subject(), gana.GoogleEmail) }, AccessToken(ana, gana, nil),
			"IAM", 403,
			"Unable to generate access token; IAM returned 403 Forbidden: Permission 'iam.serviceAccounts.getAccessToken' " +
				"denied on resource (or it may not exist)." + binding},
		{"T-07 no binding, ID token", func(w *world) { w.google.Deny(ana.Subject(), gana.GoogleEmail) },
			IDToken(ana, gana, "x"), "IAM", 403,
			"Unable to generate ID token; IAM returned 403 Forbidden: Permission 'iam.serviceAccounts.getOpenIdToken' denied " +
				"on resource (or it may not exist)." + binding},
		{"T-07 no such account", func(w *world) {
			w.annotate(ana,
				workload.Account{GoogleEmail: "who@p.iam.gserviceaccount.com"})
		},
			AccessToken(ana, workload.Account{GoogleEmail: "who@p.iam.gserviceaccount.com"}, nil), "IAM", 404,
			"Unable to generate access token; IAM returned 404 Not Found: Not found; Gaia id not found for email " +
				"who@p.iam.gserviceaccount.com Hint: create the Google service account, or correct annotation " +
				"iam.gke.io/gcp-service-account of ServiceAccount team/ana."},
		{"T-07 the API is not enabled", func(w *world) {
			w.google.Break(googletest.GenerateAccessToken, googletest.Fault{Status: 403, Body: `{"error": {"code": 403, ` +
				`"message": "The API is off.", "status": "PERMISSION_DENIED", "details": [{"@type": ` +
				`"type.googleapis.com/google.rpc.ErrorInfo", "reason": "SERVICE_DISABLED", "domain": "googleapis.com"}]}}`})
		}, AccessToken(ana, gana, nil), "IAM", 403,
			"Unable to generate access token; IAM returned 403 Forbidden: The API is off."},
		{"T-07 the API is not enabled, nothing beside it", func(w *world) {
			w.google.Break(googletest.GenerateAccessToken, googletest.Fault{Status: 403,
				Message: "IAM Service Account Credentials API has not been used in project 1 before or it is disabled."})
		}, AccessToken(ana, gana, nil), "IAM", 403,
			"Unable to generate access token; IAM returned 403 Forbidden: IAM Service Account Credentials API has not been " +
				"used in project 1 before or it is disabled."},
		{"T-07 VPC Service Controls", func(w *world) {
			w.google.Break(googletest.GenerateAccessToken, googletest.Fault{Status: 403,
				Message: "Request is prohibited by organization's policy. vpcServiceControlsUniqueIdentifier: x"})
		}, AccessToken(ana, gana, nil), "IAM", 403,
			"Unable to generate access token; IAM returned 403 Forbidden: Request is prohibited by organization's policy. " +
				"vpcServiceControlsUniqueIdentifier: x"},
		{"G-05 wrong audience", func(w *world) { w.claims = map[string]any{"aud": "other"} }, AccessToken(ana, gana, nil),
			"STS", 400,
			"Unable to generate access token; STS returned 400 Bad Request: The audience in ID Token [other] does not match " +
				"the expected audience."},
		{"G-05 wrong audience, ID token", func(w *world) { w.claims = map[string]any{"aud": "other"} },
			IDToken(ana, gana, "x"), "STS", 400,
			"Unable to generate ID token; STS returned 400 Bad Request: The audience in ID Token [other] does not match the " +
				"expected audience."},
		{"G-05 stale", func(w *world) { w.claims = map[string]any{"iat": 7, "exp": 3607} }, AccessToken(ana, gana, nil),
			"STS", 400,
			"Unable to generate access token; STS returned 400 Bad Request: ID Token issued at 7 is stale to sign-in."},
		{"G-06 long subject", func(w *world) { w.annotate(long, gana) }, AccessToken(long, gana, nil), "STS", 400,
			"Unable to generate access token; STS returned 400 Bad Request: The size of mapped attribute google.subject " +
				"exceeds the 127 bytes limit. Either modify your attribute mapping or the incoming assertion to produce a mapped " +
				"attribute that is less than 127 bytes. Hint: google.subject is too long: " + long.Subject() +
				" has 186 bytes and the limit is 127: map a shorter value in the provider's attribute mapping, or shorten the " +
				"names."},
		{"429", func(w *world) {
			w.google.Break(googletest.Exchange, googletest.Fault{Status: 429, Message: "Quota exceeded.",
				RetryAfter: time.Minute})
		}, AccessToken(ana, gana, nil), "STS", 429,
			"Unable to generate access token; STS returned 429 Too Many Requests: Quota exceeded."},
		{"no JSON", func(w *world) {
			w.google.Break(googletest.GenerateAccessToken, googletest.Fault{Status: 407, Body: "<html>proxy</html>"})
		}, AccessToken(ana, gana, nil), "IAM", 407,
			"Unable to generate access token; IAM returned 407 Proxy Authentication Required: (the answer is not in Google's " +
				"form: check the proxies between this node and Google)"},
		{"status alone", func(w *world) {
			w.google.Break(googletest.GenerateAccessToken, googletest.Fault{Status: 400,
				Body: `{"error":{"code":400,"status":"FAILED_PRECONDITION"}}`})
		}, AccessToken(ana, gana, nil), "IAM", 400,
			"Unable to generate access token; IAM returned 400 Bad Request: FAILED_PRECONDITION"},
		{"code alone", func(w *world) {
			w.google.Break(googletest.Exchange, googletest.Fault{Status: 400, Body: `{"error":"invalid_target"}`})
		}, AccessToken(ana, gana, nil), "STS", 400,
			"Unable to generate access token; STS returned 400 Bad Request: invalid_target"},
		{"control characters and length", func(w *world) {
			w.google.Break(googletest.Exchange, googletest.Fault{Status: 400,
				Body: `{"error":"x","error_description":"a\u001b[31m\nb ` + strings.Repeat("word ", 400) + `"}`})
		}, AccessToken(ana, gana, nil), "STS", 400,
			"Unable to generate access token; STS returned 400 Bad Request: a[31m b " + strings.Repeat("word ", 100) + "word…"},
		{"the subject token echoed", func(w *world) {
			w.google.Break(googletest.Exchange, googletest.Fault{Status: 400,
				Body: `{"error":"x","error_description":"bad token %TOKEN%, really"}`})
		}, AccessToken(ana, gana, nil), "STS", 400,
			"Unable to generate access token; STS returned 400 Bad Request: bad token [redacted], really"},
		{"the federated token echoed", func(w *world) {
			w.google.Break(googletest.GenerateAccessToken, googletest.Fault{Status: 403,
				Body: `{"error":{"message":"bad Bearer%TOKEN%"}}`})
		}, AccessToken(ana, gana, nil), "IAM", 403,
			"Unable to generate access token; IAM returned 403 Forbidden: bad Bearer[redacted]" + binding},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			w.linked("team", "ana")
			c.fault(w)
			_, err := w.cache.Token(t.Context(), c.ask)
			var refusal *GoogleError
			if !errors.As(err, &refusal) {
				t.Fatalf("error %v, want Google's", err)
			}
			if refusal.Step != c.step || refusal.Status != c.status {
				t.Errorf("%s %d, want %s %d", refusal.Step, refusal.Status, c.step, c.status)
			}
			if err.Error() != c.text {
				t.Errorf("text\n%s\nwant\n%s", err, c.text)
			}
			if got, want := errors.Is(err, ErrUnavailable), c.status == 429; got != want { // T-09
				t.Errorf("is ErrUnavailable: %v", got)
			}
			w.noSecrets(t, err.Error())
		})
	}
}

func TestAnswersThatMakeNoSense(t *testing.T) {
	ok := func(body string) googletest.Fault { return googletest.Fault{Status: 200, Body: body} }
	for _, c := range []struct {
		name   string
		method googletest.Method
		fault  googletest.Fault
		lives  time.Duration // 0: refused
	}{
		{"G-04 a number", googletest.Exchange, ok(`{"access_token":"t","expires_in":3599}`), 3599 * time.Second},
		{"G-04 a string", googletest.Exchange, ok(`{"access_token":"t","expires_in":"3599"}`), 3599 * time.Second},
		{"a fraction", googletest.Exchange, ok(`{"access_token":"t","expires_in":3598.9}`), 3598900 * time.Millisecond},
		{"too long to be true", googletest.Exchange, ok(`{"access_token":"t","expires_in":1e300}`), 24 * time.Hour},
		{"missing", googletest.Exchange, ok(`{"access_token":"t"}`), 0},
		{"null", googletest.Exchange, ok(`{"access_token":"t","expires_in":null}`), 0},
		{"zero", googletest.Exchange, ok(`{"access_token":"t","expires_in":0}`), 0},
		{"negative", googletest.Exchange, ok(`{"access_token":"t","expires_in":-1}`), 0},
		{"not a number", googletest.Exchange, ok(`{"access_token":"t","expires_in":"NaN"}`), 0},
		{"no token", googletest.Exchange, ok(`{"expires_in":3599}`), 0},
		{"a token of two lines", googletest.Exchange, ok(`{"access_token":"t\r\nX: y","expires_in":3599}`), 0},
		{"no JSON", googletest.Exchange, ok(`hello`), 0},
		{"a redirect", googletest.Exchange, googletest.Fault{Status: 307, Header: http.Header{"Location": {"/v1/token"}}}, 0},
		{"IAM: no expireTime", googletest.GenerateAccessToken, ok(`{"accessToken":"t"}`), 0},
		{"IAM: expired", googletest.GenerateAccessToken, ok(`{"accessToken":"t","expireTime":"2020-01-01T00:00:00Z"}`), 0},
		{"IAM: no time", googletest.GenerateAccessToken, ok(`{"accessToken":"t","expireTime":"soon"}`), 0},
		{"IAM: longer than asked for", googletest.GenerateAccessToken,
			ok(`{"accessToken":"t","expireTime":"2120-01-01T00:00:00Z"}`), time.Hour},
		{"IAM: no token", googletest.GenerateAccessToken, ok(`{"expireTime":"2120-01-01T00:00:00Z"}`), 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			w.linked("team", "ana")
			if c.method == googletest.Exchange {
				w.annotate(ana, workload.Account{})
			}
			account, _ := w.Account(t.Context(), ana, 0)
			w.google.Break(c.method, c.fault)
			got, err := w.cache.Token(t.Context(), AccessToken(ana, account, nil))
			if c.lives == 0 {
				if !errors.Is(err, ErrUnavailable) {
					t.Errorf("error %v, want ErrUnavailable", err)
				}
				if n := w.google.Calls(c.method); n != 1 {
					t.Errorf("tried %d times", n)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if lives := got.Expires.Sub(got.Minted); lives != c.lives {
				t.Errorf("lives %v, want %v", lives, c.lives)
			}
		})
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

func TestFaultsOnTheWayAreTriedAgain(t *testing.T) {
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

func TestRefusalsAreLoggedAtABoundedRate(t *testing.T) {
	w := newWorld(t)
	w.err = errors.New("no")
	for i := range 200 { // one ServiceAccount's are one line
		sa := workload.ServiceAccount{Namespace: ana.Namespace, Name: fmt.Sprintf("a%d", i)}
		_, _ = w.minter.Token(context.Background(), AccessToken(sa, workload.Account{}, nil))
	}
	if n := strings.Count(w.lines.String(), "level=warning"); n < 20 || n > 30 {
		t.Errorf("%d lines for 200 refusals", n)
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
