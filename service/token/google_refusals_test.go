package token

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

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

func TestGooglesRefusalsInGooglesWords(t *testing.T) {
	long := workload.ServiceAccount{Namespace: strings.Repeat("n", 63), Name: strings.Repeat("s", 100)}
	const binding = ` Hint: if the binding is missing: gcloud iam service-accounts add-iam-policy-binding ` +
		`ana@project.iam.gserviceaccount.com --role roles/iam.workloadIdentityUser --member ` +
		`"principal://iam.googleapis.com/projects/123/locations/global/workloadIdentityPools/pool/subject/` +
		`system:serviceaccount:team:ana"`
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
