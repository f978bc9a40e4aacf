package server

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// TestLoopbackProbe: in routing.mode loopback the probe finds our own listener from the host
// itself, which otherwise reaches the cloud's server at that address.
func TestLoopbackProbe(t *testing.T) {
	node := netnstest.Start(t, "loopback")
	at := netip.MustParseAddrPort("169.254.169.254:80")
	var l net.Listener
	if err := node.Do(func() error {
		r, err := routing.New(routing.Plan{Mode: routing.ModeLoopback, Listen: at, Guard: routing.DefaultGuard(),
			RunDir: t.TempDir()})
		if err == nil {
			err = r.Install(t.Context())
		}
		if err == nil {
			lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) { // as service.listen does
				_ = c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1) })
				return err
			}}
			lc.SetMultipathTCP(false)
			l, err = lc.Listen(t.Context(), "tcp", at.String())
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	server := &http.Server{ReadHeaderTimeout: time.Minute,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "ours") })}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { _ = server.Close() })
	get := func(c net.Conn) string {
		t.Helper()
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(testTimeout))
		if _, err := io.WriteString(c, "GET / HTTP/1.0\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(c)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	// The dialer by itself: a client dials on a thread that may be in another namespace.
	dial := newProbe(l).client.Transport.(*http.Transport).DialContext
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
	defer cancel()
	var c net.Conn
	if err := node.Do(func() (err error) {
		c, err = dial(ctx, "tcp", at.String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if got := get(c); !strings.HasSuffix(got, "ours") {
		t.Errorf("the probe got %q", got)
	}
	if from := c.LocalAddr().String(); !strings.HasPrefix(from, "127.0.0.1:") {
		t.Errorf("the probe asked from %s", from)
	}
}
