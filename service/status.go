package service

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/status"
)

// Status tells the state of the service now.
func (s *Service) Status() status.Status {
	st := status.Status{Version: s.options.Version, Started: s.started, State: "serving",
		Listen:      s.listener.Addr().String(),
		Connections: s.server.Connections().Open, Unreachable: s.server.Unreachable()}
	st.Requests, st.Requests6 = s.server.Requests()
	if state, err := routing.ReadState(s.options.RunDir); err != nil {
		st.RoutingErr = err.Error()
	} else {
		st.Routing = &state
	}
	st.LastInstall, _ = routing.ReadFailure(s.options.RunDir) // one that cannot be read tells nothing
	active := s.active()
	if active.unconfigured != nil {
		st.State, st.Reason = "not configured", active.unconfigured.Error()
	} else {
		if a := active.config.Listen6; a.IsValid() && s.listening.on(a) {
			st.Listen6 = a.String()
		}
		if err := s.onDisk.Load(); err != nil {
			st.ConfigFile = config.Outdated(*err)
		}
		c := active.cluster.Status()
		st.Cluster, st.Tokens, st.Proxy = &c, active.cache.Status(), active.proxy
		st.Attestation = s.attestation(active, &c)
		st.SkippedHostPods = s.skippedHostPods(active.config.Passthrough)
	}
	if s.server.Draining() {
		st.State = "stopping"
	}
	return st
}

// statusNow is Status with what /readyz says.
func (s *Service) statusNow(ctx context.Context) status.Status {
	st := s.Status()
	if st.State == "serving" {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second) // where our own listener hangs
		defer cancel()
		if err := s.readiness(ctx); err != nil {
			st.Reason = err.Error()
		}
	}
	return st
}

// skippedHostPods returns the ServiceAccounts whose host pods were refused another cloud's
// metadata, and which passthrough does not name now, sorted.
func (s *Service) skippedHostPods(passthrough []string) (all []status.SkippedHostPod) {
	for sa, n := range s.server.SkippedHostPods() {
		if !slices.Contains(passthrough, sa.String()) {
			all = append(all, status.SkippedHostPod{ServiceAccount: sa.String(), Requests: n})
		}
	}
	slices.SortFunc(all, func(a, b status.SkippedHostPod) int {
		return strings.Compare(a.ServiceAccount,
			b.ServiceAccount)
	})
	return all
}

// attestation tells what is gone by, and notes on each pod what it is known by.
func (s *Service) attestation(active *activeConfig, c *kube.Status) status.Attestation {
	a := status.Attestation{Mode: active.config.Attestation.Mode}
	kind := attest.ByAddress
	if a.Mode == "kernel" {
		k := s.kernel.Status()
		a.Kernel, kind = &k, k.Evidence
	}
	for i := range c.Pods {
		p := &c.Pods[i]
		p.Evidence = kind
		if active.Attestor.AddressAlone(p.RuntimeClass) {
			p.Evidence = attest.ByAddress
		}
		if p.ServiceAccount == "" || p.HostNetwork && p.Evidence != attest.ByCgroup {
			p.Evidence = "" // nothing can tell who asks, or nothing needs to
		}
	}
	for i, h := range active.config.HostIdentities {
		a.HostIdentities = append(a.HostIdentities, status.HostIdentity{Unit: h.Unit, Cgroup: h.Cgroup,
			HostStatus: c.Hosts[i]})
	}
	c.Hosts = nil // said above
	return a
}

// summary is the STATUS= line of `systemctl status`.
func (s *Service) summary() string {
	st := s.Status()
	if st.State != "serving" {
		return cmp.Or(st.Reason, st.State)
	}
	if st.ConfigFile != "" {
		return "serving; " + st.ConfigFile
	}
	if !st.Cluster.Synced {
		return "serving no pods yet: " + st.Cluster.Problem
	}
	if k := st.Attestation.Kernel; k != nil && !k.Helper {
		return "serving known pods only: " + k.Problem
	}
	return fmt.Sprintf("serving %d pods with %d tokens cached", len(st.Cluster.Pods), len(st.Tokens))
}

// serveStatus answers `gke-metadata-emulator status` over a Unix socket that the service's group
// may use.
func (s *Service) serveStatus(ctx context.Context) error {
	if err := s.listenStatus(ctx); err != nil {
		s.log.WithError(err).Error("the status socket cannot be made: `gke-metadata-emulator status` does not work, " +
			"pods are served")
		return nil
	}
	return s.server.ServeStatus(ctx, s.status, func() any { return s.statusNow(ctx) })
}

// listenStatus makes the status socket, unless it is there already.
func (s *Service) listenStatus(ctx context.Context) (err error) {
	if s.status == nil {
		s.status, err = listenUnix(ctx, "unix",
			cmp.Or(s.options.StatusSocket, filepath.Join(s.options.RunDir, "status.sock")), unit)
	}
	return err
}

// serveHealth answers probes and Prometheus on healthListen, which pods do not reach unless the
// operator says so.
func (s *Service) serveHealth(ctx context.Context, a netip.AddrPort) error {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // whose sockets have not all options
	l, err := lc.Listen(ctx, "tcp", a.String())
	if err != nil {
		s.log.WithError(bindError("healthListen", a, err)).Error("/healthz, /readyz and /metrics are not served, pods are")
		return nil
	}
	return s.server.ServeHealth(ctx, l, s.readiness, s.gather(), s.mayAskHealth)
}

// mayAskHealth says whether healthListen answers a client at a. This node's own loopback may ask
// always: doctor does.
func (s *Service) mayAskHealth(a netip.Addr) bool {
	allow := s.active().config.HealthAllow
	return len(allow) == 0 || a.IsLoopback() || slices.ContainsFunc(allow, func(network string) bool {
		p, err := netip.ParsePrefix(network)
		return err == nil && p.Contains(a)
	})
}

// gather collects the metrics of the process, and the gauges of the backend that is in force. One
// scrape does so at a time: each starts a goroutine for every collector, and a flood of scrapes
// would have pods wait for all of them.
func (s *Service) gather() prometheus.Gatherer {
	var one sync.Mutex
	return prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) {
		one.Lock()
		defer one.Unlock()
		g := prometheus.Gatherers{s.registry}
		if b := s.active().backend; b != nil {
			g = append(g, b.gauges)
		}
		return g.Gather()
	})
}

// readiness is stricter than READY=1: a pod that asks now gets its token, as far as this node can
// tell. Its error is on one line, and the only text for each state that is not ready: /readyz,
// `status` and doctor show it.
func (s *Service) readiness(ctx context.Context) error {
	active := s.active()
	if active.unconfigured != nil {
		return active.unconfigured
	}
	if err := s.attests(active); err != nil {
		return err
	}
	if r, err := routing.ReadState(s.options.RunDir); err == nil && r.Desired == routing.Installed && !r.Closed {
		to := []string{r.Listen}
		if r.IPv6 == "" && r.Listen6 != "" {
			to = append(to, r.Listen6)
		}
		for _, text := range to {
			if a, err := netip.ParseAddrPort(text); err == nil && !s.listening.on(a) {
				return fmt.Errorf("the rules redirect pods to %s, but the service listens on %s: "+
					"systemctl restart gke-metadata-emulator", a, s.listening.String())
			}
		}
	}
	return s.server.Alive(ctx)
}

// attests returns why a new connection cannot be attested now.
func (s *Service) attests(active *activeConfig) error {
	if active.config.Attestation.Mode != "kernel" {
		_, _, err := active.cluster.At(netip.Addr{})
		return err
	}
	if k := s.kernel.Status(); !k.Helper {
		return fmt.Errorf("gke-metadata-emulator-attest.service is not connected: %s", k.Problem)
	}
	_, err := active.cluster.Known()
	return err
}
