package kube

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
)

// What the API server says, however long and whatever is in it, is one line of bounded length to
// the pod, in the log and in `status`.
func TestLongRefusals(t *testing.T) {
	long := "first line\n\x1b[31m" + strings.Repeat("no ", 4<<20)
	for _, code := range []int{400, 401, 403, 404, 409, 418, 429, 500, 503} {
		s := newServer(t, kubetest.Options{})
		s.GrantAudience(provider)
		b := run(t, s, nil)
		b.at(t, "10.1.0.11", "p1")
		s.Inject(kubetest.Fault{Verb: "create", Resource: "serviceaccounts/token", Code: code, Message: long})
		s.Inject(kubetest.Fault{Verb: "get", Resource: "serviceaccounts", Code: code, Message: long})
		_, err := b.Token(t.Context(), ksa)
		_, accountErr := b.Account(t.Context(), ksa, time.Nanosecond)
		for _, text := range []string{err.Error(), accountErr.Error(), b.Status().LastError} {
			if len(text) > 3*maxMessage || strings.ContainsAny(text, "\n\x1b") {
				t.Errorf("%d: %d bytes: %.200q", code, len(text), text)
			}
		}
		for line := range strings.Lines(b.logs.String()) {
			if len(line) > 8<<10 {
				t.Errorf("%d: a line of the log has %d bytes: %.200q", code, len(line), line)
			}
		}
		b.stop()
	}
}

// An answer without an end is not read to it, whatever it says of itself.
func TestEndlessAnswers(t *testing.T) {
	for _, code := range []int{200, 403, 500} {
		var sent atomic.Int64 // the most of one answer
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(code)
			n, junk := 0, []byte(strings.Repeat("x", 1<<20))
			for n < 4*maxAnswer {
				m, err := w.Write(junk)
				if n += m; err != nil {
					break
				}
			}
			sent.Store(max(sent.Load(), int64(n)))
		}))
		conf := filepath.Join(t.TempDir(), "kubeconfig")
		if err := os.WriteFile(conf, []byte(`apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "`+s.URL+`"}}]
users: [{name: u, user: {token: t}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
`), 0o600); err != nil {
			t.Fatal(err)
		}
		a, _ := Try(t.Context(), Options{Kubeconfig: conf, NodeName: "node1"})
		if a.Reach == nil && a.List == nil || a.List != nil && len(a.List.Error()) > 3*maxMessage {
			t.Errorf("%d: %v, %.200v", code, a.Reach, a.List)
		}
		s.CloseClientConnections()
		s.Close()
		if n := sent.Load(); n > 2*maxAnswer {
			t.Errorf("%d: %d bytes were read", code, n)
		}
	}
}
