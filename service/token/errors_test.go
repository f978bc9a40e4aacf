package token

import (
	"errors"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
)

// Which of Google's refusals, as they come, are about what the ServiceAccount may.
func TestFinalRefusals(t *testing.T) {
	for _, c := range []struct {
		name  string
		fault func(*world)
		final bool
	}{
		{"T-07 no binding", func(w *world) { w.google.Deny(ana.Subject(), gana.GoogleEmail) }, true},
		{"T-07 no such account", func(w *world) {
			w.google.Break(googletest.GenerateAccessToken, googletest.Fault{Status: 404,
				Message: "Not found; Gaia id not found"})
		}, true},
		{"attribute condition", func(w *world) { w.claims = map[string]any{"sub": ""} }, true},
		{"issuer unreachable, or its keys rotated", func(w *world) {
			w.google.Break(googletest.Exchange, googletest.Fault{Status: 400,
				Body: `{"error":"invalid_grant","error_description":"Error connecting to the given credential's issuer."}`})
		}, false},
		{"wrong audience", func(w *world) { w.claims = map[string]any{"aud": "other"} }, false},
		{"this node's clock", func(w *world) { w.claims = map[string]any{"iat": 7, "exp": 3607} }, false},
		{"provider disabled", func(w *world) { w.minter.o.Audience += "x" }, false},
		{"429 of IAM", func(w *world) {
			w.google.Break(googletest.GenerateAccessToken, googletest.Fault{Status: 429, RetryAfter: time.Minute})
		}, false},
		{"lifetime that is not allowed", func(w *world) { w.minter.o.Lifetime *= 2 }, false},
		{"a proxy's 403", func(w *world) {
			w.google.Break(googletest.GenerateAccessToken, googletest.Fault{Status: 403, Body: "<html>Forbidden</html>"})
		}, false},
		{"a wrong iamCredentialsURL", func(w *world) { w.minter.iam += "/wrong" }, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			w.linked("team", "ana")
			c.fault(w)
			_, err := w.cache.Token(t.Context(), request)
			var refusal *GoogleError
			if !errors.As(err, &refusal) || w.cache.terminal(err) != c.final {
				t.Errorf("final: %v, want %v: %v", w.cache.terminal(err), c.final, err)
			}
		})
	}
}
