package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
)

// ServeStatus answers GET /status on l with what status returns, as JSON, until ctx is done.
func (s *Server) ServeStatus(ctx context.Context, l net.Listener, status func() any) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		_ = e.Encode(status()) // a client that left is no news
	})
	return s.serveInternal(ctx, l, mux, nil)
}

// ServeHealth answers GET /metrics, /healthz, which is Alive, and /readyz, which is ready, on l
// until ctx is done. Clients that are not allowed get 403.
func (s *Server) ServeHealth(ctx context.Context, l net.Listener, ready func(context.Context) error,
	g prometheus.Gatherer, allowed func(netip.Addr) bool) error {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(g, promhttp.HandlerOpts{ErrorLog: s.log}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) { health(w, s.Alive(r.Context())) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) { health(w, ready(r.Context())) })
	// Any pod on the host network reaches it: a few connections are enough for Prometheus and
	// probes, and whoever comes is let in.
	x := newConnections(func() int { return maxHealth }, func(netip.AddrPort) bool { return false }, func(*attest.Peer) {})
	x.admission = newAdmission(maxHealth, maxHealth)
	return s.serveInternal(ctx, s.bounded(l, true), onlyFrom(allowed, mux), x)
}

// onlyFrom answers 403 to a client whose address is not allowed.
func onlyFrom(allowed func(netip.Addr) bool, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		from, err := netip.ParseAddrPort(r.RemoteAddr)
		who := "the client"
		if err == nil {
			who = from.Addr().Unmap().String()
		}
		if err != nil || !allowed(from.Addr().Unmap()) {
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			w.WriteHeader(http.StatusForbidden)
			_, _ = fmt.Fprintf(w, "%s is not in healthAllow\n", who)
			return
		}
		h.ServeHTTP(w, r)
	})
}

func health(w http.ResponseWriter, err error) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	if err != nil {
		w.WriteHeader(http.StatusServiceUnavailable)
		_, _ = fmt.Fprintln(w, err)
		return
	}
	_, _ = fmt.Fprintln(w, "ok")
}

// serveInternal serves until ctx is done. Connections are bounded by x, if there is one.
func (s *Server) serveInternal(ctx context.Context, l net.Listener, h http.Handler, x *connections) error {
	web := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		IdleTimeout:    2 * time.Minute,
		MaxHeaderBytes: 16 << 10, ErrorLog: quietLog(s.log)}
	if x != nil {
		web.ConnContext, web.ConnState = x.accept, x.state
	}
	var g errgroup.Group
	g.Go(func() error {
		<-ctx.Done()
		return web.Close()
	})
	g.Go(func() error {
		if err := web.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serving %s: %w", l.Addr(), err)
		}
		return nil
	})
	return g.Wait()
}
