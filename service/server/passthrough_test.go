package server

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/sirupsen/logrus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/metadata"
)

// U-02: what is another cloud's, once its path was cleaned.
func TestForeign(t *testing.T) {
	const ttl, azure = "X-Aws-Ec2-Metadata-Token-Ttl-Seconds: 21600", "Metadata: true"
	tree, err := metadata.New(unconfigured())
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		method, path, header string
		want                 bool
	}{
		{"PUT", "/latest/api/token", ttl, true},
		{"PUT", "/latest/api/token", "", false},
		{"PUT", "/latest/api/token/", ttl, false},
		{"PUT", "/latest/meta-data/", ttl, false},
		{"GET", "/latest", "", true},
		{"HEAD", "/latest/", "", true},
		{"GET", "/latest/meta-data/iam/security-credentials/role_1+=,.@-x", "", true},
		{"GET", "/latest/meta-data/network/interfaces/macs/02:29:96:8f:6a:2d/subnet-id", "", true},
		{"GET", "/latest/dynamic/instance-identity/document", "", true},
		{"GET", "/2021-01-03/meta-data/", "", true},
		{"GET", "/1.0/user-data", "", true},
		{"GET", "/2021-1-3/meta-data/", "", false},
		{"POST", "/latest/meta-data/", "", false},
		{"DELETE", "/latest/meta-data/", "", false},
		{"GET", "/metadata/instance", azure, true},
		{"GET", "/metadata/identity/oauth2/token", "Metadata: True", true},
		{"GET", "/metadata/instance", "", false},
		{"GET", "/metadata/instance", "Metadata: false", false},
		{"GET", "/metadata/instance", azure + "\nMetadata: true", false},
		{"POST", "/metadata/scheduledevents", azure, true},
		{"POST", "/metadata/instance", azure, false},
		{"GET", "/openstack/latest/meta_data.json", "", true},
		{"GET", "/openstacks/latest", "", false},
		{"GET", "/", "", false},
		{"GET", "/latest/../computeMetadata/v1/", "", false},
		{"GET", "//latest/./meta-data", "", true},
		{"GET", "/computeMetadata/v1/../../latest/meta-data/", "", true},
		{"GET", "/computeMetadata/v1/latest/", azure, false},
		{"GET", "/latest/%2e%2e/computeMetadata/v1/", "", false}, // as a client sends %252e
		{"GET", `/latest/..\computeMetadata`, "", false},
		{"GET", "/latest/a;b", "", false},
		{"GET", "/latest\n/", "", false},
		{"GET", "/latest/\n", "", false},
		{"GET", "/LATEST/", "", false},
	} {
		h := http.Header{}
		for line := range strings.Lines(tt.header) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
			h.Add(name, value)
		}
		if got := foreign(tt.method, tree.Find(tt.path).Path, h); got != tt.want {
			t.Errorf("%s %q %q: %v", tt.method, tt.path, tt.header, got)
		}
	}
}

// servePassthrough answers like the service, but passes everything to the handler.
func servePassthrough(t *testing.T, cloudSays http.HandlerFunc) (ask func(request string) response, c *cloud) {
	t.Helper()
	behind := httptest.NewServer(cloudSays)
	t.Cleanup(behind.Close)
	s := &Server{draining: make(chan struct{}), log: logrus.New(), cloud: newCloud()}
	s.log.SetOutput(io.Discard)
	s.active.Store(new(Active))
	s.connections = newConnections(func() int { return 9 }, func(netip.AddrPort) bool { return false },
		func(*attest.Peer) {})
	s.cloud.at = behind.Listener.Addr().String()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	web := &http.Server{ConnContext: s.connections.accept, ConnState: s.connections.state,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			req := &request{Request: r, connection: connectionOf(r.Context())}
			a, err := s.cloud.ask(r.Context(), r, r.URL.Path, req.party)
			req.passed = a
			s.write(w, req, metadata.Answer{}, err)
		})}
	go func() { _ = web.Serve(clientListener{Listener: l}) }()
	t.Cleanup(func() { _ = web.Close() })
	return func(request string) response {
		t.Helper()
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := io.WriteString(c, strings.ReplaceAll(request, "|", "\r\n")); err != nil {
			t.Fatal(err)
		}
		method, _, _ := strings.Cut(request, " ")
		return readResponse(t, bufio.NewReader(c), method)
	}, s.cloud
}

// response is an answer with all of its body.
type response struct {
	*http.Response
	body string
}

func readResponse(t *testing.T, r *bufio.Reader, method string) response {
	t.Helper()
	res, err := http.ReadResponse(r, &http.Request{Method: method})
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response{res, string(body)}
}

// U-02: what is passed on, and what comes back.
func TestPassed(t *testing.T) {
	var saw *http.Request
	var sent string
	var says http.HandlerFunc
	ask, c := servePassthrough(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		saw, sent = r, string(body)
		says(w, r)
	})
	says = func(w http.ResponseWriter, _ *http.Request) {
		w.Header()["Metadata-Flavor"] = []string{"Google"}
		w.Header().Set("Keep-Alive", "timeout=9")
		w.Header().Set("Server", "EC2ws")
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.WriteHeader(http.StatusNotFound)
		_, _ = io.WriteString(w, strings.Repeat("x", 5000))
	}

	a := ask("GET /latest/user-data?a=b HTTP/1.1|Host: metadata|Connection: X-Hop, Upgrade|X-Hop: 1|Upgrade: h2c|Te: " +
		"trailers|Metadata-Flavor: Google|X-Aws-Ec2-Metadata-Token: t||")
	if a.StatusCode != 404 || len(a.body) != 5000 || a.ContentLength != 5000 || a.Header.Get("Server") != "EC2ws" ||
		a.Header.Get("Content-Type") != "text/plain; charset=utf-8" {
		t.Errorf("%+v", a)
	}
	for _, name := range []string{"Metadata-Flavor", "X-Frame-Options", "X-Xss-Protection", "Keep-Alive", "Etag"} {
		if a.Header.Get(name) != "" {
			t.Errorf("the answer has %s", name)
		}
	}
	if saw.RequestURI != "/latest/user-data?a=b" || saw.Host != c.at || len(saw.Header) != 2 ||
		saw.Header.Get("Connection") != "close" || saw.Header.Get("X-Aws-Ec2-Metadata-Token") != "t" {
		t.Errorf("the cloud saw %s %s %v", saw.Host, saw.RequestURI, saw.Header)
	}

	says = func(w http.ResponseWriter, _ *http.Request) {
		w.Header()["Content-Type"] = nil
		_, _ = io.WriteString(w, "<html>")
	}
	a = ask("POST /metadata/scheduledevents HTTP/1.1|Host: metadata|Transfer-Encoding: chunked||3|abc|0||")
	if a.StatusCode != 200 || a.Header["Content-Type"] != nil || sent != "abc" {
		t.Errorf("%+v, and the cloud saw %q", a, sent)
	}
	if a := ask("HEAD /latest/ HTTP/1.1|Host: metadata||"); a.StatusCode != 200 || a.ContentLength != 6 {
		t.Errorf("HEAD: %+v", a)
	}

	for name, tt := range map[string]struct {
		says    http.HandlerFunc
		request string
		status  int
		body    string // in it
		ours    bool
	}{
		"a redirect is not followed": {says: func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://192.0.2.1/", http.StatusFound)
		}, status: 302, body: "192.0.2.1"},
		"too much": {says: func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write(make([]byte, maxResponseBytes+1))
		}, status: 502, body: "more than 1048576 bytes", ours: true},
		"as much as may be": {says: func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write(make([]byte, maxResponseBytes))
		}, status: 200, body: "\x00"},
		"it breaks off": {says: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "10")
			_, _ = io.WriteString(w, "secret")
		}, status: 502, body: "the answer is invalid", ours: true},
		"no HTTP": {says: func(w http.ResponseWriter, _ *http.Request) {
			c, _, _ := http.NewResponseController(w).Hijack()
			_, _ = io.WriteString(c, "secret\r\n\r\n")
			_ = c.Close()
		}, status: 502, body: "the answer is invalid", ours: true},
		"another protocol": {says: func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusSwitchingProtocols)
		}, status: 502, body: "the answer is invalid", ours: true},
		"ourselves": {says: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Server", "GKE Metadata Server")
		}, status: 502, body: "loop: the service's own request", ours: true},
		"a request that is too long": {request: "POST /metadata/scheduledevents HTTP/1.1|Host: metadata|Content-Length: " +
			"65537||" + strings.Repeat("x", 65537), status: 413, body: "65536", ours: true},
	} {
		says = tt.says
		if tt.request == "" {
			tt.request = "GET /latest/ HTTP/1.1|Host: metadata||"
		}
		a := ask(tt.request)
		if a.StatusCode != tt.status || !strings.Contains(a.body, tt.body) ||
			(a.Header.Get("Metadata-Flavor") == "Google") != tt.ours || strings.Contains(a.body, "secret") {
			t.Errorf("%s: %d %.80q %v", name, a.StatusCode, a.body, a.Header)
		}
	}
}

// A cloud that never answers holds nobody for longer than that, and those who wait behind 16 others
// neither.
func TestPassedTooSlowly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCloud()
		c.DialContext = func(context.Context, string, string) (net.Conn, error) {
			ours, theirs := net.Pipe()
			go func() { _, _ = io.Copy(io.Discard, theirs) }()
			return ours, nil
		}
		ask := func(ctx context.Context, pod int) error {
			r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://169.254.169.254/latest/", http.NoBody)
			if err != nil {
				return err
			}
			_, err = c.ask(ctx, r, "/latest/", attest.Party{PodUID: strconv.Itoa(pod)})
			return err
		}
		errs := make(chan error)
		for i := range maxConcurrent {
			go func() { errs <- ask(t.Context(), i/maxConcurrentPerPod) }()
		}
		synctest.Wait()
		gone, leave := context.WithCancel(t.Context())
		left := make(chan error)
		go func() { left <- ask(gone, 99) }()
		synctest.Wait()
		leave()
		if err := <-left; err != context.Canceled {
			t.Errorf("who left: %v", err)
		}
		go func() { errs <- ask(t.Context(), 98) }()
		status := map[int]int{}
		for range maxConcurrent + 1 {
			status[refusalOf(<-errs).Status]++
		}
		if status[502]+status[503] != maxConcurrent+1 || status[502] < maxConcurrent {
			t.Errorf("%v", status)
		}
	})
}

// One pod that asks a slow cloud leaves it to the others, too.
func TestPassedShares(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tt := newTurns(maxConcurrent, maxConcurrentPerPod)
		greedy, other := attest.Party{PodUID: "greedy"}, attest.Party{PodUID: "other"}
		ctx, leave := context.WithCancel(t.Context())
		for range maxConcurrent + 4 {
			go func() {
				if done, ok := tt.wait(ctx, greedy); ok {
					<-ctx.Done()
					done()
				}
			}()
		}
		synctest.Wait()
		for range maxConcurrentPerPod {
			if _, ok := tt.wait(t.Context(), other); !ok {
				t.Fatal("no turn")
			}
		}
		if n := len(tt.all); n != 2*maxConcurrentPerPod {
			t.Errorf("%d at once", n)
		}
		leave()
		synctest.Wait()
		if n := len(tt.parties); n != 1 || len(tt.all) != maxConcurrentPerPod {
			t.Errorf("%d parties, and %d turns are taken", n, len(tt.all))
		}
	})
}
