package service

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/dns"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/messageid"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/server"
)

// Options are what Run needs to know that is not in the configuration.
type Options struct {
	Load func() (config.Config, error) // reads file and flags; asked again at each reload
	// what Load reads: while it is missing or broken, a change of it is a reload
	File       string
	Reload     <-chan os.Signal // SIGHUP
	RunDir     string           // where the state of the rules is read
	CgroupRoot string           // where the node's cgroups are; "": where the system has them
	// where root puts a copy of a kubeconfig that this user may not read; "": nowhere
	CredentialCopy string
	StatusSocket   string // where `status` asks; "": status.sock in RunDir
	Version        string
	Commit         string    // that the program was built from; "": not known
	Stderr         io.Writer // nil: os.Stderr
}

// Service is a running emulator.
type Service struct {
	options   Options
	log       *logrus.Logger
	registry  *prometheus.Registry // of all that the process counts
	metrics   metrics
	server    *server.Server
	inForce   atomic.Pointer[activeConfig] // never nil once serving
	listener  net.Listener                 // the first
	listening listening
	queries   queries
	onDisk    atomic.Pointer[error] // why the configuration on disk does not load; nil: it does, as far as is known
	status    *unixListener         // where `status` asks; nil until it is made
	serve     func(net.Listener)
	fdstore   *fdstore
	kernel    *attest.Kernel
	watching  func() // has the kernel asked from now on
	started   time.Time
	ready     chan struct{} // closed at READY=1
}

// Run serves until ctx is done, and returns when nothing is left running. A configuration that
// cannot be loaded is an error (what Load returned) when started by hand; with a listener of
// systemd's it is a state: READY, and 503 with the reason.
func Run(ctx context.Context, o Options) error {
	s := newService(o)
	all, queries, left, err := inherited()
	if err != nil {
		return err
	}
	for _, c := range queries {
		s.queries.add(c)
	}
	defer s.queries.leave()
	s.fdstore.inherit(left)
	if len(all) == 0 { // started by hand: beside a running service that is a mistake
		if err := s.listenStatus(ctx); errors.Is(err, errSocketInUse) {
			return err
		}
		defer s.leaveStatus()
	}
	kube.RouteKlog(s.log) // once for the process, so behind what ends a second one
	first, err := s.load(nil)
	switch {
	case err == nil && len(all) == 0:
		var l net.Listener
		l, err = listen(ctx, "listen", first.config.Listen)
		all = []net.Listener{l}
	case err == nil:
		sortListeners(all, first.config.Listen)
	case len(all) > 0:
		first, err = brokenConfig(err), nil
	}
	if err != nil {
		if first != nil {
			first.stop()
		}
		return err
	}
	return s.run(ctx, first, all...)
}

// leaveStatus removes the status socket where nothing was served.
func (s *Service) leaveStatus() {
	if s.status != nil {
		_ = s.status.Close()
	}
}

func newService(o Options) *Service {
	s := &Service{options: o, log: logrus.New(), registry: prometheus.NewRegistry(), started: time.Now(),
		ready: make(chan struct{})}
	if s.options.Stderr == nil {
		s.options.Stderr = os.Stderr
	}
	configureLog(s.log, config.Default().Log, s.options.Stderr)
	s.fdstore = newFDStore(os.Getenv("NOTIFY_SOCKET"), s.log)
	s.kernel = attest.NewKernel(attest.KernelOptions{CgroupRoot: o.CgroupRoot, Socket: namespaceSocket(o.RunDir),
		Spared:     routing.HostCgroups(),
		Redirected: []netip.AddrPort{routing.MetadataServer(), routing.MetadataServer6()}, Log: s.log,
		Registerer: s.registry})
	s.metrics = newMetrics(s.registry, o)
	s.queries.Server = dns.New(dns.Options{IPv6: s.servesIPv6, Log: s.log, Registerer: s.registry})
	return s
}

// load makes an activeConfig of what the configuration says now, with what it can take over from
// old.
func (s *Service) load(old *activeConfig) (*activeConfig, error) {
	c, err := s.options.Load()
	if err != nil {
		return nil, err
	}
	configureLog(s.log, c.Log, s.options.Stderr)
	return s.newActive(c, old)
}

// run serves on all listeners, first by what first says. The server's own probe asks the first one.
func (s *Service) run(ctx context.Context, first *activeConfig, all ...net.Listener) error {
	s.listener = all[0]
	s.inForce.Store(first)
	s.metrics.inForce(first)
	s.metrics.read(first.Broken)
	s.server = server.New(server.Options{Listener: all[0], Log: s.log, Registerer: s.registry}, &first.Active)
	s.describe(first)
	defer func() { s.active().stop() }()

	g, gctx := errgroup.WithContext(ctx)
	life, end := context.WithCancel(context.Background()) // longer than ctx: until whoever was accepted is answered
	defer end()
	s.watching = sync.OnceFunc(func() { g.Go(func() error { return s.kernel.Run(life) }) })
	s.startAttestation(first)
	s.listening.health = first.config.HealthListen
	s.serve = func(l net.Listener) {
		left, ok := s.listening.add(l)
		if !ok {
			return
		}
		g.Go(func() error {
			defer left()
			if err := s.server.Serve(l); gctx.Err() == nil {
				return fmt.Errorf("serving %s: %w", l.Addr(), err)
			}
			return nil
		})
	}
	for _, l := range all {
		s.serve(l)
	}
	if want := first.config.Listen; first.Broken == nil && want.Port() != 0 && !s.listening.on(want) {
		s.log.Error(s.elsewhere("listen", want))
	}
	if first.Broken == nil {
		s.listenIPv6(ctx, first.config.Listen6)
		s.listenDNS(ctx, first.config)
	}
	g.Go(func() error { return s.notifySystemd(gctx) })
	g.Go(func() error { return s.server.Run(gctx) })
	g.Go(func() error { return s.handOver(gctx) })
	g.Go(func() error { return s.reloadLoop(gctx) })
	g.Go(func() error { return s.serveStatus(gctx) })
	g.Go(func() error { return s.serveHealth(gctx, first.config.HealthListen) })
	g.Go(func() error {
		<-gctx.Done()
		s.drain()
		end()
		return nil
	})
	return g.Wait()
}

func (s *Service) active() *activeConfig { return s.inForce.Load() }

// activate puts next in force.
func (s *Service) activate(next *activeConfig) {
	s.metrics.inForce(next)
	s.server.Activate(&next.Active)
	close(s.inForce.Swap(next).superseded)
}

// startAttestation has the kernel asked from the first configuration on that goes by what it says.
func (s *Service) startAttestation(next *activeConfig) {
	if next.Broken == nil && next.config.Attestation.Mode == "kernel" {
		s.watching()
	}
}

// drain ends without losing a request: answers say Connection: close for a while and long
// polls are released, mints in flight come to their end, and only then is the listener left, which
// systemd goes on holding.
func (s *Service) drain() {
	_ = s.leaveTokens(s.active()) // tried again below
	notify(s.log, daemon.SdNotifyStopping+"\nSTATUS=stopping")
	s.log.Info("stopping")
	s.server.Drain()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	sleep(ctx, 200*time.Millisecond) // of 64 busy connections this loses none, and no wait loses all
	s.active().drain(ctx)
	if err := s.leaveTokens(s.active()); err != nil {
		s.log.WithError(err).Warn("the latest tokens are not handed over: the next process mints them again")
	}
	s.queries.leave()
	s.listening.leave()
	s.server.Shutdown(ctx)
}

// fileInterval is how often the configuration on disk is read while another one is in force.
const fileInterval = 5 * time.Second

// reloadLoop reads the configuration anew on SIGHUP, and each second while there is none: a change
// of any of its files ends that state. While there is one it only looks whether the files
// still load.
func (s *Service) reloadLoop(ctx context.Context) error {
	s.noteFile(s.active().Broken)
	broken, file := time.NewTicker(time.Second), time.NewTicker(fileInterval)
	defer broken.Stop()
	defer file.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.options.Reload:
			s.reload(ctx, true)
		case <-broken.C:
			if s.active().Broken != nil {
				s.reload(ctx, false)
			}
		case <-file.C:
			if s.active().Broken == nil {
				s.lookAtFile()
			}
		}
	}
}

// noteFile writes down whether the configuration on disk loads, and reports whether that is news.
func (s *Service) noteFile(err error) (news bool) {
	if err == nil {
		s.metrics.file.Set(1)
		return s.onDisk.Swap(nil) != nil
	}
	s.metrics.file.Set(0)
	before := s.onDisk.Swap(&err)
	return before == nil || (*before).Error() != err.Error()
}

// lookAtFile says in the log when the configuration on disk does not load any more, or does again.
func (s *Service) lookAtFile() {
	_, err := s.options.Load()
	switch news := s.noteFile(err); {
	case !news:
	case err == nil:
		s.log.Info("the configuration on disk loads again")
	default:
		messageid.ConfigRefused.In(s.log).Error(config.Outdated(err))
	}
}

// reload puts what the configuration says now in place of what it said. One that does not load
// changes nothing, unless there was none: then the reason is logged anew, if it is another one or
// somebody asked.
func (s *Service) reload(ctx context.Context, asked bool) {
	old := s.active()
	next, err := s.load(old)
	s.noteFile(err)
	if err == nil {
		if err = s.listenAlso(ctx, old, next.config.Listen); err != nil && next.backend != old.backend {
			next.stop()
		}
	}
	s.metrics.read(err)
	switch {
	case err != nil && old.Broken == nil:
		s.metrics.reloads.WithLabelValues("error").Inc()
		text := "reload failed: the previous configuration stays in force: " + config.Brief(err)
		messageid.ConfigRefused.In(s.log).Error(text)
		notify(s.log, "STATUS="+text)
		return
	case err != nil:
		if next = brokenConfig(err); !asked && next.Broken.Error() == old.Broken.Error() {
			return
		}
		s.metrics.reloads.WithLabelValues("error").Inc()
	default:
		s.metrics.reloads.WithLabelValues("ok").Inc()
		s.startAttestation(next)
		s.listenIPv6(ctx, next.config.Listen6)
		s.listenDNS(ctx, next.config)
		if next.backend != old.backend && next.backend != nil {
			next.settle(ctx) // until then the old one serves the pods that it knows
		}
	}
	s.activate(next)
	s.describe(next)
	notify(s.log, "STATUS="+s.summary())
	if old.backend != next.backend {
		go old.retire()
	}
}

// describe logs what the configuration came to.
func (s *Service) describe(now *activeConfig) {
	if now.unconfigured != nil {
		messageid.ConfigRefused.In(s.log).Error(now.unconfigured.Error() + "; until then pods are answered 503 with this " +
			"reason")
		return
	}
	for _, w := range now.config.Warnings {
		s.log.Warn(w)
	}
	if s.listening.health.IsValid() && s.listening.health != now.config.HealthListen {
		s.log.Warnf("healthListen is now %s: the service listens on %s until it is restarted: "+
			"systemctl restart gke-metadata-emulator", now.config.HealthListen, s.listening.health)
	}
}

// listenAlso follows a listen address that a reload changed: the rules send pods there from now on,
// and connections to the old one go on. Where systemd holds the listener, or the port needs a right
// that this process has not, that fails, and the reload with it; where there was no configuration
// before, any is better than none.
func (s *Service) listenAlso(ctx context.Context, old *activeConfig, a netip.AddrPort) error {
	if a.Port() == 0 || s.listening.on(a) || old.Broken == nil && old.config.Listen == a {
		return nil
	}
	l, err := listen(ctx, "listen", a)
	if err != nil && old.Broken != nil {
		s.log.WithError(err).Error(s.elsewhere("listen", a))
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w", s.elsewhere("listen", a), err)
	}
	s.serve(l)
	return nil
}

// listenIPv6 listens for IPv6 too (H-24), where systemd did not hand such a listener over. It is no
// reason for IPv4 not to be served.
func (s *Service) listenIPv6(ctx context.Context, a netip.AddrPort) {
	if !a.IsValid() || s.listening.on(a) {
		return
	}
	l, err := listen(ctx, "listen6", a)
	if err != nil {
		s.log.WithError(err).Error(s.elsewhere("listen6", a) + "; IPv4 is served")
		return
	}
	s.serve(l)
}

// elsewhere says that no listener is where the configuration's key wants it, and what to do.
func (s *Service) elsewhere(key string, want netip.AddrPort) string {
	return fmt.Sprintf("%s is %s in the configuration, but the service listens on %s: restart the socket (systemctl "+
		"daemon-reload && systemctl restart gke-metadata-emulator.socket), or change %[1]s back", key, want,
		s.listening.String())
}
