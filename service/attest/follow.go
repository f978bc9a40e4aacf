package attest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/messageid"
)

const (
	walkInterval = time.Second            // between walks for a cgroup that is not known, of 40 ms where there are 1000
	scanInterval = 100 * time.Millisecond // between two looks that the helper is asked for
	// between two looks at the addresses of one namespace, which its owner can change as he likes
	addressInterval = 20 * time.Millisecond
	retryInterval   = 250 * time.Millisecond // until a helper that is not there is tried again
)

// Run follows the cgroups, our own network namespace, and what the helper hands over, until ctx is
// done. It gives nothing up: what fails is logged, shown by Status, and tried again.
func (k *Kernel) Run(ctx context.Context) error {
	for {
		err := k.run(ctx)
		if ctx.Err() != nil {
			return nil
		}
		k.options.Log.WithError(err).Error("attest: the kernel cannot be queried: trying again in 5s")
		k.mu.Lock()
		k.status.Lacks = []string{err.Error()}
		k.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(5 * time.Second):
		}
	}
}

func (k *Kernel) run(ctx context.Context) (err error) {
	unified, err := unifiedHierarchy(k.options.CgroupRoot)
	if err != nil {
		return err
	}
	if hierarchy, err := podHierarchy(k.options.CgroupRoot); err == nil {
		k.node = findNode(hierarchy) // by which the helper names pods too
	}
	p, err := newPoller()
	if err != nil {
		return err
	}
	defer p.close()
	k.poller = p
	var groups *cgroups
	if unified {
		if groups, err = newCgroups(k.options.CgroupRoot, k.options.Log); err != nil {
			return err
		}
		defer groups.close()
		groups.walk()
	}
	defer func() { k.forget(groups, ctx.Err() == nil) }()
	if err := k.openOwn(groups); err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(p.run)
	if groups != nil {
		g.Go(func() error { return groups.follow(k.changed) })
		g.Go(func() error { return k.walkLoop(gctx, groups) })
	}
	g.Go(func() error { return k.helperLoop(gctx) })
	g.Go(func() error {
		<-gctx.Done()
		p.close()
		if groups != nil {
			groups.close()
		}
		return gctx.Err()
	})
	return g.Wait()
}

// openOwn makes our own namespace one that can be asked, once it answered for a connection of our
// own.
func (k *Kernel) openOwn(groups *cgroups) error {
	diag, err := openNetlink(unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return err
	}
	route, err := openNetlink(unix.NETLINK_ROUTE)
	if err != nil {
		return errors.Join(err, unix.Close(diag))
	}
	own, err := newNamespace(0, -1, diag, route, k.buffer)
	if err != nil {
		return err
	}
	named, err := tryOut(own)
	if err != nil {
		own.close(k.poller)
		return fmt.Errorf("query an own connection by sock_diag (kernel module tcp_diag): %w", err)
	}
	s := KernelStatus{Hierarchy: "cgroup2", Evidence: ByCgroup}
	const without = ": pods are identified by their network namespace only: pods on the host network are refused: boot " +
		"with cgroup v2 and Linux 5.9 or later"
	switch {
	case groups == nil:
		s.Hierarchy, s.Evidence = "cgroup1", ByNamespace
		s.Lacks = []string{"no cgroup v2" + without}
	case !named:
		s.Evidence = ByNamespace
		s.Lacks = []string{"sock_diag reports no cgroups" + without}
	}
	for _, l := range s.Lacks {
		k.options.Log.Warn("attest: " + l)
	}
	k.mu.Lock()
	k.own, k.cgroups, k.unified, k.status = own, groups, groups != nil && named, s
	k.mu.Unlock()
	return k.follow(own)
}

// tryOut reports whether the kernel names the cgroup of a socket of ours.
func tryOut(own *namespace) (named bool, err error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return false, err
	}
	defer func() { _ = l.Close() }()
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		return false, err
	}
	defer func() { _ = c.Close() }()
	f, ok, err := own.socket(addrPort(c.LocalAddr()), addrPort(c.RemoteAddr()), 0)
	if err == nil && !ok {
		err = ErrNoSocket
	}
	return f.cgroup != 0, err
}

// follow has changes of the namespace's addresses, and the end of its process, reported to us.
func (k *Kernel) follow(n *namespace) (err error) {
	k.routing.Lock()
	defer k.routing.Unlock()
	if n.process >= 0 {
		if n.processKey, err = k.poller.add(n.process, func() { k.processEnded(n) }); err != nil {
			return err
		}
	}
	if n.routeKey, err = k.poller.add(n.route.fd, func() { k.addressesChanged(n) }); err != nil {
		return err
	}
	k.readAddresses(n)
	return nil
}

func (k *Kernel) processEnded(n *namespace) {
	k.routing.Lock()
	over := !n.closed() && ended(n.process)
	if !over && !n.closed() {
		k.poller.again(n.process, n.processKey)
	}
	k.routing.Unlock()
	if over {
		k.drop(n)
	}
}

// addressesChanged reads the addresses at once, and then not again for a while.
func (k *Kernel) addressesChanged(n *namespace) {
	k.routing.Lock()
	defer k.routing.Unlock()
	k.readAddresses(n)
}

// readAddresses notes what addresses the namespace has. After addressInterval it reads them again,
// where they could not be read or changed meanwhile; else when the kernel tells of a change. The
// lock of the route sockets is held.
func (k *Kernel) readAddresses(n *namespace) {
	if n.closed() {
		return
	}
	found, err := n.route.addresses()
	if err != nil && err != errChanging && !n.warned { // its owner could make it happen again and again
		n.warned = true
		k.options.Log.WithError(err).WithField("namespace",
			n).Warn("attest: not all addresses of a network namespace are known")
	}
	if err != errTooMany {
		time.AfterFunc(addressInterval, func() {
			k.routing.Lock()
			defer k.routing.Unlock()
			switch {
			case n.closed():
			case err != nil:
				k.readAddresses(n)
			default:
				k.poller.again(n.route.fd, n.routeKey)
			}
		})
	}
	if err != nil && err != errTooMany && err != errChanging {
		return // with those that were known
	}
	k.mu.Lock()
	k.index(n, found)
	k.mu.Unlock()
	k.changed()
}

// index replaces what addresses lead to the namespace.
func (k *Kernel) index(n *namespace, addresses map[netip.Addr]uint32) {
	for a, device := range n.addresses {
		if now, ok := addresses[a]; ok && now == device {
			continue
		}
		others := slices.DeleteFunc(slices.Clone(k.byAddr[a]), func(h holder) bool { return h.namespace == n })
		if len(others) == 0 {
			delete(k.byAddr, a)
		} else {
			k.byAddr[a] = others
		}
	}
	for a, device := range addresses {
		if before, ok := n.addresses[a]; !ok || before != device {
			k.byAddr[a] = append(slices.Clone(k.byAddr[a]), holder{n, device})
		}
	}
	n.addresses = addresses
}

// drop forgets a namespace and lets go of it.
func (k *Kernel) drop(n *namespace) {
	k.routing.Lock()
	defer k.routing.Unlock()
	k.mu.Lock()
	if k.namespaces[n.inode] == n {
		delete(k.namespaces, n.inode)
		n.life.Store(false)
	}
	k.index(n, nil)
	k.mu.Unlock()
	n.close(k.poller)
	k.changed()
}

// forget ends a run. Where another follows, what was evidence may have died unseen; at the end of
// all, who is being answered still is.
func (k *Kernel) forget(groups *cgroups, dead bool) {
	if dead && groups != nil {
		groups.dieAll()
	}
	k.routing.Lock()
	defer k.routing.Unlock()
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.own != nil {
		k.own.close(k.poller)
	}
	for _, n := range k.namespaces {
		if dead {
			n.life.Store(false)
		}
		n.close(k.poller)
	}
	k.own, k.cgroups = nil, nil
	clear(k.namespaces)
	clear(k.byAddr)
}

// walkLoop looks at all cgroups when one is not known.
func (k *Kernel) walkLoop(ctx context.Context, groups *cgroups) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-k.walk:
			groups.walk()
			k.changed()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(walkInterval):
		}
	}
}

// helperLoop stays connected with the helper.
func (k *Kernel) helperLoop(ctx context.Context) error {
	for said := ""; ctx.Err() == nil; {
		err := k.listenToHelper(ctx)
		if ctx.Err() != nil {
			return nil
		}
		k.helperIs(false, err.Error())
		if err.Error() != said {
			said = err.Error()
			messageid.HelperAway.In(k.options.Log).WithError(err).Warn("attest: gke-metadata-emulator-attest.service is " +
				"not connected: known pods are served, new ones wait")
		}
		select {
		case <-ctx.Done():
		case <-time.After(retryInterval):
		}
	}
	return nil
}

// listenToHelper takes what the helper hands over until one of the two ends it.
func (k *Kernel) listenToHelper(ctx context.Context) error {
	c, err := dialHelper(ctx, k.options.Socket)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	complete := make(chan struct{}, 1)
	go k.askHelper(ctx, c, complete)

	k.generation++
	k.helperIs(true, "")
	buffer := make([]byte, maxMessage)
	for first := true; ; {
		m, fds, err := receiveMessage(c, buffer)
		switch {
		case err != nil:
			return err
		case m.Complete:
			if first {
				k.options.Log.Info("attest: gke-metadata-emulator-attest.service is connected")
				k.dropOlder(k.generation)
				first = false
			}
			k.helperIs(true, m.Problem)
			k.done.Store(k.begun.Load()) // there is one at a time
			k.changed()
			signal(complete)
		case m.Gone:
			k.mu.RLock()
			n := k.namespaces[m.Namespace]
			k.mu.RUnlock()
			if n != nil {
				k.drop(n)
			}
		default:
			if err := k.take(m, fds); err != nil {
				return err
			}
		}
	}
}

// askHelper asks for a look at all pods when somebody wants one: one at a time, and not too often.
func (k *Kernel) askHelper(ctx context.Context, c *net.UnixConn, complete <-chan struct{}) {
	for {
		select { // the helper looks by itself when we come
		case <-ctx.Done():
			return
		case <-complete:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(scanInterval):
		}
		select {
		case <-ctx.Done():
			return
		case <-k.scan:
		}
		k.begun.Add(1)
		if _, err := c.Write([]byte{scanRequest}); err != nil {
			_ = c.Close()
			return
		}
	}
}

// take makes a namespace of what the helper handed over. One that was known is asked by the new
// sockets from then on.
func (k *Kernel) take(m helperMessage, fds []int) error {
	n, err := newNamespace(m.Namespace, fds[0], fds[1], fds[2], k.buffer)
	if err != nil {
		return err
	}
	n.pods(k.node, m.Cgroups)
	n.generation = k.generation
	k.mu.Lock()
	old := k.namespaces[n.inode]
	if old != nil && old.evidence != nil && n.evidence != nil && old.evidence.PodUID == n.evidence.PodUID {
		n.evidence, n.life = old.evidence, old.life
	}
	k.namespaces[n.inode] = n
	k.mu.Unlock()
	err = k.follow(n)
	if old != nil {
		if old.life != n.life {
			old.life.Store(false)
		}
		k.drop(old)
	}
	if err != nil {
		k.drop(n)
	}
	return err
}

// dropOlder forgets what a helper before this one handed over and this one did not find.
func (k *Kernel) dropOlder(generation int) {
	var old []*namespace
	k.mu.RLock()
	for _, n := range k.namespaces {
		if n.generation != generation {
			old = append(old, n)
		}
	}
	k.mu.RUnlock()
	for _, n := range old {
		k.drop(n)
	}
}
