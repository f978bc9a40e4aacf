package service

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// opened are connections that say nothing.
func opened(t *testing.T, n int, dial func(i int) net.Conn) (all []net.Conn) {
	t.Helper()
	for i := range n {
		c := dial(i)
		t.Cleanup(func() { c.Close() })
		all = append(all, c)
	}
	return all
}

// Any pod on the host network reaches healthListen: connections that it leaves idle hold nothing,
// and keep nobody out.
func TestHealthListenIsBounded(t *testing.T) {
	b := newWorld(t)
	b.configure(t)
	lc := net.ListenConfig{}
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	b.replace(t, "config.yaml", "healthListen: 127.0.0.1:0", "healthListen: "+addr)
	b.start(t)
	from := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 9)}}
	prometheus := &http.Client{Transport: &http.Transport{DialContext: from.DialContext}}
	scrape := func() {
		t.Helper()
		for _, path := range []string{"/metrics", "/healthz"} {
			res, err := prometheus.Get("http://" + addr + path)
			if err != nil {
				t.Fatal(err)
			}
			_, err = io.Copy(io.Discard, res.Body)
			res.Body.Close()
			if err != nil || res.StatusCode != 200 {
				t.Errorf("%s: %d %v", path, res.StatusCode, err)
			}
		}
	}
	b.eventually(t, "it is served", func() bool { c, err := net.Dial("tcp", addr); return err == nil && c.Close() == nil })
	scrape()
	const most, flood = 64, 5 * 64 // of healthListen
	all := opened(t, flood, func(int) net.Conn {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		// and is kept alive after it
		if _, err := io.WriteString(c, "GET /nothing HTTP/1.1\r\nHost: health\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if res := readResponse(t, bufio.NewReader(c), "GET"); res.StatusCode != 404 ||
			res.Header.Get("Metadata-Flavor") != "" {
			t.Fatalf("%d %v", res.StatusCode, res.Header)
		}
		return c
	})
	closed := make(chan bool, flood)
	for _, c := range all {
		go func() { _, err := c.Read(make([]byte, 1)); closed <- err != nil }()
	}
	for range flood - most {
		receive(t, closed)
	}
	scrape() // on the connection that it kept, too
}

// Whoever makes up addresses takes no room of pods, and none of others who are not known.
func TestMadeUpAddresses(t *testing.T) {
	b := newTestNode(t)
	b.ready(t)
	kept := b.dial(t, linked)
	defer kept.Close()
	ask := func(c net.Conn) {
		t.Helper()
		if _, err := io.WriteString(c, benchRequest); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 8<<10)
		if n, err := c.Read(buf); err != nil || !strings.HasPrefix(string(buf[:n]), "HTTP/1.1 200 ") {
			t.Fatalf("%q %v", buf[:n], err)
		}
	}
	ask(kept)
	const maxUnknown = 2000 // of clients that are an address and nothing else
	opened(t, maxUnknown+500, func(i int) net.Conn { return b.dial(t, fmt.Sprintf("127.3.%d.1", i/100)) })
	b.eventually(t, "all were accepted",
		func() bool { return b.counted(t, "connections_closed_total", "made-room") >= 500 })
	if n := b.server.Connections().Open; n > maxUnknown+1 {
		t.Errorf("%d connections are open", n)
	}
	ask(kept)
	if res := b.ask(t, "127.4.0.1", "GET", "/", ""); res.StatusCode != 200 {
		t.Errorf("another unknown client: %d %s", res.StatusCode, res.body)
	}
	if err := b.server.Alive(t.Context()); err != nil {
		t.Error(err)
	}
}

// scrapes counts the scrapes that collect it at once.
type scrapes struct {
	prometheus.Gauge
	now, most atomic.Int64
}

func (s *scrapes) Collect(c chan<- prometheus.Metric) {
	if n := s.now.Add(1); n > s.most.Load() {
		s.most.Store(n)
	}
	for range 1000 {
		runtime.Gosched() // others may collect meanwhile
	}
	s.Gauge.Collect(c)
	s.now.Add(-1)
}

// However many scrape, one scrape is collected at a time.
func TestScrapesTakeTurns(t *testing.T) {
	b := newTestNode(t)
	s := &scrapes{Gauge: prometheus.NewGauge(prometheus.GaugeOpts{Name: "scrapes_test"})}
	b.registry.MustRegister(s)
	g := b.gather()
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			if _, err := g.Gather(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := s.most.Load(); n != 1 {
		t.Errorf("%d scrapes are collected at once", n)
	}
}

// A reload brings what healthAllow says. The node's own loopback may always ask: doctor and probes
// do.
func TestHealthAllow(t *testing.T) {
	b := newTestNode(t)
	is := func(address string, want bool) {
		t.Helper()
		if got := b.mayAskHealth(netip.MustParseAddr(address)); got != want {
			t.Errorf("%s may ask: %t", address, got)
		}
	}
	is("203.0.113.9", true)
	b.configure(t, "healthAllow: [10.0.0.0/8, 'fd00::/8', 192.0.2.7]")
	b.reload <- os.Interrupt
	b.eventually(t, "it is in force", func() bool { return !b.mayAskHealth(netip.MustParseAddr("203.0.113.9")) })
	for address, want := range map[string]bool{"10.1.2.3": true, "fd12::1": true, "192.0.2.7": true, "127.0.0.1": true,
		"::1":       true,
		"192.0.2.8": false, "fe80::1": false, "169.254.169.254": false} {
		is(address, want)
	}
}
