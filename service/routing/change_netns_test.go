package routing

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/nft"
)

// connectUntil connects and hangs up, until stop says so; with pauses, since what conntrack knows
// of each connection is looked through at a change.
func connectUntil(ns *netnstest.NS, stop *atomic.Bool, note func(error)) error {
	return ns.Do(func() error {
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		for ; !stop.Load(); <-tick.C {
			s, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			_ = unix.SetsockoptLinger(s, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
			note(unix.Connect(s, &unix.SockaddrInet4{Addr: metadataServer.Addr().As4(), Port: int(metadataServer.Port())}))
			_ = unix.Close(s)
		}
		return nil
	})
}

// TestChangeLosesNoConnect: while the mode changes every connect() of pods comes about, by the one
// way or by the other, and nothing is sent on to the LAN for an address that is not this node's any
// more: routers there say "network is unreachable", or somebody answers.
func TestChangeLosesNoConnect(t *testing.T) {
	t.Parallel()
	for _, from := range []string{"iptables-nft", ModeNFTables} {
		t.Run(from, func(t *testing.T) {
			b := modeNode(t, ModeLoopback)
			loopback, dnat := b.plan, b.plan
			dnat.Mode, dnat.Listen = ModeNFTables, netip.MustParseAddrPort("169.254.169.252:988")
			if from != ModeNFTables {
				dnat.Mode, dnat.Binary = ModeIPTables, from
			}
			b.run("iptables -A FORWARD -m conntrack --ctstate INVALID -j DROP") // conntrack is on, as on nodes
			lan := func(command string) string {
				out, err := b.Cloud.Command(t.Context(), "sh", "-c", command).CombinedOutput()
				if err != nil {
					t.Fatalf("%v: %s", err, out)
				}
				return string(out)
			}
			lan(
				`nft 'table ip lan { chain lan { type filter hook prerouting priority raw; ip daddr 169.254.169.252 tcp flags & ` +
					`(syn | ack) == syn counter; }; }'`,
			)
			b.install(dnat)
			var stop atomic.Bool
			var connects, reset atomic.Int64
			var pods sync.WaitGroup
			for range 3 {
				pods.Go(func() {
					if err := connectUntil(b.pod, &stop, func(err error) {
						connects.Add(1)
						switch {
						case errors.Is(err, unix.ECONNRESET): // it came about, and is one of those that a change resets
							reset.Add(1)
						case err != nil:
							t.Errorf("connect: %v", err)
						}
					}); err != nil {
						t.Error(err)
					}
				})
			}
			for range 6 {
				b.install(loopback)
				b.install(dnat)
			}
			stop.Store(true)
			pods.Wait()
			if sent := lan("nft list table ip lan"); !strings.Contains(sent, "counter packets 0 ") {
				t.Errorf("sent on to the LAN: %s", sent)
			}
			if connects.Load() < 100 {
				t.Errorf("no load: %d connections", connects.Load())
			}
			t.Logf("%d connections, %d of them reset", connects.Load(), reset.Load())
		})
	}
}

// TestInstallAgainTouchesNothing: where all stands, Install changes nothing in the kernel that it
// tells of, and no pod notices it.
func TestInstallAgainTouchesNothing(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{ModeNFTables, ModeLoopback, "linked"} {
		t.Run(mode, func(t *testing.T) {
			b := modeNode(t, mode)
			b.install(b.plan)
			var changes *nl.NetlinkSocket
			var before uint32
			if err := b.Do(func() (err error) {
				if changes, err = nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE,
					// of links and IPv6 the kernel tells later, by itself
					unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE); err != nil {
					return err
				}
				before, err = nft.Generation()
				return err
			}); err != nil {
				t.Fatal(err)
			}
			defer changes.Close()
			var stop atomic.Bool
			var pod sync.WaitGroup
			pod.Go(func() {
				if err := connectUntil(b.pod, &stop, func(err error) {
					if err != nil {
						t.Errorf("connect: %v", err)
					}
				}); err != nil {
					t.Error(err)
				}
			})
			for range 5 {
				b.install(b.plan)
			}
			stop.Store(true)
			pod.Wait()
			// What is reported of a change waits in the socket before the change is acknowledged.
			message := make([]byte, 4096)
			if n, _, err := unix.Recvfrom(changes.GetFd(), message, unix.MSG_DONTWAIT); !errors.Is(err, unix.EAGAIN) {
				t.Errorf("the kernel reported a change (%v): %x", err, message[:max(n, 0)])
			}
			if err := b.Do(func() error {
				after, err := nft.Generation()
				if after != before {
					t.Errorf("nf_tables was changed %d times", after-before)
				}
				return err
			}); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestChangeThatWasKilled is finished by the next Install, though what is desired was written down
// before: else redirection of the mode of before would go on, to an address that is gone.
func TestChangeThatWasKilled(t *testing.T) {
	t.Parallel()
	b := modeNode(t, ModeLoopback)
	loopback, dnat := b.plan, b.plan
	dnat.Mode, dnat.Listen, dnat.Binary = ModeIPTables, netip.MustParseAddrPort("169.254.169.252:988"), "iptables-nft"
	before := b.ruleset()
	b.install(loopback)
	whole := b.ruleset()
	b.install(dnat)
	s, err := ReadState(b.plan.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	_, now := b.router(loopback).(*router).state(Installed)
	now.Installs = s.Installs
	if err := writeState(b.plan.RunDir, now); err != nil { // as far as it came
		t.Fatal(err)
	}
	b.install(loopback)
	b.requireEqual("the next install", b.ruleset(), whole)
	b.remove(loopback)
	b.requireEqual("remove", b.ruleset(), before)
}

// TestInstallForgetsRedirections: where nothing is redirected and conntrack still knows of a
// redirection, the next connect() from that port goes to an address that is not this node's, and
// fails by what a router says. Install heals that, whoever left it.
func TestInstallForgetsRedirections(t *testing.T) {
	t.Parallel()
	b := modeNode(t, ModeLoopback)
	b.install(b.plan)
	connect := func() error {
		t.Helper()
		var result error
		if err := b.pod.Do(func() error {
			s, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer func() { _ = unix.Close(s) }()
			_ = unix.SetsockoptLinger(s, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
			if err := unix.Bind(s, &unix.SockaddrInet4{Port: 40000}); err != nil {
				return err
			}
			result = unix.Connect(s, &unix.SockaddrInet4{Addr: metadataServer.Addr().As4(), Port: int(metadataServer.Port())})
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return result
	}
	b.run("iptables -A FORWARD -m conntrack --ctstate INVALID -j DROP") // conntrack is on, as on nodes
	b.run(
		`nft 'table ip other { chain pre { type nat hook prerouting priority dstnat - 5; ip daddr 169.254.169.254 tcp ` +
			`dport 80 dnat to 169.254.169.252:988; }; }'`,
	)
	if err := connect(); !errors.Is(err, unix.ENETUNREACH) {
		t.Fatalf("redirected to nobody: %v", err)
	}
	b.run("nft flush chain ip other pre") // others have chains of type nat
	if err := connect(); !errors.Is(err, unix.ENETUNREACH) {
		t.Fatalf("conntrack remembers it: %v", err)
	}
	b.install(b.plan)
	if err := connect(); err != nil {
		t.Errorf("after another install: %v", err)
	}
}

// TestInstallForgetsWhatIsOver: a connection that DNAT brought goes on in mode ebpf. When it is
// over conntrack knows it for two minutes more, and would give the next one from its port another
// port, by which no client is found.
func TestInstallForgetsWhatIsOver(t *testing.T) {
	t.Parallel()
	b := ebpfNode(t)
	dnat := b.plan
	dnat.Mode = ModeNFTables
	redirections := func() (n int) {
		t.Helper()
		if err := b.Do(func() error {
			flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
			for _, f := range flows {
				if (served{redirectTarget: b.plan.target(nodeFacts{}, netobj.IPv4), redirected: true}).MatchConntrackFlow(f) {
					n++
				}
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return n
	}
	b.run("iptables -t nat -A POSTROUTING -s 192.0.2.0/24 -j MASQUERADE") // others have conntrack on
	b.install(dnat)
	var c net.Conn
	if err := b.pod.Do(func() (err error) {
		c, err = net.DialTimeout("tcp", metadataServer.String(), long)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	for range 2 { // a change of the mode, and the same again
		b.install(b.plan)
		if who, err := talk(c, long); who != emulator || err != nil {
			t.Fatalf("what was open goes on: %q, %v", who, err)
		}
		if n := redirections(); n != 1 {
			t.Errorf("%d redirections are known, want 1", n)
		}
	}
	_ = c.Close()
	b.install(b.plan)
	if n := redirections(); n != 0 {
		t.Errorf("%d redirections are known of what is over, want 0", n)
	}
}
