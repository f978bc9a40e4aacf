package server

import (
	"net/http"
	"net/http/httptest"
	"net/netip"
	"testing"
)

func TestHealthAnswersWhomItMay(t *testing.T) {
	h := onlyFrom(func(a netip.Addr) bool { return a == netip.MustParseAddr("192.0.2.7") },
		http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) }))
	for from, want := range map[string]struct {
		status int
		body   string
	}{
		"192.0.2.7:40000":          {200, "ok\n"},
		"[::ffff:192.0.2.7]:40000": {200, "ok\n"},
		"192.0.2.8:40000":          {403, "192.0.2.8 is not in healthAllow\n"},
		"[fe80::1]:40000":          {403, "fe80::1 is not in healthAllow\n"},
		"@":                        {403, "the client is not in healthAllow\n"},
	} {
		r := httptest.NewRequest("GET", "/metrics", nil)
		r.RemoteAddr = from
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != want.status || w.Body.String() != want.body {
			t.Errorf("%s: %d %q", from, w.Code, w.Body)
		}
	}
}
