package server

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// testTimeout bounds each wait of a test; no test fails because the machine is slow.
const testTimeout = 2 * time.Minute

// onePod is a node with one pod, which has all addresses, its ServiceAccount, and a source of its
// tokens.
type onePod struct{}

var callers = []workload.Caller{
	{PodUID: "1", PodName: "p", ServiceAccount: workload.ServiceAccount{Namespace: "ns", Name: "sa"}},
}

func (onePod) Of(string) (workload.Caller, bool, <-chan struct{}, error) {
	return callers[0], true, nil, nil
}

func (onePod) At(netip.Addr) ([]workload.Caller, <-chan struct{}, error) { return callers, nil, nil }

func (onePod) Account(context.Context, workload.ServiceAccount, time.Duration) (workload.Account, error) {
	return workload.Account{GoogleEmail: reader}, nil
}

func (onePod) Token(context.Context, token.Request) (token.Token, error) {
	return token.Token{Value: strings.Repeat("x", 1024), Expires: time.Now().Add(time.Hour)}, nil
}

// newHandler returns a Server for the pod, and a context of a connection of the pod's.
func newHandler(t testing.TB, log *logrus.Logger) (*Server, context.Context) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	c := config.Default()
	tree, err := NewTree(c, onePod{}, token.NewCache(token.CacheOptions{Source: onePod{}}))
	if err != nil {
		t.Fatal(err)
	}
	s := New(Options{Listener: l, Log: log, Registerer: prometheus.NewRegistry()},
		&Active{Tree: tree, ConnectionsPerPod: 9, RequestsPerPod: 1e6, Attestor: attest.New(attest.Options{Pods: onePod{}})})
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return s, s.connections.accept(t.Context(), otherEnd{conn})
}

// otherEnd is a client's connection as the server sees it.
type otherEnd struct{ net.Conn }

func (c otherEnd) RemoteAddr() net.Addr { return c.Conn.LocalAddr() }
func (c otherEnd) LocalAddr() net.Addr  { return c.Conn.RemoteAddr() }

type discardResponse http.Header

func (w discardResponse) Header() http.Header         { return http.Header(w) }
func (w discardResponse) Write(b []byte) (int, error) { return len(b), nil }
func (w discardResponse) WriteHeader(int)             {}

func get169(t testing.TB, ctx context.Context, path string) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://169.254.169.254"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Metadata-Flavor", "Google")
	return req
}

const accts = "/computeMetadata/v1/instance/service-accounts/"

// Each token that is in an answer is audited, and nothing else is.
func TestAnswersAreAudited(t *testing.T) {
	var out syncBuffer
	log := logrus.New()
	log.SetOutput(&out)
	s, ctx := newHandler(t, log)
	for _, tt := range []struct {
		path  string
		lines int
	}{
		{accts + "default/email", 0},
		{accts + "?recursive=true", 0},
		{accts + "default/token", 1},
		{accts + "default/token", 0}, // the same token
		{accts + reader + "/token?scopes=a", 1},
		{accts + "default/identity?audience=b", 1},
		{accts + "default/identity", 0}, // refused
		{accts + "default/token", 0},    // the first one again, which is counted
	} {
		s.ServeHTTP(discardResponse{}, get169(t, ctx, tt.path))
		got := out.take()
		if n := strings.Count(got, "token issued"); n != tt.lines {
			t.Errorf("%s: %d audit lines, want %d:\n%s", tt.path, n, tt.lines, got)
		}
	}
}

// BenchmarkHandler is our part of an answer out of the cache, without net/http's.
func BenchmarkHandler(b *testing.B) {
	log := logrus.New()
	log.SetLevel(logrus.WarnLevel)
	s, ctx := newHandler(b, log)
	req, w := get169(b, ctx, accts+"default/token"), discardResponse{}
	b.ReportAllocs()
	for b.Loop() {
		clear(w)
		s.ServeHTTP(w, req)
	}
}
