package service

import (
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// TestLoopbackListener: in routing.mode loopback our own listener answers pods from 169.254.169.254
//
func TestLoopbackListener(t *testing.T) {
	node := netnstest.Start(t, "loopback")
	pod, err := node.AddPod("pod")
	if err != nil {
		t.Fatal(err)
	}
	at := netip.MustParseAddrPort("169.254.169.254:80")
	var l net.Listener
	if err := node.Do(func() error {
		r, err := routing.New(routing.Plan{Mode: routing.ModeLoopback, Listen: at, Guard: routing.DefaultGuard(),
			RunDir: t.TempDir()})
		if err == nil {
			err = r.Install(t.Context())
		}
		if err == nil {
			l, err = listen(t.Context(), "listen", at)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	server := &http.Server{
		ReadHeaderTimeout: time.Minute,
		Handler: http.HandlerFunc(
			func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "ours") },
		),
	}
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
	c, err := pod.Dial(t.Context(), "tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	if got := get(c); !strings.HasSuffix(got, "ours") {
		t.Errorf("the pod got %q", got)
	}
}
