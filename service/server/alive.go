package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
)

// Alive asks our own listener for `/`, and returns why it is not answered. Without a configuration
// the closed guard may stand alone, which brings no address to ask at: there is nobody to answer
// then, and waiting for it would hold kubelet up.
//
// What pods get is what counts. Somebody's rule in chain OUTPUT may refuse what the node itself
// sends, and where that cannot be overruled the listener and the server are asked without a
// packet.
func (s *Server) Alive(ctx context.Context) error {
	err := s.probe.ask(ctx)
	switch {
	case err == nil:
		s.unreachable.Store(nil)
		return nil
	case s.active.Load().Broken != nil && !addressHere(addrPortOf(s.listener).Addr()):
		return nil
	case !blocked(err):
		return err
	}
	if inside := s.aliveInside(ctx); inside != nil {
		return fmt.Errorf("%w; %w", err, inside)
	}
	reason := err.Error()
	if s.unreachable.Swap(&reason) == nil {
		s.log.WithError(err).Warn("the node's own connections to the listener fail, pods' do not: " +
			"a firewall rule refuses them: find it with `gke-metadata-emulator doctor`")
	}
	return nil
}

// Unreachable says why the node's own connections to the listener failed when Alive asked last,
// where those of pods do not; "": they do not fail.
func (s *Server) Unreachable() string {
	if reason := s.unreachable.Load(); reason != nil {
		return *reason
	}
	return ""
}

// blocked reports whether a probe failed before it reached the listener, though the listener's
// address is this node's.
func blocked(err error) bool {
	var op *net.OpError
	noAddress := errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EADDRNOTAVAIL)
	return errors.As(err, &op) && op.Op == "dial" && !noAddress && !errors.Is(err, context.Canceled)
}

// aliveInside asks the kernel for the listener's state, and the server for what the probe asks.
func (s *Server) aliveInside(ctx context.Context) error {
	if err := accepting(s.listener); err != nil {
		return err
	}
	ctx = context.WithValue(ctx, connectionKey{}, &connection{peer: new(attest.Peer)})
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.probe.url, nil)
	if err != nil {
		return err
	}
	var w statusWriter
	if s.ServeHTTP(&w, req); w != http.StatusOK {
		return fmt.Errorf("the service answered / with status %d", w)
	}
	return nil
}

// accepting reports whether connections to l are accepted: it listens, and the connections that
// wait do not fill its queue.
func accepting(l net.Listener) error {
	c, ok := l.(syscall.Conn)
	if !ok {
		return errors.New("the listener is not a socket")
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var info *unix.TCPInfo
	control := raw.Control(func(fd uintptr) {
		info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP,
			unix.TCP_INFO)
	})
	if err := errors.Join(control, err); err != nil {
		return err
	}
	const listen = 10 // TCP_LISTEN; then Unacked is the length of the queue, and Sacked the most that it holds
	if info.State != listen || info.Unacked > 0 && info.Unacked >= info.Sacked {
		return fmt.Errorf("the listener is in state %d, and %d of %d connections wait to be accepted",
			info.State, info.Unacked, info.Sacked)
	}
	return nil
}

// statusWriter is a ResponseWriter that keeps the status alone.
type statusWriter int

func (w *statusWriter) Header() http.Header         { return http.Header{} }
func (w *statusWriter) WriteHeader(status int)      { *w = statusWriter(status) }
func (w *statusWriter) Write(b []byte) (int, error) { return len(b), nil }
