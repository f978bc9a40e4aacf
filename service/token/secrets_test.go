package token

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// gossip is a transport to Google that says back what it was sent: a proxy with a debugging page, a
// broken server.
type gossip struct {
	next http.RoundTripper
	say  func(secret string) (*http.Response, error) // nil: nothing out of the way
	only string                                      // in the paths that it concerns
}

func (g *gossip) RoundTrip(r *http.Request) (*http.Response, error) {
	if g.say == nil || !strings.Contains(r.URL.Path, g.only) {
		return g.next.RoundTrip(r)
	}
	secret := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	if secret == "" {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return nil, err
		}
		form, err := url.ParseQuery(string(body))
		if err != nil {
			return nil, err
		}
		secret = form.Get("subject_token")
	}
	return g.say(secret)
}

// Every outcome of a mint, with all that is written down about it: no secret and no piece of
// one may be in there.
func TestNoSecretShowsAnywhere(t *testing.T) {
	answer := func(status int, header http.Header, body string) (*http.Response, error) {
		if header == nil {
			header = http.Header{}
		}
		return &http.Response{StatusCode: status, Header: header, Body: io.NopCloser(strings.NewReader(body))}, nil
	}
	gossips := map[string]func(secret string) (*http.Response, error){
		"none": nil,
		"OAuth form": func(s string) (*http.Response, error) {
			return answer(400, nil, `{"error":"x","error_description":"bad `+s+`."}`)
		},
		"the code": func(s string) (*http.Response, error) { return answer(400, nil, `{"error":"`+s+`"}`) },
		"API form": func(s string) (*http.Response, error) {
			return answer(403, nil, `{"error":{"message":"token=`+s+`","status":"`+s+`"}}`)
		},
		"one half": func(s string) (*http.Response, error) {
			return answer(400, nil, `{"error":"x","error_description":"token=`+s[:len(s)/2]+`…"}`)
		},
		"the other half": func(s string) (*http.Response, error) {
			return answer(400, nil, `{"error":{"message":"…`+s[len(s)/2:]+`"}}`)
		},
		"cut by a length": func(s string) (*http.Response, error) {
			return answer(400, nil, `{"error":"x","error_description":"`+strings.Repeat("word ", 190)+s+`"}`)
		},
		"a page": func(s string) (*http.Response, error) { return answer(403, nil, `<html>Bearer `+s+`</html>`) },
		"sense that is no use": func(s string) (*http.Response, error) {
			return answer(200, nil, `{"access_token":"`+s+` ","expires_in":10,"token":"`+s+`"}`)
		},
		"redirect": func(s string) (*http.Response, error) { return answer(307, http.Header{"Location": {"/?" + s}}, "") },
		"network error": func(s string) (*http.Response, error) {
			return nil, fmt.Errorf("malformed HTTP response %q", "Bearer "+s)
		},
		"broken body": func(s string) (*http.Response, error) {
			a, err := answer(200, nil, "")
			a.Body = io.NopCloser(&broken{errors.New("unexpected " + s)})
			return a, err
		},
	}
	for name, say := range gossips {
		for _, only := range []string{"/v1/token", ":generate"} {
			t.Run(name+" "+only, func(t *testing.T) {
				t.Parallel()
				transport := &gossip{only: only}
				w := newWorld(t, func(g *GoogleOptions, _ *CacheOptions) {
					transport.next = g.HTTPClient.Transport
					g.HTTPClient.Transport = transport
				})
				sa, a := w.linked("team", "ana")
				requests := []Request{AccessToken(sa, a, nil), IDToken(sa, a, "x"),
					AccessToken(sa, a, []string{cloudPlatform + ".read-only"}),
					AccessToken(workload.ServiceAccount{Namespace: "team", Name: "unlinked"}, workload.Account{}, nil)}
				var said []string
				askAll := func() {
					for _, r := range requests {
						got, err := w.cache.Token(t.Context(), r)
						said = append(said, fmt.Sprintf("%v %+v %#v %q", got, got, got, got),
							fmt.Sprintf("%v %+v %#v %q", err, err, err, err))
						if err != nil {
							w.log.WithError(err).WithField("error2", err).Debug("refused")
						}
					}
				}
				transport.say = say
				askAll()
				transport.say = nil
				w.cache.Use(nil) // forget what was refused
				askAll()
				w.google.Break(googletest.GenerateIDToken, googletest.Fault{Status: 401, Body: `{"error":{"message":"%TOKEN%"}}`})
				requests = append(requests, IDToken(sa, a, "y"))
				askAll()
				w.noSecrets(t, said...)
			})
		}
	}
}

type broken struct{ err error }

func (b *broken) Read([]byte) (int, error) { return 0, b.err }
