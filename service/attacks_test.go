package service

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	attackLine = "GET " + accts + "default/email HTTP/1.1\r\n"
	attackHost = "Host: 169.254.169.254\r\n"
	attackEnd  = "Metadata-Flavor: Google\r\nConnection: close\r\n\r\n"
)

// statusLines finds the beginning of each answer.
var statusLines = regexp.MustCompile(`HTTP/1\.[01] \d{3}`)

// TestHostileRequests sends what no client of ours sends. Each row names the status of each answer;
// none stands for a connection that is closed without one. Every answer has our header, the next
// pod gets its own, and nothing is left of the connection.
func TestHostileRequests(t *testing.T) {
	b := newTestNode(t)
	b.ready(t)
	headers := func(n int) string {
		var s strings.Builder
		for i := range n {
			fmt.Fprintf(&s, "X-%d: y\r\n", i)
		}
		return s.String()
	}
	chunked := "Transfer-Encoding: chunked\r\n"
	smuggled := attackLine + attackHost + attackEnd
	for _, tt := range []struct {
		name, send string
		want       []string // of each answer
		mayBeReset bool     // the kernel may drop an answer behind which the client still sends
	}{
		{"HTTP/0.9", "GET /\r\n", []string{"400"}, false},
		{"HTTP/0.9 with a version", "GET / HTTP/0.9\r\n\r\n", []string{"505"}, false},
		{"HTTP/3.0", "GET / HTTP/3.0\r\n" + attackHost + "\r\n", []string{"505"}, false},
		{"header of 1 MB", attackLine + attackHost + "X: " + strings.Repeat("x", 1<<20) + "\r\n" + attackEnd,
			[]string{"431"}, true},
		{"10,000 headers", attackLine + attackHost + headers(10_000) + attackEnd, []string{"400"}, true},
		// Each of these would cost several hundred KB while its request waits for a change.
		{"3,000 headers of 5 bytes", attackLine + attackHost + strings.Repeat("x:\r\n", 3_000) + attackEnd, []string{"400"},
			true},
		{"3,000 parameters", strings.Replace(attackLine, " HTTP", "?"+strings.Repeat("a=&", 3_000)+" HTTP", 1) + attackHost +
			attackEnd, []string{"400"}, false},
		{"audience of 5 KB", "GET " + accts + "default/identity?audience=" + strings.Repeat("a", 5_000) + " HTTP/1.1\r\n" +
			attackHost + attackEnd, []string{"400"}, false},
		{"100 headers and parameters", strings.Replace(attackLine, " HTTP", "?"+strings.Repeat("a=&", 100)+" HTTP", 1) +
			attackHost + headers(100) + attackEnd, []string{"200"}, false},
		{"two Content-Length", attackLine + attackHost + "Content-Length: 1\r\nContent-Length: 2\r\n" + attackEnd + "ab",
			[]string{"400"}, false},
		{"negative Content-Length", attackLine + attackHost + "Content-Length: -1\r\n" + attackEnd, []string{"400"}, false},
		{"Content-Length of 2^64", attackLine + attackHost + "Content-Length: 18446744073709551616\r\n" + attackEnd,
			[]string{"400"}, false},
		{"Content-Length hides a request", attackLine + attackHost +
			fmt.Sprintf("Content-Length: %d\r\nMetadata-Flavor: Google\r\n\r\n", len(smuggled)) + smuggled,
			[]string{"200"}, false},
		{"Content-Length and Transfer-Encoding", attackLine + attackHost + "Content-Length: 5\r\n" + chunked +
			"Metadata-Flavor: Google\r\n\r\n0\r\n\r\n" + smuggled, []string{"200"}, false},
		{"Transfer-Encoding twice", attackLine + attackHost + chunked + chunked + attackEnd + "0\r\n\r\n",
			[]string{"501"}, false},
		{"Transfer-Encoding with HTTP/1.0", "GET / HTTP/1.0\r\n" + chunked + "\r\n0\r\n\r\n" + smuggled,
			[]string{"200"}, false},
		{"obs-fold", attackLine + attackHost + "X: a\r\n b\r\n" + attackEnd, []string{"200"}, false},
		{"obs-fold in Metadata-Flavor", attackLine + attackHost + "Metadata-Flavor: Goo\r\n gle\r\nConnection: close\r\n\r\n",
			[]string{"403"}, false},
		{"obs-fold first", attackLine + " X: a\r\n" + attackHost + attackEnd, []string{"400"}, false},
		{"NUL in a value", attackLine + attackHost + "X: a\x00b\r\n" + attackEnd, []string{"400"}, false},
		{"NUL in a name", attackLine + attackHost + "X\x00: a\r\n" + attackEnd, []string{"400"}, false},
		{"NUL in the path", "GET /computeMetadata/v1/\x00 HTTP/1.1\r\n" + attackHost + attackEnd, []string{"400"}, false},
		{"NUL in Metadata-Flavor", attackLine + attackHost + "Metadata-Flavor: Google\x00\r\nConnection: close\r\n\r\n",
			[]string{"400"}, false},
		{"Metadata-Flavor twice", attackLine + attackHost + "Metadata-Flavor: x\r\n" + attackEnd, []string{"403"}, false},
		{"space before the colon", attackLine + attackHost + "Metadata-Flavor : Google\r\nConnection: close\r\n\r\n",
			[]string{"400"}, false},
		{"Expect: 100-continue", attackLine + attackHost + "Expect: 100-continue\r\nContent-Length: 2\r\n" + attackEnd + "ab",
			[]string{"200"}, false},
		{"Expect: 100-continue without the body", attackLine + attackHost +
			"Expect: 100-continue\r\nContent-Length: 2\r\n" + attackEnd, []string{"200"}, false},
		{"CONNECT", "CONNECT 169.254.169.254:80 HTTP/1.1\r\n" + attackHost + attackEnd, []string{"405"}, false},
		{"CONNECT to another", "CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n" + attackEnd,
			[]string{"405"}, false},
		{"absolute form", "GET http://169.254.169.254" + accts + "default/email HTTP/1.1\r\n" + attackHost + attackEnd,
			[]string{"200"}, false},
		{"absolute form of another server", "GET http://evil.example" + accts + "default/email HTTP/1.1\r\n" + attackHost +
			attackEnd, []string{"403"}, false},
		{"absolute form, another Host", "GET http://169.254.169.254" + accts + "default/email HTTP/1.1\r\n" +
			"Host: evil.example\r\n" + attackEnd, []string{"200"}, false}, // RFC 9112, 3.2.2: Host is ignored then
		{"no Host", attackLine + attackEnd, []string{"400"}, false},
		{"Host twice", attackLine + attackHost + attackHost + attackEnd, []string{"400"}, false},
		{"two Hosts", attackLine + attackHost + "Host: evil.example\r\n" + attackEnd, []string{"400"}, false},
		{"Host with a path", attackLine + "Host: 169.254.169.254/x\r\n" + attackEnd, []string{"400"}, false},
		{"chunk extension of 100 KB", attackLine + attackHost + chunked + attackEnd + "1;x=" + strings.Repeat("y", 100<<10) +
			"\r\na\r\n0\r\n\r\n", []string{"200"}, true},
		{"chunk of 2^64", attackLine + attackHost + chunked + attackEnd + "fffffffffffffffff\r\n", []string{"200"}, false},
		{"trailer of a refused header", attackLine + attackHost + chunked +
			"Trailer: Metadata-Flavor\r\nConnection: close\r\n\r\n0\r\nMetadata-Flavor: Google\r\n\r\n", []string{"403"}, false},
		{"Upgrade: h2c", attackLine + attackHost + "Connection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\n" +
			"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\nMetadata-Flavor: Google\r\n\r\n", []string{"200"}, false},
		{"Upgrade: websocket", attackLine + attackHost + "Connection: Upgrade, close\r\nUpgrade: websocket\r\n" +
			"Metadata-Flavor: Google\r\n\r\n", []string{"200"}, false},
		{"HTTP/2's preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00", []string{"405"}, false},
		{"100 requests at once", strings.Repeat(attackLine+attackHost+"Metadata-Flavor: Google\r\n\r\n", 99) + smuggled,
			strings.Split(strings.Repeat("200 ", 100), " ")[:100], false},
		{"nothing", "", nil, false},
		{"half a request", attackLine + attackHost, []string{"400"}, false},
		{"empty lines", strings.Repeat("\r\n", 100), []string{"400"}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := b.dial(t, linked)
			defer c.Close()
			written := make(chan error, 1)
			go func() { // an answer may come before all is written
				_, err := io.WriteString(c, tt.send)
				if err == nil && (tt.want == nil || !strings.Contains(tt.send, "\r\n\r\n")) {
					err = c.(*net.TCPConn).CloseWrite()
				}
				written <- err
			}()
			got, err := io.ReadAll(c)
			if e := errors.Join(err, <-written); e != nil && !tt.mayBeReset {
				t.Errorf("the connection: %v", e)
			}
			b.mustHaveAnswered(t, string(got), tt.want, tt.mayBeReset && err != nil)
			b.mustServeOthers(t)
		})
	}
}

// mustHaveAnswered fails unless these are answers with our header and of the statuses; what was
// reset may have none.
func (b *testNode) mustHaveAnswered(t *testing.T, got string, want []string, reset bool) {
	t.Helper()
	at := statusLines.FindAllStringIndex(got, -1)
	var statuses []string
	for i, a := range at {
		end := len(got)
		if i+1 < len(at) {
			end = at[i+1][0]
		}
		head, body, _ := strings.Cut(got[a[0]:end], "\r\n\r\n")
		status := head[len("HTTP/1.1 "):len("HTTP/1.1 200")]
		statuses = append(statuses, status)
		if strings.Count(head, "Metadata-Flavor: Google\r\n") != 1 {
			t.Errorf("an answer without our header: %q", head)
		}
		if status != "200" && strings.Contains(body, gsa) {
			t.Errorf("a refusal tells who asks: %q", body)
		}
	}
	if strings.Join(statuses, " ") != strings.Join(want, " ") && !(reset && len(got) == 0) {
		t.Errorf("statuses %q, want %q; the first answer: %.400q", statuses, want, got)
	}
}

// mustServeOthers fails unless another pod gets its own, and nothing is left of connections.
func (b *testNode) mustServeOthers(t *testing.T) {
	t.Helper()
	if res := b.ask(t, unlinked, "GET", accts+"default/email", ""); res.StatusCode != 200 || res.body == gsa ||
		res.Header.Get("Metadata-Flavor") != "Google" {
		t.Errorf("another pod got %d %q", res.StatusCode, res.body)
	}
	b.eventually(t, "nothing is left", func() bool {
		all := make([]byte, 4<<20)
		stacks := string(all[:runtime.Stack(all, true)])
		return b.server.Connections().Open == 0 && !strings.Contains(stacks, "server.(*Server).ServeHTTP(") &&
			!strings.Contains(stacks, "server.clientConn.Read(")
	})
}

// A TLS client is refused, in words that it can show.
func TestTLSClient(t *testing.T) {
	b := newTestNode(t)
	b.ready(t)
	c := b.dial(t, linked)
	defer c.Close()
	client := tls.Client(c, &tls.Config{ServerName: "metadata.google.internal"})
	if err := client.HandshakeContext(t.Context()); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a handshake: %v", err)
	}
	_ = c.Close()
	b.mustServeOthers(t)
}

// A request that comes byte by byte is one.
func TestByteByByte(t *testing.T) {
	b := newTestNode(t)
	b.ready(t)
	c := b.dial(t, linked)
	defer c.Close()
	for _, one := range []byte(attackLine + attackHost + attackEnd) {
		if _, err := c.Write([]byte{one}); err != nil { // each is a packet: net sets TCP_NODELAY
			t.Fatal(err)
		}
	}
	got, err := io.ReadAll(c)
	if err != nil {
		t.Error(err)
	}
	b.mustHaveAnswered(t, string(got), []string{"200"}, false)
	b.mustServeOthers(t)
}

// Requests that a pod sent at once outlive it: none that is answered after its death is answered
// with its identity, nor with that of whoever has its address now.
func TestPipelineOverADeath(t *testing.T) {
	const requests = 400                                // more than come to be answered, however late the death is known
	b := newTestNode(t, "limits: {requestsPerPod: 20}") // so that they wait in the connection
	b.ready(t)
	c := b.dial(t, linked)
	defer c.Close()
	one := attackLine + attackHost + "Metadata-Flavor: Google\r\n\r\n"
	if _, err := io.WriteString(c, strings.Repeat(one, requests)); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var answers []response
	done := make(chan struct{})
	go func() {
		defer close(done)
		for r := bufio.NewReader(c); ; {
			res, err := http.ReadResponse(r, nil)
			if err != nil {
				return
			}
			body, err := io.ReadAll(res.Body)
			if err != nil {
				return
			}
			mu.Lock()
			answers = append(answers, response{res, string(body)})
			mu.Unlock()
		}
	}()
	answered := func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(answers)
	}
	b.eventually(t, "some are answered", func() bool { return answered() > 0 })
	b.kube.DeletePod("default", "reader")
	b.addPod("successor", linked, nil)
	select {
	case <-done:
	case <-time.After(testTimeout):
		t.Fatal("the connection is not closed")
	}
	last := len(answers) - 1
	for i, a := range answers {
		switch {
		case a.StatusCode == 200 && a.body == gsa && i < last:
		case a.StatusCode == 503 && i == last && a.Close && !strings.Contains(a.body, gsa):
		default:
			t.Errorf("answer %d of %d: %d %q", i+1, len(answers), a.StatusCode, a.body)
		}
	}
	if last < 0 || last >= requests-1 {
		t.Errorf("%d answers: the death came too late for this test to say anything", last+1)
	}
}
