package service

import (
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// imds is AWS's metadata server where a node has it.
type imds struct {
	mu   sync.Mutex
	seen []string // "client METHOD path", and headers that nobody but the client may have written
}

const imdsToken = "AQAEAL-imds-secret"

func (m *imds) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	client, _ := netip.ParseAddrPort(r.RemoteAddr)
	line := fmt.Sprint(client.Addr(), " ", r.Method, " ", r.URL)
	for _, name := range []string{"Metadata-Flavor", "X-Forwarded-For", "Via", "Forwarded"} {
		if v := r.Header.Get(name); v != "" {
			line += " " + name
		}
	}
	m.mu.Lock()
	m.seen = append(m.seen, line)
	m.mu.Unlock()
	w.Header().Set("Server", "EC2ws")
	switch {
	case r.Method == http.MethodPut:
		w.Header().Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", r.Header.Get("X-Aws-Ec2-Metadata-Token-Ttl-Seconds"))
		_, _ = io.WriteString(w, imdsToken)
	case r.Header.Get("X-Aws-Ec2-Metadata-Token") != imdsToken:
		w.WriteHeader(http.StatusUnauthorized)
	default:
		_, _ = io.WriteString(w, "i-0abc")
	}
}

func (m *imds) take() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	defer func() { m.seen = nil }()
	return m.seen
}

// TestPassthrough has everybody ask for AWS's metadata by way of rules that redirect pods on the
// host network and spare the node's own slices, as which the service itself asks: it has to get
// there, and nobody by it who was not named.
func TestPassthrough(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{routing.ModeIPTables, routing.ModeNFTables, routing.ModeEBPF} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			testPassthrough(t, mode)
		})
	}
}

func testPassthrough(t *testing.T, mode string) {
	k := newKernelNodeIn(t, routing.Plan{Mode: mode}, "passthrough: [default/aws]")
	aws := new(imds)
	l, err := k.node.Cloud.Listen("tcp4", "169.254.169.254:80")
	if err != nil {
		t.Fatal(err)
	}
	web := &http.Server{Handler: aws}
	go func() { _ = web.Serve(l) }()
	t.Cleanup(func() { _ = web.Close() })
	start := func(name string, ns *netnstest.NS, change func(*podNode)) *podNode {
		t.Helper()
		p := k.newPod(name, ns)
		p.ServiceAccount = "aws"
		if change != nil {
			change(p)
		}
		if err := p.start(); err != nil {
			t.Fatal(err)
		}
		p.tell()
		return p
	}
	network := func(name string) *netnstest.NS {
		t.Helper()
		ns, err := k.node.AddPod(name)
		if err != nil {
			t.Fatal(err)
		}
		return ns
	}
	named := start("aws", k.node.NS, nil)

	ask := func(p *podNode, how, request string) said {
		t.Helper()
		a, err := p.ask(how, request)
		if err != nil || a.Err != "" {
			t.Fatalf("%s asks %s: %v %s", p.Name, request, err, a.Err)
		}
		return a
	}
	const (
		host     = " HTTP/1.1|Host: 169.254.169.254|"
		putToken = "raw PUT /latest/api/token" + host + "X-aws-ec2-metadata-token-ttl-seconds: 60|Content-Length: 0||"
		getID    = "raw GET /latest/meta-data/instance-id" + host + "X-aws-ec2-metadata-token: " + imdsToken + "||"
		version1 = "raw GET /2021-01-03/meta-data/instance-id" + host + "|"
	)
	theirs := func(a said, status int, body string) {
		t.Helper()
		if a.Status != status || a.Body != body || a.Header.Get("Server") != "EC2ws" ||
			a.Header.Get("Metadata-Flavor") != "" ||
			a.Header.Get("X-Frame-Options") != "" {
			t.Errorf("%+v, want AWS's own %d %q", a, status, body)
		}
	}
	ours := func(a said, status int, says string) {
		t.Helper()
		if a.Status != status || !strings.Contains(a.Body, says) || a.Header.Get("Metadata-Flavor") != "Google" {
			t.Errorf("%+v, want our %d %q", a, status, says)
		}
	}

	// Request by request, on one connection.
	theirs(ask(named, "fresh", putToken), 200, imdsToken)
	theirs(ask(named, "kept", getID), 200, "i-0abc")
	if a := ask(named, "kept", accts+"default/token"); a.Status != 200 || k.subjectOf(t, a.Body) != "default:aws" {
		t.Errorf("its own token: %+v", a)
	}
	theirs(ask(named, "kept", version1), 401, "")
	ours(ask(named, "kept", "raw GET /computeMetadata/v1/instance/id"+host+"|"), 403, "Missing required header")
	ours(
		ask(named, "kept", "raw GET /latest/%2e%2e/computeMetadata/v1/instance/id"+host+"|"),
		403,
		"Missing required header",
	)
	ours(ask(named, "kept", strings.Replace(getID, "||", "|X-Forwarded-For: 10.0.0.1||", 1)), 403, "X-Forwarded-For")
	ours(
		ask(named, "kept", strings.Replace(getID, "Host: 169.254.169.254", "Host: evil.example.com", 1)),
		403,
		"Host header",
	)
	want := []string{
		"198.51.100.10 PUT /latest/api/token",
		"198.51.100.10 GET /latest/meta-data/instance-id",
		"198.51.100.10 GET /2021-01-03/meta-data/instance-id",
	}
	if got := aws.take(); strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("AWS saw %q, want %q", got, want)
	}

	// Who must not, does not.
	onPodNetwork := start("a", network("a"), nil)
	escaped := start(
		"b",
		k.node.NS,
		func(p *podNode) { p.HostNetwork = false },
	) // its process is in the node's namespace
	pretended := start("c", network("c"), func(p *podNode) { p.HostNetwork = true })               // and here it is not
	outside := start("sshd", k.node.NS, func(p *podNode) { p.cgroup = "/system.slice/x.service" }) // by our address
	unlisted := start("d", k.node.NS, func(p *podNode) { p.ServiceAccount = "d" })
	for _, p := range []*podNode{onPodNetwork, escaped, pretended} {
		k.eventually(t, p.Name+" is known", func() bool { return ask(p, "fresh", accts+"default/email").Status == 200 })
		ours(ask(p, "fresh", putToken), 405, "GET or HEAD")
		ours(ask(p, "fresh", getID), 403, "Missing required header")
		ours(ask(p, "fresh", "/latest/meta-data/"), 404, "Not Found\n")
	}
	ours(ask(outside, "direct", getID), 403, "Missing required header")
	ours(ask(unlisted, "fresh", putToken), 404, "add it to passthrough")
	ours(ask(unlisted, "kept", getID), 404, "default/d")
	if got := aws.take(); len(got) > 0 {
		t.Errorf("AWS saw %q", got)
	}
	var text strings.Builder
	st := statusOf(t, k.dir)
	if err := st.Text(&text, st.Started); err != nil || len(st.SkippedHostPods) != 1 ||
		!strings.Contains(text.String(), "\nhost pods    ServiceAccount default/d: 2 requests ") {
		t.Errorf("status: %+v, %v:\n%s", st.SkippedHostPods, err, &text)
	}

	_ = web.Close()
	ours(ask(named, "fresh", getID), 502, "connection refused")
	log := k.log.String()
	if !strings.Contains(log, `"msg":"passed to the cloud's metadata server","place":"passthrough","pod":"default/aws"`) ||
		strings.Contains(log, imdsToken) ||
		strings.Contains(log, "i-0abc") {
		t.Error("the log lacks the line of what was passed, or holds more than that")
	}
}
