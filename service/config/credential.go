package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"regexp"
	"strings"
	"time"
)

// credential holds the used fields of the file that `gcloud iam workload-identity-pools
// create-cred-config` writes (G-18, external_account). Its credential_source is not used: the
// subject token is the pod's own.
type credential struct {
	Type             string `json:"type"`
	Audience         string `json:"audience"`
	SubjectTokenType string `json:"subject_token_type"`
	TokenURL         string `json:"token_url"`
	UniverseDomain   string `json:"universe_domain"`
	ImpersonationURL string `json:"service_account_impersonation_url"`
	Impersonation    struct {
		Lifetime int `json:"token_lifetime_seconds"`
	} `json:"service_account_impersonation"`
	QuotaProject     textOrNumber `json:"quota_project_id"`
	WorkforceProject string       `json:"workforce_pool_user_project"`
}

// textOrNumber is a JSON string, or a number as it is written.
type textOrNumber string

func (t *textOrNumber) UnmarshalJSON(b []byte) error {
	var n json.Number // which takes both, but of strings only numbers
	if err := json.Unmarshal(b, &n); err == nil {
		*t = textOrNumber(n)
		return nil
	}
	return json.Unmarshal(b, (*string)(t))
}

var impersonation = regexp.MustCompile(`^(https://[^/]+)/v1/projects/-/serviceAccounts/([^/]+):generateAccessToken$`)

const (
	credentialKey = "credentialConfigFile"
	makeAnother   = "gcloud iam workload-identity-pools create-cred-config PROVIDER --credential-source-file=unused " +
		"--output-file=FILE"
)

// resolveCredential adds the credential configuration's values below the explicit settings. A
// contradiction is a fault.
func (l *loader) resolveCredential() {
	if l.CredentialConfigFile == "" || l.broken[credentialKey] {
		if l.impersonateUnlinked && !l.broken[credentialKey] {
			l.complain("impersonateUnlinked", 0, bad("set "+credentialKey+" to a file with service_account_impersonation_url, "+
				"or remove it", "no account to impersonate is configured"))
		}
		return
	}
	data, err := l.read(l.CredentialConfigFile)
	if err != nil {
		l.complain(credentialKey, 0, bad("name a file that this user can read", "%s: %s", quote(l.CredentialConfigFile),
			reason(err)))
		return
	}
	data = bytes.TrimPrefix(data, []byte("\ufeff")) // editors of other systems write a byte order mark
	var c credential
	if err := json.Unmarshal(data, &c); err != nil {
		t, line := badJSON(data, err)
		l.credentialFault("", line, t)
		return
	}
	if c.Type != "external_account" {
		t := bad(makeAnother, "%s is not external_account", quote(c.Type))
		if c.Type == "service_account" || c.Type == "authorized_user" {
			t = bad("delete it and use workload identity federation: "+makeAnother,
				"%s is a key file, which this service never uses", quote(c.Type))
		}
		l.credentialFault("type", 0, t)
		return
	}
	if !strings.HasSuffix(c.SubjectTokenType, ":token-type:jwt") && !strings.HasSuffix(c.SubjectTokenType,
		":token-type:id_token") {
		l.credentialFault("subject_token_type", 0, bad(makeAnother,
			"%s is not a Kubernetes token's: urn:ietf:params:oauth:token-type:jwt", quote(c.SubjectTokenType)))
	}
	if c.WorkforceProject != "" {
		l.credentialFault("workforce_pool_user_project", 0, bad(makeAnother,
			"is for workforce pools, and pods use a workload identity pool"))
	}
	if c.Audience == "" {
		l.credentialFault("audience", 0, bad(makeAnother, "is not set"))
	}
	l.take("audience", c.Audience, "workloadIdentityProvider", provider, &l.provider)
	l.take("token_url", c.TokenURL, "google.stsURL", stsURL, &l.Google.STSURL)
	l.take("universe_domain", c.UniverseDomain, "google.universeDomain", domain, &l.Google.UniverseDomain)
	l.take("quota_project_id", string(c.QuotaProject), "", quotaProject, &l.Google.QuotaProject)
	if n := c.Impersonation.Lifetime; n != 0 {
		lifetime := duration(l.Google.TokenLifetime)
		l.take("service_account_impersonation.token_lifetime_seconds", duration(time.Duration(n)*time.Second),
			"google.tokenLifetime", tokenLifetime, &lifetime)
		l.Google.TokenLifetime, _ = time.ParseDuration(lifetime) // the check has parsed it
	}
	l.takeImpersonation(c.ImpersonationURL)
}

// takeImpersonation reads the URL that holds IAM's address and the account to impersonate for
// unlinked ServiceAccounts.
func (l *loader) takeImpersonation(u string) {
	const field = "service_account_impersonation_url"
	if u == "" {
		if l.impersonateUnlinked {
			l.complain("impersonateUnlinked", 0, bad("make the file with --service-account=EMAIL, or remove it",
				"%s names no account to impersonate", l.CredentialConfigFile))
		}
		return
	}
	if _, t := endpoint(u); t != nil {
		l.credentialFault(field, 0, t)
		return
	}
	m := impersonation.FindStringSubmatch(u)
	if m == nil || !googleEmail.MatchString(m[2]) {
		l.credentialFault(field, 0, bad("write https://iamcredentials.googleapis.com/v1/projects/-/"+
			"serviceAccounts/EMAIL:generateAccessToken",
			"%s does not name the access tokens of a Google service account", quote(u)))
		return
	}
	l.take(field, m[1], "google.iamCredentialsURL", iamCredentialsURL, &l.Google.IAMCredentialsURL)
	if l.impersonateUnlinked {
		l.ImpersonateUnlinked = m[2]
	}
}

// take checks a field of the file and keeps it. If the setting with the same meaning is given too,
// both must be equal.
func (l *loader) take(field, text, setting string, check func(string) (string, *trouble), into *string) {
	if text == "" {
		return
	}
	s, t := check(text)
	if t != nil {
		l.credentialFault(field, 0, t)
		return
	}
	if _, given := l.given[setting]; !given {
		*into = s
	} else if s != *into && !l.broken[setting] {
		l.complain(setting, 0, bad("remove one of the two", "%s contradicts %s of %s, which says %s", quote(*into), field,
			l.CredentialConfigFile, quote(s)))
	}
}

// credentialFault records a fault of the file itself.
func (l *loader) credentialFault(field string, line int, t *trouble) {
	l.broken[credentialKey] = true
	l.faults = append(l.faults, Fault{File: l.CredentialConfigFile, Line: line, Key: field, Problem: t.problem,
		Remedy: t.remedy, Public: t.public})
}

// badJSON never shows the content, since the file may be a key.
func badJSON(data []byte, err error) (t *trouble, line int) {
	const remedy = "name the file that gcloud wrote"
	at := func(offset int64) int {
		return 1 + bytes.Count(data[:min(max(offset, 0), int64(len(data)))], []byte("\n"))
	}
	var syntax *json.SyntaxError
	var wrong *json.UnmarshalTypeError
	switch {
	case errors.As(err, &syntax):
		return bad(remedy, "this is not JSON"), at(syntax.Offset)
	case errors.As(err, &wrong) && wrong.Field != "":
		return bad(remedy, "%s is not a %s", wrong.Field, wrong.Type), at(wrong.Offset)
	}
	return bad(remedy, "this is not a credential configuration"), 0
}
