package attest

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// newV1Node makes a node whose cgroups are of v1: a hierarchy of the test's own, without
// controllers, where systemd has its own.
func newV1Node(t *testing.T) *testNode {
	t.Helper()
	b := newTestNode(t)
	b.stop() // the kernel that looks at cgroup v2
	<-b.stopped
	fs, err := unix.Fsopen("cgroup", unix.FSOPEN_CLOEXEC)
	if err == nil {
		defer unix.Close(fs)
		err = errors.Join(unix.FsconfigSetFlag(fs, "none"), unix.FsconfigSetString(fs, "name",
			fmt.Sprintf("gme-%d-%d", os.Getpid(), nodeSequence.Add(1))), unix.FsconfigCreate(fs))
	}
	if err != nil {
		netnstest.Lacks(t, fmt.Errorf("mount a cgroup v1 hierarchy: %w", err))
	}
	mount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		netnstest.Lacks(t, fmt.Errorf("mount a cgroup v1 hierarchy: %w", err))
	}
	v1 := os.NewFile(uintptr(mount), "cgroup1")
	hierarchy := fmt.Sprintf("/proc/self/fd/%d", mount)
	unified := b.mount
	t.Cleanup(func() {
		kids, _ := subdirectories(hierarchy)
		for kid := range kids {
			eventually(t, "the cgroups are removed", func() bool {
				removeCgroups(hierarchy + "/" +
					kid)
				return !exists(hierarchy + "/" + kid)
			})
		}
		v1.Close()
		b.mount = unified
	})
	root := t.TempDir()
	// In the hierarchy's own root all processes of this machine are.
	// the helper's third
	if err := errors.Join(os.Mkdir(hierarchy+"/node", 0o755), os.Symlink("/proc/self/fd/3/node",
		root+"/systemd")); err != nil {
		t.Fatal(err)
	}
	b.startKernel(root)
	b.mount, b.v1 = v1, hierarchy+"/node"
	b.startHelperAt(root)
	b.connected()
	return b
}

// v1Client starts a client and puts it into a cgroup of v1.
func (b *testNode) v1Client(path string, ns *netnstest.NS) *client {
	b.t.Helper()
	c := b.client("/unseen", ns)
	err := os.MkdirAll(b.v1+path, 0o755)
	if err == nil {
		err = os.WriteFile(b.v1+path+"/cgroup.procs", []byte(strconv.Itoa(c.cmd.Process.Pid)), 0)
	}
	if err != nil {
		b.t.Fatal(err)
	}
	return c
}

// With cgroup v1 a pod's own network namespace is the evidence, and one of two pods is none, nor is
// one that another process is in too.
func TestCgroupV1(t *testing.T) {
	b := newV1Node(t)
	one, shared := b.pod("one"), b.pod("shared")
	a, side := b.v1Client(containerPath(1, 1), one), b.v1Client(containerPath(1, 2), one)
	host := b.v1Client(containerPath(2, 2), b.node.NS)
	both := b.v1Client(containerPath(3, 3), shared)
	b.v1Client(containerPath(4, 4), shared)
	if s := b.kernel.Status(); s.Hierarchy != "cgroup1" || len(s.Lacks) != 1 {
		t.Errorf("Status = %+v", s)
	}
	var evidence *Evidence
	for _, c := range []*client{a, side} {
		e, conn, err := b.connect(c, dial)
		if err != nil || e.Kind != ByNamespace || e.PodUID != podUID(1) || e.Container != "" || e.Cgroup != "" || !e.Alive() {
			t.Errorf("%+v, %v", e, err)
		}
		if again, err := b.look(accepted(conn)); again != e || err != nil {
			t.Errorf("again: %+v, %v", again, err)
		}
		evidence = e
	}
	b.requireRefused("a pod on the host network", accepted(b.accept(host.do(dial))), ErrNoCgroup)
	conn := b.accept(both.do(dial))
	eventually(t, "both pods of the namespace are known", func() bool {
		_, err := b.kernel.Look(accepted(conn))
		return errors.Is(err, ErrPods)
	})
	container := b.v1Client("/system.slice/docker-0abc.scope", b.pod("container"))
	b.requireRefused("a container of no pod", accepted(b.accept(container.do(dial))), ErrNoCgroup)
	guest := b.v1Client("/system.slice/guest.service", one)
	conn = b.accept(a.do(dial))
	eventually(t, "the namespace is ambiguous", func() bool {
		_, err := b.kernel.Look(accepted(conn))
		return errors.Is(err, ErrNoCgroup) && strings.Contains(err.Error(), "guest.service, which belongs to no pod") &&
			!evidence.Alive()
	})
	kill(guest.cmd)
	eventually(t, "it is the pod's again", func() bool {
		e, err := b.kernel.Look(accepted(conn))
		evidence = e
		return err == nil && e.PodUID == podUID(1)
	})
	kill(container.cmd)
	kill(side.cmd)
	kill(a.cmd)
	eventually(t, "the evidence is dead, and its namespace let go",
		func() bool { return !evidence.Alive() && b.kernel.Status().Namespaces == 1 })
}
