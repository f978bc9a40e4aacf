package attest

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// Known pods go on being known while the helper is killed again and again, and new ones are when it
// is back.
func TestHelperKilledUnderLoad(t *testing.T) {
	b := newTestNode(t)
	const pods = 8
	clients := make([]*client, pods)
	for i := range clients {
		clients[i] = b.client(containerPath(i, i), b.pod(fmt.Sprint("pod", i)))
	}
	b.startHelper()
	for i, c := range clients {
		b.mustBe(c, dial, podUID(i), containerIDOf(i))
	}

	var over atomic.Bool
	var asked, wrong atomic.Int64
	var askers sync.WaitGroup
	askers.Go(func() {
		for c := range b.accepted {
			from := accepted(c)
			e, err := b.look(from)
			if want := podUID(int(from.Client.Addr().As4()[3]) - 2); err != nil || e.PodUID != want || !e.Alive() {
				wrong.Add(1)
				t.Errorf("%s is %+v, %v", from.Client, e, err)
			}
			asked.Add(1)
			c.Close()
		}
	})
	var clientsDone sync.WaitGroup
	for _, c := range clients {
		clientsDone.Go(func() {
			for !over.Load() && wrong.Load() == 0 {
				own, err := c.try(dial)
				if err == nil {
					_, err = c.try("wait %s", own) // until it was looked at, and closed
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 5 {
		before := asked.Load()
		b.killHelper()
		eventually(t, "others ask meanwhile", func() bool { return asked.Load() > before+50 || wrong.Load() > 0 })
		b.startHelper()
	}
	over.Store(true)
	clientsDone.Wait()
	b.listener.Close()
	askers.Wait()
	b.listen()
	b.mustBe(b.client(containerPath(99, 99), b.pod("new")), dial, podUID(99), containerIDOf(99))
	t.Logf("%d connections, %d wrong", asked.Load(), wrong.Load())
}

// Every helper here has the two capabilities that its unit has.
func TestHelperCapabilities(t *testing.T) {
	b := newTestNode(t)
	b.startHelper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", b.helper.Process.Pid))
	if err != nil || !strings.Contains(string(status), "CapEff:\t0000000000280000") ||
		!strings.Contains(string(status), "CapBnd:\t0000000000280000") {
		t.Errorf("%v: %s", err, status)
	}
}

// Without a helper a pod is refused with the reason, and one on the host network is known.
func TestHelperAway(t *testing.T) {
	b := newTestNode(t)
	c, host := b.client(containerPath(1, 1), b.pod("one")), b.client(containerPath(2, 2), b.node.NS)
	b.mustBe(host, dial, podUID(2), containerIDOf(2))
	conn := b.accept(c.do(dial))
	b.requireRefused("no helper", accepted(conn), ErrHelperAway)
	b.startHelper()
	if e, err := b.look(accepted(conn)); err != nil || e.PodUID != podUID(1) { // the same connection, held meanwhile
		t.Errorf("when the helper is there: %+v, %v", e, err)
	}
}

// nothing keeps a namespace alive: 1000 come and go, and as many are there after as before.
func TestNothingIsPinned(t *testing.T) {
	b := newTestNode(t)
	b.startHelper()
	veths := func() int { return strings.Count(b.in(b.node.NS, "ip -o link show master cni0"), "\n") }
	before, descriptors := veths(), openFiles(t, "self")
	helper := openFiles(t, strconv.Itoa(b.helper.Process.Pid))
	total, atOnce := 1000, 50
	if testing.Short() {
		total = 100
	}
	seen := 0
	for start := 0; start < total; start += atOnce {
		var namespaces []*netnstest.NS
		var clients []*client
		for i := start; i < start+atOnce; i++ {
			ns := b.pod(fmt.Sprint("p", i))
			namespaces = append(namespaces, ns)
			clients = append(clients, b.sleeper(containerPath(i, i), ns))
		}
		eventually(t, "all pods are known", func() bool { return b.kernel.Status().Namespaces == atOnce })
		seen += atOnce
		for _, c := range clients {
			kill(c.cmd)
			b.removeCgroup(c.group)
		}
		for _, ns := range namespaces {
			if err := ns.Close(); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, "no namespace is left", func() bool { return veths() == before })
	}
	if n := b.kernel.Status().Namespaces; n != 0 {
		t.Errorf("%d namespaces are left", n)
	}
	eventually(t, "the helper has closed all", func() bool {
		return openFiles(t,
			strconv.Itoa(b.helper.Process.Pid)) <= helper
	})
	b.kernel.cgroups.mu.Lock()
	cgroups, watches := len(b.kernel.cgroups.byID), len(b.kernel.cgroups.byWatch)
	b.kernel.cgroups.mu.Unlock()
	if cgroups > 10 || watches > 20 {
		t.Errorf("%d cgroups and %d watches are left", cgroups, watches)
	}
	t.Logf("%d namespaces came and went; veths %d before and %d after; descriptors of ours %d and %d", seen, before,
		veths(), descriptors, openFiles(t, "self"))
}

// sleeper is a process that does nothing.
func (b *testNode) sleeper(cgroup string, ns *netnstest.NS) *client {
	b.t.Helper()
	cmd := exec.Command("sleep", "infinity")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return b.place(cmd, cgroup, ns)
}

// removeCgroup removes it, and the pod's if that is empty then.
func (b *testNode) removeCgroup(path string) {
	b.t.Helper()
	eventually(b.t, "the cgroup is removed", func() bool {
		err := unix.Rmdir(b.cgroups + path)
		return err == nil ||
			err == unix.ENOENT
	})
	_ = unix.Rmdir(filepath.Dir(b.cgroups + path))
}

func openFiles(t testing.TB, pid string) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/" + pid + "/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// The process that asks the kernel has no right at all, and another user is not handed anything.
func TestUnprivileged(t *testing.T) {
	b := newTestNode(t)
	c, host := b.client(containerPath(1, 1), b.pod("one")), b.client(containerPath(2, 2), b.node.NS)
	b.startHelper()
	if err := os.Chmod(b.socket, 0o666); err != nil { // the unit has a group for that
		t.Fatal(err)
	}
	for dir := filepath.Dir(b.socket); dir != "/"; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err == nil && info.Mode()&0o011 != 0o011 {
			err = os.Chmod(dir, info.Mode()|0o011)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	listener, err := b.listener.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	b.listener.Close() // it is the other's now
	program := filepath.Join(filepath.Dir(b.socket), "server")
	if err := copyFile(program, "/proc/self/exe"); err != nil {
		t.Fatal(err)
	}
	serve := func(uid uint32) *bufio.Reader {
		cmd := self(t.Context(), "server", "ROOT="+b.seenByClients(""), "SOCKET="+b.socket)
		cmd.Path = program
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uid, Gid: uid, NoSetGroups: false}
		cmd.ExtraFiles = []*os.File{b.mount, listener}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		b.start(b.node.NS, cmd)
		t.Cleanup(func() { kill(cmd) })
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
		if err != nil || !strings.Contains(string(status), "CapEff:\t0000000000000000") {
			t.Fatalf("it has capabilities: %v %s", err, status)
		}
		return bufio.NewReader(out)
	}
	said := serve(65534)
	for cl, uid := range map[*client]string{c: podUID(1), host: podUID(2)} {
		cl.do(dial)
		line, err := said.ReadString('\n')
		var found struct {
			Evidence *Evidence
			Changed  int
		}
		if err := errors.Join(err, json.Unmarshal([]byte(line), &found)); err != nil || found.Evidence == nil ||
			found.Evidence.PodUID != uid {
			t.Errorf("%v: %s; want %s", err, line, uid)
		}
		if found.Changed != 0 {
			t.Errorf("it could change %d network namespaces", found.Changed)
		}
	}
}

func TestPeers(t *testing.T) {
	if os.Geteuid() != 0 {
		netnstest.Lacks(t, netnstest.ErrNeedsRoot)
	}
	abstract := func(name string) *net.UnixAddr {
		return &net.UnixAddr{Name: fmt.Sprintf("@gme-%d-%s", os.Getpid(), name), Net: "unixpacket"}
	}
	// Whoever is not the service's user is hung up on.
	l, err := net.ListenUnix("unixpacket", abstract("helper"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	h := &Helper{options: HelperOptions{User: 4711, Log: quiet()}, over: t.Context().Done(), events: make(chan func())}
	go func() { _ = h.accept(l) }()
	asUser(t, 65534, func() {
		c, err := net.Dial("unixpacket", l.Addr().String())
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		if n, err := c.Read(make([]byte, 8)); n != 0 || err == nil {
			t.Errorf("a stranger got %d bytes, %v", n, err)
		}
		// And the server takes nothing from one that is not root.
		own, err := net.ListenUnix("unixpacket", abstract("stranger"))
		if err != nil {
			t.Error(err)
			return
		}
		defer own.Close()
		if c, err := dialHelper(context.Background(), own.Addr().String()); err == nil ||
			!strings.Contains(err.Error(), "and not to root") {
			t.Errorf("a helper that is not root: %v, %v", c, err)
		}
	})
}
