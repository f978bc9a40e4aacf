package attest

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// This file makes a node with pods: cgroups and network namespaces of the test's own, processes in
// them, rules that redirect, a helper in a process of its own, and a Kernel in the node's network
// namespace.

// roles are what the test binary can be started as, by the variable.
const (
	roleVariable    = "GME_ATTEST_ROLE"
	verboseVariable = "GME_ATTEST_VERBOSE" // has everybody log to standard error
)

func TestMain(m *testing.M) {
	roles := map[string]func() error{"helper": helperRole, "client": clientRole, "server": serverRole}
	if role, ok := roles[os.Getenv(roleVariable)]; ok {
		if err := role(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// self is a command that runs the test binary in a role.
func self(ctx context.Context, role string, env ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Env = append(os.Environ(), append(env, roleVariable+"="+role)...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

var nodeSequence atomic.Uint32

// testNode is a node.
type testNode struct {
	t       testing.TB
	node    *netnstest.Node
	mount   *os.File // a cgroup v2 mount that is nowhere in the file system
	cgroups string   // our part of it: what the node takes for its root
	v1      string   // a hierarchy of cgroup v1, where the test has one
	socket  string   // the helper's
	kernel  *Kernel
	helper  *exec.Cmd
	stopped chan struct{}
	stop    context.CancelFunc

	listener net.Listener
	accepted chan net.Conn
}

const (
	metadataAddr = "169.254.169.254:80"
	listenAddr   = "169.254.169.252:988"
)

// newTestNode makes a node without pods, with a Kernel that runs and without a helper.
func newTestNode(t testing.TB) *testNode {
	t.Helper()
	netnstest.Needs(t, "ip", "iptables")
	b := &testNode{t: t, node: netnstest.Start(t, "attest")}
	b.mountCgroups()
	b.socket = filepath.Join(t.TempDir(), "attest.sock")
	for _, line := range []string{
		"ip address add 169.254.169.252/32 dev lo",
		"sysctl -qw net.ipv4.ip_forward=1",
		"iptables -t nat -A PREROUTING -d 169.254.169.254/32 -p tcp --dport 80 -j DNAT --to-destination " + listenAddr,
		"iptables -t nat -A OUTPUT -d 169.254.169.254/32 -p tcp --dport 80 -j DNAT --to-destination " + listenAddr,
	} {
		args := strings.Fields(line)
		if out, err := b.node.Command(t.Context(), args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", line, err, out)
		}
	}
	b.listen()
	b.startKernel(b.cgroups)
	return b
}

// listen accepts until the listener is closed.
func (b *testNode) listen() {
	b.t.Helper()
	l, err := b.node.Listen("tcp4", listenAddr)
	if err != nil {
		b.t.Fatal(err)
	}
	accepted := make(chan net.Conn, 4096)
	b.listener, b.accepted = l, accepted
	go func() {
		defer close(accepted)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
}

// mountCgroups mounts cgroup v2 where nobody else sees it, and makes a part of it ours.
func (b *testNode) mountCgroups() {
	t := b.t
	t.Helper()
	fs, err := unix.Fsopen("cgroup2", unix.FSOPEN_CLOEXEC)
	if err != nil {
		netnstest.Lacks(t, fmt.Errorf("mount cgroup2: %w", err))
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		netnstest.Lacks(t, fmt.Errorf("mount cgroup2: %w", err))
	}
	mount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		netnstest.Lacks(t, fmt.Errorf("mount cgroup2: %w", err))
	}
	b.mount = os.NewFile(uintptr(mount), "cgroup2")
	b.cgroups = fmt.Sprintf("/proc/self/fd/%d/gme-attest-%d-%d", mount, os.Getpid(), nodeSequence.Add(1))
	if err := os.Mkdir(b.cgroups, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = os.WriteFile(b.cgroups+"/cgroup.kill", []byte("1"), 0)
		eventually(t, "the cgroups are removed", func() bool { removeCgroups(b.cgroups); return !exists(b.cgroups) })
		_ = b.mount.Close()
	})
}

func removeCgroups(path string) {
	kids, _ := subdirectories(path)
	for kid := range kids {
		removeCgroups(path + "/" + kid)
	}
	_ = unix.Rmdir(path)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// eventually polls until ok, for as long as a slow machine may need. Between polls it pauses for as
// long as one takes: some run commands.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	end := time.Now().Add(30 * time.Second)
	for asked := time.Now(); !ok(); asked = time.Now() {
		if asked.After(end) {
			t.Fatalf("still not so after 30 s: %s", what)
		}
		<-time.After(max(time.Millisecond, time.Since(asked)))
	}
}

func quiet() logrus.FieldLogger {
	l := logrus.New()
	l.SetLevel(logrus.DebugLevel)
	if os.Getenv(verboseVariable) == "" {
		l.SetOutput(io.Discard)
	}
	return l
}

func (b *testNode) startKernel(root string) {
	b.kernel = NewKernel(KernelOptions{CgroupRoot: root, Socket: b.socket, Log: quiet()})
	ctx, cancel := context.WithCancel(context.Background())
	b.stop, b.stopped = cancel, make(chan struct{})
	k, stopped := b.kernel, b.stopped
	go func() {
		defer close(stopped)
		_ = b.node.Do(func() error { return k.Run(ctx) })
	}()
	b.t.Cleanup(func() { cancel(); <-stopped })
	eventually(b.t, "the kernel runs", func() bool { return b.kernel.Status().Hierarchy != "" })
}

// startHelper starts one in a process of its own, on the node, and waits until it has reported all
// it knows.
func (b *testNode) startHelper() {
	b.t.Helper()
	b.startHelperAt(b.cgroups)
	b.connected()
}

func (b *testNode) startHelperAt(root string) {
	b.t.Helper()
	b.helper = self(context.Background(), "helper", "ROOT="+strings.Replace(root, fmt.Sprintf("/fd/%d/", b.mount.Fd()),
		"/fd/3/", 1), "SOCKET="+b.socket)
	b.helper.ExtraFiles = []*os.File{b.mount}
	// With the rights that the unit has, and no others.
	setpriv, err := exec.LookPath("setpriv")
	if err != nil {
		netnstest.Lacks(b.t, err)
	}
	program, err := os.Executable()
	if err != nil {
		b.t.Fatal(err)
	}
	b.helper.Path = setpriv
	b.helper.Args = []string{"setpriv", "--no-new-privs", "--bounding-set=-all,+sys_admin,+sys_ptrace", "--inh-caps=-all",
		program}
	b.start(b.node.NS, b.helper)
	helper := b.helper
	b.t.Cleanup(func() { kill(helper) })
}

func (b *testNode) connected() {
	b.t.Helper()
	eventually(b.t, "the helper is connected", func() bool { return b.kernel.Status().Helper })
}

func (b *testNode) killHelper() {
	b.t.Helper()
	kill(b.helper)
	eventually(b.t, "the helper is away", func() bool { return !b.kernel.Status().Helper })
}

func kill(cmd *exec.Cmd) {
	if cmd.ProcessState == nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
}

// start starts the command in the namespace. The thread that starts it lives on as long as the
// test: the command dies with it.
func (b *testNode) start(ns *netnstest.NS, cmd *exec.Cmd) {
	b.t.Helper()
	started, over := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := ns.Do(func() error {
			started <- cmd.Start()
			return nil
		})
		if err != nil {
			started <- err
		}
		<-over
	}()
	b.t.Cleanup(func() { close(over) })
	if err := <-started; err != nil {
		b.t.Fatal(err)
	}
}

// helperRole is the helper.
func helperRole() error {
	socket := os.Getenv("SOCKET")
	_ = os.Remove(socket) // an earlier helper's
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		return err
	}
	if err := os.Chmod(socket, 0o660); err != nil {
		return err
	}
	return RunHelper(context.Background(), HelperOptions{CgroupRoot: os.Getenv("ROOT"), Listener: l, User: 65534,
		Log: quiet()})
}

// serverRole is a Kernel that looks at each connection to the listener that it is handed, and
// writes down what it found.
func serverRole() error {
	l, err := net.FileListener(os.NewFile(4, "listener"))
	if err != nil {
		return err
	}
	k := NewKernel(KernelOptions{CgroupRoot: os.Getenv("ROOT"), Socket: os.Getenv("SOCKET"), Log: quiet()})
	go func() { _ = k.Run(context.Background()) }()
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		changed := k.Changes()
		e, err := k.Look(accepted(c))
		for errors.Is(err, ErrNoNamespace) || errors.Is(err, ErrHelperAway) {
			<-changed
			changed = k.Changes()
			e, err = k.Look(accepted(c))
		}
		said, _ := json.Marshal(map[string]any{"evidence": e, "error": fmt.Sprint(err), "changed": k.tamper()})
		fmt.Printf("%s\n", said)
		_ = c.Close()
	}
}

// tamper tries to change the pods' network namespaces by the sockets in them, and returns how many
// let it.
func (k *Kernel) tamper() (changed int) {
	k.routing.Lock()
	defer k.routing.Unlock()
	for _, n := range k.namespaces {
		r := n.route.request(unix.RTM_NEWADDR, unix.NLM_F_ACK|unix.NLM_F_CREATE, unix.SizeofIfAddrmsg+8)
		m := r[headerLen:]
		m[0], m[1] = unix.AF_INET, 32
		binary.NativeEndian.PutUint32(m[4:], 1) // lo
		copy(m[unix.SizeofIfAddrmsg:], []byte{8, 0, unix.IFA_LOCAL, 0, 192, 0, 2, 1})
		if n.route.send(r) != nil {
			continue
		}
		answer, err := n.route.receive()
		if m, _, ok := nextMessage(answer); err != nil || !ok || m.kind != unix.NLMSG_ERROR || m.errno() != unix.EPERM {
			changed++
		}
	}
	return changed
}

// cgroup makes one, and all above it. path is from the node's root.
func (b *testNode) cgroup(path string) string {
	b.t.Helper()
	if err := os.MkdirAll(b.cgroups+path, 0o755); err != nil {
		b.t.Fatal(err)
	}
	return path
}

// accept returns our end of the client's connection from there.
func (b *testNode) accept(from string) net.Conn {
	b.t.Helper()
	want := netip.MustParseAddrPort(from)
	for {
		select {
		case c, ok := <-b.accepted:
			if !ok {
				b.t.Fatal("nobody accepts")
			}
			if addrPort(c.RemoteAddr()) == netip.AddrPortFrom(want.Addr().Unmap(), want.Port()) {
				b.t.Cleanup(func() { c.Close() })
				return c
			}
			c.Close()
		case <-time.After(10 * time.Second):
			b.t.Fatalf("no connection from %s", from)
		}
	}
}

// look looks until there is evidence, or an error that lasts, or that stays for a second.
func (b *testNode) look(c Conn) (*Evidence, error) {
	over := time.After(time.Second)
	for {
		changed := b.kernel.Changes()
		e, err := b.kernel.Look(c)
		if err == nil || lasts(err) {
			return e, err
		}
		select {
		case <-changed:
		case <-over:
			return e, err
		}
	}
}

func lasts(err error) bool {
	for _, soft := range []error{ErrNoNamespace, ErrHelperAway, ErrNoSocket, ErrUnknownCgroup} {
		if errors.Is(err, soft) {
			return false
		}
	}
	return true
}

// connect has the client connect, and looks who it is.
func (b *testNode) connect(c *client, how string) (*Evidence, net.Conn, error) {
	b.t.Helper()
	conn := b.accept(c.do("%s", how))
	e, err := b.look(accepted(conn))
	return e, conn, err
}

// mustBe has the client connect, and fails unless it is known as pod and container.
func (b *testNode) mustBe(c *client, how, pod, container string) (*Evidence, net.Conn) {
	b.t.Helper()
	e, conn, err := b.connect(c, how)
	if err != nil {
		b.t.Fatalf("%s: %v", how, err)
	}
	if e.PodUID != pod || e.Container != container || e.Cgroup != c.group || e.Kind != ByCgroup || !e.Alive() {
		b.t.Fatalf("%s is %+v, want pod %s, container %s, cgroup %s", how, e, pod, container, c.group)
	}
	return e, conn
}

// podUID and containerIDOf make as many as a test wants.
func podUID(n int) string        { return fmt.Sprintf("00000000-0000-4000-8000-%012d", n) }
func containerIDOf(n int) string { return fmt.Sprintf("%064x", n) }

// containerPath is a container's cgroup with the cgroupfs driver.
func containerPath(pod, container int) string {
	return "/kubepods/burstable/pod" + podUID(pod) + "/" + containerIDOf(container)
}

// copyFile copies by another process: a child of another test could inherit the descriptor that
// writes, and the copy then be busy.
func copyFile(to, from string) error {
	from, err := filepath.EvalSymlinks(from) // what /proc/self is to cp is another process
	if err != nil {
		return err
	}
	return exec.Command("cp", from, to).Run()
}
