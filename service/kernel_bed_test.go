package service

import (
	"bufio"
	"cmp"
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

// This file makes a node whose pods are processes, in cgroups and in network namespaces, with the service and the helper as processes
// of the node.

const (
	cgroupRoot   = "GME_CGROUP_ROOT"
	attestSocket = "GME_ATTEST_SOCKET"
)

// kernelBed is the node.
type kernelBed struct {
	*bed
	t       testing.TB
	node    *netnstest.Node
	cgroups *netnstest.Cgroups // what the node takes for its root
	server  *exec.Cmd
	helper  *exec.Cmd
	uids    atomic.Uint32
}

// newKernelBed starts the service, with more lines of configuration if there are any, and the helper. An identity of its own is used,
// since a node's does not do for processes of the node (N-07).
func newKernelBed(t testing.TB, more ...string) *kernelBed {
	t.Helper()
	return newKernelBedIn(t, routing.ModeIPTables, more...)
}

// newKernelBedIn is newKernelBed in a mode that serves IPv6 too.
func newKernelBedIn(t testing.TB, mode string, more ...string) *kernelBed {
	t.Helper()
	netnstest.Needs(t, "ip", "iptables")
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
	rules, err := routing.New(routing.Plan{Mode: mode, Listen: netip.MustParseAddrPort("169.254.169.252:988"), Listen6: netip.MustParseAddrPort("[fd20:ce::252]:988"),
		Guard: routing.DefaultGuard(), RunDir: k.dir})
	if err != nil {
		t.Fatal(err)
	}
	if err := k.node.Do(func() error { return rules.Install(t.Context()) }); err != nil {
		t.Fatal(err)
	}
	// What routing.interceptHostPods adds where there are slices to spare.
	args := strings.Fields("-t nat -A OUTPUT -d 169.254.169.254/32 -p tcp --dport 80 -j DNAT --to-destination 169.254.169.252:988")
	if out, err := k.node.Command(t.Context(), "iptables", args...).CombinedOutput(); err != nil {
		t.Fatalf("iptables: %v: %s", err, out)
	}
	k.kube.AddUser("gke-metadata-emulator", "dedicated-secret")
	kubeconfig, err := k.kube.TokenKubeconfig("dedicated-secret")
	if err != nil {
		t.Fatal(err)
	}
	k.write(t, "kubeconfig", string(kubeconfig))
	k.write(t, "x.token", "dedicated-secret")
	k.configure(t, append(more, "nodeName: "+node, "listen6: '[fd20:ce::252]:988'")...)
	k.replace(t, "config.yaml", "routing: {mode: none}", "routing: {mode: "+mode+"}")
	k.replace(t, "config.yaml", "listen: 127.0.0.1:0", "listen: 169.254.169.252:988")
	k.replace(t, "config.yaml", "attestation: {mode: source-ip}", "attestation: {mode: kernel, byAddress: [gvisor]}")
	k.server = k.process(k.node.NS, filepath.Join(k.dir, "config.yaml"))
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

// makeCgroups makes cgroups where nobody else sees them.
func (k *kernelBed) makeCgroups() {
	t := k.t
	t.Helper()
	c, err := netnstest.NewCgroups("", fmt.Sprintf("gme-service-%d-%s", os.Getpid(), strings.ReplaceAll(t.Name(), "/", "-")))
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
}

// process starts this binary in a role, in the namespace and as a process of the node.
func (k *kernelBed) process(ns *netnstest.NS, role string) *exec.Cmd {
	k.t.Helper()
	cmd := k.command(role)
	cmd.Stderr = k.log
	if err := ns.Do(cmd.Start); err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() { k.kill(cmd) })
	return cmd
}

func (k *kernelBed) command(role string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), benchServer+"="+role, cgroupRoot+"="+strings.Replace(k.cgroups.Path, fmt.Sprintf("/fd/%d/", k.cgroups.Mount.Fd()), "/fd/3/", 1),
		attestSocket+"="+namespaceSocket(k.dir))
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
	k.helper = k.process(k.node.NS, "helper")
}

func helperProcess() error {
	log := logrus.New()
	log.SetOutput(os.Stderr)
	return attest.RunHelper(context.Background(), attest.HelperOptions{CgroupRoot: os.Getenv(cgroupRoot), Socket: os.Getenv(attestSocket), User: os.Getuid(), Log: log})
}

// podBed is a pod, or a process of the node.
type podBed struct {
	k *kernelBed
	kubetest.Pod
	container string
	cgroup    string // from the node's root; "": one that the node does not have, as a sandbox's processes are none of its kernel's
	ns        *netnstest.NS

	cmd *exec.Cmd
	in  io.Writer
	out *bufio.Reader
	fds *net.UnixConn // by which it passes descriptors
}

// newPod makes a pod that nobody knows yet, and the ServiceAccount of its name.
func (k *kernelBed) newPod(name string, ns *netnstest.NS) *podBed {
	n := k.uids.Add(1)
	p := &podBed{k: k, ns: ns, container: fmt.Sprintf("%064x", n), Pod: kubetest.Pod{Namespace: "default", Name: name, ServiceAccount: name, Node: node, UID: fmt.Sprintf("00000000-0000-4000-8000-%012d", n)}}
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

// ask has the pod send a request: "kept" on its connection, "fresh" on another, "six" on one by IPv6, "direct" on one to the listen address. It says what came.
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

// mustAsk is ask on a fresh connection.
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
			to := map[string]string{"direct": "169.254.169.252:988", "six": "[fd20:ce::254]:80"}[how]
			c, err := net.DialTimeout("tcp", cmp.Or(to, "169.254.169.254:80"), 10*time.Second)
			if err != nil {
				_ = say.Encode(said{Err: err.Error()})
				continue
			}
			conn, r = c.(*net.TCPConn), bufio.NewReader(c)
		}
		_ = say.Encode(exchangeOn(conn, r, path))
	}
	return nil
}

// exchangeOn sends a request and reads what comes. A path that begins with "raw " is the whole request, with | for the ends of its lines.
func exchangeOn(c net.Conn, r *bufio.Reader, path string) said {
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	text, raw := strings.CutPrefix(path, "raw ")
	if !raw {
		host := "metadata"
		if a, ok := c.RemoteAddr().(*net.TCPAddr); ok && a.IP.To4() == nil {
			host = "[" + a.IP.String() + "]" // as clients have it (H-16)
		}
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
