package attest

import (
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// asks is how often the kernel was asked for sockets, in all namespaces.
func (k *Kernel) asks() (n uint32) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	for _, ns := range k.namespaces {
		ns.mu.Lock()
		n += ns.diag.sequence
		ns.mu.Unlock()
	}
	return n
}

// Users of the node may be allowed to make network namespaces, with any address. A pod of that
// address is found among them, and each connection costs no more than a few questions.
func TestManyNamespaces(t *testing.T) {
	const others = 60
	b := newTestNode(t)
	ns := b.pod("one")
	for i := range others {
		cmd := exec.Command("sh", "-c", fmt.Sprintf("ip address add %s/32 dev lo && exec sleep 1000", ns.Addr))
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Cloneflags: syscall.CLONE_NEWNET}
		b.place(cmd, fmt.Sprintf("/user.slice/user-1000.slice/user@1000.service/%d", i%4), b.node.NS)
	}
	b.startHelper()
	eventually(t, "all namespaces have the address", func() bool { return len(b.holders(ns.Addr)) == others })
	c := b.client(containerPath(1, 1), ns) // the pod comes last
	b.mustBe(c, dial, podUID(1), containerIDOf(1))
	conn := accepted(b.accept(c.do(dial)))
	var took []time.Duration
	before := b.kernel.asks()
	const looks = 300
	for range looks {
		start := time.Now()
		if e, err := b.kernel.Look(conn); err != nil || e.PodUID != podUID(1) {
			t.Fatalf("%+v, %v", e, err)
		}
		took = append(took, time.Since(start))
	}
	if n := float64(b.kernel.asks()-before) / looks; n > maxAskedOfOne+1 {
		t.Errorf("%.1f namespaces are asked for each connection", n)
	}
	slices.Sort(took)
	t.Logf("%d namespaces: p50 %v, p99 %v", others+1, took[looks/2], took[looks*99/100])
	if s := b.kernel.Status(); !strings.Contains(strings.Join(s.Lacks, "\n"),
		fmt.Sprintf("1 addresses are in more than %d network namespaces", maxAskedOfOne)) {
		t.Errorf("status does not say so: %+v", s)
	}
}

// Which of the namespaces that have an address are asked.
func TestAskable(t *testing.T) {
	in := func(inode uint64, cgroups ...string) holder {
		n := &namespace{inode: inode}
		n.pods("", cgroups)
		return holder{namespace: n}
	}
	var all []holder
	for i := range uint64(500) {
		all = append(all, in(1000+i, "/user.slice/user-1000.slice/user@1000.service"))
	}
	container, own, one, two := in(1, "/system.slice/docker-x.scope"), holder{namespace: &namespace{}},
		in(2, containerPath(1, 1)), in(3, containerPath(2, 2))
	all = append(all, container, own, one, two)
	for i := range uint64(50) {
		all = append(all, in(2000+i, containerPath(3, 3)))
	}
	got := askable(all)
	for what, h := range map[string]holder{"a container's": container, "our own": own, "a pod's": one,
		"another pod's": two} {
		if !slices.Contains(got, h) {
			t.Errorf("%s is not asked", what)
		}
	}
	if len(got) > 3*maxAskedOfOne+2 || got[0].ofNode {
		t.Errorf("%d are asked, first %v", len(got), got[0])
	}
	if few := all[:maxAskedOfOne]; len(askable(few)) != len(few) {
		t.Error("a few are not all asked")
	}
}
