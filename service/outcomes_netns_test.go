package service

import (
	"bufio"
	"fmt"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// Who is answered by whom in every mode, where the kernel says who asks.
//
//	own        the emulator, with a token of the asker's own ServiceAccount; nobody is ever told another's
//	403, 503   the emulator, that it is told none: it is no pod; it is not known
//	cloud      the cloud's own metadata server (kubelet, pod: those)
//	reset      nobody: the connection is refused by a reset
//	noroute    nobody: there is no route there, or it is prohibited
//	drop       nobody: nothing comes back
//	~          not asked: another row of the mode is the same, or it has no such thing
//
// Who asks: pod is on the node's bridge, routed on a link of its own; hostpod is one on the node's
// network (off: with routing.interceptHostPods: off), daemon a unit of system.slice; neighbour is
// another host, which sends through the node what it can, and lan one that does not. X-as-Y asks
// with Y's address as its own, and what comes back goes to Y; arp is thief where the node takes it
// for the victim by its hardware address, so that it comes back to the thief.
//
// Where: listen is where the emulator listens (loopback, linked: at metadata:80), env what `routing
// show` has pods of mode none write into their environment (GCE_METADATA_HOST); node: and cni0: are
// addresses of the node's, with the port of listen.
const outcomes = `
who              asks           iptables legacy  nftables loopback linked  ebpf    none    none-node none-any observe
pod              metadata:80    own      own     own      own      own     own     noroute noroute   noroute  cloud
pod              listen         drop     drop    drop     ~        ~       own     own     own       own      own
pod              env            ~        ~       ~        ~        ~       ~       own     own       own      ~
pod              metadata:53    cloud    cloud   cloud    cloud    reset   cloud   cloud   cloud     cloud    cloud
pod              metadata:443   reset    reset   reset    reset    reset   reset   reset   reset     reset    cloud
pod              google6:80     own      own     own      noroute  noroute noroute noroute noroute   noroute  cloud
pod              aws6:80        noroute  noroute noroute  noroute  noroute noroute noroute noroute   noroute  cloud
pod              oracle6:80     noroute  noroute noroute  noroute  noroute noroute noroute noroute   noroute  cloud
routed           metadata:80    own      own     own      own      own     own     noroute noroute   noroute  cloud
routed           listen         drop     drop    drop     ~        ~       own     own     own       own      own
routed           google6:80     own      own     own      noroute  noroute noroute noroute noroute   noroute  cloud
hostpod          metadata:80    own      own     own      cloud    own     own     cloud   cloud     cloud    cloud
hostpod          listen         own      own     own      ~        ~       own     own     own       own      own
hostpod          google6:80     own      own     own      cloud    cloud   cloud   cloud   cloud     cloud    cloud
daemon           metadata:80    cloud    cloud   cloud    cloud    403     cloud   cloud   cloud     cloud    cloud
daemon           listen         403      403     403      ~        ~       403     403     403       403      403
daemon           google6:80     cloud    cloud   cloud    cloud    cloud   cloud   cloud   cloud     cloud    cloud
neighbour        metadata:80    noroute  noroute noroute  drop     drop    noroute noroute noroute   noroute  cloud
neighbour        listen         drop     drop    drop     ~        ~       drop    drop    drop      drop     503
neighbour        node:listen    reset    reset   reset    reset    reset   reset   reset   ~         ~        reset
neighbour        cni0:listen    reset    reset   reset    reset    reset   reset   reset   reset     drop     reset
neighbour        google6:80     noroute  noroute noroute  noroute  noroute noroute noroute noroute   noroute  cloud
neighbour        listen6        drop     drop    drop     ~        ~       ~       ~       ~         ~        ~
neighbour        routed:kubelet pod      pod     pod      pod      pod     pod     pod     pod       pod      pod
neighbour        node:kubelet   kubelet  kubelet kubelet  kubelet  kubelet kubelet kubelet kubelet   kubelet  kubelet
lan              metadata:80    cloud    cloud   cloud    cloud    cloud   cloud   cloud   cloud     cloud    cloud
routed-as-pod    metadata:80    drop     drop    drop     drop     drop    drop    drop    drop      drop     drop
routed-as-pod    listen         drop     drop    drop     ~        ~       drop    drop    drop      drop     drop
pod-as-routed    metadata:80    drop     drop    drop     drop     drop    drop    drop    drop      drop     drop
pod-as-routed    listen         drop     drop    drop     ~        ~       drop    drop    drop      drop     drop
neighbour-as-pod metadata:80    drop     drop    drop     drop     drop    drop    drop    drop      drop     drop
neighbour-as-pod listen         drop     drop    drop     ~        ~       drop    drop    drop      drop     drop
thief-as-victim  metadata:80    drop     drop    drop     drop     drop    drop    drop    drop      drop     drop
thief-as-victim  listen         drop     drop    drop     ~        ~       drop    drop    drop      drop     drop
arp-as-victim    metadata:80    own      own     own      own      own     own     noroute noroute   noroute  cloud
arp-as-victim    listen         drop     drop    drop     ~        ~       own     own     own       own      own
victim           metadata:80    own      own     own      own      own     own     ~       ~         ~        cloud
victim           listen         ~        ~       ~        ~        ~       ~       own     own       own      own
off              metadata:80    cloud    cloud   cloud    ~        ~       cloud   ~       ~         ~        ~
`

// planOf is a column's.
func planOf(column string) routing.Plan {
	node := netip.MustParseAddrPort("198.51.100.10:988")
	return map[string]routing.Plan{
		"iptables": {Mode: routing.ModeIPTables, Binary: "iptables-nft"},
		"legacy":   {Mode: routing.ModeIPTables, Binary: "iptables-legacy"},
		"nftables": {Mode: routing.ModeNFTables}, "loopback": {Mode: routing.ModeLoopback},
		"linked": {Mode: routing.ModeLoopback, Link: "gme0"},
		"ebpf":   {Mode: routing.ModeEBPF}, "observe": {Mode: routing.ModeObserve}, "none": {Mode: routing.ModeNone},
		"none-node": {Mode: routing.ModeNone, Listen: node},
		"none-any":  {Mode: routing.ModeNone, Listen: netip.AddrPortFrom(netip.IPv4Unspecified(), node.Port())},
	}[column]
}

func TestOutcomes(t *testing.T) {
	netnstest.Needs(t, "nft", "iptables-nft", "iptables-legacy")
	rows := strings.Split(strings.TrimSpace(outcomes), "\n")
	for i, column := range strings.Fields(rows[0])[2:] {
		t.Run(column, func(t *testing.T) {
			t.Parallel()
			o := newOutcomeNode(t, planOf(column))
			for _, row := range rows[1:] {
				f := strings.Fields(row)
				who, at, want := f[0], f[1], f[2+i]
				if want == "~" {
					continue
				}
				if who == "off" {
					off := o.plan
					off.InterceptHostPods = "off"
					o.route(off, "install", "check")
					who = "hostpod"
				}
				if got := o.asks(who, o.where(at), want); got != want {
					t.Errorf("%s asks %s (%s): %s, want %s", f[0], at, o.where(at), got, want)
				}
			}
			o.whole(t)
		})
	}
}

// outcomeNode is a node with everybody who asks.
type outcomeNode struct {
	*kernelNode
	spaces map[string]*netnstest.NS // of who asks from another than the node's
	pods   map[string]*podNode      // who asks by a process of the node
	cloud  atomic.Int64             // how often the cloud was asked,
	want   int64                    // and should have been
	served map[string]bool          // who got its own
	byIPv6 uint64                   // how often by IPv6
}

func newOutcomeNode(t *testing.T, plan routing.Plan) *outcomeNode {
	o := &outcomeNode{
		kernelNode: newKernelNodeIn(t, plan),
		spaces:     map[string]*netnstest.NS{},
		pods:       map[string]*podNode{},
		served:     map[string]bool{},
	}
	for name, add := range map[string]func(string) (*netnstest.NS, error){
		"pod": o.node.AddPod, "routed": o.node.AddRoutedPod, "thief": o.node.AddPod, "victim": o.node.AddPod,
		"neighbour": o.node.AddNeighbour, "lan": o.node.AddNeighbour,
	} {
		var err error
		if o.spaces[name], err = add(name); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"pod", "routed", "thief", "victim", "hostpod", "daemon"} {
		ns := o.spaces[name]
		if ns == nil {
			ns = o.node.NS
		}
		p := o.newPod(name, ns)
		if name == "daemon" {
			p.cgroup = "/system.slice/daemon.service"
		} else {
			p.tell()
		}
		if err := p.start(); err != nil {
			t.Fatal(err)
		}
		o.pods[name] = p
	}
	for _, at := range []string{"169.254.169.254:80", "169.254.169.254:53", "169.254.169.254:443", "[fd20:ce::254]:80",
		"[fd00:ec2::254]:80", "[fd00:c1::a9fe:a9fe]:80"} {
		o.standIn(o.node.Cloud, at, "cloud")
	}
	o.standIn(o.node.NS, o.where("node:kubelet"), "kubelet")
	o.standIn(o.spaces["routed"], o.where("routed:kubelet"), "pod")
	o.in(
		"neighbour",
		"for a in 169.254.169.254 169.254.169.252 10.244.0.0/16 10.245.0.0/16; do ip route add $a via %[1]s; done; for a "+
			"in fd20:ce::254 fd20:ce::252; do ip -6 route add $a via %[2]s; done",
		o.node.Addr,
		o.node.Addr6,
	)
	o.eventually(t, "everybody is known", func() bool {
		st, known := statusOf(t, o.dir), 0
		for _, p := range st.Cluster.Pods {
			if o.pods[p.Name] != nil && p.AccountRead != nil {
				known++
			}
		}
		return known == len(o.pods)-1 && st.Attestation.Kernel.Namespaces >= 4
	})
	return o
}

// standIn answers in its name.
func (o *outcomeNode) standIn(ns *netnstest.NS, at, name string) {
	o.t.Helper()
	l, err := ns.Listen("tcp", at)
	if err != nil {
		o.t.Fatal(err)
	}
	web := &http.Server{
		ReadHeaderTimeout: time.Minute,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			if name == "cloud" {
				o.cloud.Add(1)
			}
			w.Header().Set("Server", name)
		}),
	}
	go func() { _ = web.Serve(l) }()
	o.t.Cleanup(func() { _ = web.Close() })
}

// where is the address that a word of the table stands for.
func (o *outcomeNode) where(word string) string {
	o.t.Helper()
	port := func(a netip.Addr, port uint16) string { return netip.AddrPortFrom(a, port).String() }
	switch word {
	case "listen":
		if o.plan.Listen.Addr().IsUnspecified() {
			return port(o.node.Addr, o.plan.Listen.Port())
		}
		return o.plan.Listen.String()
	case "listen6":
		return o.plan.Listen6.String()
	case "env":
		var text string
		if err := o.node.Do(func() (err error) {
			text, err = routing.Show(o.plan)
			return err
		}); err != nil {
			o.t.Fatal(err)
		}
		_, after, _ := strings.Cut(text, "GCE_METADATA_HOST")
		value := regexp.MustCompile(`(?m)value: (\S+)$`).FindStringSubmatch(after)
		if value == nil {
			o.t.Fatalf("no GCE_METADATA_HOST in\n%s", text)
		}
		return strings.Replace(value[1], "$(NODE_IP)", o.node.Addr.String(), 1)
	case "node:listen":
		return port(o.node.Addr, o.plan.Listen.Port())
	case "cni0:listen":
		return port(netip.MustParseAddr("10.244.0.1"), o.plan.Listen.Port())
	case "node:kubelet":
		return port(o.node.Addr, 10250)
	case "routed:kubelet":
		return port(o.spaces["routed"].Addr, 10250)
	case "google6:80":
		return "[fd20:ce::254]:80"
	case "aws6:80":
		return "[fd00:ec2::254]:80"
	case "oracle6:80":
		return "[fd00:c1::a9fe:a9fe]:80"
	}
	return strings.Replace(word, "metadata:", "169.254.169.254:", 1)
}

// in runs shell commands in somebody's network namespace.
func (o *outcomeNode) in(who, script string, args ...any) {
	o.t.Helper()
	if out, err := o.spaces[who].Command(o.t.Context(), "sh", "-ec",
		fmt.Sprintf(script, args...)).CombinedOutput(); err != nil {
		o.t.Fatalf("%s: %s: %v: %s", who, script, err, out)
	}
}

// take makes somebody's address one of the link's, or has the node take whoever has the hardware
// for it, until end.
func (o *outcomeNode) take(ns *netnstest.NS, link, owner, hardware string) (end func()) {
	o.t.Helper()
	a := o.spaces[owner].Addr
	change := func(address func(netlink.Link, *netlink.Addr) error, neighbour func(*netlink.Neigh) error) {
		o.t.Helper()
		if err := ns.Do(func() error {
			l, err := netlink.LinkByName(link)
			switch {
			case err != nil:
				return err
			case hardware == "":
				return address(l, &netlink.Addr{IPNet: netlink.NewIPNet(a.AsSlice())})
			}
			return neighbour(&netlink.Neigh{LinkIndex: l.Attrs().Index, IP: a.AsSlice(), State: netlink.NUD_PERMANENT,
				HardwareAddr: netnstest.Hardware(o.spaces[hardware].Addr)})
		}); err != nil {
			o.t.Fatalf("%s of %s: %v", a, link, err)
		}
	}
	change(netlink.AddrAdd, netlink.NeighSet)
	return func() { change(netlink.AddrDel, netlink.NeighDel) }
}

// asks returns what comes of a request, in the words of the table.
func (o *outcomeNode) asks(who, to, want string) string {
	o.t.Helper()
	wait := testTimeout
	if want == "drop" {
		wait = 300 * time.Millisecond
	}
	if want == "cloud" {
		o.want++
	}
	name, as, _ := strings.Cut(who, "-as-")
	source := ""
	if as != "" {
		hardware := as
		if name == "arp" {
			name, hardware = "thief", "thief"
		}
		source = o.spaces[as].Addr.String()
		if as == "victim" {
			defer o.take(o.node.NS, "cni0", as, hardware)()
		}
		defer o.take(o.spaces[name], "lo", as, "")()
	}
	how := fmt.Sprintf("%s,%s,%s", to, source, wait)
	a := o.exchange(name, how)
	// A client library asks again too: where the node is busy, an address may be news for longer than
	// the service holds a request.
	for began := time.Now(); a.Status == http.StatusServiceUnavailable && want != "503" &&
		a.Header.Get("Retry-After") != "" && time.Since(began) < testTimeout; a = o.exchange(name, how) {
		o.t.Logf("%s is to ask %s again: %s", who, to, a.Body)
		if strings.HasPrefix(to, "[") {
			o.byIPv6++
		}
	}
	server := a.Header.Get("Server")
	switch {
	case a.Err != "":
		return a.Err
	case server != "GKE Metadata Server":
		return server
	case a.Status != http.StatusOK:
		return strconv.Itoa(a.Status)
	}
	if subject := o.subjectOf(o.t, a.Body); subject != "default:"+name {
		return "token of " + subject
	}
	o.served[name] = true
	if strings.HasPrefix(to, "[") {
		o.byIPv6++
	}
	return "own"
}

// exchange has somebody send a request on a connection of its own, as dial has it.
func (o *outcomeNode) exchange(name, how string) (a said) {
	o.t.Helper()
	if p := o.pods[name]; p != nil {
		a, err := p.ask(how, accts+"default/token")
		if err != nil {
			o.t.Fatal(err)
		}
		return a
	}
	_ = o.spaces[name].Do(func() error {
		c, err := dial(how)
		a = saidOf(err)
		if err == nil {
			a = exchangeOn(c, bufio.NewReader(c), accts+"default/token")
			_ = c.Close()
		}
		return nil
	})
	return a
}

// whole looks at what is to be seen of all that when it is over.
func (o *outcomeNode) whole(t *testing.T) {
	t.Helper()
	if got := o.cloud.Load(); got != o.want {
		t.Errorf("the cloud was asked %d times, want %d", got, o.want)
	}
	o.eventually(t, "the log tells who got a token, and by what evidence", func() bool {
		log := o.log.String()
		if strings.Contains(log, `"evidence":"source-ip"`) {
			t.Fatal("an address was believed")
		}
		for name := range o.served {
			if !regexp.MustCompile(`"container":"` + o.pods[name].container + `".*"evidence":"cgroup".*"pod":"default/` + name +
				`"`).
				MatchString(log) {
				return false
			}
		}
		return true
	})
	if o.plan.Listen6.IsValid() {
		var text strings.Builder
		if err := statusOf(t, o.dir).Text(&text, time.Now()); err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{fmt.Sprintf("requests so far, %d of them by IPv6", o.byIPv6),
			"169.254.169.252:988 and [fd20:ce::252]:988, ", "mode " + o.plan.Mode +
				" to 169.254.169.252:988 and [fd20:ce::252]:988"} {
			if !strings.Contains(text.String(), want) {
				t.Errorf("status has no %q:\n%s", want, &text)
			}
		}
	}
	// Where nothing is translated there is no original destination, and the tuple that the kernel is
	// asked for is the plain one.
	var flows []*netlink.ConntrackFlow
	if err := o.node.Do(func() (err error) {
		flows, err = netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	translated := slices.ContainsFunc(
		flows,
		func(f *netlink.ConntrackFlow) bool { return !f.Forward.DstIP.Equal(f.Reverse.SrcIP) },
	)
	dnats := o.plan.Mode == routing.ModeIPTables || o.plan.Mode == routing.ModeNFTables
	if len(flows) == 0 || translated != dnats {
		t.Errorf("of %d connections some were translated: %t, want %t", len(flows), translated, dnats)
	}
}
