package service

import (
	"bytes"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// keeper does what systemd does for a unit with FileDescriptorStoreMax=4: it holds what the service
// stores, by name, and hands it to the next process.
type keeper struct {
	socket string

	mu   sync.Mutex
	held []*os.File
	said []string // what came, without READY=1 and the like
	over bool     // there was one too many
	sync chan struct{}
}

const (
	keeps   = 4
	barrier = "barrier" // of the test's
)

func newKeeper(t testing.TB, socket string) *keeper {
	t.Helper()
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	k := &keeper{socket: socket, sync: make(chan struct{})}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		k.listen(c)
	}()
	t.Cleanup(func() {
		_ = c.Close()
		<-ended
		if k.over {
			t.Errorf("more than %d descriptors were to be held", keeps)
		}
		for _, f := range k.held {
			_ = f.Close()
		}
	})
	return k
}

func (k *keeper) listen(c *net.UnixConn) {
	b, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4*8))
	for {
		n, oobn, _, _, err := c.ReadMsgUnix(b, oob)
		if err != nil {
			return
		}
		if string(b[:n]) == barrier {
			k.sync <- struct{}{}
			continue
		}
		k.heard(string(b[:n]), oob[:oobn])
	}
}

func (k *keeper) heard(state string, oob []byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	lines := strings.Split(state, "\n")
	name := ""
	for _, l := range lines {
		if v, ok := strings.CutPrefix(l, "FDNAME="); ok {
			name = v
		}
	}
	switch lines[0] {
	case "STOPPING=1", "FDSTOREREMOVE=1", "FDSTORE=1":
		k.said = append(k.said, strings.TrimSpace(lines[0]+" "+name))
	}
	switch {
	case lines[0] == "FDSTOREREMOVE=1":
		k.held = slices.DeleteFunc(k.held, func(f *os.File) bool { return f.Name() == name && f.Close() == nil })
	case len(oob) > 0:
		messages, _ := unix.ParseSocketControlMessage(oob)
		for _, m := range messages {
			fds, _ := unix.ParseUnixRights(&m)
			for _, fd := range fds {
				unix.CloseOnExec(fd)
				k.held = append(k.held, os.NewFile(uintptr(fd), name))
			}
		}
		k.over = k.over || len(k.held) > keeps
	}
}

// catchUp returns when all was heard that was said until now: systemd too reads its socket to the
// end before it takes note of a service's.
func (k *keeper) catchUp(t testing.TB) {
	t.Helper()
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: k.socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, barrier); err != nil {
		t.Fatal(err)
	}
	<-k.sync
}

// holding returns duplicates of what is held.
func (k *keeper) holding(t testing.TB) (files []*os.File) {
	t.Helper()
	k.catchUp(t)
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, f := range k.held {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, os.NewFile(uintptr(fd), f.Name()))
	}
	return files
}

// hold makes the keeper hold the files and nothing else.
func (k *keeper) hold(t testing.TB, files []*os.File) {
	t.Helper()
	k.catchUp(t)
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, f := range k.held {
		_ = f.Close()
	}
	k.held = files
}

func (k *keeper) names() (names []string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, f := range k.held {
		names = append(names, f.Name())
	}
	return names
}

// contents are those of all that is held.
func (k *keeper) contents(t testing.TB) (all [][]byte) {
	t.Helper()
	for _, f := range k.holding(t) {
		all = append(all, contentOf(t, f))
		_ = f.Close()
	}
	return all
}

// holds reports whether one snapshot is held, and whether it has the token.
func (k *keeper) holds(t testing.TB, value string) bool {
	t.Helper()
	all := k.contents(t)
	return len(all) == 1 && bytes.Contains(all[0], []byte(value))
}

func (k *keeper) heardSoFar() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.said)
}

func contentOf(t testing.TB, f *os.File) []byte {
	t.Helper()
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<30))
	if err != nil {
		t.Fatal(err)
	}
	return b
}
