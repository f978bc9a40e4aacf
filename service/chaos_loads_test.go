package service

import (
	"bufio"
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
	"sync"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// chaosPod is where clients of pods ask.
const chaosPod = "169.254.169.254:80"

// attacker is a network namespace in which no process is: nothing tells the service who its clients
// are.
func (b *chaosNode) attacker(t *testing.T) *netnstest.NS {
	t.Helper()
	ns, err := b.node.AddPod(fmt.Sprint("attacker-", b.n))
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

// floods has connections opened in the namespace, and closes them at the end. What the service
// refuses or closes is its right.
func (b *chaosNode) floods(
	t *testing.T,
	ns *netnstest.NS,
	n int,
	to string,
	from func(int) string,
	then func(net.Conn),
) func() {
	t.Helper()
	var all []net.Conn
	var wg sync.WaitGroup
	err := ns.Do(func() error {
		for i, failed := 0, 0; i < n && failed < 10; i++ {
			d := net.Dialer{Timeout: time.Second}
			if a := from(i); a != "" {
				d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(a)}
			}
			c, err := d.Dial("tcp4", to)
			if err != nil {
				failed++
				continue
			}
			failed = 0
			all = append(all, c)
			if then != nil {
				wg.Go(func() { then(c) })
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d of %d connections were opened", len(all), n)
	return func() {
		for _, c := range all {
			_ = c.(*net.TCPConn).SetLinger(0)
			_ = c.Close()
		}
		wg.Wait()
	}
}

func anywhere(int) string { return "" }

// idleHealth stays below the 20,000 descriptors that this process may have.
func (b *chaosNode) idleHealth(t *testing.T) func() {
	return b.floods(t, b.node.NS, 19_000/b.scale, nodeHealth, anywhere, nil)
}

func (b *chaosNode) madeUpAddresses(t *testing.T) func() {
	ns := b.attacker(t)
	var script strings.Builder
	last := ns.Addr.As4()
	from := func(i int) string { return netip.AddrFrom4([4]byte{last[0], last[1], 7, byte(1 + i%120)}).String() }
	for i := range 120 {
		fmt.Fprintf(&script, "addr add %s/32 dev eth0\n", from(i))
	}
	cmd := ns.Command(t.Context(), "ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(script.String())
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	b.run(
		fmt.Sprintf("ip route replace %s dev cni0", netip.PrefixFrom(netip.AddrFrom4([4]byte{last[0], last[1], 7, 0}), 24)),
	)
	return b.floods(t, ns, 19_800/b.scale, chaosPod, from, func(c net.Conn) {
		_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: metadata\r\n\r\n")
	})
}

func (b *chaosNode) neverReading(t *testing.T) func() {
	return b.floods(t, b.attacker(t), 255, chaosPod, anywhere, func(c net.Conn) {
		_ = c.(*net.TCPConn).SetReadBuffer(4 << 10)
		for text := strings.Repeat("GET / HTTP/1.1\r\nHost: metadata\r\n\r\n", 100); ; {
			if _, err := io.WriteString(c, text); err != nil {
				return
			}
		}
	})
}

func (b *chaosNode) slowHeaders(t *testing.T) func() {
	return b.floods(t, b.attacker(t), 180, chaosPod, anywhere, func(c net.Conn) {
		for _, err := io.WriteString(c, "GET / HTTP/1.1\r\nX"); err == nil; _, err = io.WriteString(c, "x") {
			time.Sleep(100 * time.Millisecond) // that is the attack
		}
	})
}

// halfClosing holds a token back, and has clients end their half meanwhile: none gets a 200 that is
// empty.
func (b *chaosNode) halfClosing(t *testing.T) func() {
	return b.floods(t, b.attacker(t), 180, chaosPod, anywhere, func(c net.Conn) {
		_, _ = io.WriteString(c, "GET "+accts+"default/token HTTP/1.1\r\nHost: metadata\r\nMetadata-Flavor: Google\r\n\r\n")
		_ = c.(*net.TCPConn).CloseWrite()
		all, err := io.ReadAll(bufio.NewReader(c))
		if err == nil && strings.HasPrefix(string(all), "HTTP/1.1 200 ") &&
			!strings.Contains(string(all), "Metadata-Flavor") {
			t.Errorf("a client that ended its half got %q", all)
		}
	})
}

// longRefusals has the API server refuse the tokens of a pod that asks all the time.
func (b *chaosNode) longRefusals(t *testing.T) func() {
	ns, err := b.node.AddPod("refused")
	if err != nil {
		t.Fatal(err)
	}
	p := b.newPod("refused", ns)
	p.tell()
	if err := p.start(); err != nil {
		t.Fatal(err)
	}
	heal := b.kube.Inject(
		kubetest.Fault{
			Verb:     "create",
			Resource: "serviceaccounts/token",
			Code:     400,
			Message:  strings.Repeat("no ", 10<<20/3),
		},
	)
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			a, err := p.ask("fresh", accts+fmt.Sprintf("default/token?scopes=https://www.googleapis.com/auth/x%d", i%8))
			if err != nil {
				return
			}
			if len(a.Body) > 4096+64 {
				t.Errorf("a refusal has %d bytes", len(a.Body))
			}
		}
	})
	return func() { stop(); wg.Wait(); heal(); p.die() }
}

func (b *chaosNode) manyNamespaces(t *testing.T) func() { return b.namespaces(t, 500/b.scale) }

// namespaces makes n network namespaces of no pod that have the asker's own address.
func (b *chaosNode) namespaces(t *testing.T, n int) func() {
	var all []*exec.Cmd
	var made []*bufio.Reader
	for range n {
		cmd := exec.CommandContext(t.Context(), "unshare", "--net", "sh", "-ec",
			fmt.Sprintf("ip link set lo up; ip addr add %s/32 dev lo; echo made; exec sleep 600", b.asker.ns.Addr))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		made = append(made, bufio.NewReader(out))
		if err := b.cgroups.Start(b.node.NS, "/user.slice/someone", cmd); err != nil {
			t.Fatal(err)
		}
		all = append(all, cmd)
	}
	for _, out := range made {
		if _, err := out.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
	// The helper looks because of a client that nobody knows: as often as one comes, for a second
	// since the last time may not have passed.
	stranger := b.attacker(t)
	b.eventually(t, fmt.Sprintf("%d namespaces are known", n), func() bool {
		if c, err := stranger.Dial(t.Context(), "tcp4", chaosPod); err == nil {
			_ = c.Close()
		}
		known := statusOf(t, b.dir).Attestation.Kernel
		return known != nil && known.Namespaces >= n
	})
	return func() {
		for _, cmd := range all {
			b.kill(cmd)
		}
	}
}

// manyCgroups makes as many as fill the table, and then a pod.
func (b *chaosNode) manyCgroups(t *testing.T) func() {
	dir := filepath.Join(b.cgroups.Path, "user.slice/delegated")
	var errs error
	n := 33_000 / b.scale
	for i := range n {
		errs = errors.Join(errs, os.MkdirAll(filepath.Join(dir, fmt.Sprint(i)), 0o755))
	}
	if errs != nil {
		t.Fatal(errs)
	}
	ns, err := b.node.AddPod("late")
	if err != nil {
		t.Fatal(err)
	}
	p := b.newPod("late", ns)
	p.tell()
	if err := p.start(); err != nil {
		t.Fatal(err)
	}
	if a := p.served(t, accts+"default/token"); a.Status != 200 {
		t.Errorf("a new pod: %d %.300s", a.Status, a.Body)
	}
	return func() { p.die(); b.cgroups.Remove("user.slice/delegated") }
}

// ambiguousSockets makes, in a namespace that a process is in, sockets that could be the asker's
// own.
func (b *chaosNode) ambiguousSockets(t *testing.T) func() {
	ns := b.attacker(t)
	p := b.newPod(fmt.Sprint("ambiguous-", b.n), ns)
	p.tell()
	if err := p.start(); err != nil {
		t.Fatal(err)
	}
	// The address of the asker, and a server of its own behind the address that is asked: every port
	// is one of a live socket.
	script := fmt.Sprintf("ip addr add %s/32 dev lo; ip addr add 169.254.169.254/32 dev lo", b.asker.ns.Addr)
	if out, err := ns.Command(t.Context(), "sh", "-ec", script).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	l, err := ns.Listen("tcp4", chaosPod)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
		}
	}()
	end := b.floods(t, ns, 28_000/b.scale, chaosPod, func(int) string { return b.asker.ns.Addr.String() }, nil)
	return func() { end(); l.Close(); p.die() }
}
