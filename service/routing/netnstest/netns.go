// Package netnstest makes a node out of network namespaces: the node itself, its pods, and behind
// its uplink the cloud with the real metadata server's address and other hosts of the same LAN.
// Tests and the demo build on it; the service does not.
//
// It needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN) and touches nothing of the machine's own network.
// Namespaces are named like those of ip-netns(8), so a person can enter one that was left standing:
// ip netns exec NAME … (which hides cgroupfs: A-16).
package netnstest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Dir is where the namespaces are named, as ip-netns(8) does it.
const Dir = "/run/netns"

// ErrNeedsRoot is what New returns to a process that may not make namespaces.
var ErrNeedsRoot = errors.New("network namespaces need root (CAP_SYS_ADMIN and CAP_NET_ADMIN)")

// sequence tells apart the nodes of one process; the pid tells apart processes.
var sequence atomic.Uint32

// NS is one network namespace.
type NS struct {
	Name  string     // below Dir: gme-PID-N-NAME
	Addr  netip.Addr // its IPv4 address: a pod's, a neighbour's, the node's own
	Addr6 netip.Addr // its IPv6 address

	mu   sync.Mutex
	open []io.Closer // listeners, which would keep the namespace alive
}

// newNS makes a namespace with lo up.
func newNS(name string) (*NS, error) {
	if os.Geteuid() != 0 {
		return nil, ErrNeedsRoot
	}
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return nil, fmt.Errorf("this thread's network namespace: %w", err)
	}
	defer home.Close()
	made, err := netns.NewNamed(name) // moves this thread
	if back := netns.Set(home); back != nil {
		// The thread stays locked and so dies with its goroutine: nobody else may run on it.
		return nil, fmt.Errorf("return from namespace %s: %w", name, back)
	}
	runtime.UnlockOSThread()
	if err != nil {
		_ = os.Remove(filepath.Join(Dir, name))
		if errors.Is(err, unix.EPERM) {
			return nil, fmt.Errorf("%w: %w", ErrNeedsRoot, err)
		}
		return nil, fmt.Errorf("make network namespace %s: %w", name, err)
	}
	defer made.Close()
	ns := &NS{Name: name}
	if err := ns.Do(func() error { return run(loopback, unlimitedICMP) }); err != nil {
		return nil, errors.Join(err, ns.Close())
	}
	return ns, nil
}

// thisNS gives the namespace that the calling thread is in a name, if it has no link but lo and
// beside.
func thisNS(name, beside string) (*NS, error) {
	if os.Geteuid() != 0 {
		return nil, ErrNeedsRoot
	}
	links, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	for _, l := range links {
		if l.Flags&net.FlagLoopback == 0 && l.Name != beside {
			return nil, fmt.Errorf("this network namespace has %s: only one that has nothing but lo may be made a node", l.Name)
		}
	}
	ns := &NS{Name: name}
	if err := os.MkdirAll(Dir, 0o755); err != nil {
		return nil, err
	}
	if err := os.WriteFile(ns.Path(), nil, 0o444); err != nil {
		return nil, err
	}
	if err := unix.Mount("/proc/thread-self/ns/net", ns.Path(), "", unix.MS_BIND, ""); err != nil {
		return nil, errors.Join(fmt.Errorf("name this network namespace %s: %w", name, err), os.Remove(ns.Path()))
	}
	if err := ns.Do(loopback); err != nil {
		return nil, errors.Join(err, ns.Close())
	}
	return ns, nil
}

// Path is the file that stands for the namespace, for setns(2) and nsenter(1).
func (ns *NS) Path() string { return filepath.Join(Dir, ns.Name) }

// Do runs f with the calling goroutine's thread inside the namespace. Sockets made in f stay in the
// namespace; goroutines that f starts do not run in it. f may panic or call Goexit (as t.FailNow
// does).
func (ns *NS) Do(f func() error) (err error) {
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("this thread's network namespace: %w", err)
	}
	there, err := netns.GetFromPath(ns.Path())
	if err == nil {
		err = netns.Set(there)
		_ = there.Close()
	}
	if err != nil {
		_ = home.Close()
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace %s: %w", ns.Name, err)
	}
	defer func() {
		if back := netns.Set(home); back != nil {
			err = errors.Join(err, fmt.Errorf("return from namespace %s: %w", ns.Name, back)) // and the thread stays locked
		} else {
			runtime.UnlockOSThread()
		}
		_ = home.Close()
	}()
	return f()
}

// Dial connects from inside the namespace. addr is an IP address and a port: a name would be looked
// up on another thread.
func (ns *NS) Dial(ctx context.Context, network, addr string) (conn net.Conn, err error) {
	err = ns.Do(func() error {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, addr)
		return err
	})
	return conn, err
}

// Listen listens inside the namespace (tcp networks). The address need not be there yet
// (IP_FREEBIND), as with the service's socket unit. Close of the namespace or its node closes the
// listener.
func (ns *NS) Listen(network, addr string) (l net.Listener, err error) {
	err = ns.Do(func() error {
		lc := net.ListenConfig{Control: freeBind}
		lc.SetMultipathTCP(false) // as systemd
		l, err = lc.Listen(context.Background(), network, addr)
		return err
	})
	if err != nil {
		return nil, err
	}
	ns.keep(l)
	return l, nil
}

// ListenPacket is Listen for udp networks.
func (ns *NS) ListenPacket(network, addr string) (c net.PacketConn, err error) {
	err = ns.Do(func() error {
		lc := net.ListenConfig{Control: freeBind}
		c, err = lc.ListenPacket(context.Background(), network, addr)
		return err
	})
	if err != nil {
		return nil, err
	}
	ns.keep(c)
	return c, nil
}

func freeBind(_, _ string, raw syscall.RawConn) (err error) {
	if e := raw.Control(func(fd uintptr) {
		// IP_FREEBIND counts for IPv6 sockets too.
		err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1)
	}); e != nil {
		return e
	}
	return err
}

func (ns *NS) keep(c io.Closer) {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	ns.open = append(ns.open, c)
}

// Command is exec.CommandContext inside the namespace. It uses nsenter(1), since ip-netns(8) would
// mount another /sys.
func (ns *NS) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + ns.Path(), "--", name}, args...)...)
}

// Close closes the namespace's listeners and removes its name. The kernel frees the namespace, and
// its links with it, as soon as no process and no socket is left in it. It can be called again.
func (ns *NS) Close() error {
	ns.mu.Lock()
	open := ns.open
	ns.open = nil
	ns.mu.Unlock()
	for _, c := range open {
		_ = c.Close() // may have been closed by its user
	}
	err := unix.Unmount(ns.Path(), unix.MNT_DETACH)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", ns.Path(), err)
	}
	if err := os.Remove(ns.Path()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
