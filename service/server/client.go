package server

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// What one connection may hold in the kernel. An answer of usual size fits, and a longer one waits
// for its reader; by themselves both buffers grow to several MB (tcp_wmem, tcp_rmem). The kernel
// doubles the numbers, for its own records.
const (
	sendBuffer    = 16 << 10
	receiveBuffer = 16 << 10 // a header has 16 KiB at most

	// readTimeout bounds how long a client may take to read what is written. An answer is at most
	// three writes.
	readTimeout = 5 * time.Second
	// hastyTimeout is readTimeout while the service stops: the next process serves those that do
	// read.
	hastyTimeout = 500 * time.Millisecond

	// What net/http makes of a line of a few bytes takes more than a hundred, and so does what
	// package metadata makes of a parameter. A request that waits for a change keeps both.
	maxHeadLines  = 128
	maxParameters = 128
)

var errHeadLines = fmt.Errorf("the head of a request has more than %d lines", maxHeadLines)

// clientListener is a listener for net/http.
type clientListener struct {
	net.Listener
	plain bool            // net/http's own refusals stay as they are
	hasty <-chan struct{} // closed when the service stops; nil: it never says so
}

// bounded bounds what connections of the listener hold: each inherits what is set here. An error
// leaves them unbounded.
func (s clientListener) bounded() error {
	socket, ok := s.Listener.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	if e := raw.Control(func(fd uintptr) {
		for _, o := range []struct{ level, name, value int }{
			{unix.SOL_SOCKET, unix.SO_SNDBUF, sendBuffer},
			{unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer},
			// What nobody reads is dropped after this time, also when the connection was closed
			// here.
			{unix.SOL_TCP, unix.TCP_USER_TIMEOUT, int((2 * readTimeout).Milliseconds())},
		} {
			err = errors.Join(err, unix.SetsockoptInt(int(fd), o.level, o.name, o.value))
		}
	}); e != nil {
		return e
	}
	return err
}

func (s clientListener) Accept() (net.Conn, error) {
	c, err := s.Listener.Accept()
	if tcp, ok := c.(*net.TCPConn); ok && err == nil {
		info := &connection{half: half{ended: make(chan struct{})}}
		return clientConn{tcp, info, s.plain, s.hasty}, nil
	}
	return c, err
}

// half is the client's half of a connection.
type half struct {
	body   atomic.Bool   // of the request; it is still being read, and cannot come in whole once the half ended
	closed atomic.Bool   // the half ended while an answer was waited for,
	ended  chan struct{} // and this is closed
}

// head counts the lines of the head of a request as they come in. An empty line ends it.
type head struct {
	lines int
	text  bool // in the line that has not ended yet
}

// fits reports whether the head has no more than maxHeadLines, with what was read now.
func (h *head) fits(read []byte) bool {
	for ended := true; ended && h.lines <= maxHeadLines; {
		var line []byte
		line, read, ended = bytes.Cut(read, []byte("\n"))
		h.text = h.text || len(bytes.TrimSuffix(line, []byte("\r"))) > 0
		switch {
		case ended && h.text:
			h.lines, h.text = h.lines+1, false
		case ended:
			h.lines = 0
		}
	}
	return h.lines <= maxHeadLines
}

// clientConn is a connection as net/http has it.
type clientConn struct {
	*net.TCPConn
	*connection // what we know of it, where ConnState finds it
	plain       bool
	hasty       <-chan struct{}
}

var (
	refusalPrefix  = []byte("HTTP/1.1 ")
	flavourHeaders = []byte("Metadata-Flavor: Google\r\nServer: GKE Metadata Server\r\nX-XSS-Protection: " +
		"0\r\nX-Frame-Options: SAMEORIGIN\r\nContent-Type: application/text\r\n")
)

// Write gives our header to the refusals that net/http writes itself: of what is no HTTP, of
// headers that are too long. Node's client takes no answer without it for one (H-04). They are a
// 4xx or 5xx that names its type with a charset, which ours never do (H-05).
func (c clientConn) Write(b []byte) (int, error) {
	if c.plain || c.theirs || len(b) < 12 || b[9] < '4' || !bytes.HasPrefix(b, refusalPrefix) ||
		bytes.Contains(b, flavourHeaders[:23]) {
		return c.send(b)
	}
	line, rest, _ := bytes.Cut(b, []byte("\r\n"))
	rest = bytes.Replace(rest, []byte("Content-Type: text/plain; charset=utf-8\r\n"), nil, 1)
	if _, err := c.send(slices.Concat(line, []byte("\r\n"), flavourHeaders, rest)); err != nil {
		return 0, err
	}
	return len(b), nil
}

// send writes to a client that reads. What another one leaves in the kernel's buffer is dropped.
func (c clientConn) send(b []byte) (int, error) {
	timeout := readTimeout
	select {
	case <-c.hasty:
		timeout = hastyTimeout
	default:
	}
	if err := c.SetWriteDeadline(time.Now().Add(timeout)); err != nil {
		return 0, err
	}
	n, err := c.TCPConn.Write(b)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		_ = c.SetLinger(0)
	}
	return n, err
}

// Read waits, where a client has asked and then ended its half of the connection, for the end of
// the other half: net/http takes the end of the first for a client that left, and would end the
// request that it waits for. A long poll ends at that, since a client that left looks the same
// ([half]).
//
// The first Read finds out who is on the other end.
func (c clientConn) Read(b []byte) (int, error) {
	if c.look != nil {
		if err := c.look(); err != nil {
			return 0, err
		}
	}
	n, err := c.TCPConn.Read(b)
	if !c.asked.Load() && !c.fits(b[:n]) { // else it is a body, or the request after this one
		return 0, errHeadLines
	}
	if err != io.EOF || !c.asked.Load() || c.body.Load() {
		return n, err
	}
	if !c.closed.Swap(true) {
		close(c.ended)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, io.EOF
	}
	gone := func(fd uintptr) bool { // recv says EOF whatever happens after it
		p := []unix.PollFd{{Fd: int32(fd)}}
		_, err := unix.Poll(p, 0)
		return err != nil || p[0].Revents&(unix.POLLERR|unix.POLLHUP) != 0
	}
	if err := raw.Read(gone); err != nil {
		return 0, err // net/http ended the wait, by a deadline: the answer is there
	}
	return 0, io.EOF
}

// reset closes the connection and drops what its client did not read.
func reset(c net.Conn) {
	if s, ok := c.(interface{ SetLinger(int) error }); ok {
		_ = s.SetLinger(0)
	}
	_ = c.Close()
}
