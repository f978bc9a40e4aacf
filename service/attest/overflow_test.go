package attest

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// a death of which the kernel could not tell, since its queue of events was full, is noticed
// all the same.
func TestOverflow(t *testing.T) {
	b := newTestNode(t)
	limit, err := os.ReadFile("/proc/sys/fs/inotify/max_queued_events")
	if err != nil {
		t.Fatal(err)
	}
	queued, err := strconv.Atoi(strings.TrimSpace(string(limit)))
	if err != nil {
		t.Fatal(err)
	}
	ns := b.pod("one")
	c, other := b.client(containerPath(1, 1), ns), b.client(containerPath(2, 2), b.pod("other"))
	b.startHelper()
	dead, _ := b.mustBe(c, dial, podUID(1), containerIDOf(1))
	alive, _ := b.mustBe(other, dial, podUID(2), containerIDOf(2))

	groups := b.kernel.cgroups
	groups.mu.Lock() // whoever takes the events waits, as while all cgroups are walked
	flood := b.cgroups + containerPath(2, 2) + "/x"
	for made := 0; made < queued*3; made += 2 { // more than the queue holds, and than is taken of it meanwhile
		if err := errors.Join(os.Mkdir(flood, 0o755), os.Remove(flood)); err != nil {
			groups.mu.Unlock()
			t.Fatal(err)
		}
	}
	changed := watch(t, b.cgroups+containerPath(1, 1)+"/cgroup.events")
	kill(c.cmd)
	eventually(t, "the death is reported to others", changed)
	groups.mu.Unlock()
	eventually(t, "the death is noticed", func() bool { return !dead.Alive() })
	b.mustBe(other, dial, podUID(2), containerIDOf(2))
	if !alive.Alive() {
		t.Error("what did not die is dead")
	}
}

// watch reports whether the kernel reported a change of the file since.
func watch(t *testing.T, file string) func() bool {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if _, err := unix.InotifyAddWatch(fd, file, unix.IN_MODIFY); err != nil {
		t.Fatal(err)
	}
	return func() bool {
		n, err := unix.Read(fd, make([]byte, 4096))
		return err == nil && n > 0
	}
}

// From the word that events were lost until all is read anew, nobody is served by what was known
// before.
func TestDoubt(t *testing.T) {
	root := t.TempDir()
	g, err := newCgroups(root, quiet())
	if err != nil {
		t.Fatal(err)
	}
	real := g.file
	defer real.Close()
	events, kernel, err := os.Pipe() // a kernel that tells of nothing but what the test has it tell
	if err != nil {
		t.Fatal(err)
	}
	g.file = events
	defer kernel.Close()
	stays, goes := mkdir(t, root+"/system.slice/a.service"), mkdir(t, root+"/system.slice/b.service")
	g.walk()
	first, err := g.lookup(stays)
	if err != nil {
		t.Fatal(err)
	}
	second, err := g.lookup(goes)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- g.follow(func() {}) }()
	defer func() {
		g.close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	populate(t, root+"/system.slice/b.service", false)
	deliver := func(mask uint32) {
		t.Helper()
		event := make([]byte, unix.SizeofInotifyEvent)
		for i := range 4 {
			event[4+i] = byte(mask >> (8 * i))
		}
		if _, err := kernel.Write(event); err != nil {
			t.Fatal(err)
		}
	}

	g.mu.Lock()
	deliver(unix.IN_Q_OVERFLOW)
	eventually(t, "all is in doubt", func() bool { return first.inDoubt() && second.inDoubt() })
	a := New(Options{Pods: newIndex(), Kernel: newWitness(first, nil),
		Hosts: []Host{{Unit: "a.service", ServiceAccount: puller}}})
	p := &Peer{evidence: first}
	if _, _, err := a.find(p); !errors.Is(err, ErrNotRead) {
		t.Errorf("who asks meanwhile: %v", err)
	}
	p.binding.Store(&binding{evidence: first})
	if _, err := a.check(p, p.binding.Load()); !errors.Is(err, ErrNotRead) {
		t.Errorf("who is answered meanwhile: %v", err)
	}
	g.mu.Unlock()
	// The inotify descriptor has events that nobody takes here: what comes next without a loss ends
	// the doubt.
	eventually(t, "all is read anew", func() bool { deliver(0); return !first.inDoubt() })
	if !first.Alive() || second.Alive() {
		t.Errorf("alive are %v and %v, want the first alone", first.Alive(), second.Alive())
	}
	if b, _, err := a.find(p); err != nil || b.caller.ServiceAccount != puller {
		t.Errorf("who asks again: %+v, %v", b.caller, err)
	}

	// A loss that is reported while all is read anew has it read again. Events from above may still be
	// about to be taken: then they are let go first.
	eventually(t, "all is in doubt again", func() bool {
		g.mu.Lock()
		deliver(unix.IN_Q_OVERFLOW)
		for range 50 {
			if first.inDoubt() {
				return true
			}
			<-time.After(time.Millisecond)
		}
		g.mu.Unlock()
		return false
	})
	populate(t, root+"/system.slice/a.service", false)
	deliver(unix.IN_Q_OVERFLOW)
	g.mu.Unlock()
	eventually(t, "it is dead", func() bool { deliver(0); return !first.inDoubt() && !first.Alive() })
}

// Where no descriptor is to spare, nobody is taken for dead, nor for alive.
func TestPopulated(t *testing.T) {
	dir := t.TempDir()
	if alive, err := populated(dir + "/cgroup.events"); alive || err != nil {
		t.Errorf("a cgroup that is gone: %v, %v", alive, err)
	}
	for _, yes := range []bool{true, false} {
		populate(t, dir, yes)
		if alive, err := populated(dir + "/cgroup.events"); alive != yes || err != nil {
			t.Errorf("populated %v: %v, %v", yes, alive, err)
		}
	}
	if _, err := populated(dir + "/cgroup.events/" + fmt.Sprint(1)); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("what cannot be opened: %v", err)
	}
}
