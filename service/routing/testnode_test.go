package routing

import (
	"context"
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
	"time"

	"github.com/sirupsen/logrus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/bpf"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/probe"
)

// TestMain lets the test program stand for other programs: one that asks, one that listens, one
// that installs.
func TestMain(m *testing.M) {
	role, arg := os.Getenv("ROUTING_TEST_ROLE"), os.Getenv("ROUTING_TEST_ARG")
	switch role {
	case "":
		os.Exit(m.Run())
	case "ask":
		c, err := net.DialTimeout("tcp", arg, long)
		if err == nil {
			var who string
			if who, err = talk(c, long); err == nil {
				fmt.Print(who)
			}
		}
		end(err)
	case "repeat":
		end(repeat(arg))
	case "load":
		end(loadUntilEOF(arg))
	case "pins":
		dir, root, _ := strings.Cut(arg, " ")
		end(
			(bpf.Pins{Dir: dir, Root: root, Hooks: bpf.RedirectHooks}).Install(
				bpf.Rewriting{Server: metadataServer, Listen: netip.MustParseAddrPort("169.254.169.252:988")},
			),
		)
	case "connect":
		end(connectAs(arg))
	case "watch":
		log := logrus.New()
		log.SetOutput(os.Stdout)
		p := testPlan(filepath.Dir(arg), filepath.Base(arg))
		end(Watch{RunDir: p.RunDir, Log: log, Load: func() Plan { return p }}.Run(context.Background()))
	case "watch by programs": // in mode ebpf, whose test nodes have cgroups of their own
		log := logrus.New()
		log.SetOutput(os.Stdout)
		p := testPlan("", "")
		p.Mode = ModeEBPF
		_, err := fmt.Sscan(arg, &p.RunDir, &p.BPFDir, &p.CgroupRoot)
		end(errors.Join(err, Watch{RunDir: p.RunDir, Log: log, Load: func() Plan { return p }}.Run(context.Background())))
	case "resolve":
		end(resolveAs(arg))
	case "detect":
		end(detect())
	case "look up":
		end(lookUp(arg))
	case "listen":
		_, err := net.Listen("tcp", arg)
		fmt.Println("listening", err)
		_, _ = io.Copy(io.Discard, os.Stdin) // until the test is over
		end(err)
	case "listen on UDP":
		_, err := net.ListenPacket("udp4", arg)
		fmt.Println("listening", err)
		_, _ = io.Copy(io.Discard, os.Stdin)
		end(err)
	case "probe": // which is killed in the middle of it
		pod, err := probe.NewPod()
		if err == nil {
			_, err = pod.Dropped(context.Background(), pod.Addr, func() {
				fmt.Println("probing")
				_, _ = io.Copy(io.Discard, os.Stdin)
			})
		}
		end(err)
	case "remove without IPv6":
		err := denyIPv6()
		if err == nil {
			err = removeIPTables(context.Background(), testPlan(filepath.Dir(arg), filepath.Base(arg)), false)
		}
		end(err)
	case "install":
		r, err := New(testPlan(filepath.Dir(arg), filepath.Base(arg)))
		if err == nil {
			err = r.Install(context.Background())
		}
		end(err)
	}
}

func end(err error) {
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	os.Exit(0)
}

// play is the command that makes this program play a role on the node, after the words of prefix.
func (b *testNode) play(role, arg, program string, prefix ...string) *exec.Cmd {
	b.t.Helper()
	args := append(prefix, program)
	cmd := b.Command(context.Background(), args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "ROUTING_TEST_ROLE="+role, "ROUTING_TEST_ARG="+arg)
	return cmd
}

// start starts a program that plays a role, for its output. end closes its input, at which it ends.
func (b *testNode) start(cmd *exec.Cmd) (out io.Reader, end func()) {
	b.t.Helper()
	in, err := cmd.StdinPipe()
	if err != nil {
		b.t.Fatal(err)
	}
	if out, err = cmd.StdoutPipe(); err != nil {
		b.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	return out, func() { _ = in.Close(); _ = cmd.Wait() }
}

// self is this program's file.
func (b *testNode) self() string {
	b.t.Helper()
	exe, err := os.Executable()
	if err != nil {
		b.t.Fatal(err)
	}
	return exe
}

// testNode is a node with a pod, a neighbour on the LAN, an emulator at the default listen address
// and a fake cloud that must never be asked.
type testNode struct {
	*netnstest.Node
	t         testing.TB
	pod       *netnstest.NS
	neighbour *netnstest.NS
	plan      Plan
	leaked    atomic.Int64 // connections of the pod that the cloud accepted
}

const (
	emulator = "emulator"
	cloud    = "cloud"
)

// onBothBackends runs the test on a node of its own for each backend, side by side.
func onBothBackends(t *testing.T, f func(t *testing.T, b *testNode)) {
	for _, binary := range []string{"iptables-nft", "iptables-legacy"} {
		t.Run(binary, func(t *testing.T) {
			t.Parallel()
			f(t, newTestNode(t, binary))
		})
	}
}

// onEveryDNAT runs the test on a node of its own for each backend of mode iptables, and in mode
// nftables.
func onEveryDNAT(t *testing.T, f func(t *testing.T, b *testNode)) {
	onBothBackends(t, f)
	t.Run("nftables", func(t *testing.T) {
		t.Parallel()
		f(t, nftNode(t))
	})
}

func testPlan(runDir, binary string) Plan {
	return Plan{Mode: ModeIPTables, Listen: netip.MustParseAddrPort("169.254.169.252:988"), Guard: DefaultGuard(),
		InterceptHostPods: "auto", RunDir: runDir, Binary: binary}
}

func newTestNode(t testing.TB, binary string) *testNode {
	t.Helper()
	netnstest.Needs(t, binary, binary+"-restore", "ip", "nsenter")
	b := &testNode{Node: netnstest.Start(t, "routing"), t: t}
	var err error
	if b.pod, err = b.AddPod("pod"); err != nil {
		t.Fatal(err)
	}
	if b.neighbour, err = b.AddNeighbour("neighbour"); err != nil {
		t.Fatal(err)
	}
	b.plan = testPlan(t.TempDir(), binary)
	b.serve(b.NS, b.plan.Listen.String(), emulator)
	for _, at := range []string{"169.254.169.254:80", "[fd00:c1::a9fe:a9fe]:80", "[fd00:ec2::254]:80", "[fd20:ce::254]:80",
		"169.254.169.254:53", "169.254.169.254:443"} {
		l, err := b.Cloud.Listen("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		go answerAll(leaks{l, b.pod, &b.leaked}, cloud)
	}
	return b
}

// leaks counts the pod's connections that the cloud accepts.
type leaks struct {
	net.Listener
	of    *netnstest.NS
	count *atomic.Int64
}

func (l leaks) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		from := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
		if from == l.of.Addr || from == l.of.Addr6 {
			l.count.Add(1)
		}
	}
	return c, err
}

// serve answers every line that a client sends with who it is.
func (b *testNode) serve(ns *netnstest.NS, at, who string) {
	b.t.Helper()
	l, err := ns.Listen("tcp", at)
	if err != nil {
		b.t.Fatal(err)
	}
	go answerAll(l, who)
}

func answerAll(l net.Listener, who string) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			buf := make([]byte, 64)
			for {
				n, err := c.Read(buf)
				if err != nil {
					return
				}
				answer := who
				if strings.HasPrefix(string(buf[:n]), "GET ") {
					answer = "HTTP/1.0 401 Unauthorized\r\n\r\n" // as AWS's does
				}
				if _, err := io.WriteString(c, answer); err != nil {
					return
				}
			}
		}()
	}
}

// How long a client waits for an answer that should come, and for one that should not.
const long, short = 10 * time.Second, 300 * time.Millisecond

// ask connects, sends a line and returns who answered, or the error.
func ask(ns *netnstest.NS, at string, wait time.Duration) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	c, err := ns.Dial(ctx, "tcp", at)
	if err != nil {
		return "", err
	}
	defer c.Close()
	return talk(c, wait)
}

func talk(c net.Conn, wait time.Duration) (string, error) {
	if err := c.SetDeadline(time.Now().Add(wait)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(c, "who?"); err != nil {
		return "", err
	}
	buf := make([]byte, 64)
	n, err := c.Read(buf)
	return string(buf[:n]), err
}

// answers fails unless who answers ns at the address; "" stands for nobody.
func (b *testNode) answers(ns *netnstest.NS, at, who string) {
	b.t.Helper()
	wait := long
	if who == "" {
		wait = short
	}
	got, err := ask(ns, at, wait)
	if got != who {
		b.t.Errorf("%s asked %s: %q answered (%v), want %q", ns.Name, at, got, err, who)
	}
}

func (b *testNode) router(p Plan) Router {
	b.t.Helper()
	r, err := New(p)
	if err != nil {
		b.t.Fatal(err)
	}
	return r
}

func (b *testNode) install(p Plan) {
	b.t.Helper()
	if err := b.Do(func() error { return b.router(p).Install(context.Background()) }); err != nil {
		b.t.Fatalf("install: %v", err)
	}
}

func (b *testNode) check(p Plan) error {
	b.t.Helper()
	return b.Do(func() error { return b.router(p).Check(context.Background()) })
}

// requireOK fails unless Check finds nothing.
func (b *testNode) requireOK(p Plan) {
	b.t.Helper()
	if err := b.check(p); err != nil {
		b.t.Errorf("check: %v", err)
	}
}

func (b *testNode) remove(p Plan) {
	b.t.Helper()
	if err := b.Do(func() error { return b.router(p).Remove(context.Background()) }); err != nil {
		b.t.Fatalf("remove: %v", err)
	}
}

// run runs shell commands on the node with the iptables and ip6tables of the backend. All
// namespaces share the lock of legacy iptables.
func (b *testNode) run(script string) string {
	b.t.Helper()
	ip6tables := strings.Replace(b.plan.Binary, "iptables", "ip6tables", 1)
	script = fmt.Sprintf(
		"set -e; iptables() { %s -w 60 \"$@\"; }; ip6tables() { %s -w 60 \"$@\"; }; %s",
		b.plan.Binary,
		ip6tables,
		script,
	)
	out, err := b.Command(context.Background(), "sh", "-c", script).CombinedOutput()
	if err != nil {
		b.t.Fatalf("%s: %v: %s", script, err, out)
	}
	return string(out)
}

func (b *testNode) ruleset() string {
	b.t.Helper()
	s, err := b.Ruleset()
	if err != nil {
		b.t.Fatal(err)
	}
	return s
}

// requireEqual fails and shows the lines that differ.
func (b *testNode) requireEqual(what, got, want string) {
	b.t.Helper()
	if got == want {
		return
	}
	g, w := lines(got), lines(want)
	for _, line := range only(g, w) {
		b.t.Errorf("%s: too much: %s", what, line)
	}
	for _, line := range only(w, g) {
		b.t.Errorf("%s: lost: %s", what, line)
	}
	b.t.Errorf("%s: not as before", what)
}

func lines(s string) []string { return strings.Split(s, "\n") }

func only(a, b []string) (found []string) {
	count := map[string]int{}
	for _, l := range b {
		count[l]++
	}
	for _, l := range a {
		if count[l]--; count[l] < 0 {
			found = append(found, l)
		}
	}
	return found
}

// faults are the lines of what Check returned, each of which must be a fault and not a failure to
// look.
func faults(t testing.TB, err error) []string {
	t.Helper()
	if err == nil {
		return nil
	}
	if !errors.Is(err, fault.ErrMissing) {
		t.Errorf("not a fault: %v", err)
	}
	return strings.Split(err.Error(), "\n")
}
