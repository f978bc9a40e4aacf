package routing

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// TestUplinksThatAreConfigured are believed instead of what was found: here the LAN is served, as
// the operator said.
func TestUplinksThatAreConfigured(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	b.plan.Uplinks = []string{"wan+"}
	b.install(b.plan)
	b.requireOK(b.plan)
	if out, err := b.neighbour.Command(t.Context(), "ip", "route", "add", "169.254.169.254/32", "via",
		b.Addr.String()).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	b.answers(b.neighbour, "169.254.169.254:80", emulator)
	b.plan.Uplinks = nil
	if got := faults(t, b.check(b.plan)); len(got) != 2 { // eth0 is missing, wan+ is too much
		t.Errorf("check named %q", got)
	}
	b.install(b.plan)
	b.answers(b.neighbour, "169.254.169.254:80", "")
}

// TestSparedInterface is left alone altogether: who is behind it goes on talking to the real
// server.
func TestSparedInterface(t *testing.T) {
	t.Parallel()
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		container, err := b.AddRoutedPod("container")
		if err != nil {
			t.Fatal(err)
		}
		before := b.ruleset()
		b.plan.ExcludeInterfaces = []string{"veth2"}
		b.install(b.plan)
		b.requireOK(b.plan)
		b.answers(container, "169.254.169.254:80", cloud)
		b.answers(container, "[fd00:ec2::254]:80", cloud)
		b.answers(b.pod, "169.254.169.254:80", emulator)
		b.plan.ExcludeInterfaces = nil // Remove needs no memory of the Plan
		b.remove(b.plan)
		b.requireEqual("remove", b.ruleset(), before)
	})
}

// TestListenOnNodeAddress: only that port of the address is guarded, and the address is not ours to
// take away.
func TestListenOnNodeAddress(t *testing.T) {
	t.Parallel()
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		b.plan.Listen = netip.AddrPortFrom(b.Addr, 988)
		b.serve(b.NS, b.plan.Listen.String(), "emulator on the node's address")
		b.serve(b.NS, netip.AddrPortFrom(b.Addr, 10250).String(), "kubelet")
		before := b.ruleset()
		b.install(b.plan)
		b.requireOK(b.plan)
		b.answers(b.pod, "169.254.169.254:80", "emulator on the node's address")
		b.answers(b.neighbour, b.plan.Listen.String(), "")
		b.answers(b.neighbour, netip.AddrPortFrom(b.Addr, 10250).String(), "kubelet")
		b.answers(b.pod, netip.AddrPortFrom(b.Addr, 10250).String(), "kubelet")
		b.remove(b.plan)
		b.requireEqual("remove", b.ruleset(), before)
	})
}

// TestAddressOfSomebodyElse: an address that the operator gave the node is used, and stays when we
// go.
func TestAddressOfSomebodyElse(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	b.run("ip address add 169.254.169.252/32 dev lo")
	before := b.ruleset()
	b.install(b.plan)
	b.requireOK(b.plan)
	b.answers(b.pod, "169.254.169.254:80", emulator)
	b.remove(b.plan)
	b.requireEqual("remove", b.ruleset(), before)
}

// TestReadDevices compares what the kernel calls its links with what the table of R-05 calls them.
func TestReadDevices(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	b.run(
		`ip link add flannel.1 type vxlan id 1 dstport 8472 dev eth0; ip tuntap add dev tap0 mode tap; ip link set tap0 master cni0; ip tuntap add dev tun0 mode tun
		ip link add mv0 link eth0 type macvlan; ip link set mv0 up; ip link add br0 type bridge
		ip address add 198.51.100.99/32 dev br0; ip link set br0 up; ip route add default via 198.51.100.1 dev eth0 src 198.51.100.99 table 8`,
	)
	var found []string
	if err := b.Do(func() error {
		devices, err := readDevices()
		for _, d := range devices {
			want := map[string]string{"flannel.1": "vxlan", "tap0": "tuntap", "tun0": "tun", "cni0": "bridge", "veth1": "veth",
				"eth0": "veth", "mv0": "macvlan"}[d.name]
			if want != "" && d.kind != want {
				t.Errorf("%s is a %q, want %q", d.name, d.kind, want)
			}
		}
		found, _ = uplinks(devices)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	// eth0 has a default route, and mv0 leads to it; br0 holds the address that one of them sends
	// from.
	if want := []string{"br0", "eth0", "flannel.1", "mv0", "tun0"}; !slices.Equal(found, want) {
		t.Errorf("uplinks %q, want %q", found, want)
	}
}

// TestNeighbourByAnotherLink: a link that the node has on its uplink is no way in either.
func TestNeighbourByAnotherLink(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"iptables-nft", ModeNFTables, ModeLoopback, ModeNone} {
		t.Run(mode, func(t *testing.T) {
			b := modeNode(t, mode)
			b.run(
				"ip link add mv0 link eth0 type macvlan; ip address add 198.51.100.99/32 dev mv0; ip link set mv0 up; sysctl " +
					"-qw net.ipv4.conf.eth0.arp_ignore=1",
			)
			if out, err := b.neighbour.Command(t.Context(), "sh", "-c",
				"ip route add 169.254.169.254 via 198.51.100.99; ip route add 169.254.169.252 via "+
					"198.51.100.99").CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			b.install(b.plan)
			for _, at := range []string{"169.254.169.254:80", b.plan.Listen.String()} {
				if who, _ := ask(b.neighbour, at, short); who != "" {
					t.Errorf("%s answered the neighbour at %s", who, at)
				}
			}
		})
	}
}

// TestListenElsewhere: the emulator lives in a namespace of its own, and the node forwards nothing
// unless told to.
func TestListenElsewhere(t *testing.T) {
	t.Parallel()
	onBothBackends(t, func(t *testing.T, b *testNode) {
		box, err := b.AddRoutedPod("box")
		if err != nil {
			t.Fatal(err)
		}
		b.plan.Listen = netip.AddrPortFrom(box.Addr, 988)
		b.serve(box, b.plan.Listen.String(), "emulator elsewhere")
		b.run("iptables -P FORWARD DROP")
		before := b.ruleset()
		b.install(b.plan)
		b.requireOK(b.plan)
		b.answers(b.pod, "169.254.169.254:80", "emulator elsewhere")
		b.answers(b.pod, b.plan.Listen.String(), "")
		b.answers(b.neighbour, "169.254.169.254:80", cloud)
		b.remove(b.plan)
		b.requireEqual("remove", b.ruleset(), before)
	})
}

// TestPlanChanges: Install converges from another Plan's rules, Remove from any.
func TestPlanChanges(t *testing.T) {
	t.Parallel()
	onBothBackends(t, func(t *testing.T, b *testNode) {
		before := b.ruleset()
		b.install(b.plan)
		whole := b.ruleset()
		other := b.plan
		other.Listen = netip.MustParseAddrPort("169.254.7.7:1988")
		other.Guard = []netip.AddrPort{netip.MustParseAddrPort("168.63.129.16:80")}
		other.ExcludeInterfaces = []string{"docker0"}
		b.serve(b.NS, other.Listen.String(), "the other")
		b.install(other)
		b.requireOK(other)
		b.answers(b.pod, "169.254.169.254:80", "the other")
		if s := b.ruleset(); strings.Contains(s, "169.254.169.252") ||
			strings.Contains(s, "fd00:ec2") && strings.Contains(s, "fd00:ec2::254 ipproto") {
			t.Errorf("left of the first plan:\n%s", s)
		}
		b.install(b.plan)
		if again := b.ruleset(); len(only(lines(again), lines(whole)))+len(only(lines(whole), lines(again))) > 0 {
			b.requireEqual("back", again, whole) // iptables-nft may list chains in another order when they are made again
		}
		b.install(other)
		b.remove(b.plan)
		b.requireEqual("remove", b.ruleset(), before)
	})
}

// TestForeignRulesAreLeftAlone: jumps go back to the top past whoever inserted before, and nobody
// else's rule moves.
func TestForeignRulesAreLeftAlone(t *testing.T) {
	t.Parallel()
	onBothBackends(t, func(t *testing.T, b *testNode) {
		b.run(
			`iptables -t nat -N KUBE-SERVICES; iptables -t nat -A PREROUTING -j KUBE-SERVICES; iptables -A FORWARD -s 10.1.0.0/16 -j DROP; iptables -P INPUT DROP
			iptables -A INPUT -i lo -j ACCEPT; ip rule add pref 97 to 192.0.2.1 lookup main; ip rule add pref 98 to 169.254.169.254 lookup main
			ip address add 169.254.169.253/32 dev lo; ip route add 192.0.2.9/32 dev lo`,
		)
		before := b.ruleset()
		b.install(b.plan)
		b.answers(b.pod, "169.254.169.254:80", emulator) // through INPUT's policy DROP
		b.run("iptables -t nat -I PREROUTING 1 -p tcp --dport 9 -j ACCEPT")
		b.requireOK(b.plan) // who inserts before us costs time, not safety
		b.install(b.plan)
		if lines := strings.Split(b.run("iptables -t nat -S PREROUTING"), "\n"); !strings.HasSuffix(lines[1], "-j GME-PRE") {
			t.Errorf("our jump is not first: %q", lines)
		}
		b.run("iptables -t nat -D PREROUTING -p tcp --dport 9 -j ACCEPT")
		b.remove(b.plan)
		b.requireEqual("remove", b.ruleset(), before)
	})
}

// TestHostPods: what the node sends from outside its own slices is redirected, its daemons are not
// and it works on a node without a default route.
func TestHostPods(t *testing.T) {
	t.Parallel()
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		root := cgroup2()
		if root == "" {
			netnstest.Lacks(t, errors.New("no cgroup v2 hierarchy (R-22)"))
		}
		own := fmt.Sprintf("gme-routing-%d-%s", os.Getpid(), filepath.Base(t.Name())) // others run side by side
		slice, pods := filepath.Join(own, "system.slice"), filepath.Join(own, "kubepods.slice")
		for _, dir := range []string{own, slice, pods} {
			if err := os.Mkdir(filepath.Join(root, dir), 0o755); err != nil {
				netnstest.Lacks(t, err)
			}
			t.Cleanup(func() {
				if err := os.Remove(filepath.Join(root, dir)); err != nil {
					t.Error(err)
				}
			})
		}
		ipv6Node(b)
		askAt := func(cgroup, at string) string {
			t.Helper()
			dir, err := os.Open(filepath.Join(root, cgroup))
			if err != nil {
				t.Fatal(err)
			}
			defer dir.Close()
			cmd := b.play("ask", at, b.self())
			cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
			out, _ := cmd.Output()
			return string(out)
		}
		askFrom := func(cgroup string) string { t.Helper(); return askAt(cgroup, "169.254.169.254:80") }
		b.plan.InterceptHostPods = "on"
		r := b.router(b.plan).(*router)
		r.hostCgroups = []string{slice, filepath.Join(own, "user.slice")} // the second does not exist
		do := func(f func(context.Context) error) {
			t.Helper()
			if err := b.Do(func() error { return f(t.Context()) }); err != nil {
				t.Fatal(err)
			}
		}
		before := b.ruleset()
		do(r.Install)
		do(r.Check)
		if got := askFrom(pods); got != emulator {
			t.Errorf("a pod on the host network was answered by %q", got)
		}
		if got := askFrom(slice); got != cloud {
			t.Errorf("a daemon of the node was answered by %q", got)
		}
		for cgroup, want := range map[string]string{pods: emulator, slice: cloud} {
			if got := askAt(cgroup, "[fd20:ce::254]:80"); got != want {
				t.Errorf("by IPv6 %s was answered by %q, want %q", cgroup, got, want)
			}
		}
		if strings.Contains(b.run("ip route"), "169.254.169.254") {
			t.Error("the node has a default route, and was given one more to the metadata server")
		}

		b.run("ip route del default")
		if err := b.Do(func() error { return r.Check(t.Context()) }); err == nil ||
			!strings.Contains(err.Error(), "ip route: 169.254.169.254/32 dev lo") {
			t.Errorf("check without default route: %v", err)
		}
		do(r.Install)
		do(r.Check)
		if got := askFrom(pods); got != emulator {
			t.Errorf("without default route a pod on the host network was answered by %q", got)
		}
		b.answers(b.pod, "169.254.169.254:80", emulator)
		b.run("ip route add default via 198.51.100.1 dev eth0")
		if err := b.Do(func() error { return r.Check(t.Context()) }); err == nil ||
			!strings.Contains(err.Error(), "should not be there") {
			t.Errorf("check with the default route back: %v", err)
		}
		do(r.Install)
		do(r.Check)
		if got := askFrom(slice); got != cloud {
			t.Errorf("with the default route back a daemon of the node was answered by %q", got)
		}

		b.plan.InterceptHostPods = "off" // the chain does not exist at all
		b.install(b.plan)
		if s := b.ruleset(); strings.Contains(s, "GME-OUT") || strings.Contains(s, "hook output priority -110") {
			t.Error("the chain is still there")
		}
		do(r.Install)
		do(r.Remove)
		b.requireEqual("remove", b.ruleset(), before)
	})
}

// TestNoDefaultRoute: pods are served, and the node is given no route that it does not need.
func TestNoDefaultRoute(t *testing.T) {
	t.Parallel()
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		b.run("ip route del default; ip -6 route del default")
		before := b.ruleset()
		b.install(b.plan)
		b.requireOK(b.plan)
		b.answers(b.pod, "169.254.169.254:80", emulator)
		b.remove(b.plan)
		b.requireEqual("remove", b.ruleset(), before)
	})
}
