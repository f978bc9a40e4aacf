package googletest

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
)

const (
	skew       = time.Minute // that STS tolerates between clocks, either way
	maxSubject = 127         // bytes of google.subject (G-06, length of google.subject)

	grantType   = "urn:ietf:params:oauth:grant-type:token-exchange"
	accessType  = "urn:ietf:params:oauth:token-type:access_token"
	jwtType     = "urn:ietf:params:oauth:token-type:jwt"
	idTokenType = "urn:ietf:params:oauth:token-type:id_token"
)

// stsError is a refusal in STS's form (G-05, forms of errors).
func stsError(code, format string, args ...any) response {
	return response{status: http.StatusBadRequest, body: map[string]string{"error": code,
		"error_description": fmt.Sprintf(format, args...)}}
}

// exchange is POST /v1/token. The messages are Google's where they are known. The comment "ours"
// marks the others.
func (s *Server) exchange(r *http.Request, body string) (a response) {
	form, err := url.ParseQuery(body)
	secret := form.Get("subject_token")
	if secret != "" {
		s.secret(secret)
	}
	defer func() { a.secret = secret }()
	if r.Header.Get("Authorization") != "" { // G-02, STS takes no credential; the message is ours
		return stsError("invalid_client", "The request must not carry an Authorization header.")
	}
	if t, _, merr := mime.ParseMediaType(r.Header.Get("Content-Type")); merr != nil ||
		t != "application/x-www-form-urlencoded" || err != nil {
		return stsError("invalid_request", "Invalid request body: it must be application/x-www-form-urlencoded.") // ours
	}
	for _, field := range []string{"grant_type", "audience", "scope", "requested_token_type", "subject_token",
		"subject_token_type"} {
		if len(form[field]) != 1 || form.Get(field) == "" {
			return stsError("invalid_request", "Missing or repeated parameter: %q.", field) // ours
		}
	}
	switch {
	case form.Get("grant_type") != grantType:
		return stsError("unsupported_grant_type", "Invalid value for \"grant_type\".") // ours
	case form.Get("requested_token_type") != accessType:
		return stsError("invalid_request", "Invalid value for \"requested_token_type\".") // ours
	case form.Get("subject_token_type") != jwtType && form.Get("subject_token_type") != idTokenType:
		return stsError("invalid_request", "Invalid value for \"subject_token_type\".") // ours
	}
	audience := form.Get("audience")
	if !strings.HasPrefix(audience, "//iam.googleapis.com/projects/") && !strings.HasPrefix(audience,
		"identitynamespace:") {
		return stsError("invalid_request", "Invalid value for \"audience\". This value should be the full resource name of "+
			"the Identity Provider. See https://cloud.google.com/iam/docs/reference/sts/rest/v1/TopLevel/token for the list "+
			"of possible formats.")
	}
	provider, ok := s.o.Providers[audience]
	if !ok {
		return stsError("invalid_target", "The target service indicated by the \"audience\" parameters is invalid. This "+
			"might either be because the pool or provider is disabled or deleted or because it doesn't exist.")
	}
	scopes := strings.Fields(form.Get("scope"))
	if !allScopes(scopes) {
		return stsError("invalid_scope", "Some requested scopes were invalid.") // ours
	}
	subject, left, refusal := provider.verify(audience, secret)
	if refusal != nil {
		return *refusal
	}
	left = min(left, s.o.FederatedLifetime)
	value := opaque()
	s.issue(value, Issued{Method: Exchange, Subject: subject, Scopes: scopes, Audience: audience,
		Expires: time.Now().Add(left)})
	return response{status: http.StatusOK, body: map[string]any{
		"access_token":      value,
		"issued_token_type": accessType,
		"token_type":        "Bearer",
		"expires_in":        int(left.Seconds()),
	}}
}

// verify returns the google.subject of a Kubernetes token, and how long the token still lives.
func (p Provider) verify(name, token string) (subject string, left time.Duration, _ *response) {
	refuse := func(code, format string, args ...any) (string, time.Duration, *response) {
		r := stsError(code, format, args...)
		return "", 0, &r
	}
	jws, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.RS256, jose.ES256})
	if err != nil || len(jws.Signatures) != 1 {
		return refuse("invalid_request", "Unable to parse the ID Token.") // ours
	}
	var claims struct {
		Iss *string         `json:"iss"`
		Sub string          `json:"sub"`
		Aud json.RawMessage `json:"aud"`
		Exp *float64        `json:"exp"`
		Iat *float64        `json:"iat"`
		Nbf *float64        `json:"nbf"`
	}
	if json.Unmarshal(jws.UnsafePayloadWithoutVerification(), &claims) != nil {
		return refuse("invalid_request", "Unable to parse the ID Token.") // ours
	}
	if claims.Iss == nil || *claims.Iss != p.Issuer {
		got := "null"
		if claims.Iss != nil {
			got = *claims.Iss
		}
		return refuse("invalid_grant", "The issuer in ID Token %s does not match the expected one in config: %s.", got,
			p.Issuer)
	}
	// Google gives one message for an issuer that does not answer and for an unknown key.
	key, ok := p.key(jws.Signatures[0].Header)
	if !ok {
		return refuse("invalid_grant", "Error connecting to the given credential's issuer.")
	}
	if _, err := jws.Verify(key); err != nil {
		return refuse("invalid_grant", "Unable to verify the ID Token signature.")
	}
	audiences := list(claims.Aud)
	allowed := p.AllowedAudiences
	if len(allowed) == 0 {
		allowed = []string{name, "https:" + name}
	}
	if len(audiences) != 1 || !slices.Contains(allowed, audiences[0]) {
		return refuse("invalid_grant", "The audience in ID Token %v does not match the expected audience.", audiences)
	}
	now := time.Now()
	stale := func(iat string) (string, time.Duration, *response) {
		return refuse("invalid_grant", "ID Token issued at %s is stale to sign-in.", iat)
	}
	if claims.Iat == nil {
		return stale("null")
	}
	iat := fmt.Sprintf("%.0f", *claims.Iat)
	switch {
	case claims.Exp == nil, now.After(unix(*claims.Exp).Add(skew)), unix(*claims.Iat).After(now.Add(skew)):
		return stale(iat)
	case claims.Nbf != nil && unix(*claims.Nbf).After(now.Add(skew)):
		return stale(iat)
	case claims.Sub == "":
		return refuse("unauthorized_client", "The given credential is rejected by the attribute condition.")
	}
	subject = claims.Sub
	if p.MapSubject != nil {
		subject = p.MapSubject(subject)
	}
	if len(subject) > maxSubject {
		return refuse("invalid_request", "The size of mapped attribute google.subject exceeds the 127 bytes limit. Either "+
			"modify your attribute mapping or the incoming assertion to produce a mapped attribute that is less than 127 bytes.")
	}
	return subject, max(unix(*claims.Exp).Sub(now), time.Second), nil
}

// key returns the provider's key that the header names.
func (p Provider) key(h jose.Header) (any, bool) {
	if p.JWKS == nil {
		return nil, false
	}
	keys := p.JWKS()
	for _, k := range keys.Key(h.KeyID) {
		switch key := k.Key.(type) {
		case *rsa.PublicKey:
			if h.Algorithm == string(jose.RS256) {
				return key, true
			}
		case *ecdsa.PublicKey:
			if h.Algorithm == string(jose.ES256) {
				return key, true
			}
		}
	}
	return nil, false
}

// list reads aud, which is a string or an array of them.
func list(raw json.RawMessage) []string {
	var one string
	if json.Unmarshal(raw, &one) == nil {
		return []string{one}
	}
	var many []string
	_ = json.Unmarshal(raw, &many)
	return many
}

func unix(s float64) time.Time { return time.Unix(int64(s), 0) }

func allScopes(scopes []string) bool {
	for _, s := range scopes {
		if !strings.HasPrefix(s, "https://www.googleapis.com/auth/") || len(s) == len("https://www.googleapis.com/auth/") {
			return false
		}
	}
	return len(scopes) > 0
}
