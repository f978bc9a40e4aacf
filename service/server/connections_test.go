package server

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
)

// serveConnections serves with x, and returns what connects to it.
func serveConnections(t *testing.T, x *connections) func() net.Conn {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	web := &http.Server{ConnContext: x.accept, ConnState: x.state,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.WriteString(w, connectionOf(r.Context()).party.String())
		})}
	go func() { _ = web.Serve(clientListener{Listener: l}) }()
	t.Cleanup(func() { _ = web.Close() })
	return func() net.Conn {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
}

func get(c net.Conn) (int, error) {
	_ = c.SetDeadline(time.Now().Add(testTimeout))
	if _, err := fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		return 0, err
	}
	r, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return 0, err
	}
	defer func() { _ = r.Body.Close() }()
	_, err = io.Copy(io.Discard, r.Body)
	return r.StatusCode, err
}

// Who is on the other end of one connection takes as long as it takes, and others are answered
// meanwhile; but nothing is read before.
func TestLookHoldsUpNobodyElse(t *testing.T) {
	looking, found := make(chan netip.AddrPort, 1), make(chan struct{})
	release := sync.OnceFunc(func() { close(found) })
	t.Cleanup(release)
	var first atomic.Bool
	x := newConnections(func() int { return 9 }, func(netip.AddrPort) bool { return false }, func(p *attest.Peer) {
		if first.CompareAndSwap(false, true) { // others do not wait for it
			looking <- p.Client
			<-found
		}
	})
	connect := serveConnections(t, x)
	slow := connect()
	if client := <-looking; client.String() != slow.LocalAddr().String() {
		t.Fatalf("%s is looked at, and not %s", client, slow.LocalAddr())
	}
	answered := make(chan error, 1)
	go func() {
		_, err := get(slow)
		answered <- err
	}()
	for range 3 {
		if status, err := get(connect()); status != http.StatusOK || err != nil {
			t.Errorf("another connection meanwhile: %d, %v", status, err)
		}
	}
	select {
	case err := <-answered:
		t.Errorf("it was read before it was looked at: %v", err)
	default:
	}
	if x.open() < 1 || x.busy() < 1 {
		t.Errorf("%d open, %d busy: a stop would not wait for it", x.open(), x.busy())
	}
	release()
	if err := <-answered; err != nil {
		t.Error(err)
	}
}

// Connections are counted for whoever has them, and not any more when they are closed.
func TestConnectionsAreCounted(t *testing.T) {
	const limit = 2
	x := newConnections(func() int { return limit }, func(netip.AddrPort) bool { return false }, func(*attest.Peer) {})
	connect := serveConnections(t, x)
	var all []net.Conn
	for i := range 2 * limit {
		c := connect()
		if status, err := get(c); status != http.StatusOK || err != nil {
			t.Fatalf("connection %d: %d, %v", i, status, err)
		}
		all = append(all, c)
	}
	over := connect()
	_ = over.SetDeadline(time.Now().Add(testTimeout))
	if n, err := over.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("one more than twice the limit: %d bytes, %v; want it closed without a word", n, err)
	}
	for _, c := range all {
		_ = c.Close()
	}
	until(t, "nothing is counted any more", func() bool {
		open, busy := x.open(), x.busy()
		x.mu.Lock()
		defer x.mu.Unlock()
		return open == 0 && busy == 0 && len(x.parties) == 0
	})
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(testTimeout); !ok(); {
		if time.Now().After(end) {
			t.Fatalf("still not so after %s: %s", testTimeout, what)
		}
		<-time.After(time.Millisecond)
	}
}

// A new connection that finds no room among clients that nobody vouches for is closed and counted:
// the alert GKEMetadataEmulatorConnectionsRefused asks for that series.
func TestNoRoom(t *testing.T) {
	x := newConnections(func() int { return 9 }, func(netip.AddrPort) bool { return false }, func(*attest.Peer) {})
	x.most, x.mostUnknown = 9, 1
	registry := prometheus.NewRegistry()
	newMetrics(registry, &x.admission)
	connect := serveConnections(t, x)
	asks := connect()
	if status, err := get(asks); status != http.StatusOK || err != nil {
		t.Fatalf("%d, %v", status, err)
	}
	until(t, "its answer is over", func() bool { return x.idle.Load() == 1 })
	x.mu.Lock() // as if the next one took its time
	for c := range x.all {
		c.asked.Store(true)
	}
	x.mu.Unlock()
	if n := noRoom(t, registry); n != 0 {
		t.Errorf("%v are counted before", n)
	}
	late, err := net.Dial("tcp", asks.RemoteAddr().String())
	if err == nil { // else it was closed before that returned
		defer late.Close()
		_ = late.SetDeadline(time.Now().Add(testTimeout))
		_, err = late.Read(make([]byte, 1))
	}
	if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("it is not closed: %v", err)
	}
	if n := noRoom(t, registry); n != 1 {
		t.Errorf("%v are counted, want 1", n)
	}
}

// noRoom is the counter of new connections that found no room.
func noRoom(t *testing.T, g prometheus.Gatherer) float64 {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.Metric {
			if f.GetName() == "gke_metadata_emulator_connections_closed_total" && m.Label[0].GetValue() == "no-room" {
				return m.GetCounter().GetValue()
			}
		}
	}
	t.Fatal("no such series")
	return 0
}

// what a client has sent is known before the service reads it: a connection that holds a
// request is not taken for one without any.
func TestUnreadBytes(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	c, err := clientListener{Listener: l}.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	x := newConnections(func() int { return 9 }, nil, nil)
	x.all[&connection{held: held{conn: c}}] = true
	if x.unread() {
		t.Error("a connection on which nothing was sent has unread bytes")
	}
	if _, err := io.WriteString(client, "GET / HTTP/1.1\r\n"); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(testTimeout); !x.unread(); <-time.After(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the bytes that the client sent are not seen")
		}
	}
}
