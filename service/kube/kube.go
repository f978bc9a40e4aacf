// Package kube answers one question: which pods are on this node, what do their ServiceAccounts'
// annotations say, and what token does a ServiceAccount get?
//
// It uses the node's own kubelet credential, or any other kubeconfig, and reads the file again when
// it changes. A watch keeps an index of this node's pods. ServiceAccounts are read one by one,
// since a node may do no more (N-02 and N-03, a node's rights). The package keeps nothing that no
// live pod of this node uses (K-04, only accounts in use). A missing kubeconfig, an unavailable API
// server and a missing grant are states: each has its own error, which says what to do.
package kube

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"k8s.io/apimachinery/pkg/util/wait"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// Options say how to reach the cluster. The zero value finds kubelet's credential and requests
// tokens with the API server's own audience.
type Options struct {
	Kubeconfig string                    // "" = the first of Places that exists
	Places     []string                  // nil = Places()
	Copied     string                    // where root puts a Copy of a file that this user may not read; "" = none
	NodeName   string                    // "" = the credential's, else the host's
	Audience   string                    // of tokens; also named in the RBAC rule (G-17, the token's audience)
	Hosts      []workload.ServiceAccount // of processes of the node; their tokens are bound to no pod
	UserAgent  string                    // "" = gke-metadata-emulator
	Poll       time.Duration             // how often the kubeconfig and its files are read; 0 = 2 s
	Log        logrus.FieldLogger
	Metrics    *Metrics // nil = nobody reads what is counted. Gauges: Cluster.Collect
}

// Cluster is what this node knows of its cluster. Its methods may be called concurrently, before
// and during Run.
type Cluster struct {
	kubeconfig, nodeName, audience, userAgent string
	copied                                    string
	places                                    []string
	poll, refresh, watchAgain                 time.Duration
	backoff                                   wait.Backoff
	log                                       logrus.FieldLogger
	metrics                                   *Metrics
	codec                                     codec
	life                                      context.Context // of reads that continue without their caller
	end                                       context.CancelFunc
	kick                                      chan struct{} // makes Run read the kubeconfig now

	client   atomic.Pointer[client]
	pods     *pods
	accounts *accounts

	mu sync.Mutex
	state
	mismatch atomic.Pointer[nameMismatch]
}

// state is what Status shows besides the pods. Cluster.mu guards it.
type state struct {
	path, kind, server, identity, node string
	expires                            time.Time // the client certificate; zero: there is none
	unseen                             error     // why pods cannot be seen; nil when they can
	since                              time.Time // of the last contact
	away                               bool
	awaySaid                           time.Time
	lastError                          string
	lastErrorAt                        time.Time
	grants                             map[string]*Grant
}

type nameMismatch struct{ configured, credential string }

// New returns a Cluster. It does nothing until Run.
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
		kubeconfig: o.Kubeconfig, copied: o.Copied, nodeName: o.NodeName, audience: o.Audience, userAgent: o.UserAgent,
		places: o.Places,
		poll:   o.Poll, refresh: refreshEvery, watchAgain: watchAgain, backoff: relist(),
		log: o.Log, codec: newCodec(), kick: make(chan struct{}, 1),
		state: state{since: time.Now(), grants: map[string]*Grant{}},
	}
	c.life, c.end = context.WithCancel(context.Background())
	c.pods = newPods(o.Hosts, o.Log.Debugf)
	c.accounts = newAccounts()
	if c.metrics = o.Metrics; c.metrics == nil {
		c.metrics = NewMetrics(prometheus.NewRegistry())
	}
	return c
}

// Run follows the cluster until ctx is done, and then returns nil. It is called once.
func (c *Cluster) Run(ctx context.Context) error {
	defer c.end()
	ctx = withLogger(ctx, c.log)
	var wg sync.WaitGroup
	wg.Go(func() { c.followAccounts(ctx) })
	defer wg.Wait()

	last := new(client) // of the previous session
	for s := c.next(ctx, nil); s != nil; {
		session, stop := context.WithCancel(ctx)
		var done sync.WaitGroup
		done.Go(func() { c.serve(session, s) })
		next := c.next(ctx, s)
		stop()
		done.Wait()
		last.close()
		last, s = s.client, next
		time.AfterFunc(2*callTimeout, last.close) // mints in flight may still use it
	}
	last.close()
	return nil
}

// session is a credential and its connections.
type session struct {
	*credential
	client *client
}

// next waits for a usable credential that differs from the present one. It returns nil when ctx is
// done.
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
			// One cause is a certificate whose key is not written yet.
			err = fmt.Errorf("%w: %s cannot be used: %w", ErrNotConfigured, cred.path, err)
		}
		switch {
		case err == nil:
			said = ""
		case said != err.Error():
			// Without a credential this is the state; otherwise the old credential stays in use.
			said = err.Error()
			say, then := c.log.Warn, "the previous credential stays in use"
			if present == nil {
				then = "trying again"
				c.setProblem(err)
			}
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errNowhere) || errors.Is(err, ErrIncomplete) {
				say = c.log.Info // normal until kubelet has joined the cluster, and while it writes a new certificate
			}
			say(fmt.Sprintf("%v: %s", err, then))
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
	c.expires = s.expires
	c.mu.Unlock()
	c.client.Store(s.client)
	c.log.WithFields(logrus.Fields{"kubeconfig": s.path, "server": s.server}).Info("using the Kubernetes API")

	delay := c.backoff // a copy, since Step changes it
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

// At returns the live pods of this node that have the address. Pods on the host network have no
// address of their own.
//
// changed is closed at the next change of the index, also when there is an error. An error means
// that no address can be trusted: the index was never filled, or the API server does not answer and
// the address may belong to another pod by now.
//
// The slice is shared and must not be written to. At neither locks nor allocates.
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

// Of returns the live pod of this node with the UID, also a pod on the host network or without an
// address. A static pod is known by the UID in its cgroup's name, and has no ServiceAccount.
//
// changed is as At's. An error says why an unknown UID may be a pod's all the same. A known pod
// stays known while the API server is unavailable, since a UID has one owner for ever.
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

// Known returns nil once the pods of this node were listed, else why they were not. changed is
// closed when that may have changed.
func (c *Cluster) Known() (changed <-chan struct{}, err error) {
	x := c.pods.current.Load()
	if !x.synced {
		err = c.problem()
	}
	return x.changed, err
}

// ServiceAccounts returns, sorted, the ServiceAccounts of live pods of this node, also of pods on
// the host network, and those of Options.Hosts. It returns nil while the pods are unknown; the
// caller must not drop anything then.
//
// changed is closed at the next change of the index. The slice is shared and must not be written
// to.
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

// wake makes Run read the kubeconfig now.
func (c *Cluster) wake() {
	select {
	case c.kick <- struct{}{}:
	default:
	}
}
