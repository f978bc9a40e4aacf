package attest

import (
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"
)

// eventBuffer is how many bytes of the kernel's events are taken at once: some 5,000, where the
// queue holds 16,384 (fs.inotify.max_queued_events).
const eventBuffer = 256 << 10

// follow takes the kernel's events until close. changed is called after each lot of them.
//
// What was found to be alive is in doubt while events were lost, as the kernel does where they come
// faster than they are taken, until all is read anew; and while so many wait that what they
// tell is old. Who asks meanwhile waits.
func (g *cgroups) follow(changed func()) error {
	buffer := make([]byte, eventBuffer)
	for fresh := true; ; changed() {
		n, err := g.file.Read(buffer)
		if errors.Is(err, fs.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("inotify: %w", err)
		}
		lost, behind := overflowed(buffer[:n]), n > len(buffer)-unix.SizeofInotifyEvent-unix.PathMax
		if lost || behind {
			g.doubt.Store(true)
		}
		fresh = fresh && !lost
		g.take(buffer[:n])
		switch {
		case !g.doubt.Load():
		case !fresh:
			g.walk()
			g.readProcesses()
			fresh = true
			if !g.waiting() { // else what comes next may be that events were lost meanwhile
				g.doubt.Store(false)
			}
		case !behind:
			g.doubt.Store(false)
		}
	}
}

// overflowed reports whether the events say that others were lost.
func overflowed(b []byte) bool {
	for len(b) >= unix.SizeofInotifyEvent {
		e := parseInotify(b)
		if e.mask&unix.IN_Q_OVERFLOW != 0 {
			return true
		}
		b = b[min(unix.SizeofInotifyEvent+len(e.padded), len(b)):]
	}
	return false
}

// waiting reports whether there are events to take.
func (g *cgroups) waiting() bool {
	n, err := unix.IoctlGetInt(g.fd, unix.TIOCINQ)
	return n > 0 || err != nil
}

// readProcesses reads of every cgroup that is evidence whether it has a process.
func (g *cgroups) readProcesses() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, c := range g.byID {
		if c.evidence != nil && c.parent != nil {
			g.readProcess(c)
		}
	}
}

// readProcess has the evidence die with the last process. One of which that cannot be told is dead
// too: whoever asked by it asks again.
func (g *cgroups) readProcess(c *cgroup) {
	if alive, err := populated(g.root + c.path + "/cgroup.events"); !alive || err != nil {
		g.die(c)
	}
}

// take takes what inotify reported.
func (g *cgroups) take(b []byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for len(b) >= unix.SizeofInotifyEvent {
		e := parseInotify(b)
		b = b[min(unix.SizeofInotifyEvent+len(e.padded), len(b)):]
		c := g.byWatch[e.watch]
		switch {
		case c == nil || e.mask&unix.IN_IGNORED != 0:
		case e.watch == c.processWatch:
			g.readProcess(c)
			g.notify(c)
		case e.mask&unix.IN_ATTRIB != 0 && e.name() == "":
			g.reown(c)
		case e.name() != "" && e.mask&unix.IN_ISDIR != 0:
			g.reconcile(c, e.name())
		}
	}
}
