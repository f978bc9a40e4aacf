// Package routing answers: how does what a pod sends to 169.254.169.254:80 arrive at the emulator,
// and nowhere else?
//
// A Plan says what should stand. A Router puts it into the kernel (Install), says what of it is
// missing (Check) and takes it away without a trace (Remove). Install converges from any earlier
// state and can be repeated while the emulator serves; Check changes nothing; Remove needs no
// memory of an Install. All modes but observe own policy rules at preferences up to 103 that are
// marked proto kernel, all but observe and loopback an address labelled lo:gme; mode iptables
// chains named GME-*, modes nftables, loopback, none and ebpf a table gke-metadata-emulator of
// nf_tables, where IPv6 is served a local route marked proto 252, loopback one route in table 988,
// and ebpf and observe programs pinned below /sys/fs/bpf/gke-metadata-emulator; and nothing else.
package routing

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"regexp"
	"slices"
	"strings"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

const (
	// ModeIPTables is DNAT by iptables, whichever backend the node uses.
	ModeIPTables = "iptables"
	// ModeNFTables is DNAT by a table of our own.
	ModeNFTables = "nftables"
	// ModeLoopback makes the metadata server's address this node's own for pods, by policy rules and
	// without DNAT.
	ModeLoopback = "loopback"
	// ModeEBPF is programs that see each connect() of this node, for networks that bypass netfilter's
	// DNAT.
	ModeEBPF = "ebpf"
	// ModeObserve is for before a rollout: it counts who connects to the metadata server, and changes
	// nothing. See Observed.
	ModeObserve = "observe"
	// ModeNone routes nothing: pods are told by their environment where the emulator listens. Other
	// hosts are kept out, and the guard stands.
	ModeNone = "none"
)

// DefaultRunDir is where the desired state and the lock lie.
const DefaultRunDir = "/run/gke-metadata-emulator"

// Router puts one Plan into the kernel of the network namespace in which it is called.
type Router interface {
	// Install makes what the Plan wants stand, closed things before open ones, writes the desired
	// state and reads back.
	Install(ctx context.Context) error
	// Check returns nil when all stands, else one error that names everything that does not
	// (errors.Join).
	Check(ctx context.Context) error
	// Remove takes away everything that any Install of this mode can have put there, and writes the
	// desired state.
	Remove(ctx context.Context) error
}

// Plan is what the configuration says about routing. It is plain data.
type Plan struct {
	Mode   string
	Reason string // why auto came to the Mode; "" = it was asked for
	// where the emulator listens: IPv4; an address of the node, or one that the node forwards to
	Listen netip.AddrPort
	// modes iptables and nftables: where it listens for what is sent to [fd20:ce::254]:80; invalid:
	// nowhere
	Listen6 netip.AddrPort
	// modes iptables and nftables: DNS queries for metadata.google.internal are redirected to UDP of
	// the same addresses and ports
	DNS bool
	// interfaces that are not the pods'; none: found out. A trailing + stands for any ending
	Uplinks []string
	// interfaces whose traffic is left alone altogether, such as docker0
	ExcludeInterfaces []string
	// auto, on or off: redirect pods on the host network too. auto: where no cloud's server answers
	InterceptHostPods string
	Guard             []netip.AddrPort // real metadata servers that pods must not reach; Closed without any: DefaultGuard
	// There is no valid configuration. What the last valid one installed stays in force.
	// Without one pods are redirected to Listen, where the service tells them the reason. Without
	// Listen, and in mode none, the guard stands alone, and what stands besides is left as it is. In
	// mode observe there is no guard either.
	Closed bool
	RunDir string // "" is DefaultRunDir
	// mode loopback: a link that gets the metadata server's address, made as a dummy if it is not
	// there
	Link       string
	Force      bool   // mode loopback also where a metadata server answers this host
	BPFDir     string // where mode ebpf pins its programs; "" is DefaultBPFDir
	CgroupRoot string // where the cgroup v2 hierarchy is mounted; "": found out
	Binary     string // the iptables command; "" is iptables, or the backend that the node's kubelet uses
	Log        logrus.FieldLogger
}

// metadataServer is where clients send their requests.
var metadataServer = netip.AddrPortFrom(netip.AddrFrom4([4]byte{169, 254, 169, 254}), 80)

// DefaultGuard is the closed guard of a node whose configuration cannot be read: where the
// clouds hand out a node's credentials and pods have nothing to look for. The IPv6 addresses are
// Oracle's, AWS's and Google's (H-24), whether or not IPv6 is served. Not in it is what pods may
// need: Azure's WireServer, Alibaba's 100.100.100.200, and EKS Pod Identity's 169.254.170.23 and
// fd00:ec2::23.
func DefaultGuard() []netip.AddrPort {
	return []netip.AddrPort{metadataServer, netip.MustParseAddrPort("[fd00:c1::a9fe:a9fe]:80"),
		netip.MustParseAddrPort("[fd00:ec2::254]:80"), metadataServer6}
}

// New returns the Router for the Plan. It refuses a Plan that cannot be carried out, naming all
// that is wrong with it.
func New(p Plan) (Router, error) { return newRouter(p) }

func newRouter(p Plan) (*router, error) {
	p, err := p.checked()
	if err != nil {
		return nil, err
	}
	return &router{plan: p, hostCgroups: HostCgroups()}, nil
}

// checked returns the Plan with its defaults filled in.
func (p Plan) checked() (Plan, error) {
	if p.RunDir == "" {
		p.RunDir = DefaultRunDir
	}
	if p.BPFDir == "" {
		p.BPFDir = DefaultBPFDir
	}
	if p.CgroupRoot == "" {
		p.CgroupRoot = cgroup2()
	}
	if p.Log == nil {
		quiet := logrus.New()
		quiet.SetLevel(logrus.PanicLevel)
		p.Log = quiet
	}
	p.Guard = slices.Clone(p.Guard)
	if p.Closed {
		p = p.closed()
	}
	if p.traits().observes {
		p.Guard, p.InterceptHostPods = nil, "off"
	}
	slices.SortFunc(p.Guard, netip.AddrPort.Compare)
	p.Guard = slices.Compact(p.Guard)
	var errs []error
	for _, g := range p.Guard {
		if !g.IsValid() || g.Port() == 0 || g.Addr().IsUnspecified() || g.Addr().Is4In6() || g.Addr().Zone() != "" {
			errs = append(
				errs,
				fmt.Errorf("guard %s: an IP address and a port are needed, such as 169.254.169.254:80 or [fd00:ec2::254]:80", g),
			)
		}
	}
	if p.guardAlone() {
		return p, errors.Join(errs...)
	}
	if !slices.Contains(modes, p.Mode) {
		return p, fmt.Errorf("routing mode %q is not supported: use %s", p.Mode, strings.Join(modes, ", "))
	}
	errs = append(errs, p.checkListen(), checkListen6(p))
	if !p.redirects() && p.InterceptHostPods == "on" {
		errs = append(
			errs,
			fmt.Errorf(
				"interceptHostPods on: mode %s cannot tell pods on the host network from the node itself: use off",
				p.Mode,
			),
		)
	}
	switch p.InterceptHostPods {
	case "", "auto", "on", "off":
	default:
		errs = append(errs, fmt.Errorf("interceptHostPods %q: use auto, on or off", p.InterceptHostPods))
	}
	switch {
	case p.Link == "":
	case !p.traits().localServer:
		errs = append(errs, fmt.Errorf("link %s: mode %s needs none: remove it", p.Link, p.Mode))
	case len(p.Link) > unix.IFNAMSIZ-1-len(linkLabelEnd) || p.Link == "lo" || !interfaceName.MatchString(p.Link) ||
		strings.ContainsAny(p.Link, "+:"):
		errs = append(errs, fmt.Errorf("link %q: use the name of a dummy link of 11 letters at most, such as gme0", p.Link))
	}
	for _, name := range slices.Concat(p.Uplinks, p.ExcludeInterfaces) {
		if !interfaceName.MatchString(name) {
			errs = append(errs, fmt.Errorf("%q is no name of a network interface", name))
		}
	}
	for _, name := range p.ExcludeInterfaces {
		if strings.HasSuffix(name, "+") {
			errs = append(errs, fmt.Errorf("excludeInterfaces %q: policy rules have no patterns: name the interfaces one by "+
				"one", name))
		}
	}
	if p.traits().blindToLinks && len(p.ExcludeInterfaces) > 0 {
		errs = append(
			errs,
			fmt.Errorf("excludeInterfaces %s: mode %s sees who connects, and not by which interface: "+
				"leave it empty, or use mode %s",
				strings.Join(p.ExcludeInterfaces, ", "), p.Mode, ModeIPTables),
		)
	}
	return p, errors.Join(errs...)
}

// guardAlone reports whether the Plan wants the guard and nothing else.
func (p Plan) guardAlone() bool { return p.Closed && !p.Listen.IsValid() }

// RedirectsNobody says whether connections stay as they are in a mode: none and observe.
func RedirectsNobody(mode string) bool {
	t := Plan{Mode: mode}.traits()
	return t.anyListener || t.observes
}

// closed fills in what a Plan without a valid configuration lacks. By IPv6 the service listens
// nowhere unless it is told to, so the kernel resets what is redirected to closedListen6: unlike
// ICMP, which says that the guard prohibits a connection, it does so as often as somebody asks.
func (p Plan) closed() Plan {
	if len(p.Guard) == 0 {
		p.Guard = DefaultGuard()
	}
	if RedirectsNobody(p.Mode) {
		p.Listen, p.Listen6 = netip.AddrPort{}, netip.AddrPort{}
		return p
	}
	if !p.dnats() {
		p.Mode = ModeIPTables
	}
	if p.guardAlone() {
		return p
	}
	if _, err := exec.LookPath(cmp.Or(p.Binary, "iptables")); err != nil {
		p.Mode = ModeNFTables // which needs no command
	}
	if !p.Listen6.IsValid() {
		p.Listen6 = closedListen6
	}
	return p
}

// interfaceName is stricter than the kernel, which takes anything without / and blanks: these go
// into text that others parse.
var interfaceName = regexp.MustCompile(`^[A-Za-z0-9_.:@-]{1,15}$|^[A-Za-z0-9_.:@-]{1,14}\+$`)

func (p Plan) checkListen() error {
	const remedy = "; the usual choice is 169.254.169.252:988"
	l, a, has := p.Listen, p.Listen.Addr(), p.traits()
	switch {
	case has.localServer:
		if l != metadataServer {
			return fmt.Errorf(
				"listen %s: mode %s redirects nothing, so it listens where pods ask: %s",
				l,
				p.Mode,
				metadataServer,
			)
		}
		return nil
	case has.anyListener:
		if !l.IsValid() {
			return errors.New("listen: an address and a port are needed")
		}
		return nil
	case !l.IsValid() || l.Port() == 0:
		return fmt.Errorf("listen %s: an address and a port are needed%s", l, remedy)
	case !a.Is4():
		return fmt.Errorf("listen %s: mode %s redirects to an IPv4 address%s", l, p.Mode, remedy)
	case a.IsUnspecified():
		return fmt.Errorf(
			"listen %s: rules cannot redirect to every address, nor guard every address of the node%s",
			l,
			remedy,
		)
	case a.IsLoopback():
		// route_localnet=1 opens 127/8 to neighbours (CVE-2020-8558).
		return fmt.Errorf("listen %s: packets of pods cannot be redirected to 127.0.0.0/8 safely%s", l, remedy)
	case a.IsMulticast() || a == metadataServer.Addr():
		return fmt.Errorf("listen %s: packets cannot be redirected there%s", l, remedy)
	}
	return nil
}
