package service

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"
	"golang.org/x/sync/errgroup"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token"
)

// Status is what `status` shows: never a token, only how old it is.
type Status struct {
	Version     string              `json:"version"`
	Started     time.Time           `json:"started"`
	State       string              `json:"state"`                       // serving | not configured | stopping
	Reason      string              `json:"reason,omitempty"`            // why it is not serving
	ConfigFile  string              `json:"configFileProblem,omitempty"` // why the configuration on disk does not load; what was read before is in force
	Listen      string              `json:"listen"`
	Listen6     string              `json:"listen6,omitempty"`     // "" = IPv6 is not served
	Unreachable string              `json:"unreachable,omitempty"` // why the node's own connections to Listen fail, where pods' do not
	Connections int                 `json:"connections"`
	Attestation Attestation         `json:"attestation"`
	Requests    uint64              `json:"requests"`            // since Started, for anything but `/`
	Requests6   uint64              `json:"requests6,omitempty"` // those of them that came by IPv6
	Routing     *routing.State      `json:"routing,omitempty"`
	RoutingErr  string              `json:"routingError,omitempty"` // why Routing is not known
	LastInstall *routing.Failure    `json:"lastInstallFailed,omitempty"`
	Cluster     *kube.Status        `json:"cluster,omitempty"`
	Proxy       string              `json:"proxy,omitempty"` // by which Google is asked, without its user's name and password
	Tokens      []token.EntryStatus `json:"tokens,omitempty"`
	Unnamed     []Unnamed           `json:"notPassedThrough,omitempty"`
}

// Attestation is what tells who asks.
type Attestation struct {
	Mode           string               `json:"mode,omitempty"`   // attestation.mode; "" while there is no configuration
	Kernel         *attest.KernelStatus `json:"kernel,omitempty"` // in mode kernel
	HostIdentities []HostIdentity       `json:"hostIdentities,omitempty"`
}

// HostIdentity is what processes of the node are.
type HostIdentity struct {
	Unit   string `json:"unit,omitempty"`
	Cgroup string `json:"cgroup,omitempty"`
	kube.HostStatus
}

// Status tells the state of the service now.
func (s *Service) Status() Status {
	st := Status{Version: s.options.Version, Started: s.started, State: "serving", Listen: s.listener.Addr().String(),
		Connections: s.server.connections.open(), Requests: s.server.metrics.asked(), Requests6: s.server.metrics.six.Load()}
	if reason := s.unreachable.Load(); reason != nil {
		st.Unreachable = *reason
	}
	if state, err := routing.ReadState(s.options.RunDir); err != nil {
		st.RoutingErr = err.Error()
	} else {
		st.Routing = &state
	}
	st.LastInstall, _ = routing.ReadFailure(s.options.RunDir) // one that cannot be read tells nothing
	site := s.site()
	if site.broken != nil {
		st.State, st.Reason = "not configured", site.broken.Error()
	} else {
		if a := site.config.Listen6; a.IsValid() && s.listening.on(a) {
			st.Listen6 = a.String()
		}
		if err := s.onDisk.Load(); err != nil {
			st.ConfigFile = (*err).Error()
		}
		c := site.cluster.Status()
		st.Cluster, st.Tokens, st.Proxy = &c, site.cache.Status(), site.proxy
		st.Attestation = s.attestation(site, &c)
		st.Unnamed = s.server.unnamed.but(site.config.Passthrough)
	}
	select {
	case <-s.server.draining:
		st.State = "stopping"
	default:
	}
	return st
}

// attestation tells what is gone by, and notes on each pod what it is known by.
func (s *Service) attestation(site *site, c *kube.Status) Attestation {
	a := Attestation{Mode: site.config.Attestation.Mode}
	kind := attest.ByAddress
	if a.Mode == "kernel" {
		k := s.kernel.Status()
		a.Kernel, kind = &k, k.Evidence
	}
	for i := range c.Pods {
		p := &c.Pods[i]
		p.Evidence = kind
		if site.attestor.BelievesAddress(p.RuntimeClass) {
			p.Evidence = attest.ByAddress
		}
		if p.ServiceAccount == "" || p.HostNetwork && p.Evidence != attest.ByCgroup {
			p.Evidence = "" // nothing can tell who asks, or nothing needs to
		}
	}
	for i, h := range site.config.HostIdentities {
		a.HostIdentities = append(a.HostIdentities, HostIdentity{h.Unit, h.Cgroup, c.Hosts[i]})
	}
	c.Hosts = nil // said above
	return a
}

// summary is the STATUS= line of `systemctl status`.
func (s *Service) summary() string {
	st := s.Status()
	if st.State != "serving" {
		return firstLine(errors.New(st.State + ": " + st.Reason))
	}
	if st.ConfigFile != "" {
		return firstLine(errors.New("serving what was configured before; the configuration on disk does not load: " + st.ConfigFile))
	}
	if !st.Cluster.Synced {
		return firstLine(errors.New("serving; pods are not known yet: " + st.Cluster.Problem))
	}
	if k := st.Attestation.Kernel; k != nil && !k.Helper {
		return firstLine(errors.New("serving known pods; the helper that knows new ones is away: " + k.Problem))
	}
	return fmt.Sprintf("serving %d pods with %d tokens cached", len(st.Cluster.Pods), len(st.Tokens))
}

func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

// serveStatus answers `gke-metadata-emulator status` over a Unix socket that the service's group may use.
func (s *Service) serveStatus(ctx context.Context) error {
	if err := s.listenStatus(ctx); err != nil {
		s.log.WithError(err).Error("the status socket could not be made, so `status` does not work; pods are served")
		return nil
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		_ = e.Encode(s.Status()) // a client that left is no news
	})
	return s.serveInternal(ctx, s.status, mux, nil)
}

// listenStatus makes the status socket, unless it is there already.
func (s *Service) listenStatus(ctx context.Context) (err error) {
	if s.status == nil {
		s.status, err = listenUnix(ctx, "unix", cmp.Or(s.options.StatusSocket, filepath.Join(s.options.RunDir, "status.sock")), unit)
	}
	return err
}

// serveHealth answers probes and Prometheus on healthListen, which pods do not reach unless the operator says so.
func (s *Service) serveHealth(ctx context.Context, a netip.AddrPort) error {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // whose sockets have not all options
	l, err := lc.Listen(ctx, "tcp", a.String())
	if err != nil {
		s.log.WithError(bindError("healthListen", a, err)).Error("/healthz, /readyz and /metrics are not served; pods are")
		return nil
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.gather(), promhttp.HandlerOpts{ErrorLog: s.log}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) { health(w, s.alive(r.Context())) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) { health(w, s.readiness(r.Context())) })
	// Any pod on the host network reaches it: a few connections are enough for Prometheus and probes, and whoever comes is let in.
	x := newConnections(func() int { return maxHealth }, func(netip.AddrPort) bool { return false }, func(*attest.Peer) {})
	x.room = newRoom(maxHealth, maxHealth)
	x.cutAnswered = true
	return s.serveInternal(ctx, s.clients(l, true), mux, x)
}

// gather collects the server's metrics and those of the backend that is in force. One scrape does at a time: each starts a goroutine
// for every collector, and a flood of scrapes would have pods wait for all of them.
func (s *Service) gather() prometheus.Gatherer {
	var one sync.Mutex
	return prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) {
		one.Lock()
		defer one.Unlock()
		g := prometheus.Gatherers{s.server.metrics.registry, s.gathered}
		if b := s.site().backend; b != nil {
			g = append(g, b.registry)
		}
		return g.Gather()
	})
}

// readiness is stricter than READY=1: a pod that asks now gets its token, as far as this node can tell.
func (s *Service) readiness(ctx context.Context) error {
	site := s.site()
	if site.broken != nil {
		return site.broken
	}
	if err := s.attests(site); err != nil {
		return err
	}
	if r, err := routing.ReadState(s.options.RunDir); err == nil && r.Desired == routing.Installed && !r.Closed {
		to := []string{r.Listen}
		if r.IPv6 == "" && r.Listen6 != "" {
			to = append(to, r.Listen6)
		}
		for _, text := range to {
			if a, err := netip.ParseAddrPort(text); err == nil && !s.listening.on(a) {
				return fmt.Errorf("the rules send pods to %s, and we listen on %s: restart gke-metadata-emulator", a, s.listening.String())
			}
		}
	}
	return s.alive(ctx)
}

// attests returns why a new connection cannot be attested now.
func (s *Service) attests(site *site) error {
	if site.config.Attestation.Mode != "kernel" {
		_, _, err := site.cluster.At(netip.Addr{})
		return err
	}
	if k := s.kernel.Status(); !k.Helper {
		return fmt.Errorf("%w: %s", attest.ErrHelperAway, k.Problem)
	}
	_, err := site.cluster.Known()
	return err
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
func (s *Service) serveInternal(ctx context.Context, l net.Listener, h http.Handler, x *connections) error {
	web := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute,
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

// ErrNotRunning is wrapped by FetchStatus where there is no service to ask.
var ErrNotRunning = errors.New("the service is not running")

// FetchStatus asks the running service over its Unix socket for its Status, as JSON.
func FetchStatus(ctx context.Context, socket string) ([]byte, error) {
	const most = 64 << 20 // thousands of pods and their tokens' ages
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://service/status", nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w: there is no %s: systemctl restart gke-metadata-emulator", ErrNotRunning, socket)
	case errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("%w: nobody answers at %s: systemctl restart gke-metadata-emulator", ErrNotRunning, socket)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%s is for root and the service's group: %w", socket, fs.ErrPermission)
	case err != nil:
		return nil, fmt.Errorf("asking the service at %s: %w", socket, err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(io.LimitReader(resp.Body, most))
	if err != nil {
		return nil, fmt.Errorf("asking the service at %s: %w", socket, err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("asking the service at %s: %s", socket, resp.Status)
	}
	return text, nil
}
