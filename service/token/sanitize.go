package token

import (
	"cmp"
	"encoding/json"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"
)

const (
	maxMessage = 512 // bytes
	maxPiece   = 15  // bytes in a row of a secret that may remain: too few to be of use

	redacted   = "[redacted]"
	notGoogles = "(the answer is not in Google's form: check the proxies between this node and Google)"
)

// refusalMessage returns the message in the body of a refusal, in either of its two forms (G-05,
// forms of errors; T-07, texts of refusals), and its code: of STS such as "invalid_grant", of IAM
// such as "PERMISSION_DENIED". reason is what IAM says beside it, such as "SERVICE_DISABLED"
// (google.rpc.ErrorInfo). It removes all secrets, which the body may repeat.
func refusalMessage(body []byte, secrets ...string) (message, code, reason string) {
	var oauth struct {
		Error       json.RawMessage `json:"error"`
		Description string          `json:"error_description"`
	}
	var status struct {
		Message string `json:"message"`
		Status  string `json:"status"`
		Details []struct {
			Reason string `json:"reason"`
		} `json:"details"`
	}
	if json.Unmarshal(body, &oauth) != nil {
		return notGoogles, "", ""
	}
	if json.Unmarshal(oauth.Error, &code) != nil {
		_ = json.Unmarshal(oauth.Error, &status)
		code = status.Status
	}
	for _, d := range status.Details {
		reason = cmp.Or(reason, d.Reason)
	}
	code = sanitize(code, secrets...)
	message = sanitize(cmp.Or(oauth.Description, status.Message, code), secrets...)
	return cmp.Or(message, notGoogles), code, reason
}

var looksSecret = regexp.MustCompile(`eyJ[A-Za-z0-9_-]{10,}[A-Za-z0-9._-]*|ya29\.[A-Za-z0-9._-]+`)

// sanitize returns s on one line, without control characters, of bounded length, and without any
// piece of a secret that is long enough to be of use.
func sanitize(s string, secrets ...string) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\r' || r == '\t':
			return ' '
		case r == utf8.RuneError || unicode.IsControl(r) || unicode.Is(unicode.Cf, r):
			return -1
		}
		return r
	}, s)
	for _, secret := range secrets {
		s = redact(s, secret)
	}
	s = looksSecret.ReplaceAllString(s, redacted)
	if len(s) > maxMessage {
		s = strings.ToValidUTF8(s[:maxMessage], "") + "…"
	}
	return strings.TrimSpace(s)
}

// redact removes from s everything that it has in common with the secret: a proxy or Google may
// have repeated a part of it.
func redact(s, secret string) string {
	const piece = maxPiece + 1
	pieces := make(map[string]struct{}, len(secret))
	for i := 0; i+piece <= len(secret); i++ {
		pieces[secret[i:i+piece]] = struct{}{}
	}
	found := func(at int) bool {
		if at+piece > len(s) {
			return false
		}
		_, ok := pieces[s[at:at+piece]]
		return ok
	}
	var b strings.Builder
	for i := 0; i < len(s); {
		if !found(i) {
			b.WriteByte(s[i])
			i++
			continue
		}
		for found(i + 1) {
			i++
		}
		i += piece
		b.WriteString(redacted)
	}
	return b.String()
}
