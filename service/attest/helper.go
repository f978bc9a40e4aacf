package attest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// HelperOptions are what a Helper needs to know.
type HelperOptions struct {
	CgroupRoot string            // where the cgroups are mounted; "": /sys/fs/cgroup
	Listener   *net.UnixListener // of a unixpacket socket that root and our group may use; closed at the end
	User       int               // who may connect, beside root
	Log        logrus.FieldLogger
	Report     func(text string) // called when it listens, and when there is news for a person; nil: nobody
	Alive      func()            // called whenever the loop turns: every 30 s at the least; nil: nobody
}

const (
	sweepInterval = 30 * time.Second // between looks at all cgroups, whatever happens
	askedInterval = time.Second      // between looks at all cgroups because somebody asks
	// until one without a namespace of its own is looked at again; each look doubles it
	firstLook   = 5 * time.Millisecond
	lastLook    = 5 * time.Second
	sendTimeout = time.Second
	maxServers  = 4 // that are connected: those beyond are closed at once
	acceptAgain = 100 * time.Millisecond
)

// maxOthers bounds the network namespaces of no pod that are handed over: any user of the node may
// be allowed to make some.
const maxOthers = 512

// Helper finds the network namespaces of this node that pods, other containers and units live in,
// opens sockets in them and hands these over to the server, which may do none of that. All
// that it keeps of a namespace is a pidfd, so none outlives its processes. Nothing that a
// server says steers what it does, but that it looks.
type Helper struct {
	options HelperOptions
	home    uint64 // our own network namespace
	cgroups *cgroups
	poller  *poller
	over    <-chan struct{}
	events  chan func() // done by the loop, which alone touches found, servers and what they hold
	wake    chan struct{}

	found     map[uint64]*anchor // by the namespace's inode
	servers   map[*server]bool
	swept     time.Time    // when all cgroups were looked at last
	connected atomic.Int32 // how many servers
	problem   string       // what could not be done since then
	warned    string       // the last of these that was logged

	mu      sync.Mutex
	pending map[string]*look // cgroups to look at, by path: pods' own, and those of no pod
}

// anchor is a process by which a namespace is found. What is reported of it does not change,
// but for another.
type anchor struct {
	process
	key    uint64          // of the poller
	pods   []string        // whose processes are in it, by path
	others map[string]bool // cgroups of no pod that processes in it are of; a server is told of one
}

// look is when a cgroup is looked at next.
type look struct {
	due  time.Time
	wait time.Duration
}

// server is one that is connected.
type server struct {
	conn *net.UnixConn
	sent map[uint64]*anchor // what was handed over
}

// RunHelper finds and hands over until ctx is done.
func RunHelper(ctx context.Context, o HelperOptions) error {
	defer func() { _ = o.Listener.Close() }()
	if o.CgroupRoot == "" {
		o.CgroupRoot = DefaultCgroupRoot
	}
	root, err := podHierarchy(o.CgroupRoot)
	if err != nil {
		return err
	}
	h := &Helper{
		options: o, events: make(chan func()), wake: make(chan struct{}, 1),
		found: map[uint64]*anchor{}, servers: map[*server]bool{}, pending: map[string]*look{},
	}
	if h.home, err = networkNamespace("self"); err != nil {
		return err
	}
	if h.poller, err = newPoller(); err != nil {
		return err
	}
	defer h.poller.close()
	if h.cgroups, err = newCgroups(root, o.Log); err != nil {
		return err
	}
	defer h.cgroups.close()
	h.cgroups.changed = h.soon
	h.cgroups.walk()
	g, gctx := errgroup.WithContext(ctx)
	h.over = gctx.Done()
	g.Go(h.poller.run)
	g.Go(func() error { return h.cgroups.follow(func() {}) })
	g.Go(func() error { return h.accept(o.Listener) })
	g.Go(func() error { return h.loop() })
	g.Go(func() error {
		<-gctx.Done()
		_ = o.Listener.Close()
		h.poller.close()
		h.cgroups.close()
		return nil
	})
	err = g.Wait()
	for _, a := range h.found {
		a.close()
	}
	for s := range h.servers {
		_ = s.conn.Close()
	}
	return err
}

// accept serves whoever may connect: the directory of the socket says who can, and the kernel who
// did.
func (h *Helper) accept(l *net.UnixListener) error {
	for {
		c, err := l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if short(err) { // of descriptors or of memory: others' fault maybe, and it passes
			h.options.Log.WithError(err).Warnf("attest: accept failed: trying again in %s", acceptAgain)
			select {
			case <-h.over:
				return nil
			case <-time.After(acceptAgain):
			}
			continue
		}
		if err != nil {
			return fmt.Errorf("accept at %s: %w", l.Addr(), err)
		}
		if h.connected.Add(1) > maxServers {
			h.connected.Add(-1)
			_ = c.Close()
			continue
		}
		peer, err := peerOf(c)
		if err != nil || peer.Uid != 0 && int64(peer.Uid) != int64(h.options.User) {
			h.options.Log.WithError(err).Warnf("attest: connection refused: its user is neither root nor the service's: %+v",
				peer)
			h.connected.Add(-1)
			_ = c.Close()
			continue
		}
		go func() {
			defer h.connected.Add(-1)
			h.serve(c)
		}()
	}
}

// serve looks at all cgroups when a server comes, and when it asks.
func (h *Helper) serve(c *net.UnixConn) {
	s := &server{conn: c, sent: map[uint64]*anchor{}}
	h.do(func() {
		h.servers[s] = true
		h.look()
		h.complete(s)
	})
	defer h.do(func() {
		delete(h.servers, s)
		_ = c.Close()
	})
	for b := make([]byte, 2); ; {
		n, err := c.Read(b)
		if err != nil || n != 1 || b[0] != scanRequest {
			return
		}
		h.do(func() {
			h.look()
			h.complete(s)
		})
	}
}

// look looks at all cgroups, or where that was a moment ago at those that have changed since.
func (h *Helper) look() {
	if time.Since(h.swept) > askedInterval {
		h.sweep()
	} else {
		h.lookAt(h.allPending())
	}
}

// short reports whether the process, or the machine, is short of descriptors or memory.
func short(err error) bool {
	return errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ENOMEM) ||
		errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.ECONNABORTED)
}

// do has the loop do f.
func (h *Helper) do(f func()) {
	select {
	case h.events <- f:
	case <-h.over:
	}
}

// loop does all that there is to do, one after the other.
func (h *Helper) loop() error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for reported := ""; ; {
		select {
		case <-h.over:
			return nil
		case f := <-h.events:
			f()
		case <-h.wake:
		case <-timer.C:
		}
		if h.options.Alive != nil {
			h.options.Alive()
		}
		due, next := h.due()
		h.lookAt(due)
		if time.Since(h.swept) > sweepInterval {
			h.sweep()
		}
		timer.Reset(next)
		text := fmt.Sprintf("%d network namespaces, passed to %d services", len(h.found), len(h.servers))
		if h.problem != "" {
			text = h.problem
		}
		if text != reported && h.options.Report != nil {
			reported = text
			h.options.Report(text)
		}
	}
}

// soon has a cgroup looked at now, and then again until it has a namespace of its own: its
// processes come into it before they enter that, and a pod on the host network never has one.
func (h *Helper) soon(path string) {
	h.mu.Lock()
	h.pending[path] = &look{due: time.Now(), wait: firstLook}
	h.mu.Unlock()
	signal(h.wake)
}

// due returns the cgroups whose time has come, and how long there is nothing to do then. One of no
// pod, as nearly all of a node are, is left to the sweeps after 5 s.
func (h *Helper) due() (paths []string, next time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	next = sweepInterval
	for path, l := range h.pending {
		if !l.due.After(now) {
			paths = append(paths, path)
			if l.wait == lastLook && !h.cgroups.node.isPods(path) {
				delete(h.pending, path)
				continue
			}
			l.due, l.wait = now.Add(l.wait), min(2*l.wait, lastLook)
		}
		next = min(next, l.due.Sub(now))
	}
	return paths, next
}

func (h *Helper) allPending() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Collect(maps.Keys(h.pending))
}

// sweep looks at all cgroups, whatever events were missed. A pod's process is the better anchor, so
// pods come first.
func (h *Helper) sweep() {
	h.swept, h.problem = time.Now(), ""
	h.cgroups.walk()
	for _, a := range slices.Collect(maps.Values(h.found)) {
		if !a.there() {
			h.lose(a)
		}
	}
	h.lookAt(append(h.cgroups.podPaths(), h.cgroups.nodePaths()...))
}

// lookAt looks at the cgroups, and hands over what it finds.
func (h *Helper) lookAt(paths []string) {
	for _, path := range paths {
		settle := h.settleOther
		if h.cgroups.node.isPods(path) {
			settle = h.settlePod
		}
		if settle(path) {
			h.mu.Lock()
			delete(h.pending, path)
			h.mu.Unlock()
		}
	}
	for s := range h.servers {
		h.handOver(s)
	}
}

// keep notes by what a namespace is found, in the place of what was noted before.
func (h *Helper) keep(a *anchor) {
	if a.key == 0 {
		inode, pidfd := a.namespace, a.pidfd
		key, err := h.poller.add(pidfd, func() { h.ended(inode, pidfd) })
		if err != nil {
			h.cannot(err)
			a.close()
			return
		}
		a.key = key
	}
	h.found[a.namespace] = a
}

// ended is called by the poller.
func (h *Helper) ended(inode uint64, pidfd int) {
	h.do(func() {
		a := h.found[inode]
		switch {
		case a == nil || a.pidfd != pidfd:
		case a.there():
			h.poller.again(pidfd, a.key)
		default:
			h.reanchor(a)
		}
	})
}

// reanchor forgets a namespace by its process, and has it looked for by others: it may have some.
func (h *Helper) reanchor(a *anchor) {
	h.lose(a)
	for _, path := range a.paths() {
		h.soon(path)
	}
}

// lose forgets a namespace whose process is gone, or no longer in it, or of no cgroup that counts.
func (h *Helper) lose(a *anchor) {
	delete(h.found, a.namespace)
	h.poller.remove(a.pidfd, a.key)
	a.close()
	for s := range h.servers {
		if s.sent[a.namespace] != nil {
			delete(s.sent, a.namespace)
			h.send(s, helperMessage{Namespace: a.namespace, Gone: true})
		}
	}
}
