package attest

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// namespace is a network namespace whose sockets we can ask for: a pod's, another container's or
// unit's, or our own.
type namespace struct {
	inode      uint64 // 0: our own
	generation int    // of the helper that handed it over
	cgroups    []string
	ofNode     bool            // no pod's process is in it
	uids       map[string]bool // of all pods whose processes are in it; "" for a cgroup that names two
	pod        string          // UID of the one pod whose processes are in it; "" where there is none, or two
	evidence   *Evidence       // what it says by itself, where the kernel names no cgroups
	fault      error           // why it says nothing
	life       *atomic.Bool

	process    int // pidfd of a process in it; -1 for our own namespace
	processKey uint64
	route      *netlinkSocket
	routeKey   uint64
	warned     bool                  // that not all addresses are known
	addresses  map[netip.Addr]uint32 // and the interface of each; Kernel's lock holds it

	mu   sync.Mutex
	diag *netlinkSocket // nil once closed
}

// errClosed says that the namespace was closed while somebody wanted to ask it.
var errClosed = errors.New("the namespace is gone")

// newNamespace takes the descriptors over, also when it fails.
func newNamespace(inode uint64, process, diag, route int, buffer []byte) (*namespace, error) {
	n := &namespace{inode: inode, process: process, life: new(atomic.Bool)}
	n.life.Store(true)
	var err, err2 error
	n.diag, err = newNetlink(diag, make([]byte, 1024))
	n.route, err2 = newNetlink(route, buffer)
	if err = errors.Join(err, err2); err == nil {
		err = n.route.subscribeAddresses()
	}
	if err != nil {
		for _, fd := range []int{process, diag, route} {
			if fd >= 0 {
				_ = unix.Close(fd)
			}
		}
		return nil, err
	}
	return n, nil
}

// socket is netlinkSocket.socket.
func (n *namespace) socket(local, remote netip.AddrPort, device uint32) (socketFound, bool, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.diag == nil {
		return socketFound{}, false, errClosed
	}
	return n.diag.socket(local, remote, device)
}

// close lets go of the namespace: as long as its sockets are open it stays, and its links with it
//
func (n *namespace) close(p *poller) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.diag == nil {
		return
	}
	p.remove(n.route.fd, n.routeKey)
	_ = unix.Close(n.route.fd)
	_ = unix.Close(n.diag.fd)
	if n.process >= 0 {
		p.remove(n.process, n.processKey)
		_ = unix.Close(n.process)
	}
	n.diag = nil
}

func (n *namespace) closed() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.diag == nil
}

// pods notes whose processes were found in the namespace, by the cgroups of their pods; of one that
// is no pod's nothing can be said by it.
func (n *namespace) pods(node nodeRoot, cgroups []string) {
	n.cgroups, n.ofNode = cgroups, len(cgroups) > 0
	n.uids = map[string]bool{}
	for _, path := range cgroups {
		p, err := node.parse(path)
		switch {
		case err != nil:
			n.uids[""], n.fault, n.ofNode = true, err, false
		case p.pod == "":
			n.fault = fmt.Errorf("%w: a process of %s, which belongs to no pod, is in %s", ErrNoCgroup, path, n)
		default:
			n.uids[p.pod], n.pod, n.ofNode = true, p.pod, false
		}
	}
	if len(n.uids) > 1 {
		n.pod, n.fault = "", fmt.Errorf("%w: %s", ErrPods, n)
	}
	if n.fault == nil && n.pod != "" {
		n.evidence = &Evidence{Kind: ByNamespace, PodUID: n.pod, life: n.life}
	}
}

// String names the namespace for a person.
func (n *namespace) String() string {
	if n.inode == 0 {
		return "the node's network namespace"
	}
	return fmt.Sprintf("network namespace %d of %s", n.inode, strings.Join(n.cgroups, " and "))
}

// ended reports whether the process of a pidfd is dead.
func ended(pidfd int) bool {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 0)
		if err != unix.EINTR {
			return n != 0 || err != nil
		}
	}
}
