package doctor

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/status"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
)

// testNode is a service that runs in this process, with the stand-ins for Kubernetes and Google,
// and one pod.
type testNode struct {
	kube   *kubetest.Server
	google *googletest.Server
	dir    string
	stop   func()
}

const nodeName = "node1"

func newTestNode(t *testing.T) *testNode {
	t.Helper()
	n := &testNode{dir: t.TempDir()}
	requireOK := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	n.kube, err = kubetest.New(kubetest.Options{})
	requireOK(err)
	t.Cleanup(n.kube.Close)
	n.kube.GrantAudience(audience)
	for name, address := range map[string]string{"reader": "127.0.0.2", "hostile": "127.0.0.5"} {
		email := map[string]string{"reader": gsa, "hostile": "../../x:signBlob?"}[name]
		n.kube.SetServiceAccount("default", name, map[string]string{"iam.gke.io/gcp-service-account": email})
		n.kube.SetPod(kubetest.Pod{Namespace: "default", Name: name, ServiceAccount: name, Node: nodeName,
			Addresses: []string{address}})
	}
	n.google, err = googletest.New(googletest.Options{Providers: map[string]googletest.Provider{
		audience: {Issuer: n.kube.Issuer(), JWKS: n.kube.JWKS},
	}})
	requireOK(err)
	t.Cleanup(n.google.Close)
	n.google.Allow("system:serviceaccount:default:reader", gsa)
	requireOK(n.google.WriteCA(filepath.Join(n.dir, "ca.pem")))
	kubeconfig, err := n.kube.Kubeconfig(nodeName)
	requireOK(err)
	requireOK(os.WriteFile(filepath.Join(n.dir, "kubeconfig"), kubeconfig, 0o600))
	requireOK(os.WriteFile(filepath.Join(n.dir, "config.yaml"), fmt.Appendf(nil, `workloadIdentityProvider: %s
kubeconfig: kubeconfig
projectID: my-project
listen: 127.0.0.1:0
healthListen: 127.0.0.1:0
routing: {mode: none}
attestation: {mode: source-ip}
google: {stsURL: %s, iamCredentialsURL: %s, caFile: ca.pem}
`, strings.TrimPrefix(audience, "//iam.googleapis.com/"), n.google.STSURL(), n.google.URL()), 0o600))

	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- service.Run(ctx, service.Options{Load: n.load, RunDir: n.dir, Version: "test", Stderr: io.Discard})
	}()
	n.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the service: %v", err)
		}
	})
	t.Cleanup(n.stop)
	return n
}

func (n *testNode) load() (config.Config, error) {
	return config.Load(filepath.Join(n.dir, "config.yaml"), nil)
}

func (n *testNode) socket() string { return filepath.Join(n.dir, "status.sock") }

// status waits until the service's Status is as wanted, and returns it.
func (n *testNode) status(t *testing.T, what string, is func(status.Status) bool) (s status.Status) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(30 * time.Second); ; {
		s = status.Status{}
		if text, err := status.Fetch(t.Context(), n.socket()); err == nil && json.Unmarshal(text, &s) == nil && is(s) {
			return s
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("still not: %s", what)
		}
	}
}

// ask asks the service as pod default/reader.
func (n *testNode) ask(t *testing.T, listen, path string) {
	t.Helper()
	pod := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: pod.DialContext}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+listen+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Metadata-Flavor", "Google")
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	if res.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s", path, res.Status)
	}
}

// What doctor sees of a service that runs, of a Kubernetes and of a Google is what they say; no
// token is in the report.
func TestRunExamines(t *testing.T) {
	n := newTestNode(t)
	running := n.status(t, "the hostile annotation was read", func(s status.Status) bool {
		return s.Cluster != nil &&
			slices.ContainsFunc(s.Cluster.Pods, func(p kube.PodStatus) bool { return p.AccountError != "" })
	})
	examined := func() (*nodeReport, map[string]Finding) {
		t.Helper()
		o := Options{Load: n.load, File: "config.yaml", RunDir: n.dir, StatusSocket: n.socket(), Version: running.Version,
			Plan: func(config.Config, error) routing.Plan { return routing.Plan{} }}
		seen := newReport(t.Context(), o)
		seen.askCluster(t.Context(), o)
		found := map[string]Finding{}
		r := diagnose(seen)
		for _, f := range r.Checks {
			found[f.Check] = f
		}
		shown, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		for _, secret := range slices.Concat(n.kube.IssuedTokens(), n.google.Secrets()) {
			if strings.Contains(string(shown), secret) {
				t.Error("a token is in the report")
			}
		}
		return seen, found
	}
	is := func(found map[string]Finding, want map[string]Verdict) {
		t.Helper()
		for check, verdict := range want {
			if found[check].Verdict != verdict {
				t.Errorf("%+v, want %s", found[check], verdict)
			}
		}
	}

	// What everybody's probes ask for does not count as a request of pods.
	n.ask(t, running.Listen, "/")
	if s := n.status(t, "it answers", func(status.Status) bool { return true }); s.Requests != 0 {
		t.Errorf("%d requests", s.Requests)
	}
	n.ask(t, running.Listen, "/computeMetadata/v1/project/project-id")
	n.status(t, "it is counted", func(s status.Status) bool { return s.Requests == 1 })

	seen, found := examined()
	is(found, map[string]Verdict{"service": OK, "credential": OK, "pods": Warn, "serviceaccounts": OK,
		"tokenrequest": OK, "sts": OK, "iam": OK, "clock": OK})
	if seen.cluster.Pods != 2 || !seen.cluster.Account.Linked() || seen.exchange == nil {
		t.Errorf("%+v, %+v", seen.cluster, seen.exchange)
	}

	n.google.Break(googletest.Exchange, googletest.Fault{Status: http.StatusBadRequest,
		Body: `{"error":"invalid_target","error_description":"no such provider, said %TOKEN%"}`})
	_, found = examined()
	is(found, map[string]Verdict{"sts": OK, "tokenrequest": OK, "exchange": Fail})
	if !strings.Contains(found["exchange"].Finding, "no such provider") {
		t.Errorf("%+v", found["exchange"])
	}
	n.google.Heal()

	n.kube.RevokeAudience(audience)
	seen, found = examined()
	is(found, map[string]Verdict{"tokenrequest": Fail, "exchange": Skip})
	if seen.exchange != nil || !strings.Contains(found["tokenrequest"].Manifest, audience) {
		t.Errorf("%+v", found["tokenrequest"])
	}

	n.google.Close()
	n.kube.Refuse()
	_, found = examined()
	is(found, map[string]Verdict{"sts": Fail, "iam": Fail, "serviceaccounts": Skip, "clock": Skip})

	n.stop()
	_, found = examined()
	is(found, map[string]Verdict{"service": Fail, "credential": Fail, "tokens": Skip})
}

// Whoever answers at the metadata server's address is recognised by its header; redirects are not
// followed, and nobody is waited for for long.
func TestAskRoot(t *testing.T) {
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Host != "169.254.169.254" || r.URL.Path != "/" {
			t.Errorf("asked %s for %s", r.Host, r.URL.Path)
		}
		w.Header().Set("Server", "EC2ws")
		http.Redirect(w, r, "/latest/", http.StatusFound)
	}))
	defer web.Close()
	a := askRoot(t.Context(), routing.MetadataServer(), 10*time.Second, dialer(web.Listener.Addr().String()))
	if a.err != nil || a.status != http.StatusFound || a.ours || answeredBy(a) != "AWS's metadata server" {
		t.Errorf("%+v", a)
	}
	web.Close()
	if a := askRoot(t.Context(), routing.MetadataServer(), 10*time.Second,
		dialer(web.Listener.Addr().String())); a.err == nil || !isRefused(a.err) {
		t.Errorf("%+v", a)
	}
}

// dialer connects to one address, whatever is asked for.
func dialer(to string) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, to)
	}
}

func TestEphemeralPorts(t *testing.T) {
	if p := ephemeralPorts(); p[0] == 0 || p[1] < p[0] {
		t.Error(p)
	}
}
