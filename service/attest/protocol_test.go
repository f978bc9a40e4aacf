package attest

import (
	"encoding/json"
	"errors"
	"net"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// asUser runs f with a thread of that user.
func asUser(t *testing.T, uid int, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends as it is
		for _, call := range []uintptr{unix.SYS_SETRESGID, unix.SYS_SETRESUID} {
			if _, _, errno := unix.RawSyscall(call, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
				t.Error(errno)
				return
			}
		}
		f()
	}()
	<-done
}

// unixPair is a connection of the kind that the helper speaks by.
func unixPair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err = net.DialUnix("unixpacket", nil, l.Addr().(*net.UnixAddr))
	if err != nil {
		t.Fatal(err)
	}
	b, err = l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

func TestMessages(t *testing.T) {
	a, b := unixPair(t)
	before := openFiles(t, "self")
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	buffer := make([]byte, maxMessage)
	for _, tt := range []struct {
		name  string
		m     helperMessage
		fds   []int
		fails bool
	}{
		{"a namespace", helperMessage{Namespace: 7, Cgroups: []string{"/kubepods/podx"}}, []int{pipe[0], pipe[1], pipe[0]},
			false},
		{"that is gone", helperMessage{Namespace: 7, Gone: true}, nil, false},
		{"all reported", helperMessage{Complete: true, Problem: "p"}, nil, false},
		{"too few descriptors", helperMessage{Namespace: 7}, []int{pipe[0]}, true},
		{"too many", helperMessage{Namespace: 7}, []int{pipe[0], pipe[0], pipe[0], pipe[0], pipe[0]}, true},
		{"some where none belong", helperMessage{Complete: true}, []int{pipe[0]}, true},
		{"no namespace", helperMessage{}, []int{pipe[0], pipe[0], pipe[0]}, true},
	} {
		if err := sendMessage(a, tt.m, tt.fds...); err != nil {
			t.Fatal(err)
		}
		m, fds, err := receiveMessage(b, buffer)
		if (err != nil) != tt.fails || !tt.fails && (m.Namespace != tt.m.Namespace || m.Complete != tt.m.Complete ||
			len(fds) != len(tt.fds)) {
			t.Errorf("%s: %+v, %v, %v", tt.name, m, fds, err)
		}
		for _, fd := range fds {
			if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
				t.Errorf("%s: descriptor %d: %v, %d", tt.name, fd, err, flags)
			}
			unix.Close(fd)
		}
	}
	if after := openFiles(t, "self"); after != before+2 {
		t.Errorf("%d descriptors before, and %d after", before+2, after)
	}
	a.Close()
	if _, _, err := receiveMessage(b, buffer); err == nil || errors.Is(err, net.ErrClosed) {
		t.Errorf("the end of the connection: %v", err)
	}
}

// Whatever comes, a message has the descriptors that belong to it, and a namespace with a path that
// is no pod's is nobody's evidence.
func FuzzMessage(f *testing.F) {
	f.Fuzz(func(t *testing.T, b, control []byte) {
		m, fds, err := parseMessage(b, control, 0)
		if err != nil {
			return
		}
		if len(fds) != m.descriptors() {
			t.Errorf("%d descriptors with %+v", len(fds), m)
		}
		n := &namespace{inode: m.Namespace}
		n.pods("", m.Cgroups)
		if n.evidence != nil && (n.fault != nil || n.evidence.PodUID == "") || n.fault != nil && n.evidence != nil {
			t.Errorf("%+v of %+v", n, m)
		}
		for _, path := range m.Cgroups {
			if n.evidence != nil && !nodeRoot("").isPods(path) {
				t.Errorf("%+v of %+v", n, m)
			}
			if (n.ofNode || n.pod == "" && n.evidence != nil) && nodeRoot("").isPods(path) {
				t.Errorf("a namespace of no pod: %+v", m)
			}
		}
		if _, err := json.Marshal(m); err != nil {
			t.Error(err)
		}
	})
}

// Events of inotify are the kernel's, and read within their bounds all the same.
func FuzzInotify(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		for len(b) >= unix.SizeofInotifyEvent {
			e := parseInotify(b)
			_ = e.name()
			b = b[min(unix.SizeofInotifyEvent+len(e.padded), len(b)):]
		}
	})
}
