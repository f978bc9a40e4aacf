package service

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// This file makes a node whose pods are processes, in cgroups and in network namespaces, with the
// service and the helper as processes of the node.

const (
	cgroupRoot   = "GME_CGROUP_ROOT"
	attestSocket = "GME_ATTEST_SOCKET"
	routingPlan  = "GME_ROUTING_PLAN"
	routingVerbs = "GME_ROUTING_VERBS"
)

// kernelBed is the node.
type kernelBed struct {
	*bed
	t       testing.TB
	node    *netnstest.Node
	cgroups *netnstest.Cgroups // what the node takes for its root
	plan    routing.Plan       // what stands
	server  *exec.Cmd
	helper  *exec.Cmd
	uids    atomic.Uint32
}

// newKernelBed starts the service in mode iptables, with more lines of configuration if there are
// any, and the helper.
func newKernelBed(t testing.TB, more ...string) *kernelBed {
	t.Helper()
	return newKernelBedIn(t, routing.Plan{Mode: routing.ModeIPTables}, more...)
}

// newKernelBedIn is newKernelBed with another Plan, to which the usual is added: pods on the host
// network are redirected and the node's own slices spared where a mode can, and IPv6 is served. An
// identity of its own is used, since a node's does not do for processes of the node (N-07).
func newKernelBedIn(t testing.TB, plan routing.Plan, more ...string) *kernelBed {
	t.Helper()
	netnstest.Needs(t, "ip", "iptables", "unshare", "mount")
	k := &kernelBed{t: t, node: netnstest.Start(t, "kernel")}
	k.makeCgroups()
	listen := func(port uint16) net.Listener {
		l, err := k.node.Cloud.Listen("tcp4", netip.AddrPortFrom(k.node.Cloud.Addr, port).String())
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	k.bed = newWorldAt(t, listen(6443), listen(443))
	k.plan = k.usual(plan)
	if k.plan.Link != "" {
		k.sh("ip link add " + k.plan.Link + " type bridge") // whether the kernel has dummy links or not
	}
	// A network plugin's, which has connections tracked: what is not has no original destination in
	// any mode.
	k.sh("iptables -t nat -A POSTROUTING -s 192.0.2.0/24 -j MASQUERADE")
	k.route(k.plan, "install", "check")
	k.kube.AddUser("gke-metadata-emulator", "dedicated-secret")
	kubeconfig, err := k.kube.TokenKubeconfig("dedicated-secret")
	if err != nil {
		t.Fatal(err)
	}
	k.write(t, "kubeconfig", string(kubeconfig))
	k.write(t, "x.token", "dedicated-secret")
	if k.plan.Listen6.IsValid() {
		more = append(more, fmt.Sprintf("listen6: '%s'", k.plan.Listen6))
	}
	k.configure(t, append(more, "nodeName: "+node)...)
	k.replace(
		t,
		"config.yaml",
		"mode: none",
		fmt.Sprintf("mode: %s, link: %q, force: %t", k.plan.Mode, k.plan.Link, k.plan.Force),
	)
	k.replace(t, "config.yaml", "listen: 127.0.0.1:0", "listen: "+k.plan.Listen.String())
	k.replace(t, "config.yaml", "attestation: {mode: source-ip}", "attestation: {mode: kernel, byAddress: [gvisor]}")
	k.server = k.process(filepath.Join(k.dir, "config.yaml"), "/system.slice/gke-metadata-emulator.service")
	k.startHelper()
	t.Cleanup(func() {
		k.kill(k.server)
		for _, secret := range append(k.google.Secrets(), k.kube.IssuedTokens()...) {
			if strings.Contains(k.log.String(), secret) {
				t.Error("a secret is in the log")
			}
		}
		if t.Failed() {
			t.Logf("the service said:\n%s", k.log)
		}
	})
	k.eventually(t, "pods and their namespaces are known", func() bool {
		st := statusOf(t, k.dir)
		return st.Cluster != nil && st.Cluster.Watching && st.Attestation.Kernel.Helper
	})
	return k
}

// usual adds to a Plan what every one of the bed's has.
func (k *kernelBed) usual(p routing.Plan) routing.Plan {
	p.Guard, p.RunDir = routing.DefaultGuard(), k.dir
	switch p.Mode {
	case routing.ModeLoopback:
		p.Listen, p.Force = netip.MustParseAddrPort(
			"169.254.169.254:80",
		), true // the cloud's metadata server answers the node
	case routing.ModeIPTables, routing.ModeNFTables:
		p.Listen6, p.InterceptHostPods = netip.MustParseAddrPort("[fd20:ce::252]:988"), "on"
	case routing.ModeEBPF:
		p.InterceptHostPods = "on"
	}
	if !p.Listen.IsValid() {
		p.Listen = netip.MustParseAddrPort("169.254.169.252:988")
	}
	p.BPFDir = filepath.Join(netnstest.MountBPF(k.t), "gme")
	return p
}

// route does what `routing install`, check and remove do.
func (k *kernelBed) route(p routing.Plan, verbs ...string) {
	k.t.Helper()
	if out, err := k.tryRoute(p, verbs...); err != nil {
		k.t.Fatalf("routing %v: %v: %s", verbs, err, out)
	}
}

func (k *kernelBed) tryRoute(p routing.Plan, verbs ...string) (string, error) {
	k.t.Helper()
	var out strings.Builder
	cmd := k.routing(p, &out, verbs...)
	err := cmd.Wait()
	return out.String(), err
}

// routing starts a process that does it, where /sys/fs/cgroup shows the node's cgroups, and their
// root is the node's: so system.slice is the node's own.
func (k *kernelBed) routing(p routing.Plan, out io.Writer, verbs ...string) *exec.Cmd {
	k.t.Helper()
	text, err := json.Marshal(p)
	if err != nil {
		k.t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		k.t.Fatal(err)
	}
	// First the machine's own goes: the kernel mounts no file system over itself.
	const mount = `umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; exec "$0"`
	cmd := exec.CommandContext(k.t.Context(), "unshare", "--cgroup", "--mount", "sh", "-ec", mount, self)
	cmd.Env = append(
		os.Environ(),
		benchServer+"=routing",
		routingPlan+"="+string(text),
		routingVerbs+"="+strings.Join(verbs, " "),
	)
	cmd.Stdout, cmd.Stderr = out, out
	if err = k.cgroups.Start(k.node.NS, "", cmd); err != nil {
		k.t.Fatalf("routing %v: %v", verbs, err)
	}
	return cmd
}

func routingProcess() error {
	var p routing.Plan
	if err := json.Unmarshal([]byte(os.Getenv(routingPlan)), &p); err != nil {
		return err
	}
	r, err := routing.New(p)
	if err != nil {
		return err
	}
	watch := routing.Watch{Load: func() routing.Plan { return p }, RunDir: p.RunDir, Log: logrus.New()}
	do := map[string]func(context.Context) error{"install": r.Install, "check": r.Check, "remove": r.Remove,
		"watch": watch.Run}
	for _, verb := range strings.Fields(os.Getenv(routingVerbs)) {
		if err := do[verb](context.Background()); err != nil {
			return fmt.Errorf("%s: %w", verb, err)
		}
	}
	return nil
}

// sh runs shell commands in the node's network namespace.
func (k *kernelBed) sh(script string) {
	k.t.Helper()
	if out, err := k.node.Command(k.t.Context(), "sh", "-ec", script).CombinedOutput(); err != nil {
		k.t.Fatalf("%s: %v: %s", script, err, out)
	}
}

// makeCgroups makes cgroups where nobody else sees them.
func (k *kernelBed) makeCgroups() {
	t := k.t
	t.Helper()
	c, err := netnstest.NewCgroups(
		"",
		fmt.Sprintf("gme-service-%d-%s", os.Getpid(), strings.ReplaceAll(t.Name(), "/", "-")),
	)
	if errors.Is(err, netnstest.ErrNoCgroups) {
		netnstest.Lacks(t, err)
	}
	if err != nil {
		t.Fatal(err)
	}
	k.cgroups = c
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := os.Mkdir(filepath.Join(c.Path, "system.slice"), 0o755); err != nil { // rules name what is there
		t.Fatal(err)
	}
}

// process starts this binary in a role, as a unit of the node.
func (k *kernelBed) process(role, cgroup string) *exec.Cmd {
	k.t.Helper()
	cmd := k.command(role)
	cmd.Stderr = k.log
	if err := k.cgroups.Start(k.node.NS, cgroup, cmd); err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() { k.kill(cmd) })
	return cmd
}

func (k *kernelBed) command(role string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(
		os.Environ(),
		benchServer+"="+role,
		cgroupRoot+"="+strings.Replace(k.cgroups.Path, fmt.Sprintf("/fd/%d/", k.cgroups.Mount.Fd()), "/fd/3/", 1),
		attestSocket+"="+namespaceSocket(k.dir),
	)
	cmd.ExtraFiles = []*os.File{k.cgroups.Mount}
	return cmd
}

func (k *kernelBed) kill(cmd *exec.Cmd) {
	if cmd.ProcessState == nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
}

func (k *kernelBed) startHelper() {
	k.t.Helper()
	if err := os.MkdirAll(filepath.Dir(namespaceSocket(k.dir)), 0o750); err != nil {
		k.t.Fatal(err)
	}
	k.helper = k.process("helper", "/system.slice/gke-metadata-emulator-attest.service")
}

func helperProcess() error {
	log := logrus.New()
	log.SetOutput(os.Stderr)
	l, err := listenUnix(context.Background(), "unixpacket", os.Getenv(attestSocket), "x.service")
	if err != nil {
		return err
	}
	return attest.RunHelper(
		context.Background(),
		attest.HelperOptions{CgroupRoot: os.Getenv(cgroupRoot), Listener: l.UnixListener, User: os.Getuid(), Log: log},
	)
}

// podBed is a pod, or a process of the node.
type podBed struct {
	k *kernelBed
	kubetest.Pod
	container string
	// from the node's root; "": one that the node does not have, as a sandbox's processes are none of
	// its kernel's
	cgroup string
	ns     *netnstest.NS

	cmd *exec.Cmd
	in  io.Writer
	out *bufio.Reader
	fds *net.UnixConn // by which it passes descriptors
}

// newPod makes a pod that nobody knows yet, and the ServiceAccount of its name.
func (k *kernelBed) newPod(name string, ns *netnstest.NS) *podBed {
	n := k.uids.Add(1)
	p := &podBed{
		k:         k,
		ns:        ns,
		container: fmt.Sprintf("%064x", n),
		Pod: kubetest.Pod{
			Namespace:      "default",
			Name:           name,
			ServiceAccount: name,
			Node:           node,
			UID:            fmt.Sprintf("00000000-0000-4000-8000-%012d", n),
		},
	}
	p.cgroup = "/kubepods/burstable/pod" + p.UID + "/" + p.container
	if ns != k.node.NS {
		p.Addresses = []string{ns.Addr.String()}
	} else {
		p.HostNetwork = true
	}
	k.kube.SetServiceAccount("default", name, nil)
	return p
}

// tell has the API server know the pod.
func (p *podBed) tell() { p.k.kube.SetPod(p.Pod) }

// start starts the pod's process.
func (p *podBed) start() error {
	k := p.k
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "ours"), os.NewFile(uintptr(pair[1]), "theirs")
	defer ours.Close()
	defer theirs.Close()
	c, err := net.FileConn(ours)
	if err != nil {
		return err
	}
	p.fds = c.(*net.UnixConn)
	p.cmd = k.command("pod")
	p.cmd.Stderr = os.Stderr
	p.cmd.ExtraFiles = append(p.cmd.ExtraFiles, theirs)
	in, err := p.cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	p.in, p.out = in, bufio.NewReader(out)
	if p.cgroup == "" {
		err = p.ns.Do(p.cmd.Start)
	} else {
		err = k.cgroups.Start(p.ns, p.cgroup, p.cmd)
	}
	if err != nil {
		return err
	}
	k.t.Cleanup(func() { p.die() })
	return nil
}

// die kills it, and returns when it is reaped.
func (p *podBed) die() {
	p.k.kill(p.cmd)
	_ = p.fds.Close()
}

// said is what a pod was told.
type said struct {
	Status int
	Header http.Header
	Body   string
	Err    string
	Close  bool
}

// ask has the pod send a request on its connection, "kept", or on another one, as dial has it. It
// says what came.
func (p *podBed) ask(how, path string) (a said, err error) {
	if _, err = fmt.Fprintln(p.in, how, path); err != nil {
		return a, err
	}
	line, err := p.out.ReadBytes('\n')
	if err != nil {
		return a, err
	}
	return a, json.Unmarshal(line, &a)
}

// mustAsk is ask on a fresh connection, of a daemon of the node where the service listens: the
// rules spare it.
func (p *podBed) mustAsk(t testing.TB, path string) said {
	t.Helper()
	how := "fresh"
	if p.ns == p.k.node.NS && strings.HasPrefix(p.cgroup, "/system.slice/") {
		how = "direct"
	}
	a, err := p.ask(how, path)
	if err != nil || a.Err != "" {
		t.Fatalf("%s asks %s: %v %s", p.Name, path, err, a.Err)
	}
	return a
}

// served is mustAsk of a client that asks again where the answer is 503, as the answer says: what
// is new on the node is known a moment later.
func (p *podBed) served(t testing.TB, path string) (a said) {
	t.Helper()
	p.k.eventually(t, p.Name+" gets another answer than 503", func() bool {
		a = p.mustAsk(t, path)
		return a.Status != http.StatusServiceUnavailable
	})
	return a
}

// pass has the pod hand its connection over.
func (p *podBed) pass() (net.Conn, error) {
	if _, err := fmt.Fprintln(p.in, "pass -"); err != nil {
		return nil, err
	}
	control := make([]byte, unix.CmsgSpace(4))
	if _, _, _, _, err := p.fds.ReadMsgUnix(make([]byte, 1), control); err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil || len(messages) != 1 {
		return nil, errors.Join(err, errors.New("no descriptor came"))
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fds[0]), "passed")
	defer f.Close()
	return net.FileConn(f)
}

// podProcess does what its standard input says, a line each.
func podProcess() error {
	var conn *net.TCPConn
	var r *bufio.Reader
	say := json.NewEncoder(os.Stdout)
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		how, path, _ := strings.Cut(in.Text(), " ")
		if attacks[how] != nil {
			_ = say.Encode(attack(how, path))
			continue
		}
		if how == "pass" {
			f, err := conn.File()
			if err != nil {
				return err
			}
			if err := unix.Sendmsg(4, []byte{1}, unix.UnixRights(int(f.Fd())), nil, 0); err != nil {
				return err
			}
			_ = f.Close()
			continue
		}
		if how != "kept" || conn == nil {
			c, err := dial(how)
			if err != nil {
				_ = say.Encode(saidOf(err))
				continue
			}
			if conn != nil {
				_ = conn.Close() // of connections a pod has limits.connectionsPerPod
			}
			conn, r = c.(*net.TCPConn), bufio.NewReader(c)
		}
		_ = say.Encode(exchangeOn(conn, r, path))
	}
	return nil
}

// dial connects to where pods ask ("fresh"), to the listen address ("direct"), or to
// "ADDRESS:PORT,SOURCE,PATIENCE", of which SOURCE may be empty.
func dial(how string) (net.Conn, error) {
	if to := map[string]string{"fresh": "169.254.169.254:80", "kept": "169.254.169.254:80",
		"direct": "169.254.169.252:988"}[how]; to != "" {
		how = fmt.Sprint(to, ",,", testTimeout)
	}
	f := strings.Split(how, ",")
	if len(f) != 3 {
		return nil, errors.New("dial how? " + how)
	}
	timeout, err := time.ParseDuration(f[2])
	if err != nil {
		return nil, err
	}
	d := net.Dialer{Timeout: timeout}
	if f[1] != "" {
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(f[1])}
	}
	return d.Dial("tcp", f[0])
}

// saidOf is what a connection said that did not come about: reset, noroute, drop, or what else it
// was.
func saidOf(err error) (a said) {
	var timeout net.Error
	switch {
	case err == nil:
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ECONNRESET):
		a.Err = "reset"
	case errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EACCES):
		a.Err = "noroute"
	case errors.As(err, &timeout) && timeout.Timeout():
		a.Err = "drop"
	default:
		a.Err = err.Error()
	}
	return a
}

// exchangeOn sends a request and reads what comes. A path that begins with "raw " is the whole
// request, with | for the ends of its lines.
func exchangeOn(c net.Conn, r *bufio.Reader, path string) said {
	_ = c.SetDeadline(time.Now().Add(testTimeout))
	text, raw := strings.CutPrefix(path, "raw ")
	if !raw {
		host := strings.TrimSuffix(c.RemoteAddr().String(), ":80") // as clients have it (H-16)
		text = "GET " + path + " HTTP/1.1|Host: " + host + "|Metadata-Flavor: Google||"
	}
	if _, err := io.WriteString(c, strings.ReplaceAll(text, "|", "\r\n")); err != nil {
		return said{Err: err.Error()}
	}
	res, err := http.ReadResponse(r, nil)
	if err != nil {
		return said{Err: err.Error()}
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return said{Err: err.Error()}
	}
	return said{Status: res.StatusCode, Header: res.Header, Body: string(body), Close: res.Close}
}
