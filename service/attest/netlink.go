package attest

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// netlinkSocket speaks with the kernel about the network namespace that it was made in, whoever
// uses it, and wherever. The kernel answers within the call that asks, so nothing here
// waits. Not for concurrent use.
type netlinkSocket struct {
	fd       int
	sequence uint32
	buffer   []byte
}

// openNetlink makes a socket in the network namespace of the calling thread.
func openNetlink(protocol int) (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return -1, fmt.Errorf("netlink socket: %w", err)
	}
	return fd, nil
}

// newNetlink takes the descriptor over. It ties the socket to the kernel: whoever has CAP_NET_ADMIN
// in the namespace, as a pod may, could otherwise send it answers of his own. receive looks at the
// sender besides.
func newNetlink(fd int, buffer []byte) (*netlinkSocket, error) {
	if err := unix.Connect(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, fmt.Errorf("connect a netlink socket to the kernel: %w", err)
	}
	return &netlinkSocket{fd: fd, buffer: buffer}, nil
}

const (
	headerLen = unix.SizeofNlMsghdr
	// foreignMessages bounds what a socket may hold that is no answer, so that nobody keeps us
	// reading.
	foreignMessages = 64
)

// request starts a message of the kind with room for n bytes after its header, and returns it.
func (s *netlinkSocket) request(kind, flags uint16, n int) []byte {
	s.sequence++
	b := s.buffer[:headerLen+n]
	clear(b)
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	binary.NativeEndian.PutUint16(b[4:], kind)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST|flags)
	binary.NativeEndian.PutUint32(b[8:], s.sequence)
	return b
}

// send sends what request returned.
func (s *netlinkSocket) send(b []byte) error {
	for {
		_, err := unix.Write(s.fd, b)
		if err != unix.EINTR {
			return err
		}
	}
}

// errLost says that the kernel had no room for a message.
var errLost = errors.New("netlink: a message was lost")

// receive returns the next datagram that the kernel sent, and nil when there is none. It is good
// until the next call.
func (s *netlinkSocket) receive() ([]byte, error) {
	for range foreignMessages {
		n, from, err := unix.Recvfrom(s.fd, s.buffer[:cap(s.buffer)], unix.MSG_DONTWAIT|unix.MSG_TRUNC)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN:
			return nil, nil
		case err == unix.ENOBUFS:
			return nil, errLost
		case err != nil:
			return nil, fmt.Errorf("netlink: %w", err)
		}
		if sender, ok := from.(*unix.SockaddrNetlink); !ok || sender.Pid != 0 {
			continue // not the kernel
		}
		if n > cap(s.buffer) {
			return nil, errLost
		}
		return s.buffer[:n], nil
	}
	return nil, errLost
}

// message is one of a datagram's.
type message struct {
	kind, flags uint16
	sequence    uint32
	data        []byte
}

// nextMessage cuts the first message off a datagram. ok is false at its end, and where it makes no
// sense.
func nextMessage(b []byte) (m message, rest []byte, ok bool) {
	if len(b) < headerLen {
		return message{}, nil, false
	}
	n := uint64(binary.NativeEndian.Uint32(b))
	if n < headerLen || n > uint64(len(b)) {
		return message{}, nil, false
	}
	m = message{
		kind: binary.NativeEndian.Uint16(b[4:]), flags: binary.NativeEndian.Uint16(b[6:]),
		sequence: binary.NativeEndian.Uint32(b[8:]),
		data:     b[headerLen:n],
	}
	return m, b[min(align(n), uint64(len(b))):], true
}

// errno is what an NLMSG_ERROR says; 0 is an acknowledgement.
func (m message) errno() unix.Errno {
	if len(m.data) < 4 {
		return unix.EBADMSG
	}
	return unix.Errno(-int32(binary.NativeEndian.Uint32(m.data)))
}

// attribute returns the value of the first attribute of that kind, nil where there is none.
func attribute(b []byte, kind uint16) []byte {
	for len(b) >= unix.SizeofRtAttr {
		n := uint64(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofRtAttr || n > uint64(len(b)) {
			return nil
		}
		if binary.NativeEndian.Uint16(b[2:]) == kind {
			return b[unix.SizeofRtAttr:n]
		}
		b = b[min(align(n), uint64(len(b))):]
	}
	return nil
}

func align(n uint64) uint64 { return (n + 3) &^ 3 }
