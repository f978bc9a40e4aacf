package attest

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Out of linux/inet_diag.h. The request is struct inet_diag_req_v2, the answer struct inet_diag_msg
// with attributes behind it.
const (
	diagRequestLen = 56
	diagAnswerLen  = 72
	diagAnyCookie  = ^uint32(0)
	diagInfo       = 2  // INET_DIAG_INFO, struct tcp_info; needs no privilege
	diagCgroupID   = 21 // INET_DIAG_CGROUP_ID, u64; comes unasked
)

// socketFound is what the kernel says of the one socket that was asked for.
type socketFound struct {
	state  uint8  // TCP_ESTABLISHED, …
	cgroup uint64 // of whoever made the socket; 0: the kernel named none

	counted      bool   // the kernel says the rest
	received     uint64 // bytes, from the other end
	acknowledged uint32 // by the other end, so many ms ago
	// bytes, to the other end, each once; and what that acknowledged, the SYN and the FIN of this end
	// included
	sent, acked uint64
	unacked     uint32 // packets
}

// opened reports whether the kernel's numbers show that the socket opened its connection.
// One that a listener accepted was opened by somebody else, who may have forged its address. Of a
// socket that opened, the SYN was acknowledged, which counts as a byte; and its FIN in state
// FIN_WAIT2, which both kinds may reach. The numbers tell the two apart where all that was sent is
// acknowledged.
func (f socketFound) opened() bool {
	ends := uint64(0)
	if f.state == 5 {
		ends = 1
	}
	return !f.counted || f.unacked == 0 && f.acked > f.sent+ends
}

// undecided reports whether that may change: what the socket sent is under way. Of an accepted one
// that sent nothing, nothing is acknowledged.
func (f socketFound) undecided() bool { return !f.opened() && f.acked > 0 }

// live reports whether the socket can be the client's of a connection that we hold open. One that
// only tries to connect does not make it, though it has the same addresses: somebody else on its
// network answers our packets then. One that was closed at its other end (CLOSE_WAIT, LAST_ACK,
// CLOSING) is of an earlier connection: our end closes when nobody asks any more.
func (f socketFound) live() bool {
	switch f.state {
	case 1, 4, 5: // ESTABLISHED, FIN_WAIT1, FIN_WAIT2: a client may close its direction
		return true
	}
	return false
}

// socket asks for the TCP socket that has exactly these two ends, in 3 to 4 µs. device is
// the interface that has the local address, 0 where it is not known: without it a socket that is
// bound to its interface is not found.
func (s *netlinkSocket) socket(local, remote netip.AddrPort, device uint32) (socketFound, bool, error) {
	b := s.request(unix.SOCK_DIAG_BY_FAMILY, 0, diagRequestLen)
	r := b[headerLen:]
	if r[0] = unix.AF_INET6; local.Addr().Is4() {
		r[0] = unix.AF_INET // finds sockets of AF_INET6 too that speak IPv4
	}
	r[1], r[2] = unix.IPPROTO_TCP, 1<<(diagInfo-1)
	binary.NativeEndian.PutUint32(r[4:], ^uint32(0)) // in any state
	binary.BigEndian.PutUint16(r[8:], local.Port())
	binary.BigEndian.PutUint16(r[10:], remote.Port())
	putAddr(r[12:28], local.Addr())
	putAddr(r[28:44], remote.Addr())
	binary.NativeEndian.PutUint32(r[44:], device)
	binary.NativeEndian.PutUint32(r[48:], diagAnyCookie)
	binary.NativeEndian.PutUint32(r[52:], diagAnyCookie)
	if err := s.send(b); err != nil {
		return socketFound{}, false, fmt.Errorf("ask sock_diag: %w", err)
	}
	for range foreignMessages {
		answer, err := s.receive()
		if err == errLost {
			continue // what comes next may be the answer
		}
		if err != nil {
			return socketFound{}, false, fmt.Errorf("ask sock_diag: %w", err)
		}
		if answer == nil {
			break
		}
		if f, ok, known, err := parseSocket(answer, s.sequence, local, remote); known {
			return f, ok, err
		}
	}
	return socketFound{}, false, fmt.Errorf("ask sock_diag: %w", errLost)
}

func putAddr(b []byte, a netip.Addr) {
	if a.Is4() {
		a4 := a.As4()
		copy(b, a4[:])
		return
	}
	a16 := a.As16()
	copy(b, a16[:])
}

// parseSocket reads a datagram. known says that it is the answer to the question; ok, that it tells
// of exactly the socket that was asked for: where there is none, the kernel answers with a listener
// on the same port.
func parseSocket(b []byte, sequence uint32, local, remote netip.AddrPort) (f socketFound, ok, known bool, err error) {
	m, _, some := nextMessage(b)
	switch {
	case !some || m.sequence != sequence:
		return socketFound{}, false, false, nil
	case m.kind == unix.NLMSG_ERROR && m.errno() == unix.ENOENT:
		return socketFound{}, false, true, nil
	case m.kind == unix.NLMSG_ERROR:
		return socketFound{}, false, true, fmt.Errorf("sock_diag: %w", m.errno())
	case m.kind != unix.SOCK_DIAG_BY_FAMILY || len(m.data) < diagAnswerLen:
		return socketFound{}, false, true, fmt.Errorf(
			"sock_diag answered with a message of kind %d and %d bytes",
			m.kind,
			len(m.data),
		)
	}
	ends := m.data[4:]
	sourcePort, destinationPort := binary.BigEndian.Uint16(ends), binary.BigEndian.Uint16(ends[2:])
	source, destination := diagAddr(m.data[0], ends[4:20]), diagAddr(m.data[0], ends[20:36])
	if netip.AddrPortFrom(source, sourcePort) != local || netip.AddrPortFrom(destination, destinationPort) != remote {
		return socketFound{}, false, true, nil
	}
	f.state = m.data[1]
	if info := attribute(m.data[diagAnswerLen:], diagInfo); len(info) >= int(infoCounted) {
		f.counted = true
		f.received = binary.NativeEndian.Uint64(info[infoReceived:])
		f.acknowledged = binary.NativeEndian.Uint32(info[infoAcknowledged:])
		f.sent = binary.NativeEndian.Uint64(info[infoSent:]) - binary.NativeEndian.Uint64(info[infoRetransmitted:])
		f.acked = binary.NativeEndian.Uint64(info[infoAcked:])
		f.unacked = binary.NativeEndian.Uint32(info[infoUnacked:])
	}
	if id := attribute(m.data[diagAnswerLen:], diagCgroupID); len(id) == 8 {
		f.cgroup = binary.NativeEndian.Uint64(id)
	}
	return f, true, true, nil
}

// diagAddr reads an address; a socket of AF_INET6 that speaks IPv4 has ::ffff:a.b.c.d.
func diagAddr(family uint8, b []byte) netip.Addr {
	if family == unix.AF_INET {
		return netip.AddrFrom4([4]byte(b))
	}
	return netip.AddrFrom16([16]byte(b)).Unmap()
}
