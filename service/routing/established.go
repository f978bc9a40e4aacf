package routing

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/nft"
)

// Connections to the real server from before the rules. FORWARD resets them on the ports
// that the guard leaves alone; what the guard names is refused while it is routed and never gets to
// FORWARD, and a TCP socket that is established takes that refusal for a passing disturbance and
// waits for minutes. So conntrack is made to forget them: it takes the next packet for the first of
// a connection and redirects it, and the emulator's kernel resets what it does not know.
//
// Closed in any case; not reset but left hanging are IPv6 connections where IPv6 is not redirected,
// those on which the server speaks first, and all where nf_conntrack_tcp_loose is 0.

// forgetEstablished deletes the conntrack entries of connections to the metadata server of one
// family that were not redirected, in the background: to walk through conntrack's table takes 10
// ms, however few there are. Those of this host itself are left alone unless pods on the host
// network are redirected too.
func forgetEstablished(p Plan, s nodeFacts, family netobj.Family, background *sync.WaitGroup) {
	if noConnections() {
		return
	}
	failed := func(err error) {
		p.Log.WithError(err).Warn("connections to the real metadata server from before are closed, " +
			"but their clients may wait for an answer")
	}
	addrs, err := netobj.Dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		failed(fmt.Errorf("list addresses: %w", err))
		return
	}
	f := notRedirected{redirectTarget: p.target(s, family)}
	if !s.hostPods {
		f.host = map[netip.Addr]bool{}
		for _, a := range addrs {
			if ip, ok := netip.AddrFromSlice(a.IP); ok {
				f.host[ip.Unmap()] = true
			}
		}
	}
	conntrack, err := netlink.NewHandle(unix.NETLINK_NETFILTER) // of this thread's network namespace
	if err != nil {
		failed(err)
		return
	}
	background.Go(func() {
		defer nft.CloseLater(conntrack.Close)
		if _, err := conntrack.ConntrackDeleteFilters(netlink.ConntrackTable, netlink.InetFamily(family), f); err != nil {
			failed(fmt.Errorf("forget connections to %s: %w", f.server, err))
		}
	})
}

// noConnections says that conntrack knows of none: to walk through its empty table takes 10 ms.
func noConnections() bool {
	n, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
	return err == nil && strings.TrimSpace(string(n)) == "0"
}

// forgetServed deletes the conntrack entries of connections to the emulator, whichever mode brought
// them. They last for two minutes after the end; where another mode has packets look otherwise
// conntrack would give a new connection from the same port another port, and at that one the kernel
// of the client knows no socket, or go on translating to an address that is gone, where
// routers say "network is unreachable". Where pods are redirected as before, by whatever, those of
// redirections are left until they are over. An Install that follows on its like looks for those
// again, unless there is DNAT: some were not over then.
func forgetServed(ctx context.Context, p Plan, s nodeFacts, was Plan) error {
	if noConnections() {
		return nil
	}
	conntrack, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
	if err != nil {
		return fmt.Errorf("forget connections: %w", err)
	}
	defer nft.CloseLater(conntrack.Close)
	for _, family := range netobj.Families {
		if family == netobj.IPv6 && !s.listen6.IsValid() {
			continue
		}
		f := served{p.target(s, family), p.redirects() && (was.dnats() || was.Mode == p.Mode), was.Mode == p.Mode}
		for tries := 5; ; tries-- {
			n, err := conntrack.ConntrackDeleteFilters(netlink.ConntrackTable, netlink.InetFamily(family), f)
			if err != nil {
				return fmt.Errorf("forget connections to %s: %w", f.listen, err)
			}
			if !f.over || f.redirected && (n == 0 || was.Mode == p.Mode) || tries == 0 {
				break
			}
			f.redirected = true
			if err := pause(ctx, 100*time.Millisecond); err != nil { // what was being answered is over in a moment
				return err
			}
		}
	}
	return nil
}

// served picks connections that were redirected to the emulator, and those that went there
// directly.
type served struct {
	redirectTarget
	over       bool // only those that are
	redirected bool // only those that were
}

func (f served) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	addr, ok := netip.AddrFromSlice(flow.Forward.DstIP)
	if !ok || flow.Forward.Protocol != unix.IPPROTO_TCP {
		return false
	}
	if tcp, known := flow.ProtoInfo.(*netlink.ProtoInfoTCP); f.over && known && tcp.State < nl.TCP_CONNTRACK_LAST_ACK {
		return false
	}
	to := netip.AddrPortFrom(addr.Unmap(), flow.Forward.DstPort)
	return to == f.server && !flow.Reverse.SrcIP.Equal(flow.Forward.DstIP) || !f.redirected && to == f.listen
}

// notRedirected picks connections to the real metadata server.
type notRedirected struct {
	redirectTarget
	host map[netip.Addr]bool
}

func (f notRedirected) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	to, ok := netip.AddrFromSlice(flow.Forward.DstIP)
	if !ok || flow.Forward.Protocol != unix.IPPROTO_TCP ||
		netip.AddrPortFrom(to.Unmap(), flow.Forward.DstPort) != f.server {
		return false
	}
	from, _ := netip.AddrFromSlice(flow.Forward.SrcIP)
	return flow.Reverse.SrcIP.Equal(flow.Forward.DstIP) && !f.host[from.Unmap()]
}
