package service

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
)

// sends sends a request from the pod, and nothing more after it.
func (b *testNode) sends(t *testing.T, path string) net.Conn {
	t.Helper()
	c := b.dial(t, linked)
	t.Cleanup(func() { c.Close() })
	if _, err := io.WriteString(c,
		"GET "+path+" HTTP/1.1\r\nHost: metadata\r\nMetadata-Flavor: Google\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	return c
}

// A client that ends its half of the connection waits for its answer, and gets it.
func TestHalfClosed(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "prefetch: none")
	b.ready(t)
	b.google.Break(googletest.Exchange, googletest.Fault{Latency: 300 * time.Millisecond})
	c := b.sends(t, accts+"default/token")
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(c)
	res := readResponse(t, r, "GET")
	if res.StatusCode != 200 || res.Header.Get("Metadata-Flavor") != "Google" ||
		!strings.Contains(res.body, "access_token") {
		t.Errorf("%d %v, %d bytes", res.StatusCode, res.Header, len(res.body))
	}
	if _, err := r.ReadByte(); err != io.EOF {
		t.Errorf("after the answer: %v", err)
	}
	b.eventually(t, "the connection is closed", func() bool { return b.server.Connections().Open == 0 })

	// What waits for a change says what there is: a client that left looks the same.
	etag := b.ask(t, linked, "GET", accts+"default/email", "").Header.Get("ETag")
	c = b.sends(t, accts+"default/email?wait_for_change=true&last_etag="+etag)
	b.eventually(t, "it waits", func() bool { return b.server.Connections().Answering == 1 })
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if res := readResponse(t, bufio.NewReader(c), "GET"); res.StatusCode != 200 || res.body != gsa {
		t.Errorf("%d %v %q", res.StatusCode, res.Header, res.body)
	}
}

// A request that comes in half is none.
func TestHalfClosedInTheMiddle(t *testing.T) {
	t.Parallel()
	b := newTestNode(t)
	for _, text := range []string{"", "GET / HTTP/1.1\r\nHost: metad",
		"PUT /latest/api/token HTTP/1.1\r\nHost: metadata\r\nContent-Length: 9\r\n\r\nabc"} {
		c := b.dial(t, linked)
		if _, err := io.WriteString(c, text); err != nil {
			t.Fatal(err)
		}
		_ = c.(*net.TCPConn).CloseWrite()
		all, err := io.ReadAll(c)
		if err != nil || strings.HasPrefix(string(all), "HTTP/1.1 2") {
			t.Errorf("%q: %q %v", text, all, err)
		}
		c.Close()
	}
	b.eventually(t, "all are closed", func() bool { return b.server.Connections().Open == 0 })
}

// A client that left has its request ended, and is written nothing.
func TestClientLeft(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "prefetch: none")
	b.ready(t)
	b.google.Break(googletest.Exchange, googletest.Fault{Latency: time.Minute})
	for _, half := range []bool{false, true} {
		c := b.sends(t, accts+"default/token")
		b.eventually(t, "it waits", func() bool { return b.server.Connections().Answering == 1 })
		if half {
			_ = c.(*net.TCPConn).CloseWrite()
			b.eventually(t, "the end of its half has come", func() bool { return closeWait(t, c.LocalAddr()) })
		}
		_ = c.(*net.TCPConn).SetLinger(0)
		_ = c.Close()
		b.eventually(t, "its request is ended", func() bool { return b.server.Connections().Open == 0 })
	}
	if n := b.requests(t, "499"); n != 2 {
		t.Errorf("%v requests count as left", n)
	}
	if n := b.requests(t, "200"); n != 0 {
		t.Errorf("%v requests count as answered", n)
	}
}

// closeWait reports whether the service's end of the connection is in state CLOSE_WAIT
// (proc_net(5)).
func closeWait(t *testing.T, client net.Addr) bool {
	t.Helper()
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	remote := fmt.Sprintf(":%04X", client.(*net.TCPAddr).Port)
	for line := range strings.Lines(string(table)) {
		f := strings.Fields(line)
		if len(f) > 3 && strings.HasSuffix(f[2], remote) && f[3] == "08" {
			return true
		}
	}
	return false
}

// requests is what the metrics say of tokens.
func (b *testNode) requests(t *testing.T, code string) float64 {
	t.Helper()
	return b.counted(t, "requests_total", code, "/token")
}

// counted is the sum of those counters of a metric that have labels whose values end so.
func (b *testNode) counted(t *testing.T, metric string, values ...string) (n float64) {
	t.Helper()
	families, err := b.gather().Gather()
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, f := range families {
		found = found || f.GetName() == "gke_metadata_emulator_"+metric
		for _, m := range f.Metric {
			if f.GetName() == "gke_metadata_emulator_"+metric && !slices.ContainsFunc(values, func(v string) bool {
				return !slices.ContainsFunc(m.Label, func(l *dto.LabelPair) bool { return strings.HasSuffix(l.GetValue(), v) })
			}) {
				n += m.GetCounter().GetValue()
			}
		}
	}
	if !found {
		t.Fatalf("no metric gke_metadata_emulator_%s", metric)
	}
	return n
}

// neverReads asks until nothing more fits, and reads nothing.
func (b *testNode) neverReads(t *testing.T) net.Conn {
	t.Helper()
	c := b.dial(t, linked)
	t.Cleanup(func() { c.Close() })
	_ = c.(*net.TCPConn).SetReadBuffer(4 << 10)
	for {
		_ = c.SetWriteDeadline(time.Now().Add(time.Second))
		if _, err := io.WriteString(c, strings.Repeat(benchRequest, 20)); err != nil {
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal(err)
			}
			return c
		}
	}
}

// A client that reads nothing is not waited for, neither while we serve nor at the end; one that is
// slow with its header neither.
func TestClientsThatDoNotRead(t *testing.T) {
	t.Parallel()
	b := newTestNode(t)
	b.ready(t)
	b.neverReads(t)
	b.eventually(t, "its connection is closed", func() bool { return b.server.Connections().Open == 0 })

	for range 4 {
		b.neverReads(t)
		slow := b.dial(t, linked)
		t.Cleanup(func() { slow.Close() })
		if _, err := io.WriteString(slow, "GET / HTTP/1.1\r\nHost:"); err != nil {
			t.Fatal(err)
		}
	}
	b.google.Break(googletest.GenerateAccessToken, googletest.Fault{Latency: time.Second})
	answered := make(chan response, 1)
	calls := b.google.Calls(googletest.GenerateAccessToken)
	go func() {
		answered <- b.ask(t, linked, "GET", accts+"default/token?scopes=https://www.googleapis.com/auth/other", "")
	}()
	b.eventually(t, "a token is being minted",
		func() bool { return b.google.Calls(googletest.GenerateAccessToken) > calls })
	b.end(t)
	if res := receive(t, answered); res.StatusCode != http.StatusOK {
		t.Errorf("who waited for a token: %d %s", res.StatusCode, res.body)
	}
	if strings.Contains(b.log.String(), "in the middle of an answer") {
		t.Error("whoever did not read was waited for until the end")
	}
}
