package attest

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// Limits of what is followed below pods, units and other cgroups of the node that are no slices:
// who owns such a cgroup can make as many below it as it likes. Those beyond are not known, and
// what asks from there is refused. What kubelet, its runtime and systemd make for the node, which
// is pods, their containers, slices and units, counts for neither.
const (
	maxCgroups         = 32 << 10 // in all
	maxCgroupsPerParty = 1 << 10
)

// cgroups is a hierarchy of cgroups by id, kept as it is by inotify, which needs no privilege
//
type cgroups struct {
	root string   // where it is mounted
	node nodeRoot // where our node is in it
	log  logrus.FieldLogger
	// Called with the path of a pod's own cgroup when one in it came or went, or its first process or
	// its last, and with that of a cgroup of no pod when that came or went. The lock is held: it asks
	// nothing of this. nil: nobody wants to know, and pods are not watched for processes.
	changed func(path string)

	fd   int // inotify
	file *os.File

	mu      sync.Mutex
	top     *cgroup
	byID    map[uint64]*cgroup
	pods    map[string]*cgroup // by path; those that are root's
	byWatch map[int32]*cgroup  // both of a cgroup's
	deep    int                // how many count for maxCgroups
	problem error              // why not all is followed
	warned  bool               // of that, in the log

	doubt *atomic.Bool // what is known to be alive may be dead: the kernel's events are not all taken
}

// cgroup is one of them. All but path, place and fault may change, under the lock.
type cgroup struct {
	path  string // from the root: /kubepods/pod…
	place place
	fault error // why it is nobody's evidence

	id     uint64 // the inode of its directory
	parent *cgroup
	pod    *cgroup // the pod's own, if this is in a pod
	// the pod, or the unit or other cgroup outside of slices, that this is or is in; nil for a slice
	party        *cgroup
	below        int                // of a party: how many
	kids         map[string]*cgroup // by name
	watch        int32              // of the directory
	processWatch int32              // of cgroup.events; 0: not watched
	evidence     *Evidence          // what was last said of it; nil: nothing was, or its processes are gone
}

// newCgroups prepares to follow what is below root.
func newCgroups(root string, log logrus.FieldLogger) (*cgroups, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("inotify: %w (raise fs.inotify.max_user_instances)", err)
	}
	return &cgroups{
		root: root, node: findNode(root), log: log, fd: fd, file: os.NewFile(uintptr(fd), "inotify"),
		byID: map[uint64]*cgroup{}, pods: map[string]*cgroup{}, byWatch: map[int32]*cgroup{},
		doubt: new(atomic.Bool),
	}, nil
}

func (g *cgroups) close() { _ = g.file.Close() }

// walk brings what is known up to date, whatever events were missed. Who asks meanwhile waits for
// it the first time only.
func (g *cgroups) walk() {
	g.mu.Lock()
	g.problem = nil
	top := g.top
	if top == nil {
		g.top = g.add(nil, "")
	}
	g.mu.Unlock()
	if top != nil {
		g.refresh(top)
	}
}

// refresh compares what is known below a cgroup with what is there.
func (g *cgroups) refresh(c *cgroup) {
	there, err := subdirectories(g.root + c.path)
	if err != nil {
		return // it goes away, and its parent tells
	}
	g.mu.Lock()
	if g.byID[c.id] != c {
		g.mu.Unlock()
		return
	}
	for name, kid := range c.kids {
		if there[name] != kid.id {
			g.reconcile(c, name)
		}
	}
	for name := range there {
		if c.kids[name] == nil {
			g.reconcile(c, name)
		}
	}
	kids := slices.Collect(maps.Values(c.kids))
	g.mu.Unlock()
	for _, kid := range kids {
		g.refresh(kid)
	}
}

// reconcile makes the child of that name what it is now: what an event says may be long over.
func (g *cgroups) reconcile(parent *cgroup, name string) {
	if known := parent.kids[name]; known != nil {
		var now unix.Stat_t
		if unix.Stat(g.root+known.path, &now) == nil && known.id == now.Ino {
			return
		}
		g.drop(known)
	}
	g.add(parent, name)
}

// add starts to follow the cgroup of that name and all below it. What is made while it looks comes
// twice, which does no harm.
func (g *cgroups) add(parent *cgroup, name string) *cgroup {
	c := &cgroup{parent: parent, kids: map[string]*cgroup{}}
	if parent != nil {
		c.path, c.pod = parent.path+"/"+name, parent.pod
	}
	g.identify(c)
	if err := g.full(c); err != nil {
		g.problemIs(err)
		return nil
	}
	var now unix.Stat_t
	if unix.Stat(g.root+c.path, &now) != nil || now.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil // gone already
	}
	c.id = now.Ino
	events := uint32(unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_ONLYDIR)
	if c.pod == c {
		events |= unix.IN_ATTRIB // its owner may change
	}
	watch, err := unix.InotifyAddWatch(g.fd, g.root+c.path, events)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil { // nobody would tell when it goes: it is not known
		g.problemIs(fmt.Errorf("cgroup %s cannot be watched: %w (raise fs.inotify.max_user_watches)", c.path, err))
		return nil
	}
	c.watch = int32(watch)
	if c.pod == c && c.fault == nil { // after the watch, so that no change falls between the two
		c.fault = g.owned(c)
	}
	g.byWatch[c.watch], g.byID[c.id] = c, c
	if parent != nil {
		parent.kids[name] = c
	}
	g.count(c, 1)
	if c.pod == c && c.fault == nil {
		g.pods[c.path] = c
		if g.changed != nil {
			_, _ = g.watchProcesses(c)
		}
	}
	g.notify(c)
	there, _ := subdirectories(g.root + c.path) // fails for one that goes away, and its parent tells
	for name := range there {
		g.reconcile(c, name)
	}
	return c
}

// owned returns why a pod's own cgroup is not kubelet's. Kubelet's are root's: who was given a
// cgroup to make others in it can name them like a pod's, but not give them to root.
func (g *cgroups) owned(c *cgroup) error {
	var now unix.Stat_t
	if err := unix.Stat(g.root+c.path, &now); err != nil {
		return fmt.Errorf("%w: the cgroup %s: %w", ErrUnknownCgroup, c.path, err) // gone: its parent tells
	}
	if now.Uid != 0 {
		return fmt.Errorf("%w: the cgroup %s belongs to user %d", ErrOwner, c.path, now.Uid)
	}
	return nil
}

// reown takes note of a pod's own cgroup that has another owner now.
func (g *cgroups) reown(c *cgroup) {
	if err := g.owned(c); errors.Is(err, ErrUnknownCgroup) || (err == nil) == (c.fault == nil) {
		return
	}
	parent, name := c.parent, c.path[strings.LastIndexByte(c.path, '/')+1:]
	g.drop(c)
	g.add(parent, name)
}

// identify says whose the cgroup is, by its path.
func (g *cgroups) identify(c *cgroup) {
	if c.parent == nil {
		return // the root
	}
	c.party = c.parent.party
	if c.party == nil && !strings.HasSuffix(c.path, ".slice") && c.path != string(g.node) {
		c.party = c
	}
	if c.fault = c.parent.fault; c.fault != nil {
		return
	}
	if c.place, c.fault = g.node.parse(c.path); c.fault == nil && c.place.pod != "" && c.pod == nil {
		c.pod, c.party = c, c
	}
}

// full says why there is no room for the cgroup.
func (g *cgroups) full(c *cgroup) error {
	switch {
	case c.party == nil || c.party == c:
		return nil
	case c.party.below >= maxCgroupsPerParty:
		return fmt.Errorf("more than %d cgroups below %s: clients in the others are refused",
			maxCgroupsPerParty, c.party.path)
	case c.isDeep() && g.deep >= maxCgroups:
		return fmt.Errorf("more than %d cgroups below pods and units: clients in the others are refused, such as those in "+
			"%s", maxCgroups, c.path)
	}
	return nil
}

// isDeep reports whether the cgroup counts for [maxCgroups]: it is none that kubelet, its runtime
// or systemd makes for the node.
func (c *cgroup) isDeep() bool {
	return c.party != nil && c.party != c && (c.pod == nil || c.parent != c.pod)
}

// count notes that one came (1) or went (-1).
func (g *cgroups) count(c *cgroup, n int) {
	if c.party != nil && c.party != c {
		c.party.below += n
	}
	if c.isDeep() {
		g.deep += n
	}
}

// drop forgets a cgroup and all below it. Whatever it is the evidence of is dead.
func (g *cgroups) drop(c *cgroup) {
	for _, kid := range c.kids {
		g.drop(kid)
	}
	g.die(c)
	for _, w := range []int32{c.watch, c.processWatch} {
		if w != 0 {
			delete(g.byWatch, w)
			_, _ = unix.InotifyRmWatch(g.fd, uint32(w)) // the kernel may have done so
		}
	}
	if g.byID[c.id] == c {
		delete(g.byID, c.id)
	}
	g.count(c, -1)
	if c.parent != nil {
		delete(c.parent.kids, c.path[strings.LastIndexByte(c.path, '/')+1:])
	}
	if c.pod == c {
		delete(g.pods, c.path)
	}
	g.notify(c)
}

func (g *cgroups) notify(c *cgroup) {
	switch {
	case g.changed == nil:
	case c.pod != nil && c.pod.fault == nil:
		g.changed(c.pod.path)
	case c.ofNode():
		g.changed(c.path)
	}
}

// ofNode reports whether the cgroup is no pod's, nor named like one's.
func (c *cgroup) ofNode() bool { return c.pod == nil && c.fault == nil }

func (g *cgroups) die(c *cgroup) {
	if c.evidence != nil {
		c.evidence.life.Store(false)
		c.evidence = nil
	}
}

func (g *cgroups) dieAll() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, c := range g.byID {
		g.die(c)
	}
}

func (g *cgroups) problemIs(err error) {
	if !g.warned { // a workload could make it happen again and again
		g.warned = true
		g.log.WithError(err).Error("attest: some cgroups are not watched: clients in them are refused")
	}
	g.problem = err
}

// watchProcesses has the kernel tell when the cgroup gets its first process or loses its last, and
// reports whether it has one now. The root has no such file, and always has some.
func (g *cgroups) watchProcesses(c *cgroup) (bool, error) {
	file := g.root + c.path + "/cgroup.events"
	if c.processWatch == 0 {
		w, err := unix.InotifyAddWatch(g.fd, file, unix.IN_MODIFY)
		if err != nil {
			if !errors.Is(err, unix.ENOENT) {
				g.problemIs(fmt.Errorf("%s cannot be watched: %w (raise fs.inotify.max_user_watches)", file, err))
			}
			return c.parent == nil, nil
		}
		c.processWatch = int32(w)
		g.byWatch[c.processWatch] = c
	}
	return populated(file)
}

// populated reports whether a cgroup has a process. An error says that this cannot be told now, as
// without a descriptor to spare.
func populated(file string) (bool, error) {
	fd, err := unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("open %s: %w", file, err)
	}
	defer func() { _ = unix.Close(fd) }()
	var b [128]byte
	n, err := unix.Read(fd, b[:])
	// a read fails when the cgroup was removed
	return err == nil && strings.Contains(string(b[:max(n, 0)]), "populated 1"), nil
}

// lookup returns what the cgroup with this id says. The first time it costs four system calls,
// later none. The pod's owner is read then: the kernel's event of a change may not be taken yet.
func (g *cgroups) lookup(id uint64) (*Evidence, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	c := g.byID[id]
	switch {
	case c == nil && g.problem != nil:
		return nil, fmt.Errorf("%w: its id is %d, and some cgroups are not watched: %w", ErrUnknownCgroup, id, g.problem)
	case c == nil:
		return nil, fmt.Errorf("%w: its id is %d", ErrUnknownCgroup, id)
	case c.fault != nil:
		return nil, c.fault
	case c.evidence != nil:
		return c.evidence, nil
	}
	if c.pod != nil {
		if err := g.owned(c.pod); err != nil {
			return nil, err
		}
	}
	if alive, err := g.watchProcesses(c); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnknownCgroup, err)
	} else if !alive {
		return nil, fmt.Errorf("%w: %s", ErrEmptyCgroup, c.path)
	}
	c.evidence = &Evidence{Kind: ByCgroup, PodUID: c.place.pod, Container: c.place.container, Cgroup: c.path,
		node: g.node, life: new(atomic.Bool), doubt: g.doubt}
	if c.path == "" {
		c.evidence.Cgroup = "/"
	}
	c.evidence.life.Store(true)
	return c.evidence, nil
}

// known returns how many are known, and why not all are.
func (g *cgroups) known() (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.byID), g.problem
}

// podPaths returns the paths of all pods.
func (g *cgroups) podPaths() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Collect(maps.Keys(g.pods))
}

// nodePaths returns the paths of all cgroups that are no pod's, the oldest first.
func (g *cgroups) nodePaths() (paths []string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	var all []*cgroup
	for _, c := range g.byID {
		if c.ofNode() {
			all = append(all, c)
		}
	}
	slices.SortFunc(all, byAge)
	for _, c := range all {
		paths = append(paths, c.path)
	}
	return paths
}

// byAge orders cgroups: they are numbered as they are made.
func byAge(a, b *cgroup) int { return cmp.Compare(a.id, b.id) }

// inPod returns the paths of the pod's cgroups, the oldest first, up to n of them; none where the
// pod is no more.
func (g *cgroups) inPod(path string, n int) (paths []string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.pods[path] == nil {
		return nil
	}
	all := []*cgroup{g.pods[path]}
	for i := 0; i < len(all) && len(all) < n; i++ {
		all = slices.AppendSeq(all, maps.Values(all[i].kids))
	}
	slices.SortFunc(all, byAge)
	for _, c := range all[:min(n, len(all))] {
		paths = append(paths, c.path)
	}
	return paths
}
