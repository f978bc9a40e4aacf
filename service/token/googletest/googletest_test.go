package googletest_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
)

const (
	issuer   = "https://kubernetes.default.svc"
	provider = "//iam.googleapis.com/projects/123/locations/global/workloadIdentityPools/pool/providers/prov"
	closed   = "//iam.googleapis.com/projects/123/locations/global/workloadIdentityPools/pool/providers/unreachable"
	custom   = "//iam.googleapis.com/projects/123/locations/global/workloadIdentityPools/pool/providers/custom"
	short    = "identitynamespace:pool.svc.id.goog:https://issuer"
	subject  = "system:serviceaccount:team:ana"
	email    = "ana@project.iam.gserviceaccount.com"
	scope    = "https://www.googleapis.com/auth/cloud-platform"

	unauthenticated = "Expected OAuth 2 access token, login cookie or other valid authentication credential. See " +
		"https://developers.google.com/identity/sign-in/web/devconsole-project."
	audienceMissing = "The target service indicated by the \"audience\" parameters is invalid. This might either be " +
		"because the pool or provider is disabled or deleted or because it doesn't exist."
	audienceForm = "Invalid value for \"audience\". This value should be the full resource name of the Identity " +
		"Provider. See https://cloud.google.com/iam/docs/reference/sts/rest/v1/TopLevel/token for the list of possible " +
		"formats."
	subjectSize = "The size of mapped attribute google.subject exceeds the 127 bytes limit. Either modify your " +
		"attribute mapping or the incoming assertion to produce a mapped attribute that is less than 127 bytes."
)

var (
	ours    = newKey()
	another = newKey()
)

func newKey() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	return key
}

func start(t *testing.T) *googletest.Server {
	t.Helper()
	jwks := func() jose.JSONWebKeySet {
		return jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: ours.Public(), KeyID: "k", Algorithm: "ES256"}}}
	}
	s, err := googletest.New(googletest.Options{Providers: map[string]googletest.Provider{
		provider: {Issuer: issuer, JWKS: jwks},
		closed:   {Issuer: issuer},
		custom:   {Issuer: issuer, JWKS: jwks, AllowedAudiences: []string{"sts.example"}},
		short:    {Issuer: issuer, JWKS: jwks, MapSubject: func(string) string { return "short" }},
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// token is a Kubernetes token, before it is signed.
type token struct {
	claims map[string]any
	key    *ecdsa.PrivateKey
	keyID  string
}

func (k token) sign(t *testing.T) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: k.key,
		KeyID: k.keyID}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(k.claims)
	if err != nil {
		t.Fatal(err)
	}
	jws, err := signer.Sign(raw)
	if err != nil {
		t.Fatal(err)
	}
	compact, err := jws.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return compact
}

func rightToken() token {
	now := time.Now()
	return token{key: ours, keyID: "k", claims: map[string]any{"iss": issuer, "sub": subject, "aud": []string{provider},
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(time.Hour).Unix()}}
}

func rightForm(jwt string) url.Values {
	return url.Values{
		"grant_type":           {"urn:ietf:params:oauth:grant-type:token-exchange"},
		"audience":             {provider},
		"scope":                {scope},
		"requested_token_type": {"urn:ietf:params:oauth:token-type:access_token"},
		"subject_token":        {jwt},
		"subject_token_type":   {"urn:ietf:params:oauth:token-type:jwt"},
	}
}

// reply is an answer, of either service.
type reply struct {
	status int
	header http.Header
	raw    string

	AccessToken     string          `json:"access_token"`
	IssuedTokenType string          `json:"issued_token_type"`
	TokenType       string          `json:"token_type"`
	ExpiresIn       int             `json:"expires_in"`
	Description     string          `json:"error_description"`
	Error           json.RawMessage `json:"error"`
	IAMToken        string          `json:"accessToken"`
	ExpireTime      time.Time       `json:"expireTime"`
	IDToken         string          `json:"token"`

	code, message string // of a refusal
}

func do(t *testing.T, s *googletest.Server, r *http.Request) (a reply, err error) {
	t.Helper()
	resp, err := s.Client().Do(r)
	if err != nil {
		return a, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return a, err
	}
	_ = json.Unmarshal(raw, &a) // some answers are no JSON, by intent
	a.status, a.header, a.raw = resp.StatusCode, resp.Header, string(raw)
	a.message = a.Description
	var status struct {
		Code            int
		Message, Status string
	}
	if json.Unmarshal(a.Error, &a.code) != nil && json.Unmarshal(a.Error, &status) == nil {
		a.code, a.message = status.Status, status.Message
		if status.Code != a.status {
			t.Errorf("status %d, and %d in the body", a.status, status.Code)
		}
	}
	return a, nil
}

func post(t *testing.T, url, contentType, authorization, body string) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", contentType)
	if authorization != "" {
		r.Header.Set("Authorization", authorization)
	}
	return r
}

func exchange(t *testing.T, s *googletest.Server, form url.Values) reply {
	t.Helper()
	a, err := do(t, s, post(t, s.STSURL(), "application/x-www-form-urlencoded", "", form.Encode()))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestG01Exchange(t *testing.T) {
	s := start(t)
	for name, c := range map[string]struct {
		token   func(*token)
		form    func(url.Values)
		subject string
		lives   int // seconds; 0 is an hour
	}{
		"right": {},
		"id_token for its type": {form: func(f url.Values) {
			f.Set("subject_token_type",
				"urn:ietf:params:oauth:token-type:id_token")
		}},
		"audience a string":         {token: func(k *token) { k.claims["aud"] = provider }},
		"G-17 audience with https:": {token: func(k *token) { k.claims["aud"] = "https:" + provider }},
		"G-17 allowed audience": {token: func(k *token) { k.claims["aud"] = "sts.example" },
			form: func(f url.Values) { f.Set("audience", custom) }},
		"G-03 identitynamespace": {token: func(k *token) { k.claims["aud"] = short },
			form: func(f url.Values) { f.Set("audience", short) }, subject: "short"},
		"G-06 a long subject that is mapped": {token: func(k *token) {
			k.claims["aud"], k.claims["sub"] = short,
				strings.Repeat("s", 200)
		},
			form: func(f url.Values) { f.Set("audience", short) }, subject: "short"},
		"no nbf": {token: func(k *token) { delete(k.claims, "nbf") }},
		"a clock that is behind": {token: func(k *token) {
			k.claims["iat"], k.claims["nbf"] = time.Now().Unix()+30,
				time.Now().Unix()+30
		}},
		"what is left of it": {token: func(k *token) { k.claims["exp"] = time.Now().Unix() + 600 }, lives: 600},
	} {
		t.Run(name, func(t *testing.T) {
			k := rightToken()
			if c.token != nil {
				c.token(&k)
			}
			form := rightForm(k.sign(t))
			if c.form != nil {
				c.form(form)
			}
			a := exchange(t, s, form)
			// G-04
			if a.status != 200 || a.TokenType != "Bearer" ||
				a.IssuedTokenType != "urn:ietf:params:oauth:token-type:access_token" {
				t.Fatalf("%d %s %s", a.status, a.code, a.message)
			}
			lives, want := 3600, subject
			if c.lives != 0 {
				lives = c.lives
			}
			if c.subject != "" {
				want = c.subject
			}
			if a.ExpiresIn > lives || a.ExpiresIn < lives-5 {
				t.Errorf("expires in %d s, want %d", a.ExpiresIn, lives)
			}
			if i, ok := s.Lookup(a.AccessToken); !ok || i.Method != googletest.Exchange || i.Subject != want ||
				!slices.Equal(i.Scopes, []string{scope}) {
				t.Errorf("recorded: %+v", i)
			}
			if !slices.Contains(s.Secrets(), a.AccessToken) || !slices.Contains(s.Secrets(), form.Get("subject_token")) {
				t.Error("Secrets lacks one")
			}
		})
	}
}

func TestG05RefusalsOfAForm(t *testing.T) {
	s := start(t)
	set := func(key, value string) func(url.Values) { return func(f url.Values) { f.Set(key, value) } }
	for _, c := range []struct {
		name          string
		form          func(url.Values)
		code, message string
	}{
		{"grant type", set("grant_type", "password"), "unsupported_grant_type", `Invalid value for "grant_type".`},
		{"requested type", set("requested_token_type", "urn:ietf:params:oauth:token-type:jwt"), "invalid_request",
			`Invalid value for "requested_token_type".`},
		{"subject type", set("subject_token_type", "urn:ietf:params:oauth:token-type:saml2"), "invalid_request",
			`Invalid value for "subject_token_type".`},
		{"scope", set("scope", "everything"), "invalid_scope", "Some requested scopes were invalid."},
		{"scope without a name", set("scope", "https://www.googleapis.com/auth/"), "invalid_scope",
			"Some requested scopes were invalid."},
		{"audience's form", set("audience", strings.TrimPrefix(provider, "//")), "invalid_request", audienceForm},
		{"unknown provider", set("audience", provider+"x"), "invalid_target", audienceMissing},
		{"not a JWT", set("subject_token", "a.b.c"), "invalid_request", "Unable to parse the ID Token."},
	} {
		t.Run(c.name, func(t *testing.T) {
			form := rightForm(rightToken().sign(t))
			c.form(form)
			if a := exchange(t, s, form); a.status != 400 || a.code != c.code || a.message != c.message {
				t.Errorf("%d %s %q, want 400 %s %q", a.status, a.code, a.message, c.code, c.message)
			}
		})
	}
	for field := range rightForm("") {
		for name, change := range map[string]func(url.Values){
			"missing":  func(f url.Values) { f.Del(field) },
			"empty":    func(f url.Values) { f.Set(field, "") },
			"repeated": func(f url.Values) { f.Add(field, f.Get(field)) },
		} {
			form := rightForm(rightToken().sign(t))
			change(form)
			if a := exchange(t, s, form); a.status != 400 || a.code != "invalid_request" ||
				a.message != `Missing or repeated parameter: "`+field+`".` {
				t.Errorf("%s %s: %d %s %q", field, name, a.status, a.code, a.message)
			}
		}
	}
	form := rightForm(rightToken().sign(t)).Encode()
	for name, r := range map[string]*http.Request{
		"invalid_client":  post(t, s.STSURL(), "application/x-www-form-urlencoded", "Bearer x", form), // G-02
		"invalid_request": post(t, s.STSURL(), "application/json", "", form),
	} {
		if a, err := do(t, s, r); err != nil || a.status != 400 || a.code != name {
			t.Errorf("%d %s (%v), want 400 %s", a.status, a.code, err, name)
		}
	}
}

func TestG05RefusalsOfAKubernetesToken(t *testing.T) {
	s := start(t)
	now := time.Now().Unix()
	claim := func(key string, value any) func(*token) { return func(k *token) { k.claims[key] = value } }
	without := func(key string) func(*token) { return func(k *token) { delete(k.claims, key) } }
	stale := func(iat string) string { return "ID Token issued at " + iat + " is stale to sign-in." }
	wrongAudience := func(got string) string {
		return "The audience in ID Token " + got + " does not match the expected audience."
	}
	wrongIssuer := func(got string) string {
		return "The issuer in ID Token " + got + " does not match the expected one in config: " + issuer + "."
	}
	const unreachable = "Error connecting to the given credential's issuer."
	for _, c := range []struct {
		name          string
		change        func(*token)
		audience      string // the request's; "" is the right one
		code, message string
	}{
		{"signature", func(k *token) { k.key = another }, "", "invalid_grant", "Unable to verify the ID Token signature."},
		{"unknown key", func(k *token) { k.keyID = "rotated" }, "", "invalid_grant", unreachable},
		{"issuer unreachable", func(*token) {}, closed, "invalid_grant", unreachable},
		{"issuer", claim("iss", "https://elsewhere"), "", "invalid_grant", wrongIssuer("https://elsewhere")},
		{"no issuer", without("iss"), "", "invalid_grant", wrongIssuer("null")},
		{"audience", claim("aud", "other"), "", "invalid_grant", wrongAudience("[other]")},
		{"audience not allowed", func(*token) {}, custom, "invalid_grant", wrongAudience("[" + provider + "]")},
		{"two audiences", claim("aud", []string{provider, "other"}), "", "invalid_grant",
			wrongAudience("[" + provider + " other]")},
		{"no audience", without("aud"), "", "invalid_grant", wrongAudience("[]")},
		{"expired", claim("exp", now-90), "", "invalid_grant", stale(strconv.FormatInt(now, 10))},
		{"no exp", without("exp"), "", "invalid_grant", stale(strconv.FormatInt(now, 10))},
		{"no iat", without("iat"), "", "invalid_grant", stale("null")},
		{"issued in the future", claim("iat", now+3000), "", "invalid_grant", stale(strconv.FormatInt(now+3000, 10))},
		{"not yet valid", claim("nbf", now+3000), "", "invalid_grant", stale(strconv.FormatInt(now, 10))},
		{"no subject", without("sub"), "", "unauthorized_client",
			"The given credential is rejected by the attribute condition."},
		{"claims of the wrong type", claim("sub", 7), "", "invalid_request", "Unable to parse the ID Token."},
		{"G-06 subject of 128 bytes", claim("sub", strings.Repeat("s", 128)), "", "invalid_request", subjectSize},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := rightToken()
			k.claims["iat"] = now
			c.change(&k)
			form := rightForm(k.sign(t))
			if c.audience != "" {
				form.Set("audience", c.audience)
			}
			if a := exchange(t, s, form); a.status != 400 || a.code != c.code || a.message != c.message {
				t.Errorf("%d %s %q, want 400 %s %q", a.status, a.code, a.message, c.code, c.message)
			}
		})
	}
	k := rightToken()
	k.claims["sub"] = strings.Repeat("s", 127)
	if a := exchange(t, s, rightForm(k.sign(t))); a.status != 200 {
		t.Errorf("G-06 a subject of 127 bytes: %d %s", a.status, a.message)
	}
}
