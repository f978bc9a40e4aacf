package routing

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// Who reaches whom in every mode. "-" is nobody, ever; "~" is not asked in that mode. Modes that redirect do so for pods on the host network
// too (interceptHostPods: on); no mode does for the node's own daemons, but for loopback with a link (linked),
// which takes the whole address, DNS included. pod is on the node's bridge, routed on a link of its own.
const outcomes = `
who              asks           iptables-nft iptables-legacy nftables loopback linked   none     ebpf
pod              metadata:80    emulator     emulator        emulator emulator emulator -        emulator
pod              listen         -            -               -        emulator emulator emulator emulator
pod              metadata:53    cloud        cloud           cloud    cloud    -        cloud    cloud
pod              metadata:443   -            -               -        -        -        -        -
pod              metadata6:80   -            -               -        -        -        -        -
routed           metadata:80    emulator     emulator        emulator emulator emulator -        emulator
routed           listen         -            -               -        emulator emulator emulator emulator
hostpod          metadata:80    emulator     emulator        emulator cloud    emulator cloud    emulator
daemon           metadata:80    cloud        cloud           cloud    cloud    emulator cloud    cloud
neighbour        metadata:80    -            -               -        -        -        -        -
neighbour        listen         -            -               -        -        -        -        -
neighbour        node:listen    -            -               -        -        -        -        -
neighbour        routed:kubelet pod          pod             pod      pod      pod      pod      pod
neighbour        node:kubelet   kubelet      kubelet         kubelet  kubelet  kubelet  kubelet  kubelet
neighbour-lan    metadata:80    cloud        cloud           cloud    cloud    cloud    cloud    cloud
routed-as-pod    metadata:80    -            -               -        -        -        -        -
routed-as-pod    listen         -            -               -        -        -        -        -
pod-as-routed    metadata:80    -            -               -        -        -        -        -
neighbour-as-pod metadata:80    -            -               -        -        -        -        -
neighbour-as-pod listen         -            -               -        -        -        -        -
`

// modeBed is a bed whose emulator listens where the mode has it.
func modeBed(t testing.TB, name string) *bed {
	t.Helper()
	var b *bed
	switch name {
	case "iptables-nft", "iptables-legacy":
		return newBed(t, name)
	case ModeNFTables:
		return nftBed(t)
	case ModeLoopback:
		b = nftBed(t)
		b.plan.Mode, b.plan.Listen, b.plan.Force = ModeLoopback, metadataServer, true // the bed's cloud answers the host
		b.serveTransparent(emulator)
	case "linked":
		b = modeBed(t, ModeLoopback)
		b.sh("ip link add gme0 type bridge") // whether the kernel has dummy links or not
		b.plan.Link = "gme0"
	case ModeNone:
		b = nftBed(t)
		b.plan.Mode = ModeNone
	case ModeEBPF:
		return ebpfBed(t).bed
	default:
		t.Fatal(name)
	}
	return b
}

// serveTransparent has an emulator listen at the metadata server's own address.
func (b *bed) serveTransparent(who string) {
	b.t.Helper()
	if err := b.Do(func() error {
		lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
			_ = c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1) })
			return err
		}}
		l, err := lc.Listen(context.Background(), "tcp", metadataServer.String())
		if err == nil {
			b.t.Cleanup(func() { _ = l.Close() })
			go answerAll(l, who)
		}
		return err
	}); err != nil {
		b.t.Fatal(err)
	}
}

func TestOutcomes(t *testing.T) {
	rows := lines(strings.TrimSpace(outcomes))
	for column, name := range strings.Fields(rows[0])[2:] {
		t.Run(name, func(t *testing.T) {
			var b *bed
			var e *bpfBed // where programs redirect whoever is in its cgroups
			if name == ModeEBPF {
				e = ebpfBed(t)
				b = e.bed
			} else {
				b = modeBed(t, name)
			}
			cgroups := hostCgroupsOf(t)
			routed, err := b.AddRoutedPod("routed")
			if err != nil {
				t.Fatal(err)
			}
			lan := b.neighbour
			through, err := b.AddNeighbour("through") // one that sends by way of the node whatever it can
			if err != nil {
				t.Fatal(err)
			}
			nodes := netip.AddrPortFrom(b.Addr, 10250)
			b.serve(b.NS, nodes.String(), "kubelet")
			b.serve(routed, netip.AddrPortFrom(routed.Addr, 10250).String(), "pod")
			for _, to := range []string{"169.254.169.254/32", "169.254.169.252/32", "10.244.0.0/16", "10.245.0.0/16"} {
				if out, err := through.Command(t.Context(), "ip", "route", "add", to, "via", b.Addr.String()).CombinedOutput(); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
			}
			before := b.ruleset()
			r := b.router(b.plan).(*router)
			if b.plan.redirects() {
				b.plan.InterceptHostPods = "on"
				r = b.router(b.plan).(*router)
				if e == nil {
					r.hostCgroups = []string{cgroups.daemons}
				}
			}
			for _, step := range []func(context.Context) error{r.Install, r.Check, r.Install, r.Check} {
				if err := b.Do(func() error { return step(t.Context()) }); err != nil {
					t.Fatal(err)
				}
			}
			at := map[string]string{
				"metadata:80": "169.254.169.254:80", "metadata:53": "169.254.169.254:53", "metadata:443": "169.254.169.254:443",
				"metadata6:80": "[fd00:ec2::254]:80", "listen": b.plan.Listen.String(), "node:listen": netip.AddrPortFrom(b.Addr, b.plan.Listen.Port()).String(),
				"node:kubelet": nodes.String(), "routed:kubelet": netip.AddrPortFrom(routed.Addr, 10250).String(),
			}
			asker := func(who, to string, wait time.Duration) (string, error) {
				if e != nil {
					switch who {
					case "pod":
						return e.asks(podCgroup, b.pod, to)
					case "routed":
						return e.asks(podCgroup, routed, to)
					case "hostpod":
						return e.asks(podCgroup, b.NS, to)
					case "daemon":
						return e.asks("system.slice", b.NS, to)
					}
				}
				switch who {
				case "pod":
					return ask(b.pod, to, wait)
				case "routed":
					return ask(routed, to, wait)
				case "hostpod":
					return b.askFrom(cgroups.pods, to), nil
				case "daemon":
					return b.askFrom(cgroups.daemons, to), nil
				case "neighbour":
					return ask(through, to, wait)
				case "neighbour-lan":
					return ask(lan, to, wait)
				case "routed-as-pod":
					return askAs(t, routed, b.pod.Addr, to)
				case "pod-as-routed":
					return askAs(t, b.pod, routed.Addr, to)
				case "neighbour-as-pod":
					return askAs(t, through, b.pod.Addr, to)
				}
				t.Fatal(who)
				return "", nil
			}
			for _, row := range rows[1:] {
				f := strings.Fields(row)
				want := f[2+column]
				wait := long
				if want == "-" {
					want, wait = "", short
				}
				if got, err := asker(f[0], at[f[1]], wait); got != want {
					t.Errorf("%s asked %s (%s): %q answered (%v), want %q", f[0], f[1], at[f[1]], got, err, want)
				}
			}
			if err := b.Do(func() error { return r.Remove(t.Context()) }); err != nil {
				t.Fatal(err)
			}
			b.same("remove", sorted(b.ruleset()), sorted(before))
		})
	}
}

// askAs asks with another's address as the sender's.
func askAs(t *testing.T, ns *netnstest.NS, source netip.Addr, to string) (who string, err error) {
	t.Helper()
	if out, err := ns.Command(t.Context(), "sh", "-c", fmt.Sprintf("ip address show dev lo | grep -q %[1]s/32 || ip address add %[1]s/32 dev lo", source)).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	defer func() {
		_, _ = ns.Command(t.Context(), "ip", "address", "del", source.String()+"/32", "dev", "lo").CombinedOutput()
	}()
	err = ns.Do(func() error {
		d := net.Dialer{Timeout: short, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(source, 0))}
		c, err := d.DialContext(t.Context(), "tcp", to)
		if err != nil {
			return err
		}
		defer c.Close()
		who, err = talk(c, short)
		return err
	})
	return who, err
}

// twoCgroups are one for the node's daemons and one for pods, from the root of the hierarchy.
type twoCgroups struct{ daemons, pods string }

func hostCgroupsOf(t *testing.T) twoCgroups {
	t.Helper()
	root := cgroup2()
	if root == "" {
		netnstest.Lacks(t, fmt.Errorf("no cgroup v2 hierarchy (R-22)"))
	}
	own := fmt.Sprintf("gme-outcomes-%d", os.Getpid())
	c := twoCgroups{daemons: filepath.Join(own, "system.slice"), pods: filepath.Join(own, "kubepods.slice")}
	for _, dir := range []string{own, c.daemons, c.pods} {
		if err := os.Mkdir(filepath.Join(root, dir), 0o755); err != nil {
			netnstest.Lacks(t, err)
		}
		t.Cleanup(func() {
			if err := os.Remove(filepath.Join(root, dir)); err != nil {
				t.Error(err)
			}
		})
	}
	return c
}

// askFrom asks by a process of the node in the cgroup.
func (b *bed) askFrom(cgroup, to string) string {
	b.t.Helper()
	dir, err := os.Open(filepath.Join(cgroup2(), cgroup))
	if err != nil {
		b.t.Fatal(err)
	}
	defer dir.Close()
	cmd := b.play("ask", to, b.self())
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	out, _ := cmd.Output()
	return string(out)
}

// TestTwoDoors: in every mode each of two doors alone keeps a neighbour out, and without both it gets in: so they are what kept it.
func TestTwoDoors(t *testing.T) {
	for _, c := range []struct {
		mode string
		open []string // each opens one door

	}{
		{"iptables-nft", []string{"iptables -t raw -F", "iptables -F"}},
		{"iptables-legacy", []string{"iptables -t raw -F", "iptables -F"}},
		{ModeNFTables, []string{"nft flush chain ip gke-metadata-emulator raw", "nft flush chain ip gke-metadata-emulator input"}},
		{ModeLoopback, []string{"nft flush chain ip gke-metadata-emulator raw; nft flush chain ip gke-metadata-emulator input",
			"ip rule del pref 97 iif eth0 to 169.254.169.254"}},
		{"linked", []string{"nft flush chain ip gke-metadata-emulator raw", "nft flush chain ip gke-metadata-emulator input"}},
		{ModeNone, []string{"nft flush chain ip gke-metadata-emulator raw", "nft flush chain ip gke-metadata-emulator input"}},
		{ModeEBPF, []string{"nft flush chain ip gke-metadata-emulator raw", "nft flush chain ip gke-metadata-emulator input"}},
	} {
		t.Run(c.mode, func(t *testing.T) {
			b := modeBed(t, c.mode)
			b.install(b.plan)
			for _, to := range []string{"169.254.169.254", "169.254.169.252"} {
				if out, err := b.neighbour.Command(t.Context(), "ip", "route", "add", to+"/32", "via", b.Addr.String()).CombinedOutput(); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
			}
			refused := func(how string) {
				t.Helper()
				for _, at := range slices.Compact([]string{"169.254.169.254:80", b.plan.Listen.String()}) {
					if who, err := ask(b.neighbour, at, short); who != "" {
						t.Errorf("%s: %s answered the neighbour at %s (%v)", how, who, at, err)
					}
				}
			}
			refused("installed")
			for _, open := range c.open {
				b.sh(open)
				refused(open)
				if err := b.check(b.plan); err == nil {
					t.Errorf("%s: check finds nothing", open)
				}
				b.install(b.plan)
				b.green(b.plan)
			}
			b.sh(strings.Join(c.open, "; "))
			b.answers(b.neighbour, b.plan.Listen.String(), emulator)
		})
	}
}
