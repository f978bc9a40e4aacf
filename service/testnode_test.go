package service

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
)

const (
	provider = poolName + "/providers/my-cluster"
	audience = "//iam.googleapis.com/" + provider
	node     = "node1"
)

// testNode is the whole service on loopback, with the stand-ins for Kubernetes and Google. Its pods
// ask from 127.0.0.2 and up.
type testNode struct {
	kube   *kubetest.Server
	google *googletest.Server
	dir    string
	log    *syncBuffer
	left   []*os.File     // what the process before left in systemd's hands
	health netip.AddrPort // healthListen where there is no configuration

	*Service
	reload chan os.Signal
	stop   context.CancelFunc
	ended  chan struct{} // closed when err is what run returned
	err    error
}

// newTestNode starts it, with more lines of configuration if there are any. It ends with the test,
// which then looks for secrets in all that was logged.
func newTestNode(t testing.TB, more ...string) *testNode {
	t.Helper()
	b := newWorld(t)
	b.configure(t, more...)
	b.start(t)
	return b
}

// newWorld is what surrounds the service.
func newWorld(t testing.TB) *testNode {
	t.Helper()
	return newWorldAt(t, nil, nil)
}

// newWorldAt is newWorld with the stand-ins elsewhere than on loopback.
func newWorldAt(t testing.TB, kubernetes, google net.Listener) *testNode {
	t.Helper()
	b := &testNode{dir: t.TempDir(), log: new(syncBuffer), reload: make(chan os.Signal)}
	var err error
	if b.kube, err = kubetest.New(kubetest.Options{Listener: kubernetes}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.kube.Close)
	b.kube.GrantAudience(audience)
	for address, sa := range map[string]struct {
		name        string
		annotations map[string]string
	}{
		linked:    {"reader", map[string]string{"iam.gke.io/gcp-service-account": gsa}},
		unlinked:  {"plain", nil},
		principal: {"principal", map[string]string{"iam.gke.io/return-principal-id-as-email": "true"}},
		hostile:   {"hostile", map[string]string{"iam.gke.io/gcp-service-account": "../../x:signBlob?"}},
		denied: {"denied",
			map[string]string{"iam.gke.io/gcp-service-account": "denied@my-project.iam.gserviceaccount.com"}},
		missing: {"missing",
			map[string]string{"iam.gke.io/gcp-service-account": "missing@my-project.iam.gserviceaccount.com"}},
	} {
		b.addPod(sa.name, address, sa.annotations)
	}
	if b.google, err = googletest.New(googletest.Options{Listener: google, Providers: map[string]googletest.Provider{
		audience: {Issuer: b.kube.Issuer(), JWKS: b.kube.JWKS},
	}}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.google.Close)
	b.google.Allow("system:serviceaccount:default:reader", gsa)
	b.google.Account(
		"denied@my-project.iam.gserviceaccount.com")
	if err := b.google.WriteCA(filepath.Join(b.dir, "ca.pem")); err != nil {
		t.Fatal(err)
	}
	kubeconfig, err := b.kube.Kubeconfig(node)
	if err != nil {
		t.Fatal(err)
	}
	b.write(t, "kubeconfig", string(kubeconfig))
	return b
}

// addPod runs a pod of this node with a ServiceAccount of its own.
func (b *testNode) addPod(name, address string, annotations map[string]string) {
	b.kube.SetServiceAccount("default", name, annotations)
	b.kube.SetPod(
		kubetest.Pod{Namespace: "default", Name: name, ServiceAccount: name, Node: node, Addresses: []string{address}},
	)
}

func (b *testNode) write(t testing.TB, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(b.dir, name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (b *testNode) configure(t testing.TB, more ...string) {
	t.Helper()
	b.write(t, "config.yaml", fmt.Sprintf(`workloadIdentityProvider: %s
projectID: my-project
kubeconfig: kubeconfig
listen: 127.0.0.1:0
routing: {mode: none}
attestation: {mode: source-ip} # all of them are processes of one cgroup
healthListen: 127.0.0.1:0
google: {stsURL: %s, iamCredentialsURL: %s, caFile: ca.pem}
instance: {hostname: node1.example.com, id: "4503599627370497", zone: europe-west4-a}
cluster: {name: my-cluster, location: europe-west4, uid: 5f3a}
extraMetadata: {instance/machine-type: projects/1/machineTypes/n2-standard-4}
%s
`, provider, b.google.STSURL(), b.google.URL(), strings.Join(more, "\n")))
}

func (b *testNode) read() (config.Config, error) {
	return config.Load(filepath.Join(b.dir, "config.yaml"), nil)
}

// start runs the service on a listener of its own, as if systemd had handed it over.
func (b *testNode) start(t testing.TB) {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b.Service = newService(
		Options{
			Load:    b.read,
			File:    filepath.Join(b.dir, "config.yaml"),
			Reload:  b.reload,
			RunDir:  b.dir,
			Version: "test",
			Commit:  "c0ffee",
			Stderr:  b.log,
		},
	)
	b.fdstore.inherit(b.left)
	ctx, stop := context.WithCancel(context.Background())
	b.stop, b.ended = stop, make(chan struct{})
	first, err := b.Service.load(nil)
	if err != nil {
		first = brokenConfig(err)
		if b.health.IsValid() {
			first.config.HealthListen = b.health
		}
	}
	go func() {
		defer close(b.ended)
		b.err = b.run(ctx, first, l)
	}()
	t.Cleanup(func() {
		b.end(t)
		for _, secret := range append(b.google.Secrets(), b.kube.IssuedTokens()...) {
			if strings.Contains(b.log.String(), secret) {
				t.Error("a secret is in the log")
			}
		}
		if t.Failed() {
			t.Logf("the service said:\n%s", b.log)
		}
	})
	select {
	case <-b.Service.ready:
	case <-b.ended:
		t.Fatal(b.err)
	case <-time.After(testTimeout):
		t.Fatal("no READY")
	}
}

// end stops the service and waits for it.
func (b *testNode) end(t testing.TB) {
	t.Helper()
	b.stop()
	select {
	case <-b.ended:
		if b.err != nil {
			t.Errorf("run: %v", b.err)
		}
	case <-time.After(testTimeout):
		t.Error("the service does not end")
	}
}

// idle waits until the connections of earlier requests are closed at the service's end too, so that
// those of the next are the only ones that it counts.
func (b *testNode) idle(t testing.TB) {
	t.Helper()
	b.eventually(t, "no connection is open", func() bool { return b.server.Connections().Open == 0 })
}

// ready waits until pods are served.
func (b *testNode) ready(t testing.TB) {
	t.Helper()
	var err error
	defer func() {
		if err != nil {
			t.Log(err)
		}
	}()
	b.eventually(t, "pods are served", func() bool { err = b.readiness(t.Context()); return err == nil })
}

// testTimeout bounds each wait of a test. What a test waits for comes in moments where the machine
// is idle, and no test fails because it is not.
const testTimeout = 2 * time.Minute

// eventually polls until what is said is so: at first every 2 ms, and the longer it lasts, the more
// seldom, since what is polled costs processor time that others need. Where it never is, the test
// fails with what the service knows.
func (b *testNode) eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	for began := time.Now(); !is(); {
		waited := time.Since(began)
		if waited > testTimeout {
			status, _ := json.Marshal(statusOf(t, b.dir))
			t.Fatalf("still not after %s: %s; status: %s", testTimeout, what, status)
		}
		<-time.After(min(2*time.Millisecond+waited/8, 50*time.Millisecond))
	}
}

type response struct {
	*http.Response
	body string
}

// ask sends a request from the pod at the address, on a connection of its own, byte for byte as it
// stands here. Header lines replace those that clients send; "-" alone leaves out Metadata-Flavor.
func (b *testNode) ask(t testing.TB, from, method, path, header string) response {
	t.Helper()
	lines := []string{method + " " + path + " HTTP/1.1"}
	if !strings.Contains(header, "Host:") {
		lines = append(lines, "Host: 169.254.169.254")
	}
	if !strings.HasPrefix(header, "-") {
		lines = append(lines, "Metadata-Flavor: Google")
	}
	if h := strings.TrimPrefix(strings.TrimPrefix(header, "-"), "\n"); h != "" {
		lines = append(lines, h)
	}
	c := b.dial(t, from)
	defer c.Close()
	if _, err := io.WriteString(c, strings.Join(lines, "\r\n")+"\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	return readResponse(t, bufio.NewReader(c), method)
}

func readResponse(t testing.TB, r *bufio.Reader, method string) response {
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

// raw sends bytes and returns all that comes back until the end of the connection.
func (b *testNode) raw(t testing.TB, from, text string) string {
	t.Helper()
	c := b.dial(t, from)
	defer c.Close()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	all, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	return string(all)
}

func (b *testNode) dial(t testing.TB, from string) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	c, err := d.DialContext(t.Context(), "tcp", b.listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if err := c.SetDeadline(time.Now().Add(testTimeout)); err != nil {
		t.Fatal(err)
	}
	return c
}

// keep opens a connection that counts for the pod at the address, and keeps it until the end of the
// test. A connection that was only accepted counts for nobody yet: its client is looked up before
// its first request is read. The header of that is refused, which comes before any limit.
func (b *testNode) keep(t testing.TB, from string) net.Conn {
	t.Helper()
	c := b.dial(t, from)
	t.Cleanup(func() { c.Close() })
	if _, err := io.WriteString(c, "GET "+accts+" HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if res := readResponse(t, bufio.NewReader(c), "GET"); res.StatusCode != http.StatusForbidden || res.Close {
		t.Fatalf("without Metadata-Flavor: %d, Connection: close is %t: %s", res.StatusCode, res.Close, res.body)
	}
	return c
}

// syncBuffer is a bytes.Buffer for what is written while it is read.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// replace changes a file of the test node.
func (b *testNode) replace(t testing.TB, name, old, text string) {
	t.Helper()
	was, err := os.ReadFile(filepath.Join(b.dir, name))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(was), old) {
		t.Fatalf("%s holds no %q", name, old)
	}
	b.write(t, name, strings.Replace(string(was), old, text, 1))
}

// take returns what was written since the last time.
func (s *syncBuffer) take() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.b.Reset()
	return s.b.String()
}
