package service

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/sirupsen/logrus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
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

// kernelNode is the node.
type kernelNode struct {
	*testNode
	t       testing.TB
	node    *netnstest.Node
	cgroups *netnstest.Cgroups // what the node takes for its root
	plan    routing.Plan       // what stands
	server  *exec.Cmd
	helper  *exec.Cmd
	uids    atomic.Uint32
}

// newKernelNode starts the service in mode iptables, with more lines of configuration if there are
// any, and the helper.
func newKernelNode(t testing.TB, more ...string) *kernelNode {
	t.Helper()
	return newKernelNodeIn(t, routing.Plan{Mode: routing.ModeIPTables}, more...)
}

// newKernelNodeIn is newKernelNode with another Plan, to which the usual is added: pods on the host
// network are redirected and the node's own slices spared where a mode can, and IPv6 is served. An
// identity of its own is used, since a node's does not do for processes of the node (N-07).
func newKernelNodeIn(t testing.TB, plan routing.Plan, more ...string) *kernelNode {
	t.Helper()
	netnstest.Needs(t, "ip", "iptables", "unshare", "mount")
	k := &kernelNode{t: t, node: netnstest.Start(t, "kernel")}
	k.makeCgroups()
	listen := func(port uint16) net.Listener {
		l, err := k.node.Cloud.Listen("tcp4", netip.AddrPortFrom(k.node.Cloud.Addr, port).String())
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	k.testNode = newWorldAt(t, listen(6443), listen(443))
	k.plan = k.usual(plan)
	if k.plan.Link != "" {
		k.run("ip link add " + k.plan.Link + " type bridge") // whether the kernel has dummy links or not
	}
	// A network plugin's, which has connections tracked: what is not has no original destination in
	// any mode.
	k.run("iptables -t nat -A POSTROUTING -s 192.0.2.0/24 -j MASQUERADE")
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

// usual adds to a Plan what the Plan of every kernelNode has.
func (k *kernelNode) usual(p routing.Plan) routing.Plan {
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
func (k *kernelNode) route(p routing.Plan, verbs ...string) {
	k.t.Helper()
	if out, err := k.tryRoute(p, verbs...); err != nil {
		k.t.Fatalf("routing %v: %v: %s", verbs, err, out)
	}
}

func (k *kernelNode) tryRoute(p routing.Plan, verbs ...string) (string, error) {
	k.t.Helper()
	var out strings.Builder
	cmd := k.routing(p, &out, verbs...)
	err := cmd.Wait()
	return out.String(), err
}

// routing starts a process that does it, where /sys/fs/cgroup shows the node's cgroups, and their
// root is the node's: so system.slice is the node's own.
func (k *kernelNode) routing(p routing.Plan, out io.Writer, verbs ...string) *exec.Cmd {
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

// run runs shell commands in the node's network namespace.
func (k *kernelNode) run(script string) {
	k.t.Helper()
	if out, err := k.node.Command(k.t.Context(), "sh", "-ec", script).CombinedOutput(); err != nil {
		k.t.Fatalf("%s: %v: %s", script, err, out)
	}
}

// makeCgroups makes cgroups where nobody else sees them.
func (k *kernelNode) makeCgroups() {
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
func (k *kernelNode) process(role, cgroup string) *exec.Cmd {
	k.t.Helper()
	cmd := k.command(role)
	cmd.Stderr = k.log
	if err := k.cgroups.Start(k.node.NS, cgroup, cmd); err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() { k.kill(cmd) })
	return cmd
}

func (k *kernelNode) command(role string) *exec.Cmd {
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

func (k *kernelNode) kill(cmd *exec.Cmd) {
	if cmd.ProcessState == nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
}

func (k *kernelNode) startHelper() {
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
