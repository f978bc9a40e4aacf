package service

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token"
)

// fdstore hands the cached tokens over to the next process: in a sealed memfd, which systemd
// holds for us over a restart and a SIGKILL (FileDescriptorStoreMax=), and which no file system
// knows. Where nobody holds descriptors for us, all of it does nothing.
//
// What the process before left is believed only if it is a regular file of our own user that nobody
// can write to any more, and of a configuration that leads to the same tokens. And it answers
// nobody by itself: which pod asks is known from the first synced watch on, and not before.
type fdstore struct {
	log    logrus.FieldLogger
	socket string // where systemd listens; "" where it does not

	mu    sync.Mutex
	left  []snapshot // what the process before left
	names []string   // of all that systemd holds, the newest last
}

// snapshot is a memfd that a process before us left. It holds a header and then the tokens.
type snapshot struct {
	header
	file *os.File
}

// header is what a snapshot begins with, after snapshotForm.
type header struct {
	Digest  [sha256.Size]byte // of the configuration
	Written int64             // on the clock of the boot, which nobody sets, in nanoseconds
}

const (
	snapshotForm = "gke-metadata-emulator snapshot 1\n"
	headerLength = len(snapshotForm) + sha256.Size + 8

	// mostHeld is what we leave in systemd's hands at a time: one, and another while it takes the
	// place of the first. FileDescriptorStoreMax= is more, for what a process before us could not
	// have removed.
	mostHeld = 2

	allSeals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
)

// newFDStore returns the store behind a $NOTIFY_SOCKET. Before systemd 254 nothing says whether it
// holds descriptors for us; one that does not closes what it gets.
func newFDStore(socket string, log logrus.FieldLogger) *fdstore {
	if !strings.HasPrefix(socket, "/") && !strings.HasPrefix(socket, "@") { // none, or a virtual machine's vsock
		socket = ""
	}
	return &fdstore{log: log, socket: socket}
}

// inherit takes over the descriptors that systemd gave us beside the listener, and has those that
// are no snapshot of ours removed.
func (f *fdstore) inherit(files []*os.File) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, file := range files {
		h, err := inspect(file)
		if err == nil {
			f.left = append(f.left, snapshot{h, file})
			continue
		}
		f.log.WithError(err).Warnf("file descriptor %q from systemd is discarded", file.Name())
		_ = file.Close()
		if f.remove(file.Name()) != nil {
			f.names = append(f.names, file.Name()) // for put to try again
		}
	}
	slices.SortFunc(f.left, func(a, b snapshot) int { return cmp.Compare(a.Written, b.Written) })
	for _, s := range f.left {
		f.names = append(f.names, s.file.Name())
	}
}

// tokens returns what the newest snapshot of the digest holds, nil where there is none.
func (f *fdstore) tokens(digest [sha256.Size]byte) []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range slices.Backward(f.left) {
		if s.Digest != digest {
			continue
		}
		// the offset is everybody's
		b, err := io.ReadAll(io.NewSectionReader(s.file, int64(headerLength), token.LongestSnapshot))
		if err != nil {
			f.log.WithError(err).Warn("tokens of the previous process cannot be read")
			continue
		}
		return b
	}
	return nil
}

// handOver leaves the tokens for the next process: those of the backend in force when it takes
// over, and again after each change, but not more often than once a second.
func (s *Service) handOver(ctx context.Context) error {
	if s.fdstore.socket == "" {
		return nil
	}
	for said := ""; ; {
		now := s.active()
		err := s.leaveTokens(now)
		if err != nil && err.Error() != said {
			said = err.Error()
			s.log.WithError(err).Warn("tokens cannot be handed over to systemd for the next process: trying again")
		}
		if !sleep(ctx, time.Second) {
			return nil
		}
		if err != nil {
			continue
		}
		var changed <-chan struct{}
		if now.backend != nil {
			changed = now.cache.Changes()
		}
		select {
		case <-changed:
		case <-now.superseded:
		case <-ctx.Done():
			return nil
		}
	}
}

func (s *Service) leaveTokens(now *activeConfig) error {
	if now.backend == nil { // what is left stays, until there is a configuration again
		return nil
	}
	return s.fdstore.put(now.needs.digest(), now.cache.Snapshot)
}

// put leaves the tokens for the next process, in the place of all that was left before. An error
// passes: systemd's queue is full for a moment. Nothing waits for it.
func (f *fdstore) put(digest [sha256.Size]byte, tokens func() []byte) error {
	if f.socket == "" {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.keep(mostHeld - 1); err != nil { // before there are too many for a new one
		return err
	}
	now := bootTime()
	file, err := seal(slices.Concat([]byte(snapshotForm), digest[:], binary.BigEndian.AppendUint64(nil, uint64(now)),
		tokens()))
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }() // systemd has it, or nobody is to have it
	name := fmt.Sprintf("tokens-%d", now)
	if err := f.send("FDSTORE=1\nFDNAME="+name, int(file.Fd())); err != nil {
		return err
	}
	f.names = append(f.names, name)
	f.close()
	return f.keep(1)
}

// close closes what the process before left.
func (f *fdstore) close() {
	for _, s := range f.left {
		_ = s.file.Close()
	}
	f.left = nil
}

// keep has all but the newest n removed.
func (f *fdstore) keep(n int) error {
	for len(f.names) > n {
		if err := f.remove(f.names[0]); err != nil {
			return err
		}
		f.names = f.names[1:]
	}
	return nil
}

func (f *fdstore) remove(name string) error { return f.send("FDSTOREREMOVE=1\nFDNAME=" + name) }

// send tells systemd, by a socket that never blocks: its queue holds ten datagrams, and all
// services share it.
func (f *fdstore) send(state string, fds ...int) error {
	if f.socket == "" {
		return nil
	}
	s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("open a socket to systemd: %w", err)
	}
	defer func() { _ = unix.Close(s) }()
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	if err := unix.Sendmsg(s, []byte(state), rights, &unix.SockaddrUnix{Name: f.socket}, unix.MSG_NOSIGNAL); err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	return nil
}

// seal returns a memfd that holds b for ever.
func seal(b []byte) (*os.File, error) {
	const name, flags = "gke-metadata-emulator-tokens", unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate(name, flags|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate(name, flags)
	}
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	file := os.NewFile(uintptr(fd), name)
	_, err = file.Write(b)
	if err == nil {
		_, err = unix.FcntlInt(file.Fd(), unix.F_ADD_SEALS, allSeals)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("seal the tokens: %w", err), file.Close())
	}
	return file, nil
}

// inspect looks whether the file is a snapshot that a process of ours sealed.
func inspect(file *os.File) (h header, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		return h, fmt.Errorf("fstat: %w", err)
	}
	seals, err := unix.FcntlInt(file.Fd(), unix.F_GET_SEALS, 0)
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return h, errors.New("not a regular file")
	case int(st.Uid) != os.Geteuid():
		return h, fmt.Errorf("owned by uid %d, not by this user", st.Uid)
	case err != nil || seals&allSeals != allSeals:
		return h, errors.New("not sealed: another process can still write to it")
	case st.Size > int64(headerLength+token.LongestSnapshot):
		return h, fmt.Errorf("%d bytes, more than a snapshot has", st.Size)
	}
	b := make([]byte, headerLength)
	if _, err := file.ReadAt(b, 0); err != nil || !bytes.HasPrefix(b, []byte(snapshotForm)) {
		return h, errors.New("not a token snapshot of this version")
	}
	if _, err := binary.Decode(b[len(snapshotForm):], binary.BigEndian, &h); err != nil {
		return h, err
	}
	if h.Written > bootTime() {
		return h, errors.New("its time is later than now")
	}
	return h, nil
}

func bootTime() int64 {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &t) // it is in every kernel that has sealed memfds
	return t.Nano()
}

// digest says what the tokens depend on: what is not left out counts.
func (n needs) digest() [sha256.Size]byte {
	n.nodeName, n.prefetch, n.attestation = "", "", ""
	n.mintsPerPod, n.keysPerPod = 0, 0 // how many tokens, and for whom, and not which
	return sha256.Sum256(fmt.Appendf(nil, "%#v", n))
}
