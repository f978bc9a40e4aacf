package token

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// generate gets r's token from IAM Credentials, with the federated token of r's ServiceAccount
// (G-11, generateAccessToken; G-13, generateIdToken).
func (g *Google) generate(ctx context.Context, r Request, federated string) (Token, error) {
	began := time.Now()
	var t Token
	var err error
	if r.Audience != "" {
		t, err = g.generateIDToken(ctx, r, federated)
	} else {
		t, err = g.generateAccessToken(ctx, r, federated)
	}
	g.metrics.observe(stepIAM, began, err)
	return t, err
}

func (g *Google) generateAccessToken(ctx context.Context, r Request, federated string) (Token, error) {
	a, err := g.askIAM(ctx, r, federated, "generateAccessToken", struct {
		Scope    []string `json:"scope"`
		Lifetime string   `json:"lifetime"`
	}{strings.Fields(r.Scopes), strconv.Itoa(int(g.o.Lifetime.Seconds())) + "s"})
	if err != nil {
		return Token{}, err
	}
	var got struct {
		AccessToken string    `json:"accessToken"`
		ExpireTime  time.Time `json:"expireTime"`
	}
	if json.Unmarshal(a.body, &got) != nil {
		return Token{}, unavailable("IAM", errNotJSON)
	}
	return newToken("IAM", got.AccessToken, min(a.until(got.ExpireTime), g.o.Lifetime))
}

func (g *Google) generateIDToken(ctx context.Context, r Request, federated string) (Token, error) {
	a, err := g.askIAM(ctx, r, federated, "generateIdToken", struct {
		Audience     string `json:"audience"`
		IncludeEmail bool   `json:"includeEmail"` // I-03, claim email
	}{r.Audience, true})
	if err != nil {
		return Token{}, err
	}
	var got struct {
		Token string `json:"token"`
	}
	if json.Unmarshal(a.body, &got) != nil {
		return Token{}, unavailable("IAM", errNotJSON)
	}
	return newToken("IAM", got.Token, min(a.until(expiry(got.Token)), maxLife))
}

func (g *Google) askIAM(ctx context.Context, r Request, federated, method string, request any) (answer, error) {
	body, err := json.Marshal(request)
	if err != nil {
		return answer{}, err
	}
	header := http.Header{
		"Authorization": {"Bearer " + federated},
		"Content-Type":  {"application/json"},
		"Accept":        {"application/json"},
	}
	if p := r.Account.QuotaProject; p != "" {
		header.Set("X-Goog-User-Project", p) // G-15, quota project
	} else if p := g.o.QuotaProject; p != "" {
		header.Set("X-Goog-User-Project", p)
	}
	// The email is from an annotation: escaped, it cannot change the path or the method (K-00,
	// untrusted annotations).
	endpoint := g.iam + "/v1/projects/-/serviceAccounts/" + escaped(r.Account.GoogleEmail) + ":" + method
	a, err := post(ctx, g.client, endpoint, header, body)
	if err != nil {
		return answer{}, unavailable("IAM", err, federated)
	}
	if a.status != http.StatusOK {
		e := a.refusal("IAM", federated).of(r)
		if !e.ofProject() {
			e.Hint = g.bindingHint(r, a.status)
		}
		return answer{}, e.orUnavailable()
	}
	return a, nil
}

// escaped is url.PathEscape that also escapes ":" and "..", which could change the path.
func escaped(email string) string {
	return strings.NewReplacer(":", "%3A", "..", "%2E%2E").Replace(url.PathEscape(email))
}

// expiry reads the claim exp of a JWT without verifying the signature. It returns the zero time if
// it cannot.
func expiry(jwt string) time.Time {
	_, rest, _ := strings.Cut(jwt, ".")
	payload, _, _ := strings.Cut(rest, ".")
	raw, err := base64.RawURLEncoding.DecodeString(payload)
	if err != nil {
		return time.Time{}
	}
	var claims struct {
		Exp int64 `json:"exp"`
	}
	if json.Unmarshal(raw, &claims) != nil {
		return time.Time{}
	}
	return time.Unix(claims.Exp, 0)
}
