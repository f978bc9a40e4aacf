package attest

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// poller calls back when descriptors become readable. Go's own would want a goroutine for each.
type poller struct {
	fd   int
	file *os.File // fd, for Go's poller to wait on

	closed atomic.Bool

	mu    sync.Mutex
	next  uint64
	ready map[uint64]func()
}

func newPoller() (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // what os.NewFile goes by
		return nil, errors.Join(fmt.Errorf("epoll: %w", err), unix.Close(fd))
	}
	return &poller{fd: fd, file: os.NewFile(uintptr(fd), "epoll"), ready: map[uint64]func(){}}, nil
}

// add has ready called, from run's goroutine, once when fd becomes readable, and again after each
// again. It may be called without cause: when another descriptor got the number of one that was
// closed.
func (p *poller) add(fd int, ready func()) (key uint64, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.next++
	e := event(p.next)
	if err := unix.EpollCtl(p.fd, unix.EPOLL_CTL_ADD, fd, &e); err != nil {
		return 0, fmt.Errorf("epoll: %w", err)
	}
	p.ready[p.next] = ready
	return p.next, nil
}

func (p *poller) again(fd int, key uint64) {
	e := event(key)
	_ = unix.EpollCtl(p.fd, unix.EPOLL_CTL_MOD, fd, &e) // fails for one that was removed meanwhile
}

// remove is called before fd is closed.
func (p *poller) remove(fd int, key uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.ready, key)
	_ = unix.EpollCtl(p.fd, unix.EPOLL_CTL_DEL, fd, nil) // the file may be shared with another process, and would stay
}

func event(key uint64) unix.EpollEvent {
	return unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLONESHOT, Fd: int32(key), Pad: int32(key >> 32)}
}

// run calls back until close.
func (p *poller) run() error {
	raw, err := p.file.SyscallConn()
	if err != nil {
		return err
	}
	events := make([]unix.EpollEvent, 64)
	for {
		var n int
		var failed error
		err := raw.Read(func(fd uintptr) bool {
			n, failed = unix.EpollWait(int(fd), events, 0)
			return n != 0
		})
		switch {
		case p.closed.Load():
			return nil
		case err != nil:
			return fmt.Errorf("epoll: %w", err)
		case failed != nil && failed != unix.EINTR:
			return fmt.Errorf("epoll: %w", failed)
		}
		for _, e := range events[:max(n, 0)] {
			p.mu.Lock()
			ready := p.ready[uint64(uint32(e.Fd))|uint64(uint32(e.Pad))<<32]
			p.mu.Unlock()
			if ready != nil {
				ready()
			}
		}
	}
}

func (p *poller) close() {
	p.closed.Store(true)
	_ = p.file.Close()
}
