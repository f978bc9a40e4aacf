package service

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/server"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// activeConfig is all that follows from one configuration, or from having none. It is immutable; a
// reload puts another one in its place.
type activeConfig struct {
	server.Active
	config       config.Config
	unconfigured error // why there is no configuration, as config.NotConfigured says; nil: there is one
	*backend
	superseded chan struct{} // closed when another one took over
}

// backend is the costly part of an activeConfig: watch and cache. A reload that does not concern it
// keeps it.
type backend struct {
	needs    needs
	cluster  *kube.Cluster
	cache    *token.Cache
	attestor *attest.Attestor
	replaced chan struct{} // closed when another backend took over
	accounts accountReader
	gauges   *prometheus.Registry // of its state; what it counts is in the registry of the process
	proxy    string               // by which Google is asked
	end      func()               // and waits until it did
}

// retire is stop for a backend whose successor serves: those whom it holds move on, and mints come
// to their end.
func (b *backend) retire() {
	if b == nil {
		return
	}
	close(b.replaced)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	b.cache.Drain(ctx)
	b.end()
}

// stop ends what runs for the backend; a broken activeConfig has none.
func (b *backend) stop() {
	if b != nil {
		b.end()
	}
}

// drain waits for mints in flight.
func (b *backend) drain(ctx context.Context) {
	if b != nil {
		b.cache.Drain(ctx)
	}
}

// needs is what of the configuration a backend depends on. It is comparable.
type needs struct {
	kubeconfig, nodeName, audience, unlinked, prefetch string
	attestation                                        string // how, and for which processes of the node: lists as text
	identity                                           config.WorkloadIdentity
	google                                             config.Google
	ca                                                 [sha256.Size]byte // of what google.caFile holds
	mintsPerPod, keysPerPod                            int
}

func needsOf(c config.Config) (needs, error) {
	n := needs{attestation: fmt.Sprintf("%q %q", c.Attestation, c.HostIdentities), kubeconfig: c.Kubeconfig,
		nodeName: c.NodeName, audience: c.TokenAudience, unlinked: c.ImpersonateUnlinked,
		prefetch: c.Prefetch, identity: c.WorkloadIdentity, google: c.Google, mintsPerPod: c.Limits.MintsPerPod,
		keysPerPod: c.Limits.KeysPerPod}
	if c.Google.CAFile != "" {
		pem, err := os.ReadFile(c.Google.CAFile)
		if err != nil {
			return needs{}, fmt.Errorf("google.caFile: %w", err)
		}
		n.ca = sha256.Sum256(pem)
	}
	return n, nil
}

// brokenConfig is in force while there is no configuration, for that reason.
func brokenConfig(reason error) *activeConfig {
	a := &activeConfig{config: config.Default(), superseded: make(chan struct{}),
		unconfigured: errors.New(config.NotConfigured(reason))}
	a.Active = server.Unconfigured(reason, a.config.Limits)
	a.Superseded = a.superseded
	return a
}

// settle waits until the backend knows its pods, but not for long: the API server may be away.
func (b *backend) settle(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	for {
		changed, err := b.cluster.Known()
		if err == nil {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// newActive makes what c leads to. It takes over the backend of old where c asks for the same one.
func (s *Service) newActive(c config.Config, old *activeConfig) (*activeConfig, error) {
	c = resolve(c)
	n, err := needsOf(c)
	if err != nil {
		return nil, err
	}
	a := &activeConfig{config: c, superseded: make(chan struct{})}
	if old != nil && old.backend != nil && old.needs == n {
		a.backend = old.backend
	} else if a.backend, err = s.newBackend(n, c, tokensFor(n, old, s.fdstore)); err != nil {
		return nil, err
	}
	tree, err := server.NewTree(c, a.accounts, a.cache)
	if err != nil {
		if old == nil || a.backend != old.backend {
			a.stop()
		}
		return nil, err
	}
	a.Active = server.Active{Tree: tree, HostCheck: c.HostCheck, Passthrough: c.Passthrough,
		ConnectionsPerPod: c.Limits.ConnectionsPerPod, RequestsPerPod: c.Limits.RequestsPerPod, Attestor: a.attestor,
		Changes: a.cluster.Changes, Superseded: a.superseded}
	return a, nil
}

// Validate finds what only the metadata tree can tell of a configuration that loads: extraMetadata
// that is in the way of what GKE serves. The error is a *config.Error; file is what the fault is
// said to be in.
func Validate(c config.Config, file string) error {
	if _, err := server.NewTree(c, nil, nil); err != nil {
		return &config.Error{Faults: []config.Fault{{File: file, Key: "extraMetadata", Problem: err.Error(),
			Remedy: "remove it, or write another path"}}}
	}
	return nil
}

// resolve finds out what the configuration leaves to be found out about the node.
func resolve(c config.Config) config.Config {
	if c.Instance.Hostname == "" {
		c.Instance.Hostname, _ = os.Hostname() // without one, there is none to serve
	}
	if c.Instance.ID == "" {
		seed, err := os.ReadFile("/etc/machine-id")
		if err != nil || len(strings.TrimSpace(string(seed))) == 0 {
			seed = []byte(c.Instance.Hostname)
		}
		c.Instance.ID = instanceID(strings.TrimSpace(string(seed)))
	}
	return c
}

// instanceID derives a positive int64 that stays the same for the machine's life, without giving
// the machine id away, which is confidential by machine-id(5) (E-10).
func instanceID(seed string) string {
	sum := sha256.Sum256([]byte("gke-metadata-emulator instance id " + seed))
	return strconv.FormatUint(max(1, binary.BigEndian.Uint64(sum[:])>>1), 10)
}

// tokensFor returns a snapshot of tokens that somebody with the same needs left: the backend
// before, or the process before.
func tokensFor(n needs, old *activeConfig, left *fdstore) []byte {
	if old != nil && old.backend != nil && old.needs.digest() == n.digest() {
		return old.cache.Snapshot()
	}
	return left.tokens(n.digest())
}

func (s *Service) newBackend(n needs, c config.Config, tokens []byte) (*backend, error) {
	b := &backend{needs: n, gauges: prometheus.NewRegistry(), replaced: make(chan struct{})}
	b.cluster = kube.New(kube.Options{
		Kubeconfig: n.kubeconfig, NodeName: n.nodeName, Audience: n.audience,
		UserAgent: "gke-metadata-emulator/" + s.options.Version, Copied: s.options.CredentialCopy,
		Hosts: accountsOf(c.HostIdentities), Log: s.log, Metrics: s.metrics.kube,
	})
	b.accounts = accountReader{b.cluster, n.unlinked}
	google, err := token.NewGoogle(token.GoogleOptions{
		Audience: n.identity.Audience, PoolName: n.identity.PoolName, STSURL: n.google.STSURL,
		IAMCredentialsURL: n.google.IAMCredentialsURL,
		Lifetime:          n.google.TokenLifetime, QuotaProject: n.google.QuotaProject, CAFile: n.google.CAFile,
		Kubernetes: b.accounts, Log: s.log, Metrics: s.metrics.token,
	})
	if err != nil {
		return nil, err
	}
	b.cache = token.NewCache(token.CacheOptions{Source: google, MintsPerPod: n.mintsPerPod, KeysPerPod: n.keysPerPod,
		Terminal: isAnnotationError, Metrics: s.metrics.token})
	b.gauges.MustRegister(b.cluster, b.cache)
	google.Federated = b.cache // one exchange a ServiceAccount (G-07)
	b.proxy = google.Proxy()
	if tokens != nil {
		switch taken, err := b.cache.Restore(tokens); {
		case err != nil:
			s.log.WithError(err).Warn("tokens of the previous process are discarded")
		case taken > 0:
			s.log.WithField("tokens", taken).Info("tokens of the previous process are used")
		}
	}
	b.attestor = attest.New(s.attestOptions(c, b))

	ctx, cancel := context.WithCancel(context.Background())
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return b.cluster.Run(ctx) })
	g.Go(func() error { return b.cache.Run(ctx) })
	g.Go(func() error { return b.prefetch(ctx) })
	b.end = func() {
		cancel()
		if err := g.Wait(); err != nil && !errors.Is(err, context.Canceled) {
			s.log.WithError(err).Error("the previous backend ended with an error")
		}
	}
	return b, nil
}

// attestOptions say what askers are known by.
func (s *Service) attestOptions(c config.Config, b *backend) attest.Options {
	o := attest.Options{Pods: b.cluster, ByAddress: c.Attestation.ByAddress, Proxies: c.Attestation.Proxies,
		Replaced: b.replaced, Metrics: s.metrics.attest}
	if c.Attestation.Mode == "kernel" {
		o.Kernel = s.kernel
	}
	for _, h := range c.HostIdentities {
		o.Hosts = append(o.Hosts, attest.Host(h))
	}
	return o
}

func isAnnotationError(err error) bool {
	var annotation *kube.AnnotationError
	return errors.As(err, &annotation)
}

// accountsOf are the ServiceAccounts of processes of the node.
func accountsOf(hosts []config.HostIdentity) (sas []workload.ServiceAccount) {
	for _, h := range hosts {
		sas = append(sas, h.ServiceAccount)
	}
	return sas
}

// accountReader reads ServiceAccounts' annotations, and takes those that are not linked for the
// operator's account where the operator wants that (G-18).
type accountReader struct {
	*kube.Cluster
	unlinked string
}

func (r accountReader) Account(ctx context.Context, sa workload.ServiceAccount,
	maxAge time.Duration) (workload.Account, error) {
	a, err := r.Cluster.Account(ctx, sa, maxAge)
	if err == nil && !a.Linked() {
		a.GoogleEmail = r.unlinked
	}
	return a, err
}

// anyAge: what is known of an account's annotations is good enough to fetch a token ahead (H-21).
const anyAge = -1

// prefetch keeps the cache to the ServiceAccounts that this node's pods use (K-04), and has the
// token that their clients will ask for first fetched before they do (H-21).
func (b *backend) prefetch(ctx context.Context) error {
	var reading sync.Map // ServiceAccounts whose annotations are waited for
	var g errgroup.Group
	defer func() { _ = g.Wait() }()
	for {
		sas, moved := b.cluster.ServiceAccounts()
		annotated := b.cluster.Changes()
		if sas != nil { // nil is "not known yet", and no word to forget by
			b.cache.Use(sas)
		}
		for _, sa := range sas {
			if b.needs.prefetch == "none" {
				break
			}
			if _, busy := reading.LoadOrStore(sa, true); busy {
				continue
			}
			g.Go(func() error {
				defer reading.Delete(sa)
				a, err := b.accounts.Account(ctx, sa, anyAge)
				if err == nil && (a.Linked() || b.needs.prefetch == "all") {
					b.cache.Prefetch(token.AccessToken(sa, a, nil))
				}
				return nil // kube has logged it, and says in status what is wrong
			})
		}
		select {
		case <-moved:
		case <-annotated:
		case <-ctx.Done():
			return nil
		}
	}
}
