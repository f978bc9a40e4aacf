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
	longestMessage = 512 // bytes
	longestPiece   = 15  // bytes in a row of a secret that may show: too few to be of use

	gone       = "[redacted]"
	notGoogles = "(the answer is not in Google's form; is there a proxy in between?)"
)

// words returns Google's own words out of the body of a refusal, in either of its two forms (G-05, T-07), and the code
// that goes with them: "invalid_grant" and the like of STS, "PERMISSION_DENIED" and the like of IAM. No part of the
// secrets is in them, wherever the body may have echoed one.
func words(body []byte, secrets ...string) (message, code string) {
	var oauth struct {
		Error       json.RawMessage `json:"error"`
		Description string          `json:"error_description"`
	}
	var status struct {
		Message string `json:"message"`
		Status  string `json:"status"`
	}
	if json.Unmarshal(body, &oauth) != nil {
		return notGoogles, ""
	}
	if json.Unmarshal(oauth.Error, &code) != nil {
		_ = json.Unmarshal(oauth.Error, &status)
		code = status.Status
	}
	code = clean(code, secrets...)
	message = clean(cmp.Or(oauth.Description, status.Message, code), secrets...)
	return cmp.Or(message, notGoogles), code
}

var looksSecret = regexp.MustCompile(`eyJ[A-Za-z0-9_-]{10,}[A-Za-z0-9._-]*|ya29\.[A-Za-z0-9._-]+`)

// clean returns s on one line, without control characters, of bounded length, and without any piece of a secret that is
// long enough to be of use.
func clean(s string, secrets ...string) string {
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
	s = looksSecret.ReplaceAllString(s, gone)
	if len(s) > longestMessage {
		s = strings.ToValidUTF8(s[:longestMessage], "") + "…"
	}
	return strings.TrimSpace(s)
}

// redact takes out of s whatever it has in common with the secret: a proxy or Google may have echoed a part of it only.
func redact(s, secret string) string {
	const piece = longestPiece + 1
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
		b.WriteString(gone)
	}
	return b.String()
}
