package service

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
)

// H-12: a long poll is answered when something changed, when its time is over, and when the service
// stops.
func TestLongPoll(t *testing.T) {
	b := newTestNode(t)
	b.ready(t)
	path := accts + "default/email?wait_for_change=true&last_etag="
	etag := b.ask(t, linked, "GET", accts+"default/email", "").Header.Get("ETag")

	res := b.ask(t, linked, "GET", path+etag+"&timeout_sec=1", "")
	if res.StatusCode != 200 || res.body != gsa || res.Header.Get("ETag") != etag {
		t.Errorf("timeout_sec: %d %q %s", res.StatusCode, res.body, res.Header.Get("ETag"))
	}

	waiting := func() chan response {
		c := b.dial(t, linked)
		t.Cleanup(func() { c.Close() })
		if _, err := io.WriteString(c,
			"GET "+path+etag+" HTTP/1.1\r\nHost: metadata\r\nMetadata-Flavor: Google\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		answered := make(chan response, 1)
		go func() {
			res, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil {
				t.Error(err)
				close(answered)
				return
			}
			body, _ := io.ReadAll(res.Body)
			c.Close()
			answered <- response{res, string(body)}
		}()
		return answered
	}
	answered := waiting()
	b.google.Allow("system:serviceaccount:default:reader", "other@my-project.iam.gserviceaccount.com")
	b.kube.SetServiceAccount("default", "reader",
		map[string]string{"iam.gke.io/gcp-service-account": "other@my-project.iam.gserviceaccount.com"})
	// A mint reads the annotations again, and so brings the news before the next poll of them.
	b.eventually(t, "the annotation is news", func() bool {
		b.ask(t, linked, "GET", accts+fmt.Sprintf("default/token?scopes=https://www.googleapis.com/auth/x%d",
			time.Now().UnixNano()), "")
		return b.ask(t, linked, "GET", accts+"default/email", "").body == "other@my-project.iam.gserviceaccount.com"
	})
	if res := receive(t, answered); res.body != "other@my-project.iam.gserviceaccount.com" {
		t.Errorf("changed: %d %q", res.StatusCode, res.body)
	}

	etag = b.ask(t, linked, "GET", accts+"default/email", "").Header.Get("ETag")
	b.idle(t)
	answered = waiting()
	b.eventually(t, "it waits", func() bool { return b.server.Connections().Answering == 1 })
	b.end(t)
	if res := receive(t, answered); res.StatusCode != 200 || !res.Close {
		t.Errorf("R-26: stopping: %d, Connection: close is %v", res.StatusCode, res.Close)
	}
}

func receive[T any](t *testing.T, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(testTimeout):
		t.Fatalf("nothing came within %s", testTimeout)
		panic("unreachable")
	}
}

// busy keep-alive connections lose nothing when the service stops.
func TestDrain(t *testing.T) {
	t.Parallel()
	b := newTestNode(t)
	b.ready(t)
	b.ask(t, linked, "GET", accts+"default/token", "")
	const clients = 64
	var wg sync.WaitGroup
	var mu sync.Mutex
	answered, lost := 0, []error(nil)
	busy := make(chan struct{}, clients)
	for range clients {
		c := b.dial(t, linked)
		wg.Go(func() {
			defer c.Close()
			r := bufio.NewReader(c)
			for n := 0; ; n++ {
				_, err := io.WriteString(c, benchRequest)
				var res *http.Response
				if err == nil {
					res, err = http.ReadResponse(r, nil)
				}
				if err == nil {
					_, err = io.Copy(io.Discard, res.Body)
				}
				mu.Lock()
				if err != nil {
					lost = append(lost, err)
				} else {
					answered++
				}
				mu.Unlock()
				if err != nil || res.Close {
					return
				}
				if n == 3 {
					busy <- struct{}{}
				}
			}
		})
	}
	for range clients {
		<-busy
	}
	b.end(t)
	wg.Wait()
	if len(lost) > 0 {
		t.Errorf("%d of %d connections lost a request (%d answered): %v", len(lost), clients, answered, lost[0])
	}
}

// a connection that was accepted, and asks only after the listener was left, is answered too.
func TestDrainAnswersWhatItAccepted(t *testing.T) {
	b := newTestNode(t)
	b.ready(t)
	b.ask(t, linked, "GET", accts+"default/token", "")
	b.idle(t)
	c := b.dial(t, linked)
	defer c.Close()
	b.eventually(t, "it is accepted", func() bool { return b.server.Connections().Open == 1 })
	ended := make(chan struct{})
	go func() { defer close(ended); b.end(t) }()
	b.eventually(t, "the listener is left", func() bool {
		c, err := net.Dial("tcp", b.listener.Addr().String())
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	if _, err := io.WriteString(c, benchRequest); err != nil {
		t.Fatal(err)
	}
	if res, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || res.StatusCode != 200 || !res.Close {
		t.Errorf("%+v, %v", res, err)
	}
	<-ended
}

// A mint in flight when the service stops comes to its end, and its asker gets the token.
func TestDrainWaitsForMints(t *testing.T) {
	b := newTestNode(t, "prefetch: none")
	b.ready(t)
	b.google.Break(googletest.Exchange, googletest.Fault{Latency: time.Second})
	answered := make(chan response, 1)
	go func() { answered <- b.ask(t, linked, "GET", accts+"default/token", "") }()
	b.eventually(t, "it is being minted", func() bool { return b.google.Calls(googletest.Exchange) > 0 })
	b.end(t)
	if res := receive(t, answered); res.StatusCode != 200 {
		t.Errorf("%d %s", res.StatusCode, res.body)
	}
}

// Section 6 of the contract, against stand-ins that go wrong.
func TestWhenSomethingIsWrong(t *testing.T) {
	t.Parallel()
	t.Run("T-09: Google is unreachable", func(t *testing.T) {
		t.Parallel()
		b := newTestNode(t, "prefetch: none")
		b.ready(t)
		b.google.Break(googletest.Exchange, googletest.Fault{Drop: true})
		if res := b.ask(t, linked, "GET", accts+"default/token", ""); res.StatusCode != 503 {
			t.Errorf("%d %s", res.StatusCode, res.body)
		}
	})
	t.Run("T-09: Google 429", func(t *testing.T) {
		t.Parallel()
		b := newTestNode(t, "prefetch: none")
		b.ready(t)
		b.google.Break(googletest.GenerateAccessToken,
			googletest.Fault{Status: 429, Message: "Quota exceeded for quota metric"})
		if res := b.ask(t, linked, "GET", accts+"default/token", ""); res.StatusCode != 503 ||
			!strings.Contains(res.body, "Quota exceeded for quota metric") {
			t.Errorf("%d %s", res.StatusCode, res.body)
		}
	})
	t.Run("STS 400", func(t *testing.T) {
		t.Parallel()
		b := newTestNode(t, "prefetch: none")
		b.ready(t)
		b.google.Break(googletest.Exchange, googletest.Fault{Status: 400, Message: "The audience in ID Token does not match"})
		if res := b.ask(t, linked, "GET", accts+"default/token", ""); res.StatusCode != 403 ||
			!strings.Contains(res.body, "The audience in ID Token does not match") {
			t.Errorf("%d %s", res.StatusCode, res.body)
		}
	})
	t.Run("N-05: the audience is not granted", func(t *testing.T) {
		t.Parallel()
		b := newWorld(t)
		b.kube.RevokeAudience(audience)
		b.configure(t, "prefetch: none")
		b.start(t)
		b.ready(t)
		res := b.ask(t, linked, "GET", accts+"default/token", "")
		if res.StatusCode != 503 || !strings.Contains(res.body, "request-serviceaccounts-token-audience") {
			t.Errorf("%d %s", res.StatusCode, res.body)
		}
		var text strings.Builder
		if err := b.Status().Text(&text, time.Now()); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(text.String(), "kind: ClusterRole") || !strings.Contains(text.String(), audience) {
			t.Errorf("status has no manifest:\n%s", &text)
		}
	})
	t.Run("the API server is away, nothing cached", func(t *testing.T) {
		t.Parallel()
		b := newTestNode(t, "prefetch: none")
		b.ready(t)
		b.kube.Close()
		res := b.ask(t, linked, "GET", accts+"default/token", "")
		if res.StatusCode != 503 || !strings.Contains(res.body, "since") {
			t.Errorf("%d %s", res.StatusCode, res.body)
		}
	})
	t.Run("the API server is away, and the token is cached: an address is believed of nobody", func(t *testing.T) {
		t.Parallel()
		b := newTestNode(t)
		b.ready(t)
		b.ask(t, linked, "GET", accts+"default/token", "")
		b.kube.Refuse()
		b.eventually(t, "the watch is broken", func() bool { return !b.Status().Cluster.Watching })
		if res := b.ask(t, linked, "GET", accts+"default/token", ""); res.StatusCode != 503 ||
			!strings.Contains(res.body, "the Kubernetes API is unavailable since") {
			t.Errorf("%d %s", res.StatusCode, res.body)
		}
		b.kube.Accept()
		b.ready(t)
		if res := b.ask(t, linked, "GET", accts+"default/token", ""); res.StatusCode != 200 {
			t.Errorf("%d %s", res.StatusCode, res.body)
		}
	})
	t.Run("no kubeconfig yet", func(t *testing.T) {
		t.Parallel()
		b := newWorld(t)
		if err := os.Rename(filepath.Join(b.dir, "kubeconfig"), filepath.Join(b.dir, "later")); err != nil {
			t.Fatal(err)
		}
		b.configure(t)
		b.start(t) // and is READY
		res := b.ask(t, linked, "GET", v1+"project/project-id", "")
		if res.StatusCode != 503 && res.StatusCode != 403 {
			t.Errorf("%d %s", res.StatusCode, res.body)
		}
		if err := os.Rename(filepath.Join(b.dir, "later"), filepath.Join(b.dir, "kubeconfig")); err != nil {
			t.Fatal(err)
		}
		b.ready(t)
		if res := b.ask(t, linked, "GET", accts+"default/token", ""); res.StatusCode != 200 {
			t.Errorf("%d %s", res.StatusCode, res.body)
		}
	})
}

// N-11, N-12, U-06: who has the address now gets the token, and nobody else.
func TestAddressReuse(t *testing.T) {
	b := newTestNode(t)
	b.ready(t)
	kept := b.dial(t, linked)
	defer kept.Close()
	r := bufio.NewReader(kept)
	ask := func() response {
		if _, err := io.WriteString(kept, benchRequest); err != nil {
			t.Fatal(err)
		}
		return readResponse(t, r, "GET")
	}
	if res := ask(); res.StatusCode != 200 {
		t.Fatalf("%d %s", res.StatusCode, res.body)
	}
	b.kube.DeletePod("default", "reader")
	b.addPod("successor", linked, nil)
	b.eventually(t, "the successor is known", func() bool {
		return strings.Contains(b.ask(t, linked, "GET", accts, "").body, "my-pool/")
	})
	if res := ask(); res.StatusCode != 503 || !res.Close {
		t.Errorf("the next owner of the address was answered on the old one's connection: %d %s", res.StatusCode, res.body)
	}
	issued, _ := b.google.Lookup(tokenIn(t, b.ask(t, linked, "GET", accts+"default/token", "").body))
	if issued.Subject != "system:serviceaccount:default:successor" {
		t.Errorf("the successor got the token of %s", issued.Subject)
	}

	// A Succeeded pod keeps its address in the API; a terminating one keeps its identity while it
	// runs.
	b.kube.SetPod(kubetest.Pod{Namespace: "default", Name: "plain", ServiceAccount: "plain", Node: node,
		Addresses: []string{unlinked}, Terminating: true})
	b.kube.SetPod(kubetest.Pod{Namespace: "default", Name: "principal", ServiceAccount: "principal", Node: node,
		Addresses: []string{principal}, Phase: "Succeeded"})
	// the node's own address here
	b.eventually(t, "N-12: an ended pod is nobody",
		func() bool { return b.ask(t, principal, "GET", accts, "").StatusCode == 403 })
	if res := b.ask(t, unlinked, "GET", accts+"default/token", ""); res.StatusCode != 200 {
		t.Errorf("U-06: a terminating pod: %d %s", res.StatusCode, res.body)
	}
}

func TestLimits(t *testing.T) {
	t.Parallel()
	t.Run("connections", func(t *testing.T) {
		t.Parallel()
		b := newTestNode(t, "limits: {connectionsPerPod: 3}")
		b.ready(t)
		var open []net.Conn
		for range 3 {
			open = append(open, b.keep(t, linked))
		}
		res := b.ask(t, linked, "GET", accts+"default/email", "")
		if res.StatusCode != 503 || res.Header.Get("Retry-After") != "1" ||
			!strings.Contains(res.body, "limits.connectionsPerPod is 3") {
			t.Errorf("%d %s", res.StatusCode, res.body)
		}
		if res := b.ask(t, unlinked, "GET", accts+"default/email", ""); res.StatusCode != 200 {
			t.Errorf("another pod: %d %s", res.StatusCode, res.body)
		}
		for _, c := range open {
			c.Close()
		}
		b.eventually(t, "closed connections are free again",
			func() bool { return b.ask(t, linked, "GET", accts+"default/email", "").StatusCode == 200 })
	})
	t.Run("keys", func(t *testing.T) {
		t.Parallel()
		b := newTestNode(t, "limits: {keysPerPod: 2}")
		b.ready(t)
		status := map[int]int{}
		for i := range 4 {
			status[b.ask(t, linked, "GET", accts+fmt.Sprintf("default/identity?audience=a%d", i), "").StatusCode]++
		}
		held := 0
		for _, e := range b.Status().Tokens {
			if e.Audience != "" {
				held++
			}
		}
		if status[200] != 4 || held != 2 {
			t.Errorf("%v, and %d are held", status, held)
		}
	})
}

// 100 pods with 100 ServiceAccounts: their tokens are there before anybody asked, for 100 exchanges
// and 100 access tokens.
func TestPrefetch(t *testing.T) {
	t.Parallel()
	b := newWorld(t)
	for _, name := range []string{"reader", "plain", "principal", "hostile", "denied", "missing"} {
		b.kube.DeletePod("default", name)
	}
	for i := range 100 {
		name := fmt.Sprintf("app-%d", i)
		email := name + "@my-project.iam.gserviceaccount.com"
		b.google.Allow("system:serviceaccount:default:"+name, email)
		b.addPod(name, fmt.Sprintf("127.0.1.%d", i), map[string]string{"iam.gke.io/gcp-service-account": email})
	}
	b.configure(t)
	b.start(t)
	b.ready(t)
	b.eventually(t, "all tokens are there", func() bool { return b.google.Calls(googletest.GenerateAccessToken) >= 100 })
	for i := range 100 {
		if res := b.ask(t, fmt.Sprintf("127.0.1.%d", i), "GET", accts+"default/token", ""); res.StatusCode != 200 {
			t.Fatalf("pod %d: %d %s", i, res.StatusCode, res.body)
		}
	}
	if sts, iam := b.google.Calls(googletest.Exchange), b.google.Calls(googletest.GenerateAccessToken); sts != 100 ||
		iam != 100 {
		t.Errorf("%d exchanges, %d access tokens; want 100, 100", sts, iam)
	}
}

// Nothing that is printed, logged, measured or shown holds a secret. The log is looked at by every
// test that has a testNode.
func TestNoSecrets(t *testing.T) {
	b := newTestNode(t, "log: {level: debug}")
	b.ready(t)
	var shown strings.Builder
	for _, from := range []string{linked, unlinked, principal, hostile, denied, missing} {
		b.ask(t, from, "GET", accts+"default/token", "")
		b.ask(t, from, "GET", accts+"default/identity?audience=a", "")
		shown.WriteString(b.ask(t, from, "GET", v1+"?recursive=true", "").body)
	}
	stolen := tokenIn(t, b.ask(t, linked, "GET", accts+"default/token", "").body)
	for _, m := range googletest.Methods {
		b.google.Break(m, googletest.Fault{Status: 400,
			Body: `{"error":{"message":"%TOKEN%"},"error_description":"%TOKEN%"}`})
	}
	shown.WriteString(b.ask(t, linked, "GET", accts+"default/token?scopes=https://www.googleapis.com/auth/other", "").body)
	shown.WriteString(b.ask(t, unlinked, "GET", accts+"default/token?scopes=https://www.googleapis.com/auth/other",
		"Authorization: Bearer "+stolen).body)
	b.ask(t, linked, "GET", "/computeMetadata/v1/"+stolen+"?x="+stolen, "Host: "+"h"+stolen[:30])

	st, err := json.Marshal(b.Status())
	if err != nil {
		t.Fatal(err)
	}
	shown.Write(st)
	if err := b.Status().Text(&shown, time.Now()); err != nil {
		t.Fatal(err)
	}
	families, err := b.gather().Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		shown.WriteString(f.String())
	}
	for _, secret := range append(b.google.Secrets(), b.kube.IssuedTokens()...) {
		if strings.Contains(shown.String(), secret) {
			t.Error("a secret is shown")
		}
	}
	for _, line := range []string{"token issued", gsa, "default/reader"} {
		if !strings.Contains(b.log.String(), line) {
			t.Errorf("the audit trail has no %q", line)
		}
	}
}

// Whoever fills up the limit of the address that the watchdog's probe comes from does not silence
// it.
func TestProbeIsOutOfReach(t *testing.T) {
	b := newTestNode(t, "limits: {connectionsPerPod: 2}")
	b.ready(t)
	for range 4 {
		b.keep(t, "127.0.0.1")
	}
	if err := b.server.Alive(t.Context()); err != nil {
		t.Error(err)
	}
}
