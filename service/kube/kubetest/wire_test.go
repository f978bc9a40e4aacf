package kubetest_test

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
)

type got struct {
	code   int
	header http.Header
	body   string
	proto  string
}

func ask(t *testing.T, c *http.Client, method, url, body string, header ...string) got {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	resp, err := c.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return got{resp.StatusCode, resp.Header, string(b), resp.Proto}
}

const onNode1 = "/api/v1/pods?fieldSelector=spec.nodeName%3Dnode1"

// The formats are negotiated as client-go's requests expect.
func TestNegotiation(t *testing.T) {
	s := start(t, kubetest.Options{})
	if err := s.Populate("x"); err != nil {
		t.Fatal(err)
	}
	c := client(t, s, "node1")
	const proto = "application/vnd.kubernetes.protobuf"
	for _, x := range []struct{ accept, contentType, begins string }{
		{"", "application/json", `{"kind":"PodList","apiVersion":"v1"`},
		{"*/*", "application/json", `{"kind":"PodList"`},
		{proto + ",application/json", proto, "k8s\x00"},
		{"application/xml," + proto, proto, "k8s\x00"},
		{"application/json;as=Table,application/json", "application/json", `{`},
	} {
		g := ask(t, c, "GET", s.URL()+onNode1, "", "Accept", x.accept)
		if g.code != 200 || g.header.Get("Content-Type") != x.contentType || !strings.HasPrefix(g.body, x.begins) ||
			g.proto != "HTTP/2.0" {
			t.Errorf("Accept %q: %d %s %s %.20q", x.accept, g.code, g.proto, g.header.Get("Content-Type"), g.body)
		}
	}
	if g := ask(t, c, "GET", s.URL()+onNode1, "", "Accept", "text/html"); g.code != 406 {
		t.Errorf("text/html: %d", g.code)
	}
	token := "/api/v1/namespaces/ns1/serviceaccounts/ksa/token"
	for body, h := range map[string]string{"x: y": "application/xml",
		`{"kind":"TokenRequest","apiVersion":"authentication.k8s.io/v1","spec":{"audience":[]}}`: "application/json",
		"{": "application/json"} {
		if g := ask(t, c, "POST", s.URL()+token, body, "Content-Type", h); g.code != 415 && g.code != 400 {
			t.Errorf("%q as %s: %d %s", body, h, g.code, g.body)
		}
	}
}

// The framing of watches: JSON line by line, protobuf with a length before each.
func TestWatchFrames(t *testing.T) {
	s := start(t, kubetest.Options{})
	if err := s.Populate("x"); err != nil {
		t.Fatal(err)
	}
	c := client(t, s, "node1")
	const initial = "&watch=true&timeoutSeconds=1&allowWatchBookmarks=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan"
	g := ask(t, c, "GET", s.URL()+onNode1+initial, "", "Accept", "application/json")
	var types []string
	for sc := bufio.NewScanner(strings.NewReader(g.body)); sc.Scan(); {
		var e struct {
			Type   string
			Object struct {
				Kind     string
				Metadata struct {
					Name, ResourceVersion string
					Annotations           map[string]string
				}
			}
		}
		if err := json.Unmarshal(sc.Bytes(), &e); err != nil {
			t.Fatal(err)
		}
		if e.Object.Kind != "Pod" || e.Object.Metadata.ResourceVersion == "" {
			t.Errorf("event %+v", e)
		}
		if e.Type == "BOOKMARK" && e.Object.Metadata.Annotations["k8s.io/initial-events-end"] != "true" {
			t.Errorf("bookmark %+v", e)
		}
		types = append(types, e.Type)
	}
	if s := strings.Join(types, " "); s != "ADDED ADDED ADDED ADDED BOOKMARK" {
		t.Errorf("events %s", s)
	}
	g = ask(t, c, "GET", s.URL()+onNode1+initial, "", "Accept", "application/vnd.kubernetes.protobuf")
	if ct := g.header.Get("Content-Type"); ct != "application/vnd.kubernetes.protobuf;stream=watch" {
		t.Errorf("Content-Type %q", ct)
	}
	n := 0
	for b := []byte(g.body); len(b) > 4; n++ {
		l := binary.BigEndian.Uint32(b)
		if int(l) > len(b)-4 || !bytes.Contains(b[4:4+l], []byte("k8s\x00")) {
			t.Fatalf("frame %d of %d bytes", n, l)
		}
		b = b[4+l:]
	}
	if n != 5 {
		t.Errorf("%d frames", n)
	}
}

func TestWatchRules(t *testing.T) {
	s := start(t, kubetest.Options{})
	if err := s.Populate("x"); err != nil {
		t.Fatal(err)
	}
	c := client(t, s, "node1")
	s.Compact()
	for query, want := range map[string]string{
		"&watch=1&timeoutSeconds=1&resourceVersion=5": "too old resource version: 5",
		"&watch=1&sendInitialEvents=true": "sendInitialEvents requires setting resourceVersionMatch to " +
			"NotOlderThan",
		"&watch=1&resourceVersionMatch=NotOlderThan": "resourceVersionMatch is forbidden for watch unless " +
			"sendInitialEvents is provided",
		"&resourceVersion=99999999":                          "Too large resource version",
		"&resourceVersion=x":                                 "Invalid value",
		"%2Cspec.volumes%3Dx":                                "field label not supported: spec.volumes",
		"&watch=1&timeoutSeconds=1&resourceVersion=99999999": "Too large resource version",
	} {
		if g := ask(t, c, "GET", s.URL()+onNode1+query, ""); !strings.Contains(g.body, want) {
			t.Errorf("%s: %d %s", query, g.code, g.body)
		}
	}
	old := start(t, kubetest.Options{NoWatchList: true})
	if g := ask(t, client(t, old, "node1"), "GET",
		old.URL()+onNode1+"&watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan", ""); g.code != 422 {
		t.Errorf("%d %s", g.code, g.body)
	}
}

// Who nobody knows is refused, and who says nothing is anonymous.
func TestAuthentication(t *testing.T) {
	at := time.Now()
	s := start(t, kubetest.Options{Now: func() time.Time { return at }})
	other := start(t, kubetest.Options{})
	anonymous := client(t, s, "")
	if g := ask(t, anonymous, "GET", s.URL()+onNode1, ""); g.code != 403 || !strings.Contains(g.body, "system:anonymous") {
		t.Errorf("anonymous: %d %s", g.code, g.body)
	}
	if g := ask(t, anonymous, "GET", s.URL()+onNode1, "", "Authorization", "Bearer wrong"); g.code != 401 {
		t.Errorf("wrong token: %d", g.code)
	}
	node := client(t, s, "node1")
	if g := ask(t, node, "GET", s.URL()+onNode1, ""); g.code != 200 {
		t.Errorf("node: %d %s", g.code, g.body)
	}
	stranger := client(t, other, "node1")
	stranger.Transport.(*http.Transport).TLSClientConfig.RootCAs.AppendCertsFromPEM(s.CA())
	if g := ask(t, stranger, "GET", s.URL()+onNode1, ""); g.code != 401 {
		t.Errorf("another CA's node: %d", g.code)
	}
	if _, err := s.RotateNodeCert("node1"); err != nil {
		t.Fatal(err)
	}
	if g := ask(t, node, "GET", s.URL()+onNode1, ""); g.code != 401 {
		t.Errorf("rotated away, on a living connection: %d", g.code)
	}
	node = client(t, s, "node1")
	at = at.Add(30 * 24 * time.Hour)
	if g := ask(t, node, "GET", s.URL()+onNode1, ""); g.code != 401 {
		t.Errorf("expired: %d", g.code)
	}
	s.Allow("system:unauthenticated", "get", "/openid/v1/jwks")
	if g := ask(t, anonymous, "GET", s.URL()+"/openid/v1/jwks", ""); g.code != 200 ||
		!strings.Contains(g.body, `"kty":"RSA"`) {
		t.Errorf("jwks: %d %s", g.code, g.body)
	}
}

// The listener and names of the certificate may be the caller's, for a server in another network
// namespace.
func TestListenerAndHosts(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.2:0")
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, kubetest.Options{Listener: l, Hosts: []string{"api.test"}, Issuer: "https://issuer.test"})
	if s.URL() != "https://"+l.Addr().String() || s.Issuer() != "https://issuer.test" {
		t.Errorf("%s, %s", s.URL(), s.Issuer())
	}
	c := client(t, s, "node1")
	if g := ask(t, c, "GET", s.URL()+"/version", ""); g.code != 200 {
		t.Errorf("by address: %d", g.code)
	}
	c.Transport.(*http.Transport).TLSClientConfig.ServerName = "api.test"
	c.CloseIdleConnections()
	if g := ask(t, c, "GET", s.URL()+"/version", ""); g.code != 200 {
		t.Errorf("by name: %d", g.code)
	}
	if s.Calls("get", "") != 2 || len(s.AllCalls()) != 1 {
		t.Errorf("calls %v", s.AllCalls())
	}
}
