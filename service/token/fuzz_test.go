package token

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

// wire answers every request alike.
type wire struct {
	status int
	date   string
	body   string
}

func (w *wire) RoundTrip(*http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: w.status, Header: http.Header{"Date": {w.date}},
		Body: io.NopCloser(strings.NewReader(w.body))}, nil
}

// FuzzAnswer has STS and IAM answer whatever it likes, with the secret of the request, or a piece
// of it, wherever the body says %PIECE%. What comes of it is a token fit for a header, or an error
// without the secret.
func FuzzAnswer(f *testing.F) {
	const secret = "ya29.d.c0ffeeAbCdEfGhIjKlMnOpQrStUvWxYz0123456789-_AbCdEfGhIjKlMnOp.qRsTuVwXyZ~+/="
	f.Add(200, "", `{"access_token":"t","expires_in":3599}`, 0, 0)
	f.Add(200, "Sat, 01 Jan 2000 00:00:00 GMT", `{"accessToken":"t","expireTime":"2000-01-01T01:00:00Z"}`, 0, 0)
	f.Add(200, "", `{"token":"e30.eyJleHAiOjQwMDAwMDAwMDB9.c2ln"}`, 0, 0)
	f.Add(400, "", `{"error":"invalid_grant","error_description":"bad %PIECE% here"}`, 0, len(secret))
	f.Add(403, "", `{"error":{"code":403,"message":"bad token=%PIECE%","status":"PERMISSION_DENIED"}}`, 7, 40)
	w := &wire{}
	g, err := NewGoogle(GoogleOptions{Audience: testAudience, PoolName: testPool, STSURL: "https://sts",
		IAMCredentialsURL: "https://iam",
		HTTPClient:        &http.Client{Transport: w}})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, status int, date, body string, from, to int) {
		if status < 200 || status > 499 || status == http.StatusTooManyRequests {
			status = http.StatusBadRequest // the others are asked again, which takes time
		}
		from, to = min(max(from, 0), len(secret)), min(max(to, 0), len(secret))
		if from > to {
			from, to = to, from
		}
		w.status, w.date, w.body = status, date, strings.ReplaceAll(body, "%PIECE%", secret[from:to])
		for step, ask := range map[string]func() (Token, error){
			"STS":              func() (Token, error) { return g.askSTS(context.Background(), ana, cloudPlatform, secret) },
			"IAM access token": func() (Token, error) { return g.generate(context.Background(), request, secret) },
			"IAM ID token": func() (Token, error) {
				return g.generate(context.Background(), IDToken(ana, gana, "x"),
					secret)
			},
		} {
			got, err := ask()
			if err == nil {
				if lives := got.Expires.Sub(got.Minted); status != 200 || lives <= 0 || lives > maxLife || got.Value == "" ||
					strings.ContainsFunc(got.Value, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
					t.Errorf("%s: %d, %v is no token", step, status, got)
				}
				continue
			}
			if got != (Token{}) {
				t.Errorf("%s: a token and an error", step)
			}
			if e := (*GoogleError)(nil); !errors.As(err, &e) && !errors.Is(err, ErrUnavailable) {
				t.Errorf("%s: neither Google's refusal nor ErrUnavailable: %v", step, err)
			} else if e != nil && (e.Message == "" || len(e.Message) > maxMessage+len("…")) {
				t.Errorf("%s: a message of %d bytes", step, len(e.Message))
			}
			text := err.Error()
			for i := 0; i+maxPiece < len(secret); i++ {
				if piece := secret[i : i+maxPiece+1]; strings.Contains(text, piece) {
					t.Fatalf("%s: %q is in the error", step, piece)
				}
			}
			if !utf8.ValidString(text) || strings.ContainsFunc(text, unicode.IsControl) {
				t.Errorf("%s: not fit for a log: %q", step, text)
			}
		}
	})
}

// FuzzNormalise: one set of scopes is one key, however it is written (T-03, G-07).
func FuzzNormalise(f *testing.F) {
	f.Add("", "")
	f.Add(cloudPlatform, userinfoEmail)
	f.Add("b,a", " a , ,c")
	f.Fuzz(func(t *testing.T, one, two string) {
		got := normalise([]string{one, two})
		for what, other := range map[string]string{
			"the other way round":        normalise([]string{two, one}),
			"twice":                      normalise([]string{one, two, one}),
			"with commas":                normalise([]string{one + "," + two}),
			"with empty ones":            normalise([]string{"", one, ",", two, " "}),
			"what was normalised":        normalise([]string{got}),
			"with commas for the spaces": normalise([]string{strings.ReplaceAll(got, " ", ", ")}),
		} {
			if other != got {
				t.Errorf("%s: %q, want %q", what, other, got)
			}
		}
		list := strings.Split(got, " ")
		for i, s := range list {
			if s == "" || strings.ContainsFunc(s, func(r rune) bool { return r == ',' || unicode.IsSpace(r) }) ||
				i > 0 && list[i-1] >= s {
				t.Errorf("%q is not a sorted list", got)
			}
		}
	})
}
