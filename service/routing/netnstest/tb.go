package netnstest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"
)

// TB is what Start needs of a *testing.T or *testing.B.
type TB interface {
	Helper()
	Cleanup(func())
	Skip(args ...any)
	Fatal(args ...any)
	Errorf(format string, args ...any)
}

// Start is New for a test: the node is closed with it. Where nodes cannot be made the test is
// skipped with the reason, and fails with the same reason under CI=true.
func Start(tb TB, name string) *Node {
	tb.Helper()
	n, err := New(name)
	switch {
	case errors.Is(err, ErrNeedsRoot):
		Lacks(tb, err)
	case err != nil:
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := n.Close(); err != nil {
			tb.Errorf("close node %s: %v", name, err)
		}
	})
	return n
}

// Needs skips the test, or fails it under CI=true, unless the machine has the commands.
func Needs(tb TB, commands ...string) {
	tb.Helper()
	for _, c := range commands {
		if _, err := exec.LookPath(c); err != nil {
			Lacks(tb, err)
		}
	}
}

// Lacks skips the test for want of what reason says, and fails it under CI=true: there a skip would
// lie.
func Lacks(tb TB, reason error) {
	tb.Helper()
	if os.Getenv("CI") == "true" {
		tb.Fatal(reason)
	}
	tb.Skip(reason)
}

// MountBPF makes a bpf file system that is mounted nowhere and goes when the test is over; the path
// is good in other processes too.
func MountBPF(tb TB) string {
	tb.Helper()
	return mount(tb, "bpf", nil)
}

// MountFull makes such a file system in memory, of 64 KiB and 8 files, to be filled.
func MountFull(tb TB) string {
	tb.Helper()
	return mount(tb, "tmpfs", map[string]string{"size": "64k", "nr_inodes": "8", "mode": "755"})
}

func mount(tb TB, kind string, options map[string]string) string {
	tb.Helper()
	fs, err := unix.Fsopen(kind, unix.FSOPEN_CLOEXEC)
	if err != nil {
		Lacks(tb, fmt.Errorf("%s file system: %w", kind, err))
	}
	defer func() { _ = unix.Close(fs) }()
	for key, value := range options {
		if err := unix.FsconfigSetString(fs, key, value); err != nil {
			tb.Fatal(err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		tb.Fatal(err)
	}
	mount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = unix.Close(mount) })
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), mount)
}
