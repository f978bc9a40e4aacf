package netnstest

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// A process is born in its cgroup and its namespace, and goes with them.
func TestCgroups(t *testing.T) {
	pod, err := Start(t, "cgroups").AddPod("pod")
	if err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("gme-netnstest-%d", os.Getpid())
	c, err := NewCgroups("", name)
	if errors.Is(err, ErrNoCgroups) {
		Lacks(t, err)
	}
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("cat", "/proc/self/cgroup", "-")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	var out strings.Builder
	cmd.Stdout = &out
	if err := c.Start(pod, "pods/one", cmd); err != nil {
		t.Fatal(err)
	}
	here, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	if err := pod.Do(func() error {
		there, err := os.Readlink("/proc/thread-self/ns/net")
		if there != here {
			t.Errorf("the process is in %s, and not in the pod's %s", here, there)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if c.Remove("pods"); !exists(c.Path + "/pods/one") {
		t.Error("a cgroup that has a process was removed")
	}
	_ = in.Close()
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "0::") || !strings.Contains(out.String(), "/"+name+"/pods/one\n") {
		t.Errorf("its cgroups are %s", &out)
	}
	if c.Remove("pods"); exists(c.Path + "/pods") {
		t.Error("the cgroup is there still")
	}

	left := exec.Command("sleep", "60")
	if err := c.Start(pod, "pods/two", left); err != nil {
		t.Fatal(err)
	}
	go func() { _ = left.Wait() }()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// Whoever has none is told so.
func TestNoCgroups(t *testing.T) {
	if _, err := NewCgroups(t.TempDir(), "x"); !errors.Is(err, ErrNoCgroups) {
		t.Errorf("%v", err)
	}
}

// A pod's address goes to another, which is reached at it.
func TestAddPodAs(t *testing.T) {
	n := Start(t, "as")
	first, err := n.AddPod("first")
	if err != nil {
		t.Fatal(err)
	}
	greet(t, first, n.NS, netip.AddrPortFrom(n.Addr, 80))
	if err := errors.Join(first.Unplug(), first.Close()); err != nil {
		t.Fatal(err)
	}
	second, err := n.AddPodAs("second", first)
	if err != nil {
		t.Fatal(err)
	}
	if saw := greet(t, second, n.NS, netip.AddrPortFrom(n.Addr, 80)); saw != first.Addr {
		t.Errorf("the node saw %s, want %s", saw, first.Addr)
	}
}
