package service

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// clashTries and clashTime bound the long form of TestPortClash, which this variable asks for
//
const (
	clashLong  = "GME_CLASH_LONG"
	clashTries = 300_000
	clashTime  = 120 * time.Second
	clashLeast = 1_200 // tries, however long they take
)

// stale is how a client comes to hold a connection that nobody else knows any more.
type stale struct {
	name  string
	state int // of the client's socket, as /proc/net/tcp has it
	make  func(*kernelNode)
}

var stales = []stale{
	{"established", 1, func(k *kernelNode) { // conntrack -F, and the service is killed: the client is never told
		k.forgetConnections()
		k.kill(k.server)
	}},
	{"close-wait", 8, func(k *kernelNode) { // the service ends, the client does not close, conntrack's entry expires
		k.kill(k.server)
		k.eventually(k.t, "the service's half of the connections is gone", func() bool {
			return k.sockets(":988")[4]+k.sockets(":988")[5] == 0
		})
		k.forgetConnections()
	}},
}

// TestPortClash is A-18: a pod on the host network, without any capability, has conntrack give its
// redirected connections a port at random, by a direct connection from the same port, until that is
// the port of a stale connection of another pod. Nobody is served as that pod. The ports are below
// 1024, since conntrack takes one of only 424 there: a try is worth 150 of those with a client's
// usual port.
func TestPortClash(t *testing.T) {
	tries, within := 4_000, 15*time.Second
	if os.Getenv(clashLong) != "" {
		tries, within = clashTries, clashTime
	}
	onEachDNAT(t, func(t *testing.T, plan routing.Plan) {
		for i, s := range append(stales, stales[0]) {
			byIPv6 := i == len(stales)
			t.Run(s.name+map[bool]string{true: " by IPv6"}[byIPv6], func(t *testing.T) {
				k := newKernelNodeIn(t, plan)
				source := k.node.Addr
				if byIPv6 {
					source = k.node.Addr6
				}
				thief := k.holdStale(s, source)
				got := thief.clash(t, source, tries, within)
				if got.Refused < got.Tries*9/10 || got.Refused < 1000 || got.Connected > 0 || got.Stolen > 0 {
					t.Errorf("%+v: no connection comes about whose port conntrack changed", got)
				}
			})
		}
	})
}

// TestPortClashWithoutRules: the same while the rules that refuse changed ports are flushed, as by
// somebody else's reload: what the kernel counts of the stale sockets is not of these connections.
func TestPortClashWithoutRules(t *testing.T) {
	onEachDNAT(t, func(t *testing.T, plan routing.Plan) {
		k := newKernelNodeIn(t, plan, "limits: {requestsPerPod: 1000000}") // an answer that waits would not be seen
		thief := k.holdStale(stales[0], k.node.Addr)
		if plan.Mode == routing.ModeNFTables {
			k.run("nft flush chain ip gke-metadata-emulator input; nft flush chain ip gke-metadata-emulator local")
		} else {
			k.run(plan.Binary + " -F GME-IN; " + plan.Binary + " -F GME-LOCAL")
		}
		got := thief.clash(t, k.node.Addr, 1000, 30*time.Second)
		if got.Tries < 1000 || got.Connected < got.Tries/2 || got.Stolen > 0 {
			t.Errorf("%+v: connections come about, and nobody is served as somebody else", got)
		}
	})
}

// TestConntrackZone: pods whose connections the network keeps in a conntrack zone of their own are
// served, though SO_ORIGINAL_DST knows the default zone alone.
func TestConntrackZone(t *testing.T) {
	t.Parallel()
	onEachDNAT(t, func(t *testing.T, plan routing.Plan) {
		k := newKernelNodeIn(t, plan)
		command := cmp.Or(plan.Binary, "iptables-nft")
		k.run(command + " -t raw -A PREROUTING -i cni0 -j CT --zone 4097")
		k.run(command + " -t raw -A OUTPUT -d 10.244.0.0/16 -j CT --zone 4097")
		ns, err := k.node.AddPod("zoned")
		if err != nil {
			t.Fatal(err)
		}
		pod, host := k.newPod("zoned", ns), k.newPod("host", k.node.NS)
		for _, p := range []*podNode{pod, host} {
			if err := p.start(); err != nil {
				t.Fatal(err)
			}
			p.tell()
			if a := p.served(t, accts+"default/token"); a.Status != 200 || k.subjectOf(t, a.Body) != "default:"+p.Name {
				t.Errorf("%s: %+v", p.Name, a)
			}
		}
	})
}

// onEachDNAT runs a test in each way in which a firewall redirects.
func onEachDNAT(t *testing.T, test func(*testing.T, routing.Plan)) {
	for name, plan := range map[string]routing.Plan{
		"iptables-nft":    {Mode: routing.ModeIPTables, Binary: "iptables-nft"},
		"iptables-legacy": {Mode: routing.ModeIPTables, Binary: "iptables-legacy"},
		"nftables":        {Mode: routing.ModeNFTables},
	} {
		t.Run(name, func(t *testing.T) {
			if plan.Binary != "" {
				netnstest.Needs(t, plan.Binary)
			}
			test(t, plan)
		})
	}
}

// holdStale has a pod hold stale connections from 100 ports, and returns another pod on the host
// network.
func (k *kernelNode) holdStale(s stale, source netip.Addr) (thief *podNode) {
	t := k.t
	t.Helper()
	k.run("sysctl -qw net.ipv4.tcp_fin_timeout=1")
	k.google.Allow("system:serviceaccount:default:reader", gsa)
	victim := k.newPod("victim", k.node.NS)
	victim.ServiceAccount = "reader"
	thief = k.newPod("thief", k.node.NS)
	for _, p := range []*podNode{victim, thief} {
		if err := p.start(); err != nil {
			t.Fatal(err)
		}
		p.tell()
	}
	if a := victim.served(t, accts+"default/email"); a.Body != gsa {
		t.Fatalf("%+v", a)
	}
	if a, err := victim.ask("hold", fmt.Sprintf("%s %d %d", source, staleFirst, staleLast)); err != nil || a.Err != "" {
		t.Fatalf("%+v, %v", a, err)
	}
	s.make(k)
	if n := k.sockets(":80")[s.state]; n < staleLast-staleFirst {
		t.Fatalf("%d stale connections: %v", n, k.sockets(":80"))
	}
	k.server = k.process(filepath.Join(k.dir, "config.yaml"), "/system.slice/gke-metadata-emulator.service")
	k.eventually(t, "the service is there again", func() bool {
		st := statusOf(t, k.dir)
		return st.Cluster != nil && st.Cluster.Watching && st.Attestation.Kernel.Helper
	})
	if a := thief.served(t, accts+"default/token"); a.Status != 200 || k.subjectOf(t, a.Body) != "default:thief" {
		t.Fatalf("%+v", a)
	}
	return thief
}

const (
	staleFirst, staleLast = 700, 799
	clashFirst, clashers  = 620, 8
)

// clashed is what came of an attack.
type clashed struct {
	Tries, Refused, Connected, Answered, Stolen int64
	Other                                       string // the last error that is no refusal
}

func (p *podNode) clash(t testing.TB, source netip.Addr, tries int, within time.Duration) (got clashed) {
	t.Helper()
	a, err := p.ask("clash", fmt.Sprintf("%s %d %s", source, tries, within))
	if err == nil {
		err = json.Unmarshal([]byte(a.Body), &got)
	}
	if err != nil || a.Err != "" {
		t.Fatalf("%+v, %v", a, err)
	}
	t.Logf("%+v", got)
	return got
}

// forgetConnections is conntrack -F.
func (k *kernelNode) forgetConnections() {
	k.t.Helper()
	if err := k.node.ForgetConnections(); err != nil {
		k.t.Fatal(err)
	}
}

// sockets counts the node's connections that have the port at either end, by state.
func (k *kernelNode) sockets(port string) map[int]int {
	k.t.Helper()
	var text []byte
	err := k.node.Do(func() error {
		ipv4, err := os.ReadFile("/proc/thread-self/net/tcp")
		ipv6, err6 := os.ReadFile("/proc/thread-self/net/tcp6")
		text = slices.Concat(ipv4, ipv6)
		return errors.Join(err, err6)
	})
	if err != nil {
		k.t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimPrefix(port, ":"))
	if err != nil {
		k.t.Fatal(err)
	}
	states := map[int]int{}
	for line := range strings.Lines(string(text)) {
		has := func(end string) bool { return strings.HasSuffix(end, fmt.Sprintf(":%04X", n)) }
		if f := strings.Fields(line); len(f) > 3 && slices.ContainsFunc(f[1:3], has) {
			state, _ := strconv.ParseInt(f[3], 16, 0)
			states[int(state)]++
		}
	}
	return states
}

// attacks are what a pod's process can do beside asking.
var attacks = map[string]func(args []string) (any, error){
	"hold":  holdConnections,
	"clash": clashPorts,
	"flood": floodRequestsFrom,
}

// from dials from an address and a port that other connections may have too.
func from(source string, port int) net.Dialer {
	d := net.Dialer{Timeout: 2 * time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP(source), Port: port}}
	d.Control = func(_, _ string, c syscall.RawConn) (err error) {
		control := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		})
		return errors.Join(control, err)
	}
	return d
}

// at returns where a client with the source address is redirected from, and the listener that it is
// redirected to.
func at(source string) (server, listener string) {
	if strings.Contains(source, ":") {
		return "[fd20:ce::254]:80", "[fd20:ce::252]:988"
	}
	return "169.254.169.254:80", "169.254.169.252:988"
}

const askEmail = "GET " + accts + "default/email HTTP/1.1\r\nHost: 169.254.169.254\r\nMetadata-Flavor: Google\r\n\r\n"

var heldConnections []net.Conn // as long as the process lives

// holdConnections opens a connection from each port, and gets an answer on it.
func holdConnections(args []string) (any, error) {
	first, _ := strconv.Atoi(args[1])
	last, _ := strconv.Atoi(args[2])
	server, _ := at(args[0])
	for port := first; port <= last; port++ {
		d := from(args[0], port)
		c, err := d.Dial("tcp", server)
		if err != nil {
			return nil, err
		}
		heldConnections = append(heldConnections, c)
		b := make([]byte, 4096)
		if _, err := io.WriteString(c, askEmail); err != nil {
			return nil, err
		}
		if n, err := c.Read(b); err != nil || !strings.HasPrefix(string(b[:n]), "HTTP/1.1 200") {
			return nil, fmt.Errorf("%q, %w", b[:n], err)
		}
	}
	return nil, nil
}

// clashPorts opens redirected connections from ports that have a direct one, and asks on those that
// come about.
func clashPorts(args []string) (any, error) {
	most, _ := strconv.ParseInt(args[1], 10, 64)
	within, err := time.ParseDuration(args[2])
	if err != nil {
		return nil, err
	}
	server, listener := at(args[0])
	end := time.Now().Add(within)
	var tries, refused, connected, answered, stolen atomic.Int64
	var other atomic.Pointer[string]
	var wg sync.WaitGroup
	for i := range clashers { // all before the first clash, which may take the port of one
		d := from(args[0], clashFirst+i)
		direct, err := d.Dial("tcp", listener)
		if err != nil {
			return nil, err
		}
		defer direct.Close()
	}
	for i := range clashers {
		d := from(args[0], clashFirst+i)
		wg.Go(func() {
			b := make([]byte, 4096)
			for n := tries.Load(); n < most && (n < clashLeast || time.Now().Before(end)); n = tries.Load() {
				tries.Add(1)
				c, err := d.Dial("tcp", server)
				if errors.Is(err, unix.ECONNREFUSED) {
					refused.Add(1)
					continue
				}
				if err != nil {
					text := err.Error()
					other.Store(&text)
					continue
				}
				connected.Add(1)
				_ = c.(*net.TCPConn).SetLinger(0)
				_ = c.SetDeadline(time.Now().Add(20 * time.Millisecond)) // of somebody who is known
				if _, err = io.WriteString(c, askEmail); err == nil {
					n, _ := c.Read(b)
					if n > 0 {
						answered.Add(1)
					}
					if strings.Contains(string(b[:n]), gsa) {
						stolen.Add(1)
					}
				}
				_ = c.Close()
			}
		})
	}
	wg.Wait()
	got := clashed{Tries: tries.Load(), Refused: refused.Load(), Connected: connected.Load(),
		Answered: answered.Load(), Stolen: stolen.Load()}
	if text := other.Load(); text != nil {
		got.Other = *text
	}
	return got, nil
}

// attack has the pod's process do one of attacks.
func attack(how, path string) (a said) {
	result, err := attacks[how](strings.Fields(path))
	if err != nil {
		return said{Err: err.Error()}
	}
	text, err := json.Marshal(result)
	if err != nil {
		return said{Err: err.Error()}
	}
	return said{Status: http.StatusOK, Body: string(text)}
}
