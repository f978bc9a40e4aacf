package routing

import (
	"errors"
	"flag"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/xtables"
)

var update = flag.Bool("update", os.Getenv("UPDATE_GOLDEN") != "", "write the golden files anew")

// cookie is the number of this network namespace in a program.
var cookie = regexp.MustCompile(`(Call FnGetNetnsCookie\n#\s*\d+: LdImmDW dst: r1 imm: )\d+`)

// TestShownText compares plans with the text that goes to iptables-restore and ip.
func TestShownText(t *testing.T) {
	at := netip.MustParseAddrPort
	plain := Plan{Mode: ModeIPTables, Listen: at("169.254.169.252:988"), Guard: DefaultGuard()}
	for name, c := range map[string]struct {
		plan Plan
		on   nodeFacts
	}{
		"default": {plain, nodeFacts{uplinks: []string{"eth0"}, reachesIPv6: true}},
		"no-ipv6": {plain, nodeFacts{uplinks: []string{"eth0"}}},
		"host-pods": {
			Plan{Mode: ModeIPTables, Listen: at("169.254.169.252:988"), InterceptHostPods: "on"},
			nodeFacts{uplinks: []string{"bond0", "eth1"}, slices: []string{"system.slice", "user.slice", "init.scope"},
				hostPods: true},
		},
		"node-address-exclude-and-guards": {
			Plan{Mode: ModeIPTables, Listen: at("10.0.0.5:18080"), ExcludeInterfaces: []string{"docker0", "eth0"},
				Guard: []netip.AddrPort{at("169.254.169.254:80"), at("169.254.169.254:8775"), at("168.63.129.16:80"),
					at("168.63.129.16:32526"), at("[fd00:ec2::254]:80")}},
			nodeFacts{uplinks: []string{"eth0"}, reachesIPv6: true},
		},
		"ebpf": {Plan{Mode: ModeEBPF, Listen: at("169.254.169.252:988"), Guard: DefaultGuard(), CgroupRoot: "/sys/fs/cgroup"},
			nodeFacts{uplinks: []string{"bond0", "eth0"}, reachesIPv6: true}},
		"ipv6": {
			Plan{Mode: ModeIPTables, Listen: at("169.254.169.252:988"), Listen6: at("[fd20:ce::252]:988"),
				ExcludeInterfaces: []string{"docker0"},
				Guard:             DefaultGuard(), InterceptHostPods: "on"},
			nodeFacts{uplinks: []string{"eth0"}, reachesIPv6: true, listen6: at("[fd20:ce::252]:988"),
				slices: []string{"system.slice"}, hostPods: true},
		},
		"dns": {
			Plan{Mode: ModeIPTables, Listen: at("169.254.169.252:988"), Listen6: at("[fd20:ce::252]:988"), DNS: true,
				Guard: []netip.AddrPort{metadataServer}, ExcludeInterfaces: []string{"docker0"}, InterceptHostPods: "on"},
			nodeFacts{uplinks: []string{"eth0"}, reachesIPv6: true, listen6: at("[fd20:ce::252]:988"), dns: true,
				slices: []string{"system.slice"}, hostPods: true},
		},
		"dns-nftables": {
			Plan{Mode: ModeNFTables, Listen: at("169.254.169.252:988"), DNS: true, Guard: []netip.AddrPort{metadataServer},
				ExcludeInterfaces: []string{"docker0"}},
			nodeFacts{uplinks: []string{"eth0"}, dns: true},
		},
		"loopback-link": {Plan{Mode: ModeLoopback, Listen: metadataServer, Guard: []netip.AddrPort{metadataServer},
			Link: "gme0"}, nodeFacts{uplinks: []string{"eth0"}, reachesIPv6: true}},
		"none": {Plan{Mode: ModeNone, Listen: at("0.0.0.0:8988"), Guard: []netip.AddrPort{metadataServer}},
			nodeFacts{uplinks: []string{"eth0"}}},
		"observe": {Plan{Mode: ModeObserve, Listen: at("169.254.169.252:988"), Guard: DefaultGuard(),
			CgroupRoot: "/sys/fs/cgroup"}, nodeFacts{}},
		"closed": {Plan{Closed: true}, nodeFacts{}},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := c.plan.checked()
			if err != nil {
				t.Fatal(err)
			}
			got, err := text(p, c.on, "iptables")
			if err != nil {
				t.Fatal(err)
			}
			got = cookie.ReplaceAllString(got, "${1}COOKIE")
			file := filepath.Join("testdata", "show", name+".sh")
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
		})
	}
}

func TestRestoreTextMovesJumps(t *testing.T) {
	chains := []xtables.Chain{
		{Table: "nat", Base: "OUTPUT", Name: "GME-OUT", Absent: true},
		{Table: "nat", Base: "PREROUTING", Name: "GME-PRE", Rules: []string{"-i lo -j RETURN"}},
	}
	stands := func(name, rule string, positions ...int) map[string]xtables.ChainState {
		g := xtables.ChainState{Exists: true}
		for _, at := range positions {
			g.Jumps = append(g.Jumps, xtables.JumpAt{Position: at, Rule: rule})
		}
		return map[string]xtables.ChainState{name: g}
	}
	pre := func(positions ...int) map[string]xtables.ChainState {
		return stands("GME-PRE", chains[1].Jump(), positions...)
	}
	out := func(positions ...int) map[string]xtables.ChainState {
		m := stands("GME-OUT", chains[0].Jump(), positions...)
		m["GME-PRE"] = pre(1)["GME-PRE"]
		return m
	}
	const flushOut = ":GME-OUT - [0:0]\n"
	for _, c := range []struct {
		name   string
		stands map[string]xtables.ChainState
		flush  string
		want   string
	}{
		{"none", nil, "", "-I PREROUTING 1 -m comment --comment gke-metadata-emulator -j GME-PRE\n"},
		{"in place", pre(1), "", ""},
		{"displaced", pre(3), "", "-D PREROUTING " + chains[1].Jump() + "\n-I PREROUTING 1 " + chains[1].Jump() + "\n"},
		{"doubled", pre(1, 2), "", strings.Repeat("-D PREROUTING "+chains[1].Jump()+"\n", 2) + "-I PREROUTING 1 " +
			chains[1].Jump() + "\n"},
		{"no longer wanted", out(1), flushOut, "-D OUTPUT " + chains[0].Jump() + "\n-X GME-OUT\n"},
		{"left over", out(), flushOut, "-X GME-OUT\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			want := "*nat\n" + c.flush + ":GME-PRE - [0:0]\n-A GME-PRE -i lo -j RETURN\n" + c.want + "COMMIT\n"
			if got := xtables.RestoreText(chains, c.stands); got != want {
				t.Errorf("got\n%swant\n%s", got, want)
			}
		})
	}
}

// TestUplinks is R-05.
func TestUplinks(t *testing.T) {
	lo := device{name: "lo", index: 1}
	pod := device{name: "veth1", index: 9, kind: "veth"}
	for _, c := range []struct {
		name    string
		devices []device
		want    []string
		remark  string
	}{
		{"a cloud machine", []device{lo, {name: "ens5", index: 2, defaultRoute: true}, pod}, []string{"ens5"}, ""},
		{"hardware without a route", []device{lo, {name: "eth0", index: 2, defaultRoute: true}, {name: "eth1", index: 3}},
			[]string{"eth0", "eth1"}, ""},
		{"bond and vlan", []device{{name: "eth0", index: 2, master: 4}, {name: "bond0", index: 4, kind: "bond"},
			{name: "bond0.7", index: 5, kind: "vlan"}},
			[]string{"bond0", "bond0.7", "eth0"}, ""},
		{"a node in a container", []device{lo, {name: "eth0", index: 2, kind: "veth", defaultRoute: true}, pod},
			[]string{"eth0"}, ""},
		{"the pods' bridge", []device{{name: "cni0", index: 4, kind: "bridge"},
			{name: "veth7", index: 5, master: 4, kind: "veth"}}, nil, ""},
		{"a bridge to the LAN", []device{{name: "eth0", index: 2, master: 4}, {name: "br0", index: 4, kind: "bridge"}},
			[]string{"br0", "eth0"}, ""},
		{"a bridge to the LAN with pods",
			[]device{{name: "eth0", index: 2, master: 4}, {name: "br0", index: 4, kind: "bridge", defaultRoute: true},
				{name: "veth7", index: 5, master: 4, kind: "veth"}}, []string{"eth0"},
			"bridge br0 has the physical port eth0 and pods or machines at veth7"},
		{"a bridge with the default route", []device{{name: "br0", index: 4, kind: "bridge", defaultRoute: true}},
			[]string{"br0"}, ""},
		{"the node's address elsewhere",
			[]device{{name: "dummy0", index: 4, kind: "dummy", nodeAddress: true},
				{name: "nodelocaldns", index: 5, kind: "dummy"}}, []string{"dummy0"}, ""},
		{"overlays", []device{{name: "flannel.1", index: 4, kind: "vxlan"}, {name: "tunl0", index: 5, kind: "ipip"},
			{name: "wg0", index: 6, kind: "wireguard"}},
			[]string{"flannel.1", "tunl0", "wg0"}, ""},
		{"a VPN", []device{{name: "tun0", index: 4, kind: "tun"}, {name: "tap0", index: 5, kind: "tuntap"}},
			[]string{"tun0"}, ""},
		{"links on a link", []device{{name: "mv0", index: 4, kind: "macvlan"}, {name: "ipv0", index: 5, kind: "ipvlan"},
			{name: "sec0", index: 6, kind: "macsec"}},
			[]string{"ipv0", "mv0", "sec0"}, ""},
		{"a bridge to the LAN with machines",
			[]device{{name: "eth0", index: 2, master: 4}, {name: "br0", index: 4, kind: "bridge"},
				{name: "vnet0", index: 5, master: 4, kind: "tuntap"}}, []string{"eth0"}, "machines at vnet0"},
		{"a name like a pattern", []device{{name: "eth+", index: 4}, {name: `a"b`, index: 5}}, nil, "no rule can say"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, remarks := uplinks(c.devices)
			if !slices.Equal(got, c.want) {
				t.Errorf("%q, want %q", got, c.want)
			}
			if all := strings.Join(remarks, "\n"); (c.remark == "") != (all == "") || !strings.Contains(all, c.remark) {
				t.Errorf("remarks %q, want %q", all, c.remark)
			}
		})
	}
}

// TestLoopbackExemptsTheHost: whatever the guard names, the host's own requests are not ours
//
func TestLoopbackExemptsTheHost(t *testing.T) {
	lo := netobj.Rule{
		Pref:   usualPref,
		To:     netobj.Host(metadataServer.Addr()),
		IIF:    "lo",
		Action: unix.FR_ACT_GOTO,
		Arg:    usualPref + 1,
	}
	for _, guard := range [][]netip.AddrPort{nil, DefaultGuard(), {netip.MustParseAddrPort("168.63.129.16:80")}} {
		rules := guardRules(
			Plan{Mode: ModeLoopback, Listen: metadataServer, Guard: guard},
			nodeFacts{uplinks: []string{"eth0", "wan+"}},
		)
		if at := slices.Index(rules, lo); at < 0 || slices.Contains(rules[at+1:], lo) {
			t.Errorf("%v", rules)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	good := Plan{Mode: ModeIPTables, Listen: netip.MustParseAddrPort("169.254.169.252:988")}
	if _, err := New(good); err != nil {
		t.Fatal(err)
	}
	if _, err := New(Plan{Closed: true}); err != nil {
		t.Fatal(err)
	}
	listen := func(s string) func(*Plan) { return func(p *Plan) { p.Listen = netip.MustParseAddrPort(s) } }
	listen6 := func(s string) func(*Plan) { return func(p *Plan) { p.Listen6 = netip.MustParseAddrPort(s) } }
	for _, c := range []struct {
		name   string
		change func(*Plan)
		want   string
	}{
		{"no interface", func(p *Plan) { p.Mode, p.ExcludeInterfaces = ModeEBPF, []string{"docker0"} },
			"excludeInterfaces docker0: mode ebpf sees who connects, and not by which interface"},
		{"another mode", func(p *Plan) { p.Mode = "xdp" }, `routing mode "xdp" is not supported`},
		{"no mode", func(p *Plan) { p.Mode = "" }, `routing mode "" is not supported`},
		{"no listen", func(p *Plan) { p.Listen = netip.AddrPort{} }, "an address and a port are needed"},
		{"no port", listen("169.254.169.252:0"), "an address and a port are needed"},
		{"every address", listen("0.0.0.0:988"), "cannot redirect to every address"},
		{"loopback, R-04", listen("127.0.0.1:988"), "127.0.0.0/8"},
		{"IPv6", listen("[fd20:ce::254]:80"), "IPv4"},
		{"IPv6 in another mode", func(p *Plan) {
			p.Mode, p.Listen6 = ModeEBPF, netip.MustParseAddrPort("[fd20:ce::252]:988")
		}, "mode ebpf serves IPv4 alone"},
		{"IPv4 for IPv6", listen6("169.254.169.252:988"), "an IPv6 address and a port are needed"},
		{"no port for IPv6", listen6("[fd20:ce::252]:0"), "an IPv6 address and a port are needed"},
		{"a link's own", listen6("[fe80::1]:988"), "a unicast address that reaches beyond a link"},
		{"loopback for IPv6", listen6("[::1]:988"), "a unicast address that reaches beyond a link"},
		{"every IPv6 address", listen6("[::]:988"), "a unicast address that reaches beyond a link"},
		{"the real server's for IPv6", listen6("[fd20:ce::254]:80"), "cannot be redirected to a metadata server"},
		{"the real server's", listen("169.254.169.254:80"), "cannot be redirected there"},
		{"multicast", listen("224.0.0.1:80"), "cannot be redirected there"},
		{"host pods", func(p *Plan) { p.InterceptHostPods = "yes" }, `interceptHostPods "yes"`},
		{"a link in another mode", func(p *Plan) { p.Link = "gme0" }, "mode iptables needs none"},
		{"a link's name too long", func(p *Plan) { p.Mode, p.Listen, p.Link = ModeLoopback, metadataServer, "abcdefghijkl" },
			"11 letters at most"},
		{"loopback elsewhere", func(p *Plan) { p.Mode = ModeLoopback }, "listens where pods ask"},
		{"host pods in loopback", func(p *Plan) {
			p.Mode, p.Listen, p.InterceptHostPods = ModeLoopback, metadataServer, "on"
		}, "mode loopback cannot tell"},
		{"a blank in an uplink", func(p *Plan) { p.Uplinks = []string{"eth0 -j ACCEPT"} }, "no name of a network interface"},
		{"an uplink too long", func(p *Plan) { p.Uplinks = []string{"abcdefghijklmnop"} }, "no name of a network interface"},
		{"a line in an excluded one", func(p *Plan) { p.ExcludeInterfaces = []string{"a\nb"} },
			"no name of a network interface"},
		{"a pattern in an excluded one", func(p *Plan) { p.ExcludeInterfaces = []string{"br-+"} }, "one by one"},
		{"guard without port", func(p *Plan) { p.Guard = []netip.AddrPort{netip.MustParseAddrPort("1.2.3.4:0")} },
			"guard 1.2.3.4:0"},
		{"guard in disguise", func(p *Plan) { p.Guard = []netip.AddrPort{netip.MustParseAddrPort("[::ffff:1.2.3.4]:80")} },
			"guard"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := good
			c.change(&p)
			if _, err := New(p); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
	both := good
	both.InterceptHostPods, both.Uplinks = "x", []string{"/"}
	if _, err := New(both); err == nil || strings.Count(err.Error(), "\n") != 1 {
		t.Errorf("%v, want both faults", err)
	}
}

// TestEnvironmentText: in mode none pods are told an address at which they reach the emulator.
func TestEnvironmentText(t *testing.T) {
	for listen, want := range map[string]struct{ before, value string }{
		"169.254.169.252:988": {"# what pods need in their environment\n#   env:\n", "169.254.169.252:988"},
		"0.0.0.0:8988":        {"{fieldPath: status.hostIP}}\n", "$(NODE_IP):8988"},
		"198.51.100.10:8988":  {"", "$(NODE_IP):8988"},
		"[fd00:51::10]:8988":  {"", "[$(NODE_IP)]:8988"},
		"127.0.0.1:988": {"# what pods on the host network, who alone reach it, need in their environment\n#   env:\n",
			"127.0.0.1:988"},
	} {
		text := want.before
		for _, name := range []string{"GCE_METADATA_HOST", "GCE_METADATA_IP", "GCE_METADATA_ROOT"} {
			text += "#   - name: " + name + "\n#     value: " + want.value + "\n"
		}
		if got := environmentText(Plan{Listen: netip.MustParseAddrPort(listen)}); !strings.HasSuffix(got, text) {
			t.Errorf("%s: %s", listen, got)
		}
	}
}

// TestNoCommand: who has no iptables is told what to do.
func TestNoCommand(t *testing.T) {
	_, err := openIPTables(Plan{Binary: "iptables-none"}, "")
	if !errors.Is(err, exec.ErrNotFound) || !strings.Contains(err.Error(), "routing mode nftables") {
		t.Error(err)
	}
}

func TestJumps(t *testing.T) {
	base := []string{
		"-j KUBE-SERVICES",
		"-m comment --comment gke-metadata-emulator -j GME-PRE",
		"-m comment --comment gke-metadata-emulator -j GME-PREX",
		"-d 192.0.2.1/32 -m comment --comment gke-metadata-emulator -j GME-PRE",
	}
	ours, foreign := xtables.Jumps(base, "GME-PRE")
	if want := []xtables.JumpAt{{Position: 2, Rule: base[1]}, {Position: 4, Rule: base[3]}}; !slices.Equal(ours, want) ||
		foreign != "" {
		t.Errorf("%v, %q", ours, foreign)
	}
	for _, rule := range []string{"-j GME-PRE", "-g GME-PRE", "-m comment --comment mine -j GME-PRE"} {
		if ours, foreign := xtables.Jumps([]string{rule}, "GME-PRE"); len(ours) != 0 || foreign != rule {
			t.Errorf("%q: %v, %q", rule, ours, foreign)
		}
	}
}

// FuzzParseSocket: likewise for the sockets that sock_diag lists.
func FuzzParseSocket(f *testing.F) {
	ipv4 := make([]byte, 72)
	ipv4[0], ipv4[1] = unix.AF_INET, 10
	copy(ipv4[4:], []byte{3, 220, 0, 0, 169, 254, 169, 252})
	copy(ipv4[68:], []byte{210, 4, 0, 0})
	ipv6 := slices.Clone(ipv4)
	ipv6[0] = unix.AF_INET6
	copy(ipv6[8:], netip.MustParseAddr("fd20:ce::252").AsSlice())
	for _, s := range [][]byte{ipv4, ipv6, make([]byte, 72), ipv4[:71], nil} {
		f.Add(s)
	}
	if at, _, inode := parseSocket(ipv4); at.String() != "169.254.169.252:988" || inode != "1234" {
		f.Errorf("%v, %s", at, inode)
	}
	if at, _, _ := parseSocket(ipv6); at.String() != "[fd20:ce::252]:988" {
		f.Errorf("%v", at)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if at, _, inode := parseSocket(b); at.IsValid() != (inode != "") {
			t.Errorf("%x: %v, %q", b, at, inode)
		}
	})
}
