package attest

import (
	"errors"
	"net/netip"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// client finds the client's socket. n is nil where no namespace has it. redirected says that the
// client did not dial our own address.
func (k *Kernel) client(c Conn, own *namespace, holders []holder) (
	n *namespace, f socketFound, redirected bool, err error,
) {
	n, f, err = k.find(c, c.Original, own, holders)
	if err != nil || c.Original == c.Server && !c.untracked {
		return n, f, false, err
	}
	if c.Original != c.Server {
		if n == nil {
			// Conntrack knows a translated connection for a while after its end, and names its
			// destination for the next connection from the same port too, which was not translated
			// (a change to mode ebpf). The answer goes to the owner of this very socket.
			n, f, err = k.find(c, c.Server, own, holders)
		}
		return n, f, true, err
	}
	// SO_ORIGINAL_DST knows conntrack's default zone only: in another one the client may have
	// dialled either address. Two sockets are two clients, and one of them is not ours.
	for _, a := range k.options.Redirected {
		if a == c.Server || a.Addr().Is4() != c.Server.Addr().Is4() {
			continue
		}
		other, g, err := k.find(c, a, own, holders)
		switch {
		case err != nil:
			return nil, f, false, err
		case other == nil:
		case n != nil:
			return nil, f, false, k.conflict(c, n, other)
		default:
			n, f, redirected = other, g, true
		}
	}
	return n, f, redirected, nil
}

// opener finds the socket that opened the connection, where the namespace has it. While what it
// sent is under way, the kernel's numbers do not tell whether it opened the connection or accepted
// it: they are asked for again. Our kernel acknowledges at once what a client sends, and what was
// lost on the way is sent again after 200 ms. Where the numbers still do not tell, it is none: who
// forged a packet can leave out the acknowledgements. So is a client that a filter of its own kept
// from sending, which counts as sent; another connection of that client is found.
func (h holder) opener(c Conn, dialled netip.AddrPort) (f socketFound, ok bool, err error) {
	for pause := time.Millisecond; ; pause *= 2 {
		f, ok, err = h.socket(c.Client, dialled, h.device)
		ok = ok && err == nil && f.live() && c.end.fits(f)
		if !ok || !f.undecided() || pause > decideTime {
			return f, ok && f.opened(), err
		}
		time.Sleep(pause)
	}
}

// decideTime bounds a pause of opener, and so all of them together to twice that.
const decideTime = 256 * time.Millisecond

// end is our end of a connection, of which the kernel counts what was sent.
type end struct{ syscall.RawConn }

// fitSlack is how much older than our end the client's last acknowledgement may be: one that was
// lost is sent again within this time.
const fitSlack = 1000 // ms

// fits reports whether the client's socket can be the other end of ours. A socket of the same two
// ends that has received more than we sent, or was not acknowledged anything since our end was
// made, is of an earlier connection, or was made to be taken for this client's. It
// holds while the rules that refuse changed ports are flushed, and where other rules accept first.
func (e end) fits(f socketFound) bool {
	if e.RawConn == nil || !f.counted { // no socket of this kernel's (a test's), or before Linux 4.19
		return true
	}
	var ours *unix.TCPInfo
	var err error
	control := e.Control(func(fd uintptr) { ours, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) })
	if errors.Join(control, err) != nil {
		return false // closed meanwhile
	}
	// Until something is sent, the time of the last data is that of the handshake.
	return f.received <= ours.Bytes_sent && f.acknowledged <= ours.Last_data_sent+fitSlack
}

// Where struct tcp_info of linux/tcp.h has what is compared, and how long it is where the kernel
// counts what was sent.
const (
	infoUnacked       = unsafe.Offsetof(unix.TCPInfo{}.Unacked)
	infoAcknowledged  = unsafe.Offsetof(unix.TCPInfo{}.Last_ack_recv)
	infoAcked         = unsafe.Offsetof(unix.TCPInfo{}.Bytes_acked)
	infoReceived      = unsafe.Offsetof(unix.TCPInfo{}.Bytes_received)
	infoSent          = unsafe.Offsetof(unix.TCPInfo{}.Bytes_sent)
	infoRetransmitted = unsafe.Offsetof(unix.TCPInfo{}.Bytes_retrans)
	infoCounted       = infoRetransmitted + 8
)
