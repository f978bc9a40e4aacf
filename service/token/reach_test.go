package token

import (
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
)

func TestReach(t *testing.T) {
	s, err := googletest.New(googletest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	reach := func(client *http.Client, at string) (sts, iam Reached) {
		t.Helper()
		g, err := NewGoogle(GoogleOptions{STSURL: at + "/v1/token", IAMCredentialsURL: at, HTTPClient: client})
		if err != nil {
			t.Fatal(err)
		}
		return g.Reach(t.Context())
	}
	sts, iam := reach(s.Client(), s.URL())
	for _, r := range []Reached{sts, iam} {
		if r.Err != nil || r.Status == 0 || r.Proxy != "" || r.Date.Sub(r.Asked).Abs() > time.Minute {
			t.Errorf("%+v", r)
		}
	}
	if sts.URL != s.STSURL() || iam.URL != s.URL() {
		t.Errorf("asked %s and %s", sts.URL, iam.URL)
	}

	// An authority that nobody here knows.
	if sts, _ := reach(&http.Client{Transport: &http.Transport{}}, s.URL()); sts.Err == nil ||
		!strings.Contains(sts.Err.Error(), "certificate") {
		t.Errorf("%+v", sts)
	}

	// A proxy is named without its password, also where it is not there.
	proxy := &url.URL{Scheme: "http", User: url.UserPassword("me", "hunter2"), Host: "127.0.0.1:1"}
	proxied := &http.Client{Transport: &http.Transport{Proxy: http.ProxyURL(proxy)}}
	if g, err := NewGoogle(GoogleOptions{STSURL: s.STSURL(), HTTPClient: proxied}); err != nil ||
		g.Proxy() != "http://127.0.0.1:1" {
		t.Error(g.Proxy(), err)
	}
	sts, _ = reach(proxied, s.URL())
	if sts.Err == nil || sts.Proxy != "http://127.0.0.1:1" || strings.Contains(sts.Err.Error(), "hunter2") {
		t.Errorf("%+v", sts)
	}
}
