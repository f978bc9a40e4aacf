package googletest_test

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
)

const path = "/v1/projects/-/serviceAccounts/" + email + ":"

func generate(t *testing.T, s *googletest.Server, path, authorization, body string) reply {
	t.Helper()
	a, err := do(t, s, post(t, s.URL()+path, "application/json", authorization, body))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// federated is a bearer token that may call IAM Credentials, where the policy says so.
func federated(t *testing.T, s *googletest.Server, scopes string) string {
	t.Helper()
	form := rightForm(rightToken().sign(t))
	form.Set("scope", scopes)
	a := exchange(t, s, form)
	if a.status != 200 {
		t.Fatalf("%d %s", a.status, a.message)
	}
	return a.AccessToken
}

func TestG11GenerateAccessToken(t *testing.T) {
	s := start(t)
	s.Allow(subject, email)
	bearer := "Bearer " + federated(t, s, scope)
	for body, lives := range map[string]time.Duration{
		`{"scope":["` + scope + `"]}`:                                     time.Hour,
		`{"scope":["` + scope + `"],"lifetime":"600s","delegates":[]}`:    10 * time.Minute,
		`{"scope":["` + scope + `","` + scope + `x"],"lifetime":"3600s"}`: time.Hour,
	} {
		a := generate(t, s, path+"generateAccessToken", bearer, body)
		if left := time.Until(a.ExpireTime); a.status != 200 || left > lives || left < lives-5*time.Second {
			t.Errorf("%s: %d %s, %v left", body, a.status, a.message, left)
		}
		if i, ok := s.Lookup(a.IAMToken); !ok || i.Method != googletest.GenerateAccessToken || i.Subject != subject ||
			i.Email != email || i.Scopes[0] != scope {
			t.Errorf("recorded: %+v", i)
		}
		if !slices.Contains(s.Secrets(), a.IAMToken) {
			t.Error("Secrets lacks it")
		}
	}
}

func TestG13GenerateIDToken(t *testing.T) {
	s := start(t)
	s.Allow(subject, email)
	bearer := "Bearer " + federated(t, s, scope)
	for body, includesEmail := range map[string]bool{`{"audience":"https://a","includeEmail":true}`: true,
		`{"audience":"https://a"}`: false} {
		a := generate(t, s, path+"generateIdToken", bearer, body)
		jws, err := jose.ParseSignedCompact(a.IDToken, []jose.SignatureAlgorithm{jose.RS256})
		if err != nil {
			t.Fatal(err)
		}
		raw, err := jws.Verify(s.JWKS())
		if err != nil {
			t.Fatal(err)
		}
		var claims struct {
			Iss, Aud, Sub, Email string
			Verified             bool `json:"email_verified"`
			Iat, Exp             int64
		}
		if err := json.Unmarshal(raw, &claims); err != nil {
			t.Fatal(err)
		}
		if claims.Iss != "https://accounts.google.com" || claims.Aud != "https://a" || len(claims.Sub) != 21 ||
			claims.Exp-claims.Iat < 3598 ||
			claims.Verified != includesEmail || (claims.Email == email) != includesEmail {
			t.Errorf("%s: %+v", body, claims)
		}
	}
}

func TestIAMsRefusals(t *testing.T) {
	const access, id = "generateAccessToken", "generateIdToken"
	s := start(t)
	s.Allow(subject, email)
	good := federated(t, s, scope)
	revoked := federated(t, s, scope)
	s.Revoke(revoked)
	narrow := federated(t, s, "https://www.googleapis.com/auth/drive")
	impersonated := generate(t, s, path+access, "Bearer "+good, `{"scope":["`+scope+`"]}`).IAMToken
	s.Account("closed@project.iam.gserviceaccount.com")
	s.Allow(subject, "denied@project.iam.gserviceaccount.com")
	s.Deny(subject, "denied@project.iam.gserviceaccount.com")
	s.Allow("system:serviceaccount:team:bob", "bob@project.iam.gserviceaccount.com")
	of := func(account, method string) string {
		return "/v1/projects/-/serviceAccounts/" + account + "@project.iam.gserviceaccount.com:" + method
	}
	const (
		right     = `{"scope":["` + scope + `"]}`
		rightID   = `{"audience":"a"}`
		missing   = "Request is missing required authentication credential. " + unauthenticated
		invalid   = "Request had invalid authentication credentials. " + unauthenticated
		payload   = "Invalid JSON payload received."
		argument  = "Request contains an invalid argument."
		forbidden = "Permission 'iam.serviceAccounts.getAccessToken' denied on resource (or it may not exist)."
	)
	for _, c := range []struct {
		name, path, authorization, body string
		status                          int
		code, message                   string
	}{
		{"no bearer", path + access, "", right, 401, "UNAUTHENTICATED", missing},
		{"basic", path + access, "Basic eDp5", right, 401, "UNAUTHENTICATED", missing},
		{"unknown bearer", path + access, "Bearer x", right, 401, "UNAUTHENTICATED", invalid},
		{"revoked bearer", path + access, "Bearer " + revoked, right, 401, "UNAUTHENTICATED", invalid},
		{"an impersonated bearer", path + access, "Bearer " + impersonated, right, 401, "UNAUTHENTICATED", invalid},
		{"the Kubernetes token", path + access, "Bearer " + rightToken().sign(t), right, 401, "UNAUTHENTICATED", invalid},
		{"G-14 scopes", path + access, "Bearer " + narrow, right, 403, "PERMISSION_DENIED",
			"Request had insufficient authentication scopes."},
		{"no JSON", path + access, "Bearer " + good, "scope=x", 400, "INVALID_ARGUMENT", payload},
		{"unknown field", path + access, "Bearer " + good, `{"scopes":["x"]}`, 400, "INVALID_ARGUMENT", payload},
		{"no scope", path + access, "Bearer " + good, `{}`, 400, "INVALID_ARGUMENT", "Scope required."},
		{"bad scope", path + access, "Bearer " + good, `{"scope":["everything"]}`, 400, "INVALID_ARGUMENT", argument},
		{"lifetime in hours", path + access, "Bearer " + good, `{"scope":["` + scope + `"],"lifetime":"1h"}`, 400,
			"INVALID_ARGUMENT", "Invalid value at 'lifetime' (type.googleapis.com/google.protobuf.Duration)"},
		{"no lifetime", path + access, "Bearer " + good, `{"scope":["` + scope + `"],"lifetime":"0s"}`, 400,
			"INVALID_ARGUMENT", "Lifetime of access token must be larger then zero."},
		{"lifetime", path + access, "Bearer " + good, `{"scope":["` + scope + `"],"lifetime":"3601s"}`, 400,
			"INVALID_ARGUMENT", "The access token can not have lifetimes of more than 1 hour. Use the Org Policy Constraint " +
				"constraints/iam.allowServiceAccountCredentialLifetimeExtension to allow up to 12 hours."},
		{"no audience", path + id, "Bearer " + good, `{"includeEmail":true}`, 400, "INVALID_ARGUMENT", argument},
		{"ID token with scopes", path + id, "Bearer " + good, right, 400, "INVALID_ARGUMENT", payload},
		{"no such account", of("nobody", access), "Bearer " + good, right, 404, "NOT_FOUND",
			"Not found; Gaia id not found for email nobody@project.iam.gserviceaccount.com"},
		{"no binding", of("closed", access), "Bearer " + good, right, 403, "PERMISSION_DENIED", forbidden},
		{"binding taken away", of("denied", access), "Bearer " + good, right, 403, "PERMISSION_DENIED", forbidden},
		{"somebody else's binding", of("bob", access), "Bearer " + good, right, 403, "PERMISSION_DENIED", forbidden},
		{"no binding, ID token", of("closed", id), "Bearer " + good, rightID, 403, "PERMISSION_DENIED",
			"Permission 'iam.serviceAccounts.getOpenIdToken' denied on resource (or it may not exist)."},
	} {
		t.Run(c.name, func(t *testing.T) {
			if a := generate(t, s, c.path, c.authorization, c.body); a.status != c.status || a.code != c.code ||
				a.message != c.message {
				t.Errorf("%d %s %q, want %d %s %q", a.status, a.code, a.message, c.status, c.code, c.message)
			}
		})
	}
	form := post(t, s.URL()+path+access, "application/x-www-form-urlencoded", "Bearer "+good, right)
	if a, err := do(t, s, form); err != nil || a.status != 400 || a.message != payload {
		t.Errorf("content type: %d %q (%v)", a.status, a.message, err)
	}
}

// K-00: what an email could turn a path into is nowhere.
func TestWhatIsNotThere(t *testing.T) {
	s := start(t)
	for _, p := range []string{
		"/", "/v1/token/", "/v1/token?x=y", "/v2/token", "/v1/projects/p/serviceAccounts/" + email + ":generateAccessToken",
		path + "signBlob", path + "generateAccessToken?x=y", path + "signBlob:generateAccessToken",
		"/v1/projects/-/serviceAccounts/a/b:generateAccessToken", "/v1/projects/-/serviceAccounts/" + email,
	} {
		if a := generate(t, s, p, "", "{}"); a.status != 404 || !strings.Contains(a.raw, "Error 404 (Not Found)!!1") {
			t.Errorf("%s: %d %s", p, a.status, a.raw)
		}
	}
	r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, s.STSURL(), nil)
	r.RequestURI = ""
	if a, err := do(t, s, r); err != nil || a.status != 404 {
		t.Errorf("GET: %d (%v)", a.status, err)
	}
	for _, m := range googletest.Methods {
		if n := s.Calls(m); n != 0 {
			t.Errorf("%d calls of %s", n, m)
		}
	}
}

func TestFaults(t *testing.T) {
	for _, c := range []struct {
		name   string
		fault  googletest.Fault
		status int // 0: no answer
		code   string
		raw    string // "" is any
	}{
		{"drop", googletest.Fault{Drop: true}, 0, "", ""},
		{"truncate", googletest.Fault{Truncate: true}, 0, "", ""},
		{"latency alone", googletest.Fault{Latency: time.Millisecond}, 200, "", ""},
		{"latency before another", googletest.Fault{Latency: time.Millisecond, Drop: true}, 0, "", ""},
		{"403", googletest.Fault{Status: 403, Message: "no"}, 403, "PERMISSION_DENIED", ""},
		{"404", googletest.Fault{Status: 404}, 404, "NOT_FOUND", ""},
		{"429", googletest.Fault{Status: 429, RetryAfter: time.Minute}, 429, "RESOURCE_EXHAUSTED", ""},
		{"500", googletest.Fault{Status: 500}, 500, "INTERNAL", ""},
		{"503", googletest.Fault{Status: 503}, 503, "UNAVAILABLE", ""},
		{"a body", googletest.Fault{Status: 502, Body: "<html>", Header: http.Header{"X-Test": {"y"}}}, 502, "", "<html>"},
		{"a body without sense", googletest.Fault{Status: 200, Body: "{}"}, 200, "", "{}"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := start(t)
			s.Allow(subject, email)
			bearer := "Bearer " + federated(t, s, scope)
			ask := func() (reply, error) {
				return do(t, s, post(t, s.URL()+path+"generateAccessToken", "application/json", bearer, `{"scope":["`+scope+`"]}`))
			}
			c.fault.Times = 2
			s.Break(googletest.GenerateAccessToken, c.fault)
			for range 2 {
				a, err := ask()
				if (err != nil) != (c.status == 0) || a.status != c.status || a.code != c.code || c.raw != "" && a.raw != c.raw {
					t.Fatalf("%d %s %s (%v)", a.status, a.code, a.raw, err)
				}
				if c.fault.RetryAfter > 0 && a.header.Get("Retry-After") != "60" {
					t.Error("no Retry-After")
				}
				for k := range c.fault.Header {
					if a.header.Get(k) != c.fault.Header.Get(k) {
						t.Errorf("no %s", k)
					}
				}
			}
			if a, err := ask(); err != nil || a.status != 200 || a.IAMToken == "" {
				t.Errorf("after it: %d %s (%v)", a.status, a.raw, err)
			}
			c.fault.Times = 0
			s.Break(googletest.GenerateAccessToken, c.fault)
			_, _ = ask()
			s.Heal()
			if a, err := ask(); err != nil || a.status != 200 || a.IAMToken == "" {
				t.Errorf("healed: %d %s (%v)", a.status, a.raw, err)
			}
			if n := s.Calls(googletest.GenerateAccessToken); n != 5 {
				t.Errorf("%d calls, want 5", n)
			}
		})
	}
	t.Run("of STS, with the token echoed", func(t *testing.T) {
		s := start(t)
		s.Break(googletest.Exchange, googletest.Fault{Status: 400, Body: `{"error":"x","error_description":"%TOKEN%"}`})
		form := rightForm(rightToken().sign(t))
		if a := exchange(t, s, form); a.status != 400 || a.code != "x" || a.message != form.Get("subject_token") {
			t.Errorf("%d %s", a.status, a.code)
		}
		s.Break(googletest.Exchange, googletest.Fault{Status: 503, Message: "away"})
		if a := exchange(t, s, form); a.status != 503 || a.message != "away" {
			t.Errorf("%d %s", a.status, a.message)
		}
	})
}

func TestTheCertificateIsOfOurAuthority(t *testing.T) {
	s := start(t)
	if _, err := http.DefaultClient.Do(post(t, s.STSURL(), "text/plain", "", "")); err == nil {
		t.Error("a client that does not know the authority talks to the server")
	}
}
