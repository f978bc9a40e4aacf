package service

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
)

// errSocketInUse is wrapped by listenUnix where a process listens at the path already.
var errSocketInUse = errors.New("socket in use")

// unixListener is a listener whose Close removes its socket file, and never that of another
// process.
type unixListener struct {
	*net.UnixListener
	path string
	file fs.FileInfo // what the listener made
}

// listenUnix listens at path, which our group may use. It replaces the socket file of a dead
// process. Where a process listens there, the error wraps errSocketInUse and names that process;
// unit says which unit's socket it is.
func listenUnix(ctx context.Context, network, path, unit string) (*unixListener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	unlock, err := lockDirectory(ctx, filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := removeStale(ctx, network, path, unit); err != nil {
		return nil, err
	}
	l, err := new(net.ListenConfig).Listen(ctx, network, path)
	if err != nil {
		return nil, err
	}
	u := &unixListener{UnixListener: l.(*net.UnixListener), path: path}
	u.SetUnlinkOnClose(false) // Go would remove whatever is at the path
	u.file, err = os.Lstat(path)
	if err = errors.Join(err, os.Chmod(path, 0o660)); err != nil {
		return nil, errors.Join(err, u.Close())
	}
	return u, nil
}

// removeStale removes a socket file at which nobody listens.
func removeStale(ctx context.Context, network, path, unit string) error {
	c, err := new(net.Dialer).DialContext(ctx, network, path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, unix.ECONNREFUSED):
		return os.Remove(path)
	case err == nil:
		defer func() { _ = c.Close() }()
		return fmt.Errorf("%w: %s listens at %s: stop that process first (systemctl stop %s, if it is the unit's)",
			errSocketInUse, processOf(c), path, unit)
	case errors.Is(err, unix.EAGAIN): // its backlog is full
		return fmt.Errorf("%w: a process that does not answer listens at %s: restart it (systemctl restart %s)",
			errSocketInUse, path, unit)
	}
	return fmt.Errorf("%w: %s may be another process's: find it with ss -xlp: %w", errSocketInUse, path, err)
}

// processOf names the process that listens at the other end of a Unix connection.
func processOf(c net.Conn) string {
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return "a process"
	}
	var peer *unix.Ucred
	if e := raw.Control(func(fd uintptr) {
		peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET,
			unix.SO_PEERCRED)
	}); e != nil || err != nil {
		return "a process"
	}
	name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", peer.Pid)) // none where /proc does not show it
	return fmt.Sprintf("process %d (%s)", peer.Pid,
		cmp.Or(strings.TrimSpace(string(name)), fmt.Sprintf("of user %d", peer.Uid)))
}

// Close removes the socket file if it is still the one that the listener made.
func (l *unixListener) Close() error {
	err := l.UnixListener.Close()
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	unlock, lockErr := lockDirectory(ctx, filepath.Dir(l.path))
	if lockErr != nil { // what is left is replaced by the next process
		return err
	}
	defer unlock()
	if now, statErr := os.Lstat(l.path); statErr == nil && os.SameFile(now, l.file) {
		err = errors.Join(err, os.Remove(l.path))
	}
	return err
}

// lockDirectory keeps others of us from replacing sockets in the directory. Looking who listens,
// removing and binding are three steps, and two processes that start at once must not take each
// other's socket.
func lockDirectory(ctx context.Context, dir string) (unlock func(), err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for {
		err := unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return func() { _ = d.Close() }, nil
		case !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR), !sleep(ctx, 5*time.Millisecond):
			_ = d.Close()
			return nil, fmt.Errorf("lock directory %s: %w: find the process that holds it with lsof %[1]s", dir, err)
		}
	}
}

// bindError says why a TCP address could not be bound, by whom it is used, and what to do. key is
// the configuration's.
func bindError(key string, a netip.AddrPort, err error) error {
	remedy := "check that the address is valid on this node"
	switch by := routing.Listener(a); {
	case errors.Is(err, unix.EADDRINUSE) && by.PID == "1":
		remedy = fmt.Sprintf("systemd listens on %s for a socket unit: start the service by its unit (systemctl restart "+
			"gke-metadata-emulator), or choose another %s", by.At, key)
	case errors.Is(err, unix.EADDRINUSE) && by.PID != "":
		remedy = fmt.Sprintf("%s listens on %s: stop it, or choose another %s", by, by.At, key)
	case errors.Is(err, unix.EADDRINUSE):
		remedy = fmt.Sprintf("find the process with `ss -tanp 'sport = :%d'` as root, and stop it, or choose another %s",
			a.Port(), key)
	case errors.Is(err, fs.ErrPermission):
		remedy = fmt.Sprintf("port %d needs root or the unit: systemctl start gke-metadata-emulator", a.Port())
	}
	return fmt.Errorf("%s %s: %w: %s", key, a, err, remedy)
}
