package server

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
)

// crowd has connections ask for admission, by the names of their clients; "known" is one that is
// known.
type crowd struct {
	admission
	of map[string][]*connection
}

func newCrowd(most, unknown int) *crowd {
	c := &crowd{admission: newAdmission(most, unknown), of: map[string][]*connection{}}
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

// Clients that nobody vouches for take a part of the room, in which no answer is cut off for a new
// one, and the party that has most makes room for others.
func TestAdmission(t *testing.T) {
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
	c.vouch(attested)
	c.vouch(attested)
	if c.unknown != c.mostUnknown-1 {
		t.Errorf("%d are unknown after one was attested", c.unknown)
	}
	for x := range c.all {
		c.leave(x)
		c.leave(x)
	}
	if c.unknown != 0 || len(c.parties) != 0 {
		t.Errorf("%d unknown, %d parties when all have left", c.unknown, len(c.parties))
	}
}

// A full room of known clients takes one more, of whoever has fewer.
func TestAdmissionOfKnownClients(t *testing.T) {
	c := newCrowd(100, 40)
	for i := range 100 {
		c.enters([]string{"known a", "known a", "known a", "known b"}[i%4])
	}
	if !c.enters("known c") || c.openOf("known b") != 25 || c.openOf("known a") >= 75 {
		t.Errorf("a has %d, b %d, c %d", c.openOf("known a"), c.openOf("known b"), c.openOf("known c"))
	}
}

// Where nothing is idle and answers are short, the one that takes longest is cut off.
func TestAdmissionOfShortAnswers(t *testing.T) {
	c := newCrowd(4, 4)
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

// Clients within their own limits that together wait in all connections there are, by long polls,
// keep nobody out: those that have most make room, and their answers that are waited for longest.
func TestAdmissionBesideLongPolls(t *testing.T) {
	c := newCrowd(100, 40)
	for i := range 100 {
		client := fmt.Sprint("known ", i%4)
		if i >= 90 {
			client = fmt.Sprint("known small ", i)
		}
		c.enters(client)
		n := c.of[client][len(c.of[client])-1]
		n.asked.Store(true)
		n.since.Store(int64(i))
	}
	for i := range 50 {
		late := fmt.Sprint("known late ", i)
		if !c.enters(late) {
			t.Fatalf("client %d finds no room beside long polls", i)
		}
		c.of[late][0].asked.Store(true)
	}
	for client := range c.of {
		if strings.Contains(client, "small") && c.openOf(client) != 1 {
			t.Errorf("%s made room for others", client)
		}
	}
	if _, open := c.all[c.of["known 0"][0]]; open || len(c.all) > 100 {
		t.Errorf("%d are open, the oldest long poll is: %t", len(c.all), open)
	}
}
