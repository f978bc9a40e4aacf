package netnstest

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestNodeReachesEveryNamespace(t *testing.T) {
	n := Start(t, "reach")
	bridged, err := n.AddPod("bridged")
	if err != nil {
		t.Fatal(err)
	}
	routed, err := n.AddRoutedPod("routed")
	if err != nil {
		t.Fatal(err)
	}
	neighbour, err := n.AddNeighbour("neighbour")
	if err != nil {
		t.Fatal(err)
	}
	for _, from := range []*NS{n.NS, bridged, routed, neighbour} {
		for _, to := range []struct {
			ns *NS
			at netip.Addr
		}{{n.Cloud, Metadata}, {n.Cloud, MetadataIPv6}, {n.NS, n.Addr}, {n.NS, n.Addr6}, {bridged, bridged.Addr},
			{routed, routed.Addr}, {routed, routed.Addr6}} {
			t.Run(fmt.Sprintf("%s to %s", from.Name, to.at), func(t *testing.T) {
				saw := greet(t, from, to.ns, netip.AddrPortFrom(to.at, 80))
				if want := from.Addr; to.at.Is4() && from != n.NS && saw != want {
					t.Errorf("%s saw the client as %s, want %s", to.ns.Name, saw, want)
				}
			})
		}
	}
}

// greet connects and returns the client's address as the server sees it.
func greet(t *testing.T, from, to *NS, at netip.AddrPort) netip.Addr {
	t.Helper()
	l, err := to.Listen("tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	saw := make(chan netip.Addr, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			close(saw)
			return
		}
		defer c.Close()
		saw <- netip.MustParseAddrPort(c.RemoteAddr().String()).Addr()
		_, _ = io.WriteString(c, "hello")
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	c, err := from.Dial(ctx, "tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if b, err := io.ReadAll(c); err != nil || string(b) != "hello" {
		t.Fatalf("read %q, %v", b, err)
	}
	return <-saw
}

func TestDoComesHomeAfterPanic(t *testing.T) {
	n := Start(t, "panic")
	self := func() string {
		l, err := os.Readlink("/proc/thread-self/ns/net")
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	home := self()
	func() {
		defer func() { _ = recover() }()
		_ = n.Do(func() error {
			if self() == home {
				t.Error("Do did not enter")
			}
			panic("on purpose")
		})
	}()
	if self() != home {
		t.Error("the thread stayed in the node's namespace")
	}
}

func TestCommandRunsInside(t *testing.T) {
	n := Start(t, "command")
	out, err := n.Command(t.Context(), "ip", "-4", "-o", "address", "show", "dev", "eth0").CombinedOutput()
	if err != nil || !strings.Contains(string(out), n.Addr.String()) {
		t.Errorf("%s, %v", out, err)
	}
}

func TestCloseRemovesEverything(t *testing.T) {
	n, err := New("close")
	if err != nil {
		Lacks(t, err)
	}
	if _, err := n.AddPod("pod"); err != nil {
		t.Fatal(err)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if err := n.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(Dir, n.Name+"*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestRulesetSeesTraces(t *testing.T) {
	n := Start(t, "ruleset")
	before, err := n.Ruleset()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, do, undo string }{
		{"iptables-nft rule", "iptables-nft -t nat -A PREROUTING -j RETURN", "iptables-nft -t nat -D PREROUTING -j RETURN"},
		{"iptables-nft chain", "iptables-nft -t nat -N X", "iptables-nft -t nat -X X"},
		{"iptables-legacy rule", "iptables-legacy -t nat -A OUTPUT -j RETURN", "iptables-legacy -t nat -D OUTPUT -j RETURN"},
		{"ip6tables-nft policy", "ip6tables-nft -P FORWARD DROP", "ip6tables-nft -P FORWARD ACCEPT"},
		{"nft table", "nft 'add table inet x; add chain inet x c'", "nft delete table inet x"},
		{"rule", "ip rule add pref 97 to 169.254.169.254 table main", "ip rule del pref 97"},
		{"route", "ip route add 192.0.2.1/32 dev lo", "ip route del 192.0.2.1/32 dev lo"},
		{"address", "ip address add 192.0.2.1/32 dev lo", "ip address del 192.0.2.1/32 dev lo"},
		{"IPv6 address", "ip address add fd00::7/128 dev lo", "ip address del fd00::7/128 dev lo"},
	} {
		t.Run(c.name, func(t *testing.T) {
			Needs(t, strings.Fields(c.do)[0])
			run := func(line string) string {
				if out, err := n.Command(t.Context(), "sh", "-c", line).CombinedOutput(); err != nil {
					t.Fatalf("%s: %v: %s", line, err, out)
				}
				now, err := n.Ruleset()
				if err != nil {
					t.Fatal(err)
				}
				return now
			}
			if run(c.do) == before {
				t.Error("not seen in the ruleset")
			}
			if after := run(c.undo); after != before {
				t.Errorf("not as before:\n%s\nbefore:\n%s", after, before)
			}
		})
	}
}

// A machine that is given orders over a network keeps it, and its way to everywhere but the
// metadata server.
func TestNewHereBeside(t *testing.T) {
	pod, err := Start(t, "beside").AddPod("machine")
	if err != nil {
		t.Fatal(err)
	}
	var here *Node
	if err := pod.Do(func() error {
		here, err = NewHere("here", "eth0")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := here.Close(); err != nil {
			t.Error(err)
		}
	})
	for to, link := range map[string]string{"192.0.2.1": "eth0", Metadata.String(): "uplink0",
		cloudAddr.String(): "uplink0"} {
		out, err := pod.Command(t.Context(), "ip", "route", "get", to).CombinedOutput()
		if err != nil || !strings.Contains(string(out), " dev "+link+" ") {
			t.Errorf("to %s, and not by %s: %v %s", to, link, err, out)
		}
	}
}

// A machine that is connected to anything is nobody's to make a node of.
func TestNewHereRefuses(t *testing.T) {
	node := Start(t, "here")
	if err := node.Do(func() error {
		_, err := NewHere("here", "")
		if err == nil || !strings.Contains(err.Error(), "only one that has nothing but lo") {
			t.Errorf("got %v", err)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}
