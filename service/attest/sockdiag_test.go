package attest

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// forgedAnswer is what the kernel answers when it has the socket.
func forgedAnswer(sequence uint32, state uint8, cgroup uint64, local, remote netip.AddrPort) []byte {
	b := make([]byte, headerLen+diagAnswerLen+12)
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	binary.NativeEndian.PutUint16(b[4:], unix.SOCK_DIAG_BY_FAMILY)
	binary.NativeEndian.PutUint32(b[8:], sequence)
	m := b[headerLen:]
	m[0], m[1] = unix.AF_INET, state
	if local.Addr().Is6() {
		m[0] = unix.AF_INET6
	}
	binary.BigEndian.PutUint16(m[4:], local.Port())
	binary.BigEndian.PutUint16(m[6:], remote.Port())
	putAddr(m[8:24], local.Addr())
	putAddr(m[24:40], remote.Addr())
	a := m[diagAnswerLen:]
	binary.NativeEndian.PutUint16(a, 12)
	binary.NativeEndian.PutUint16(a[2:], diagCgroupID)
	binary.NativeEndian.PutUint64(a[4:], cgroup)
	return b
}

var (
	clientEnd = netip.MustParseAddrPort("10.244.0.2:40000")
	serverEnd = netip.MustParseAddrPort("169.254.169.254:80")
)

func TestParseSocket(t *testing.T) {
	good := forgedAnswer(7, 1, 42, clientEnd, serverEnd)
	change := func(at int, v byte) []byte {
		b := append([]byte(nil), good...)
		b[at] = v
		return b
	}
	addr6 := netip.MustParseAddrPort("[fd00::2]:40000")
	mapped := forgedAnswer(7, 1, 42, netip.AddrPortFrom(netip.AddrFrom16(clientEnd.Addr().As16()), clientEnd.Port()),
		netip.AddrPortFrom(netip.AddrFrom16(serverEnd.Addr().As16()), serverEnd.Port()))
	for name, tt := range map[string]struct {
		answer    []byte
		local     netip.AddrPort
		ok, known bool
		fails     bool
		want      socketFound
	}{
		"the socket": {answer: good, local: clientEnd, ok: true, known: true,
			want: socketFound{state: 1, cgroup: 42}},
		"A-09: of AF_INET6, speaking IPv4": {answer: mapped, local: clientEnd, ok: true, known: true,
			want: socketFound{state: 1, cgroup: 42}},
		"A-08: a listener on the same port": {answer: forgedAnswer(7, 10, 42, clientEnd,
			netip.MustParseAddrPort("0.0.0.0:0")), local: clientEnd, known: true},
		"A-08: another address of its own": {answer: good, local: netip.MustParseAddrPort("10.244.0.3:40000"),
			known: true},
		"A-08: another port of its own": {answer: good, local: netip.MustParseAddrPort("10.244.0.2:40001"),
			known: true},
		"another family":                {answer: good, local: addr6, known: true},
		"an answer to another question": {answer: change(8, 8), local: clientEnd},
		"cut off":                       {answer: good[:20], local: clientEnd},
		"too short for what it says it is": {answer: append([]byte{headerLen + 8, 0, 0, 0}, good[4:headerLen+8]...),
			local: clientEnd, known: true, fails: true},
		"A-13: no cgroup in a socket that ends": {answer: append([]byte{headerLen + diagAnswerLen, 0, 0, 0},
			forgedAnswer(7, 6, 0, clientEnd, serverEnd)[4:headerLen+diagAnswerLen]...), local: clientEnd, ok: true, known: true,
			want: socketFound{state: 6, cgroup: 0}},
		"an attribute that is longer than all": {answer: change(headerLen+diagAnswerLen, 200), local: clientEnd, ok: true,
			known: true, want: socketFound{state: 1, cgroup: 0}},
		"none":          {answer: netlinkError(7, unix.ENOENT), local: clientEnd, known: true},
		"another error": {answer: netlinkError(7, unix.EPERM), local: clientEnd, known: true, fails: true},
	} {
		t.Run(name, func(t *testing.T) {
			f, ok, known, err := parseSocket(tt.answer, 7, tt.local, serverEnd)
			if ok != tt.ok || known != tt.known || (err != nil) != tt.fails || f != tt.want {
				t.Errorf("parseSocket = %+v, %v, %v, %v", f, ok, known, err)
			}
		})
	}
}

func netlinkError(sequence uint32, errno unix.Errno) []byte {
	b := make([]byte, headerLen+20)
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	binary.NativeEndian.PutUint16(b[4:], unix.NLMSG_ERROR)
	binary.NativeEndian.PutUint32(b[8:], sequence)
	binary.NativeEndian.PutUint32(b[headerLen:], uint32(-int32(errno)))
	return b
}

// ownSocket is one that asks in the network namespace of the machine, which takes no right.
func ownSocket(t testing.TB) *netlinkSocket {
	t.Helper()
	fd, err := openNetlink(unix.NETLINK_SOCK_DIAG)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	s, err := newNetlink(fd, make([]byte, 512))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// pair is a connection over loopback.
func pair(t testing.TB, network, address string) (client, server net.Conn) {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if client, err = net.Dial(network, l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

func TestSocket(t *testing.T) {
	s := ownSocket(t)
	for network, address := range map[string]string{"tcp4": "127.0.0.1:0", "tcp6": "[::1]:0"} {
		client, _ := pair(t, network, address)
		local, remote := addrPort(client.LocalAddr()), addrPort(client.RemoteAddr())
		if f, ok, err := s.socket(local, remote, 0); err != nil || !ok || !f.live() || f.cgroup == 0 || !f.counted {
			t.Errorf("%s: %+v, %v, %v", network, f, ok, err)
		}
		if f, ok, err := s.socket(netip.AddrPortFrom(local.Addr(), 1), remote, 0); err != nil || ok {
			t.Errorf("%s from another port: %+v, %v, %v", network, f, ok, err)
		}
	}
}

// TestOpened: a socket that was accepted is told from one that connected, once all that it sent is
// acknowledged. One of which nothing is acknowledged was accepted.
func TestOpened(t *testing.T) {
	for name, tt := range map[string]struct {
		f                 socketFound
		opened, undecided bool
	}{
		"an old kernel":        {socketFound{state: 1}, true, false},
		"connected":            {socketFound{state: 1, counted: true, acked: 1}, true, false},
		"connected, and asked": {socketFound{state: 1, counted: true, sent: 9, acked: 10}, true, false},
		"connected, the request under way": {socketFound{state: 1, counted: true, sent: 9, acked: 1, unacked: 1}, false,
			true},
		"connected, the request dropped": {socketFound{state: 1, counted: true, sent: 9, acked: 1}, false, true},
		"connected, and ended its half":  {socketFound{state: 5, counted: true, sent: 9, acked: 11}, true, false},
		"connected, its end under way": {socketFound{state: 4, counted: true, sent: 9, acked: 10, unacked: 1}, false,
			true},
		"accepted":                         {socketFound{state: 1, counted: true}, false, false},
		"accepted, its greeting under way": {socketFound{state: 1, counted: true, sent: 9, unacked: 1}, false, false},
		"accepted, and greeted":            {socketFound{state: 1, counted: true, sent: 9, acked: 9}, false, true},
		"accepted, half of it under way": {socketFound{state: 1, counted: true, sent: 9, acked: 5, unacked: 1}, false,
			true},
		"accepted, and ended its half": {socketFound{state: 5, counted: true, sent: 9, acked: 10}, false, true},
	} {
		if opened, undecided := tt.f.opened(), tt.f.undecided(); opened != tt.opened || undecided != tt.undecided {
			t.Errorf("%s: opened = %v, undecided = %v", name, opened, undecided)
		}
	}
	s := ownSocket(t)
	for network, address := range map[string]string{"tcp4": "127.0.0.1:0", "tcp6": "[::1]:0"} {
		client, _ := pair(t, network, address)
		local, remote := addrPort(client.LocalAddr()), addrPort(client.RemoteAddr())
		if f, _, err := s.socket(local, remote, 0); err != nil || f.acked != 1 {
			t.Errorf("%s: a client is %+v, %v", network, f, err)
		}
		if f, _, err := s.socket(remote, local, 0); err != nil || f.acked != 0 {
			t.Errorf("%s: a server is %+v, %v", network, f, err)
		}
	}
}

// Whatever comes, only the exact socket is ok, and no more is read than there is.
func FuzzParseSocket(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		found, ok, known, err := parseSocket(b, 7, clientEnd, serverEnd)
		if ok && (!known || err != nil) || !ok && found != (socketFound{}) {
			t.Errorf("%+v, %v, %v, %v", found, ok, known, err)
		}
		if ok && binary.BigEndian.Uint16(b[headerLen+4:]) != clientEnd.Port() {
			t.Error("another socket's answer")
		}
		for m, rest, ok := nextMessage(b); ok; m, rest, ok = nextMessage(rest) {
			parseAddress(m.data)
		}
	})
}

func BenchmarkSocket(b *testing.B) {
	s := ownSocket(b)
	client, _ := pair(b, "tcp4", "127.0.0.1:0")
	local, remote := addrPort(client.LocalAddr()), addrPort(client.RemoteAddr())
	b.ReportAllocs()
	for b.Loop() {
		if _, ok, err := s.socket(local, remote, 0); !ok || err != nil {
			b.Fatal(ok, err)
		}
	}
}
