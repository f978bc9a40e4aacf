package attest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// followed is an index of a directory's tree. Any file system has directories with inodes, and
// tells of them; only that a cgroup is without processes is cgroupfs's own to say: here a file says
// so, which is written anew.
func followed(t *testing.T) (*cgroups, string) {
	t.Helper()
	root := t.TempDir()
	g, err := newCgroups(root, quiet())
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := g.follow(func() {}); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() { g.close(); <-done })
	return g, root
}

func mkdir(t *testing.T, path string) uint64 {
	t.Helper()
	if err := os.MkdirAll(path, 0o755); err != nil {
		t.Fatal(err)
	}
	populate(t, path, true)
	there, err := subdirectories(filepath.Dir(path))
	if err != nil {
		t.Fatal(err)
	}
	return there[filepath.Base(path)]
}

func populate(t *testing.T, path string, yes bool) {
	t.Helper()
	text := "populated 0\nfrozen 0\n"
	if yes {
		text = "populated 1\nfrozen 0\n"
	}
	if err := os.WriteFile(path+"/cgroup.events", []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestCgroupsAreFollowed(t *testing.T) {
	g, root := followed(t)
	if os.Geteuid() != 0 {
		netnstest.Lacks(t, netnstest.ErrNeedsRoot)
	}
	before := mkdir(t, root+containerPath(1, 1))
	g.walk()
	find := func(id uint64) *Evidence {
		e, err := g.lookup(id)
		if err != nil {
			return nil
		}
		return e
	}
	e := find(before)
	if e == nil || e.PodUID != podUID(1) || e.Container != containerIDOf(1) || !e.Alive() || find(before) != e {
		t.Fatalf("what was there before: %+v", e)
	}
	after := mkdir(t, root+containerPath(2, 2))
	eventually(t, "what was made later is known",
		func() bool { e := find(after); return e != nil && e.PodUID == podUID(2) })

	// A cgroup that lost its processes is dead; one that gets some again is another life.
	populate(t, root+containerPath(1, 1), false)
	eventually(t, "it dies with its processes", func() bool { return !e.Alive() })
	if _, err := g.lookup(before); !errors.Is(err, ErrEmptyCgroup) {
		t.Errorf("an empty cgroup: %v", err)
	}
	populate(t, root+containerPath(1, 1), true)
	if again := find(before); again == nil || !again.Alive() || e.Alive() {
		t.Errorf("a second life: %+v, and the first %v", again, e.Alive())
	}

	// Renamed, as cgroup v1 allows, and removed.
	e = find(after)
	if err := os.Rename(root+"/kubepods/burstable/pod"+podUID(2), root+"/kubepods/burstable/pod"+podUID(3)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is known by its new name",
		func() bool { now := find(after); return now != nil && now.PodUID == podUID(3) && !e.Alive() })
	e = find(after)
	if err := os.RemoveAll(root + "/kubepods/burstable/pod" + podUID(3)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is forgotten", func() bool { return find(after) == nil && !e.Alive() })
}

// Events can be lost: a walk finds what is, and what died is dead.
func TestWalk(t *testing.T) {
	root := t.TempDir()
	g, err := newCgroups(root, quiet())
	if err != nil {
		t.Fatal(err)
	}
	defer g.close()
	old := mkdir(t, root+"/system.slice/a.service")
	g.walk()
	e, err := g.lookup(old)
	if err != nil {
		t.Fatal(err)
	}
	// keeps the inode from being used again
	if err := os.Rename(root+"/system.slice/a.service", root+"/elsewhere"); err != nil {
		t.Fatal(err)
	}
	fresh := mkdir(t, root+"/system.slice/a.service")
	if _, err := g.lookup(fresh); !errors.Is(err, ErrUnknownCgroup) {
		t.Errorf("before the walk: %v", err)
	}
	g.walk()
	if now, err := g.lookup(fresh); err != nil || now.Unit() != "a.service" || e.Alive() {
		t.Errorf("after the walk: %+v, %v, and what was there before %v", now, err, e.Alive())
	}
	if now, err := g.lookup(old); err != nil || now.Cgroup != "/elsewhere" {
		t.Errorf("what was moved: %+v, %v", now, err)
	}
	if err := os.RemoveAll(root + "/system.slice"); err != nil {
		t.Fatal(err)
	}
	g.walk()
	if n, problem := g.known(); n != 2 || problem != nil || len(g.byWatch) > 3 {
		t.Errorf("%d cgroups and %d watches are left, %v", n, len(g.byWatch), problem)
	}
}

// A pod's cgroup that is given to a user is nobody's evidence from then on, also where the kernel's
// event of that is not taken yet, nor is one that was made meanwhile below it.
func TestOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		netnstest.Lacks(t, netnstest.ErrNeedsRoot)
	}
	own := func(t *testing.T, root string, uid int) {
		if err := os.Chown(filepath.Dir(root+containerPath(1, 1)), uid, uid); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("events wait", func(t *testing.T) {
		root := t.TempDir()
		g, err := newCgroups(root, quiet())
		if err != nil {
			t.Fatal(err)
		}
		defer g.close()
		id := mkdir(t, root+containerPath(1, 1))
		g.walk()
		own(t, root, 1000)
		if e, err := g.lookup(id); !errors.Is(err, ErrOwner) {
			t.Errorf("%+v, %v", e, err)
		}
	})
	t.Run("events are taken", func(t *testing.T) {
		g, root := followed(t)
		id := mkdir(t, root+containerPath(1, 1))
		g.walk()
		e, err := g.lookup(id)
		if err != nil {
			t.Fatal(err)
		}
		own(t, root, 1000)
		eventually(t, "what was evidence is dead", func() bool { return !e.Alive() })
		eventually(t, "it is refused", func() bool { _, err := g.lookup(id); return errors.Is(err, ErrOwner) })
		if paths := g.podPaths(); len(paths) != 0 {
			t.Errorf("the pods are %v", paths)
		}
		own(t, root, 0)
		eventually(t, "it is root's again", func() bool {
			e, err := g.lookup(id)
			return err == nil && e.Alive() && e.PodUID == podUID(1) && len(g.podPaths()) == 1
		})
	})
}

// A workload or a user that makes cgroups without end is not followed without end, and says nothing
// of others: not of pods, nor of units.
func TestTooManyCgroups(t *testing.T) {
	if os.Geteuid() != 0 {
		netnstest.Lacks(t, netnstest.ErrNeedsRoot)
	}
	const user = "/user.slice/user-1000.slice/user@1000.service"
	root := t.TempDir()
	g, err := newCgroups(root, quiet())
	if err != nil {
		t.Fatal(err)
	}
	defer g.close()
	many := func(above string) {
		t.Helper()
		for i := range maxCgroupsPerParty + 10 {
			if err := os.MkdirAll(fmt.Sprintf("%s%s/%d", root, above, i), 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	many(containerPath(1, 1))
	many(user)
	beyond := mkdir(t, root+user+"/"+fmt.Sprint(maxCgroupsPerParty+10))
	unit := mkdir(t, root+"/system.slice/kubelet.service")
	pod := mkdir(t, root+containerPath(2, 2))
	g.walk()
	known := func(what string, id uint64) {
		t.Helper()
		if _, err := g.lookup(id); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	known("another pod", pod)
	known("a unit", unit)
	if n, problem := g.known(); n > 2*maxCgroupsPerParty+20 || problem == nil ||
		!strings.Contains(problem.Error(), "cgroups below") {
		t.Errorf("%d, %v", n, problem)
	}
	if _, err := g.lookup(beyond); err != nil && (!errors.Is(err, ErrUnknownCgroup) ||
		!strings.Contains(err.Error(), "cgroups below")) {
		t.Errorf("one of those beyond is refused without the reason: %v", err)
	}

	// Where the whole table is full, kubelet's pods, its runtime's containers and systemd's units have
	// room.
	g.deep += maxCgroups
	later, service := mkdir(t, root+containerPath(3, 3)), mkdir(t, root+"/system.slice/late.service")
	inside := mkdir(t, root+containerPath(3, 3)+"/own")
	g.walk()
	known("a pod in a full table", later)
	known("a unit in a full table", service)
	if _, err := g.lookup(inside); !errors.Is(err, ErrUnknownCgroup) || !strings.Contains(err.Error(),
		"cgroups below") {
		t.Errorf("what a workload makes in a full table: %v", err)
	}
	g.deep -= maxCgroups

	for _, path := range []string{"/kubepods", "/user.slice", "/system.slice"} {
		if err := os.RemoveAll(root + path); err != nil {
			t.Fatal(err)
		}
	}
	g.walk()
	if n, problem := g.known(); n > 10 || problem != nil || g.deep < 0 || g.deep > 10 {
		t.Errorf("after they are gone: %d, %v; %d count for the whole", n, problem, g.deep)
	}
}
