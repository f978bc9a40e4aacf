package service

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
)

// crowd has connections enter a room, by the names of their clients; "known" is one that is known.
type crowd struct {
	room
	of map[string][]*connection
}

func newCrowd(most, unknown int) *crowd {
	c := &crowd{room: newRoom(most, unknown), of: map[string][]*connection{}}
	c.vouched = func(p *attest.Peer) bool { return p.Client.Addr().Is4() }
	return c
}

func (c *crowd) enters(client string) bool {
	n := new(connection)
	n.conn, _ = net.Pipe()
	n.peer = new(attest.Peer)
	if n.party.Unit = client; strings.HasPrefix(client, "known") {
		n.peer.Client = netip.MustParseAddrPort("192.0.2.1:1")
	}
	in := c.enter(n) && c.settle(n) > 0
	if in {
		c.of[client] = append(c.of[client], n)
	}
	return in
}

// open is how many of the client's are.
func (c *crowd) openOf(client string) (n int) {
	for _, x := range c.of[client] {
		if _, open := c.all[x]; open {
			n++
		}
	}
	return n
}

// Clients that nobody vouches for take a part of the room, whoever has most makes room for others, and nobody does who is being answered.
func TestRoom(t *testing.T) {
	c := newCrowd(100, 40)
	for range 60 {
		if !c.enters("known") {
			t.Fatal("a known client finds no room")
		}
	}
	for i := range 10 {
		c.enters(fmt.Sprint("small ", i))
	}
	for range 500 {
		if !c.enters("flood") {
			t.Fatal("an unknown client finds no room among idle ones")
		}
	}
	if n := c.openOf("known"); n != 60 || c.unknown > 40 || len(c.all) > 100 {
		t.Errorf("%d of 60 known ones are open, %d unknown ones, %d in all", n, c.unknown, len(c.all))
	}
	for i := range 10 {
		if c.openOf(fmt.Sprint("small ", i)) != 1 {
			t.Error("a client with one connection made room for one with many")
		}
	}
	for x := range c.all {
		x.asked.Store(true)
	}
	for c.unknown < c.mostUnknown {
		c.enters("flood")
		c.of["flood"][len(c.of["flood"])-1].asked.Store(true)
	}
	if c.enters("late") || c.refused.Load() == 0 {
		t.Error("an answer was cut off for a newcomer")
	}
	attested := c.of["flood"][len(c.of["flood"])-1]
	c.know(attested)
	c.know(attested)
	if c.unknown != c.mostUnknown-1 {
		t.Errorf("%d are unknown after one was attested", c.unknown)
	}
	for x := range c.all {
		c.leave(x)
		c.leave(x)
	}
	if c.unknown != 0 || len(c.parties) != 0 {
		t.Errorf("%d unknown, %d parties in an empty room", c.unknown, len(c.parties))
	}
}

// A full room of known clients takes one more, of whoever has fewer.
func TestRoomOfKnownClients(t *testing.T) {
	c := newCrowd(100, 40)
	for i := range 100 {
		c.enters([]string{"known a", "known a", "known a", "known b"}[i%4])
	}
	if !c.enters("known c") || c.openOf("known b") != 25 || c.openOf("known a") >= 75 {
		t.Errorf("a has %d, b %d, c %d", c.openOf("known a"), c.openOf("known b"), c.openOf("known c"))
	}
}

// Where nothing is idle and answers are short, the one that takes longest is cut off.
func TestRoomForShortAnswers(t *testing.T) {
	c := newCrowd(4, 4)
	c.cutAnswered = true
	for i := range 6 {
		if !c.enters(fmt.Sprint(i)) {
			t.Error("no room")
		}
		c.of[fmt.Sprint(i)][0].asked.Store(true)
	}
	if c.openOf("0")+c.openOf("1") != 0 || len(c.all) != 4 {
		t.Errorf("%d are open", len(c.all))
	}
}

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

// Any pod on the host network reaches healthListen: connections that it leaves idle hold nothing, and keep nobody out.
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
	prometheus := &http.Client{Transport: &http.Transport{DialContext: (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 9)}}).DialContext}}
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
	const flood = 5 * maxHealth
	all := opened(t, flood, func(int) net.Conn {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(c, "GET /nothing HTTP/1.1\r\nHost: health\r\n\r\n"); err != nil { // and is kept alive after it
			t.Fatal(err)
		}
		if res := readResponse(t, bufio.NewReader(c), "GET"); res.StatusCode != 404 || res.Header.Get("Metadata-Flavor") != "" {
			t.Fatalf("%d %v", res.StatusCode, res.Header)
		}
		return c
	})
	closed := make(chan bool, flood)
	for _, c := range all {
		go func() { _, err := c.Read(make([]byte, 1)); closed <- err != nil }()
	}
	for range flood - maxHealth {
		receive(t, closed)
	}
	scrape() // on the connection that it kept, too
}

// Whoever makes up addresses takes no room of pods, and none of others who are not known.
func TestMadeUpAddresses(t *testing.T) {
	b := newBed(t)
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
	opened(t, maxUnknown+500, func(i int) net.Conn { return b.dial(t, fmt.Sprintf("127.3.%d.1", i/100)) })
	b.eventually(t, "all were accepted", func() bool { return b.server.connections.cut.Load() >= 500 })
	if n := b.server.connections.open(); n > maxUnknown+1 {
		t.Errorf("%d connections are open", n)
	}
	ask(kept)
	if res := b.ask(t, "127.4.0.1", "GET", "/", ""); res.StatusCode != 200 {
		t.Errorf("another unknown client: %d %s", res.StatusCode, res.body)
	}
	if err := b.probe.ask(t.Context()); err != nil {
		t.Error(err)
	}
}
