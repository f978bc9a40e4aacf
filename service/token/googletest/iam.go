package googletest

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"math/big"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
)

const (
	cloudPlatform = "https://www.googleapis.com/auth/cloud-platform"
	idKeyID       = "googletest"
	idIssuer      = "https://accounts.google.com"
)

// route reads the path. The email is one escaped segment. Any other path is 404.
func route(u *url.URL) (m Method, email string, ok bool) {
	path := u.EscapedPath()
	if u.RawQuery != "" {
		return "", "", false
	}
	if path == "/v1/token" {
		return Exchange, "", true
	}
	rest, ok := strings.CutPrefix(path, "/v1/projects/-/serviceAccounts/")
	if !ok || strings.Contains(rest, "/") {
		return "", "", false
	}
	account, verb, ok := strings.Cut(rest, ":")
	if !ok || verb != string(GenerateAccessToken) && verb != string(GenerateIDToken) {
		return "", "", false
	}
	email, err := url.PathUnescape(account)
	return Method(verb), email, err == nil
}

// iamError is a refusal in the form of Google's other APIs.
func iamError(code int, status, message string, details ...any) response {
	e := map[string]any{"code": code, "message": message, "status": status}
	if len(details) > 0 {
		e["details"] = details
	}
	return response{status: code, body: map[string]any{"error": e}}
}

func errorInfo(reason, domain string, metadata map[string]string) map[string]any {
	return map[string]any{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": reason, "domain": domain,
		"metadata": metadata}
}

// generate is :generateAccessToken and :generateIdToken.
func (s *Server) generate(r *http.Request, m Method, email string, body []byte) (a response) {
	value, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	defer func() { a.secret = value }()
	if !ok || value == "" {
		return iamError(http.StatusUnauthorized, "UNAUTHENTICATED",
			"Request is missing required authentication credential. Expected OAuth 2 access token, login cookie or other "+
				"valid authentication credential. See https://developers.google.com/identity/sign-in/web/devconsole-project.")
	}
	caller, ok := s.Lookup(value)
	if !ok || caller.Method != Exchange || !time.Now().Before(caller.Expires) { // bindings are for federated tokens only
		return iamError(http.StatusUnauthorized, "UNAUTHENTICATED",
			"Request had invalid authentication credentials. Expected OAuth 2 access token, login cookie or other valid "+
				"authentication credential. See https://developers.google.com/identity/sign-in/web/devconsole-project.")
	}
	if !slices.Contains(caller.Scopes, cloudPlatform) { // G-14, scope of the exchange
		return iamError(http.StatusForbidden, "PERMISSION_DENIED", "Request had insufficient authentication scopes.",
			errorInfo("ACCESS_TOKEN_SCOPE_INSUFFICIENT", "googleapis.com",
				map[string]string{"service": "iamcredentials.googleapis.com"}))
	}
	if t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || t != "application/json" {
		return iamError(http.StatusBadRequest, "INVALID_ARGUMENT", "Invalid JSON payload received.")
	}
	issued := Issued{Method: m, Subject: caller.Subject, Email: email, QuotaProject: r.Header.Get("X-Goog-User-Project")}
	if m == GenerateAccessToken {
		return s.accessToken(issued, body)
	}
	return s.idToken(issued, body)
}

// permitted reports whether the policy allows the call.
func (s *Server) permitted(i Issued, permission string) *response {
	s.mu.Lock()
	policy, exists := s.policies[i.Email]
	allowed := policy[i.Subject]
	s.mu.Unlock()
	var r response
	switch {
	case !exists:
		r = iamError(http.StatusNotFound, "NOT_FOUND", "Not found; Gaia id not found for email "+i.Email)
	case !allowed:
		r = iamError(http.StatusForbidden, "PERMISSION_DENIED",
			fmt.Sprintf("Permission '%s' denied on resource (or it may not exist).", permission),
			errorInfo("IAM_PERMISSION_DENIED", "iam.googleapis.com", map[string]string{"permission": permission}))
	default:
		return nil
	}
	return &r
}

func (s *Server) accessToken(i Issued, body []byte) response {
	var q struct {
		Scope     []string `json:"scope"`
		Lifetime  string   `json:"lifetime"`
		Delegates []string `json:"delegates"`
	}
	if !strict(body, &q) {
		return iamError(http.StatusBadRequest, "INVALID_ARGUMENT", "Invalid JSON payload received.")
	}
	if len(q.Scope) == 0 {
		return iamError(http.StatusBadRequest, "INVALID_ARGUMENT", "Scope required.") // ours
	}
	if !allScopes(q.Scope) {
		return iamError(http.StatusBadRequest, "INVALID_ARGUMENT", "Request contains an invalid argument.")
	}
	lifetime := time.Hour
	if q.Lifetime != "" {
		d, err := time.ParseDuration(q.Lifetime)
		if err != nil || !strings.HasSuffix(q.Lifetime, "s") || strings.ContainsAny(q.Lifetime, "hm") {
			return iamError(http.StatusBadRequest, "INVALID_ARGUMENT",
				"Invalid value at 'lifetime' (type.googleapis.com/google.protobuf.Duration)")
		}
		lifetime = d
	}
	switch {
	case lifetime <= 0:
		// the typing error is Google's
		return iamError(http.StatusBadRequest, "INVALID_ARGUMENT", "Lifetime of access token must be larger then zero.")
	case lifetime > time.Hour:
		// its beginning is ours
		return iamError(http.StatusBadRequest, "INVALID_ARGUMENT",
			"The access token can not have lifetimes of more than 1 hour. Use the Org Policy Constraint "+
				"constraints/iam.allowServiceAccountCredentialLifetimeExtension to allow up to 12 hours.")
	}
	if refusal := s.permitted(i, "iam.serviceAccounts.getAccessToken"); refusal != nil {
		return *refusal
	}
	i.Scopes = q.Scope
	i.Expires = time.Now().Add(lifetime).Truncate(time.Second)
	value := opaque()
	s.issue(value, i)
	return response{status: http.StatusOK, body: map[string]string{"accessToken": value,
		"expireTime": i.Expires.UTC().Format(time.RFC3339)}}
}

func (s *Server) idToken(i Issued, body []byte) response {
	var q struct {
		Audience     string   `json:"audience"`
		IncludeEmail bool     `json:"includeEmail"`
		Delegates    []string `json:"delegates"`
	}
	if !strict(body, &q) {
		return iamError(http.StatusBadRequest, "INVALID_ARGUMENT", "Invalid JSON payload received.")
	}
	if q.Audience == "" {
		return iamError(http.StatusBadRequest, "INVALID_ARGUMENT", "Request contains an invalid argument.")
	}
	if refusal := s.permitted(i, "iam.serviceAccounts.getOpenIdToken"); refusal != nil {
		return *refusal
	}
	now := time.Now()
	i.Audience = q.Audience
	i.Expires = now.Add(time.Hour).Truncate(time.Second)
	id := uniqueID(i.Email)
	claims := map[string]any{"iss": idIssuer, "aud": q.Audience, "azp": id, "sub": id, "iat": now.Unix(),
		"exp": i.Expires.Unix()}
	if q.IncludeEmail {
		claims["email"], claims["email_verified"] = i.Email, true
	}
	value, err := s.sign(claims)
	if err != nil {
		return iamError(http.StatusInternalServerError, "INTERNAL", err.Error())
	}
	s.issue(value, i)
	return response{status: http.StatusOK, body: map[string]string{"token": value}}
}

func (s *Server) sign(claims map[string]any) (string, error) {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: s.key, KeyID: idKeyID}},
		(&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return "", err
	}
	raw, err := json.Marshal(claims)
	if err != nil {
		return "", err
	}
	signed, err := signer.Sign(raw)
	if err != nil {
		return "", err
	}
	return signed.CompactSerialize()
}

// uniqueID is the account's number: 21 digits, the same for an email every time.
func uniqueID(email string) string {
	sum := sha256.Sum256([]byte(email))
	n := new(big.Int).SetBytes(sum[:12])
	return fmt.Sprintf("1%020d", n.Mod(n, new(big.Int).Exp(big.NewInt(10), big.NewInt(20), nil)))
}

// strict reads a JSON body that has no other fields than v.
func strict(body []byte, v any) bool {
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	return d.Decode(v) == nil
}
