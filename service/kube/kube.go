// Package kube answers one question: which pods live on this node, what do their ServiceAccounts say, and a token for one of them.
//
// It uses the node's own kubelet credential, or any kubeconfig, and reads it anew as it rotates. A watch keeps an index of
// this node's pods; ServiceAccounts are read one by one, since that is all a node may do (N-02, N-03). Nothing is kept that no live
// pod of this node uses (K-04). The absence of a kubeconfig, of the API server and of grants are states, not failures: each has an error that says what to do.
package kube

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"k8s.io/apimachinery/pkg/util/wait"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// Options say where the cluster is found. The zero value looks for kubelet's credential and asks for tokens with the API server's own audience.
type Options struct {
	Kubeconfig string                    // "" = the first of Places that exists
	Places     []string                  // nil = Places()
	Copied     string                    // where root puts a Copy of what this user may not read; "" = nowhere
	NodeName   string                    // "" = the credential's, else the host's
	Audience   string                    // of tokens; also the literal in the RBAC rule (G-17)
	Hosts      []workload.ServiceAccount // of processes of the node, whose tokens are bound to no pod
	UserAgent  string                    // "" = gke-metadata-emulator
	Poll       time.Duration             // how often the kubeconfig and its files are read; 0 = 2 s
	Log        logrus.FieldLogger
	Registerer prometheus.Registerer // of counters, which several Clusters may share; nil = they go nowhere. Gauges: Cluster.Collect
}

// Cluster is what this node knows of its cluster. Its methods may be called from many goroutines, before and during Run.
type Cluster struct {
	kubeconfig, nodeName, audience, userAgent string
	copied                                    string
	places                                    []string
	poll, refresh, watchAgain                 time.Duration
	backoff                                   wait.Backoff
	log                                       logrus.FieldLogger
	metrics                                   metrics
	codec                                     codec
	life                                      context.Context // of reads that outlive their asker
	end                                       context.CancelFunc
	kick                                      chan struct{} // look at the kubeconfig now

	client   atomic.Pointer[client]
	pods     *pods
	accounts *accounts

	mu sync.Mutex
	state
	mismatch atomic.Pointer[nameMismatch]
}

// state is what Status shows besides the pods. Guarded by Cluster.mu.
type state struct {
	path, kind, server, identity, node string
	trouble                            error     // why pods cannot be seen; nil when they can
	since                              time.Time // of the last contact
	away                               bool
	awaySaid                           time.Time
	lastError                          string
	lastErrorAt                        time.Time
	grants                             map[string]*Grant
}

type nameMismatch struct{ configured, credential string }

// New makes a Cluster; it does nothing until Run.
func New(o Options) *Cluster {
	if o.Places == nil {
		o.Places = Places()
	}
	if o.Poll <= 0 {
		o.Poll = 2 * time.Second
	}
	if o.UserAgent == "" {
		o.UserAgent = "gke-metadata-emulator"
	}
	if o.Log == nil {
		o.Log = quiet()
	}
	c := &Cluster{
		kubeconfig: o.Kubeconfig, copied: o.Copied, nodeName: o.NodeName, audience: o.Audience, userAgent: o.UserAgent, places: o.Places,
		poll: o.Poll, refresh: refreshEvery, watchAgain: watchAgain, backoff: relist(),
		log: o.Log, codec: newCodec(), kick: make(chan struct{}, 1),
		state: state{since: time.Now(), grants: map[string]*Grant{}},
	}
	c.life, c.end = context.WithCancel(context.Background())
	c.pods = newPods(o.Hosts, o.Log.Debugf)
	c.accounts = newAccounts()
	c.metrics = newMetrics(o.Registerer)
	return c
}

// Run keeps the Cluster in step with Kubernetes until ctx is done, and returns nil then. It is called once.
func (c *Cluster) Run(ctx context.Context) error {
	defer c.end()
	ctx = withLogger(ctx, c.log)
	var wg sync.WaitGroup
	wg.Go(func() { c.keepAccounts(ctx) })
	defer wg.Wait()

	last := new(client) // of the session before
	for s := c.next(ctx, nil); s != nil; {
		session, stop := context.WithCancel(ctx)
		var done sync.WaitGroup
		done.Go(func() { c.serve(session, s) })
		next := c.next(ctx, s)
		stop()
		done.Wait()
		last.close()
		last, s = s.client, next
		time.AfterFunc(2*callTimeout, last.close) // mints in flight may end on it
	}
	last.close()
	return nil
}

// session is a credential and its connections.
type session struct {
	*credential
	client *client
}

// next waits for a credential that differs from the present one and that a client can be made of. It returns nil when ctx is done.
func (c *Cluster) next(ctx context.Context, present *session) *session {
	t := time.NewTicker(c.poll)
	defer t.Stop()
	said := ""
	for {
		cred, err := c.find()
		if err == nil && (present == nil || cred.digest != present.digest) {
			var k *client
			if k, err = newClient(cred.config, c.codec, c.userAgent); err == nil {
				return &session{cred, k}
			}
			// For example a certificate whose key is not written yet.
			err = fmt.Errorf("%w: no client can be made of %s: %w", ErrNotConfigured, cred.path, err)
		}
		switch {
		case err == nil:
			said = ""
		case said != err.Error():
			// Without a credential this is the state; with one the old one goes on.
			said = err.Error()
			c.log.WithError(err).Warn("no usable kubeconfig; waiting for it")
			if present == nil {
				c.setProblem(err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		case <-c.kick:
		}
	}
}

// serve follows the node's pods with one credential.
func (c *Cluster) serve(ctx context.Context, s *session) {
	c.mu.Lock()
	moved := c.server != s.server && c.server != ""
	c.path, c.kind, c.server, c.identity = s.path, s.credential.kind(), s.server, s.user
	c.mu.Unlock()
	c.client.Store(s.client)
	c.log.WithFields(logrus.Fields{"kubeconfig": s.path, "server": s.server}).Info("using the Kubernetes API")

	delay := c.backoff // a copy: it counts
	for {
		node, user, err := c.identify(ctx, s.client, s.credential)
		if err == nil {
			c.mu.Lock()
			moved = moved || (c.node != node && c.node != "")
			c.identity, c.node = user, node
			c.mu.Unlock()
			if moved {
				c.pods.reset()
				c.accounts.forget()
			}
			c.follow(ctx, s.client, node)
			return
		}
		if ctx.Err() == nil {
			c.setProblem(err)
		}
		if !sleep(ctx, delay.Step()) {
			return
		}
	}
}

// At returns the live pods of this node that have the address; pods on the host network have none. Changed is closed at the next
// change of the index, also when there is an error. With an error nobody may be believed for an address: the index was never filled, or
// there is no word from the API server, and the address may have another owner by now. The callers are shared and must not be written to.
// It neither locks nor allocates on its way to an answer.
func (c *Cluster) At(a netip.Addr) (callers []workload.Caller, changed <-chan struct{}, err error) {
	x := c.pods.current.Load()
	if !x.synced {
		return nil, x.changed, c.problem()
	}
	if since, lost := c.pods.outOfTouch(); lost {
		return nil, x.changed, c.lostTouch(since)
	}
	return x.byAddress[a.Unmap()], x.changed, nil
}

// Of returns the live pod of this node with the UID, also one on the host network or without an address yet. A static pod is known by
// the UID that its cgroup names, and has no ServiceAccount. Changed is as At's. An error says why a pod may be there that is not known; one that is
// known stays so while the API server is away, since a UID has one owner only.
func (c *Cluster) Of(uid string) (caller workload.Caller, known bool, changed <-chan struct{}, err error) {
	x := c.pods.current.Load()
	if caller, known = x.byUID[uid]; known {
		return caller, true, x.changed, nil
	}
	if !x.synced {
		return caller, false, x.changed, c.problem()
	}
	if since, lost := c.pods.outOfTouch(); lost {
		err = c.lostTouch(since)
	}
	return caller, false, x.changed, err
}

// Known returns nil once the pods of this node were listed, else why they were not, and a channel that is closed when that may have changed.
func (c *Cluster) Known() (changed <-chan struct{}, err error) {
	x := c.pods.current.Load()
	if !x.synced {
		err = c.problem()
	}
	return x.changed, err
}

// ServiceAccounts returns those that live pods of this node use, also pods on the host network, and those of Options.Hosts, sorted. It is nil as long as that is not known:
// then nothing may be forgotten on its word. Changed is closed at the next change of the index. The slice is shared and must not be written to.
func (c *Cluster) ServiceAccounts() (sas []workload.ServiceAccount, changed <-chan struct{}) {
	x := c.pods.current.Load()
	if x.synced && x.accounts == nil {
		return []workload.ServiceAccount{}, x.changed
	}
	return x.accounts, x.changed
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// wake has the kubeconfig looked at now.
func (c *Cluster) wake() {
	select {
	case c.kick <- struct{}{}:
	default:
	}
}
