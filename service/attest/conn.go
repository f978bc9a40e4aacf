package attest

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// Conn is the kernel's view of one accepted connection. Nothing in it comes from a request.
type Conn struct {
	Client   netip.AddrPort // the peer
	Server   netip.AddrPort // our end, after DNAT
	Original netip.AddrPort // what the client dialled; equal to Server where nothing was translated

	untracked bool // conntrack's default zone does not have the connection, so Original is a guess
	end       end
}

// Peer is the other end of one connection.
type Peer struct {
	Conn
	evidence *Evidence // what the kernel says; nil where it says nothing
	err      error     // why it says nothing
	search   int64     // for the client's namespace; 0: none was needed
	binding  atomic.Pointer[binding]
}

// binding is who a connection was attested to be, and by what: nil is its address.
type binding struct {
	caller   workload.Caller
	evidence *Evidence
}

func (b *binding) kind() string {
	if b.evidence == nil {
		return ByAddress
	}
	return b.evidence.Kind
}

// Evidence returns by what the connection was attested, and the container that asks; "" as long as
// it was not, or where that is not known.
func (p *Peer) Evidence() (kind, container string) {
	b := p.binding.Load()
	switch {
	case b == nil:
		return "", ""
	case b.evidence == nil:
		return ByAddress, ""
	}
	return b.evidence.Kind, b.evidence.Container
}

// HostPod reports whether the connection was attested to a pod on the host network: the kernel
// found the socket in the node's network namespace and in a cgroup of the pod's, and Kubernetes
// says that the pod is there. An address says neither.
func (p *Peer) HostPod() bool {
	b := p.binding.Load()
	return b != nil && b.evidence != nil && b.evidence.Kind == ByCgroup && b.evidence.OnHost && b.caller.PodUID != "" &&
		b.caller.HostNetwork
}

// MaybeHostPod reports whether [Attestor.Attest] could come to that.
func (p *Peer) MaybeHostPod() bool {
	if e := p.evidence; e != nil {
		return e.OnHost && e.PodUID != ""
	}
	return errors.Is(p.err, ErrUnknownCgroup) // of a pod that has just started
}

// Party is whom a connection counts for before anybody knows who that is: a pod, a unit of the
// node, or an address. It is comparable.
type Party struct {
	PodUID, Unit string
	Address      netip.Addr // where the kernel says neither; pods on the host network share theirs
}

func (p Party) String() string {
	switch {
	case p.PodUID != "":
		return "pod " + p.PodUID
	case p.Unit != "":
		return p.Unit
	}
	return p.Address.String()
}

// Party returns whom the connection counts for, as far as it is known now.
func (p *Peer) Party() Party {
	switch e := p.evidence; {
	case e != nil && e.PodUID != "":
		return Party{PodUID: e.PodUID}
	case e != nil && e.Cgroup != "":
		return Party{Unit: unitOf(e)}
	}
	return Party{Address: p.Client.Addr()}
}

// Accept writes down both ends of c. Whose the other one is, [Attestor.Look] asks.
func Accept(c net.Conn) *Peer { return &Peer{Conn: accepted(c)} }

// accepted reads both ends of c, and asks conntrack what the client dialled (SO_ORIGINAL_DST, 1 µs:
// Where conntrack knows nothing of the connection, it was not translated.
func accepted(c net.Conn) Conn {
	conn := Conn{Client: addrPort(c.RemoteAddr()), Server: addrPort(c.LocalAddr())}
	conn.Original = conn.Server
	socket, ok := c.(syscall.Conn)
	if !ok {
		return conn
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return conn
	}
	conn.end, conn.untracked = end{raw}, true
	// A control that fails leaves Original at Server: less is accepted as Host (H-16), nothing more.
	_ = raw.Control(func(fd uintptr) {
		if o, ok := originalDst(int(fd), conn.Server.Addr()); ok {
			conn.Original, conn.untracked = o, false
		}
	})
	return conn
}

// originalDst reads the kernel's sockaddr through two typed calls of x/sys whose buffers are large
// enough for it: 16 bytes of sockaddr_in in an ipv6_mreq, 28 bytes of sockaddr_in6 in an
// ip6_mtuinfo.
func originalDst(fd int, server netip.Addr) (netip.AddrPort, bool) {
	if server.Is4() {
		m, err := unix.GetsockoptIPv6Mreq(fd, unix.IPPROTO_IP, unix.SO_ORIGINAL_DST)
		if err != nil {
			return netip.AddrPort{}, false
		}
		b := m.Multiaddr
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), binary.BigEndian.Uint16(b[2:4])), true
	}
	// IP6T_SO_ORIGINAL_DST has the same number
	m, err := unix.GetsockoptIPv6MTUInfo(fd, unix.IPPROTO_IPV6, unix.SO_ORIGINAL_DST)
	if err != nil {
		return netip.AddrPort{}, false
	}
	port := make([]byte, 2)
	binary.NativeEndian.PutUint16(port, m.Addr.Port)
	return netip.AddrPortFrom(netip.AddrFrom16(m.Addr.Addr), binary.BigEndian.Uint16(port)), true
}

// addrPort returns a's address, 4-in-6 written as 4, and without a zone: the index knows
// none.
func addrPort(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}
