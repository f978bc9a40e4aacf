package attest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"

	"golang.org/x/sys/unix"
)

// The helper listens on a SOCK_SEQPACKET socket. The server sends one byte, scanRequest, and
// nothing else; the helper sends JSON.
const (
	scanRequest = 's'
	maxMessage  = 64 << 10
)

// helperMessage is what the helper tells.
type helperMessage struct {
	// A network namespace, by its inode. With it come a pidfd of a process in it, a SOCK_DIAG and a
	// ROUTE socket in it.
	Namespace uint64 `json:"namespace,omitempty"`
	// of the pods whose processes were found in it, and one of no pod if there is any
	Cgroups []string `json:"cgroups,omitempty"`
	Gone    bool     `json:"gone,omitempty"` // no process is in it any more; no descriptors
	// All cgroups were looked at, and all that was found was reported.
	Complete bool   `json:"complete,omitempty"`
	Problem  string `json:"problem,omitempty"` // what cannot be done
}

// descriptors is how many come with the message.
func (m helperMessage) descriptors() int {
	if m.Complete || m.Gone {
		return 0
	}
	return 3
}

// dialHelper connects, and makes sure that root listens there.
func dialHelper(ctx context.Context, socket string) (*net.UnixConn, error) {
	c, err := new(net.Dialer).DialContext(ctx, "unixpacket", socket)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", socket, err)
	}
	u := c.(*net.UnixConn)
	peer, err := peerOf(u)
	if err == nil && peer.Uid != 0 {
		err = fmt.Errorf("%s belongs to user %d and not to root", socket, peer.Uid)
	}
	if err != nil {
		return nil, errors.Join(err, u.Close())
	}
	return u, nil
}

// peerOf returns who is on the other end of a Unix socket, as the kernel says it.
func peerOf(c *net.UnixConn) (*unix.Ucred, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var peer *unix.Ucred
	if e := raw.Control(func(fd uintptr) {
		peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET,
			unix.SO_PEERCRED)
	}); e != nil {
		return nil, e
	}
	return peer, err
}

func sendMessage(c *net.UnixConn, m helperMessage, fds ...int) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(b) > maxMessage {
		return fmt.Errorf("a message of %d bytes is too long", len(b))
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	_, _, err = c.WriteMsgUnix(b, rights, nil)
	return err
}

// receiveMessage returns one message with its descriptors: as many as belong to it, or none where
// it fails.
func receiveMessage(c *net.UnixConn, buffer []byte) (helperMessage, []int, error) {
	control := make([]byte, unix.CmsgSpace(3*4))
	n, controls, flags, _, err := c.ReadMsgUnix(buffer, control)
	if err != nil {
		return helperMessage{}, nil, fmt.Errorf("gke-metadata-emulator-attest.service: %w", err)
	}
	m, fds, err := parseMessage(buffer[:n], control[:controls], flags)
	if err != nil {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
		return helperMessage{}, nil, err
	}
	return m, fds, nil
}

// parseMessage reads a message. The descriptors that came with it are returned with an error too.
func parseMessage(b, control []byte, flags int) (m helperMessage, fds []int, err error) {
	controls, err := unix.ParseSocketControlMessage(control)
	for _, c := range controls {
		if len(c.Data)%4 != 0 { // x/sys would panic
			continue
		}
		if rights, e := unix.ParseUnixRights(&c); e == nil {
			fds = append(fds, rights...)
		}
	}
	switch {
	case err != nil:
		return m, fds, fmt.Errorf("gke-metadata-emulator-attest.service: %w", err)
	case len(b) == 0:
		return m, fds, fmt.Errorf("gke-metadata-emulator-attest.service: %w", io.EOF)
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		return m, fds, errors.New("gke-metadata-emulator-attest.service: a message is too long")
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return m, fds, fmt.Errorf("gke-metadata-emulator-attest.service: %w", err)
	}
	if len(fds) != m.descriptors() || !m.Complete && m.Namespace == 0 {
		return m, fds, fmt.Errorf("gke-metadata-emulator-attest.service: a message with %d descriptors: %s", len(fds), b)
	}
	return m, fds, nil
}
