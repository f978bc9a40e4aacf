package routing

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/nft"
)

// ReadFacts looks at the node: files below /etc, /proc, /run and /sys, the names of network
// interfaces, and the versions of two commands. It asks nobody over the network, lists no process
// and needs no privilege, but sees pins of BPF only as root.
func ReadFacts(ctx context.Context) Facts {
	return surveyor{
		root:     "/",
		version:  func(command string) string { return version(ctx, command) },
		listens:  whoListens,
		nfTables: haveNFTables,
	}.facts()
}

// surveyor reads a node whose file system is at root.
type surveyor struct {
	root     string
	version  func(command string) string
	listens  func(netip.AddrPort) string
	nfTables func() bool
}

func (s surveyor) facts() Facts {
	f := Facts{
		Kernel:   strings.TrimSpace(s.text("proc/sys/kernel/osrelease")),
		CgroupV2: s.there("sys/fs/cgroup/cgroup.controllers") || s.there("sys/fs/cgroup/unified/cgroup.controllers"),
		BPF:      strings.Contains(s.text("proc/thread-self/mountinfo"), " - bpf "),
		Denied: s.there(
			"sys/fs/bpf/*block-iptables*",
		), // the module of Azure's network that does it pins its counters there
		GKE: strings.TrimSpace(s.text("sys/class/dmi/id/product_name")) == "Google Compute Engine" &&
			s.there("home/kubernetes/bin"),
		OpenShift: strings.Contains(s.text("etc/os-release"), "\nOPENSHIFT_VERSION="),
		Bundled:   s.find("var/lib/rancher/*/data/current/bin/aux/iptables"),
	}
	f.IPTables, f.Backend = iptablesVersion(s.version("iptables"))
	f.NFT = field(s.version("nft"), 1)
	f.NFTables = f.NFT != "" || s.nfTables() // nobody has the command without the kernel's part
	f.Port80 = s.listens(netip.AddrPortFrom(netip.IPv4Unspecified(), metadataServer.Port()))

	links := s.links()
	f.CNI = s.plugins()
	for _, known := range interfaces {
		if slices.ContainsFunc(links, func(l string) bool { return strings.HasPrefix(l, known.prefix) }) &&
			!slices.Contains(f.CNI, known.cni) {
			f.CNI = append(f.CNI, known.cni)
		}
	}
	f.Bridged = slices.Contains(f.CNI, "bridge")
	f.Cilium = slices.Contains(links, "cilium_host")
	if f.Cilium {
		f.CiliumHost = s.ciliumHostRouting()
	}
	f.CalicoBPF = slices.Contains(links, "bpfin.cali") || s.there("sys/fs/bpf/tc/globals/cali_v4_nat_fe*")
	return f
}

// interfaces tell networks whose configuration of CNI says little, or was not written yet.
var interfaces = []struct{ prefix, cni string }{
	{
		"cilium_host",
		"cilium",
	}, {"cali", "calico"}, {"flannel.", "flannel"}, {"kube-bridge", "kube-router"}, {"cni0", "bridge"},
	{
		"eni",
		"aws-vpc",
	}, {"azv", "azure-vnet"}, {"weave", "weave"}, {"antrea-gw", "antrea"}, {"ovn-k8s-mp", "ovn-kubernetes"},
}

// plugins are the types in the configuration that the runtime takes: the first file by name that is
// one.
func (s surveyor) plugins() []string {
	var files []string
	for _, pattern := range []string{"*.conflist", "*.conf", "*.json"} {
		for _, dir := range []string{"etc/cni/net.d", "var/lib/rancher/k3s/agent/etc/cni/net.d"} {
			found, _ := filepath.Glob(filepath.Join(s.root, dir, pattern)) // the pattern is a constant
			files = append(files, found...)
		}
	}
	slices.SortFunc(files, func(a, b string) int { return strings.Compare(filepath.Base(a), filepath.Base(b)) })
	for _, file := range files {
		if types := pluginsOf(file); len(types) > 0 {
			return types
		}
	}
	return nil
}

func pluginsOf(file string) (types []string) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil
	}
	type plugin struct {
		Type string `json:"type"`
	}
	var list struct {
		plugin
		Plugins []plugin `json:"plugins"`
	}
	if json.Unmarshal(text, &list) != nil {
		return nil
	}
	for _, p := range append([]plugin{list.plugin}, list.Plugins...) {
		switch p.Type {
		case "", "portmap", "bandwidth", "tuning", "sbr", "firewall": // they come with others
		default:
			types = append(types, strings.TrimSuffix(p.Type, "-cni"))
		}
	}
	return types
}

// links are the network interfaces of this thread's namespace.
func (s surveyor) links() (names []string) {
	lines := bufio.NewScanner(strings.NewReader(s.text("proc/thread-self/net/dev")))
	for lines.Scan() {
		if name, _, ok := strings.Cut(lines.Text(), ":"); ok {
			names = append(names, strings.TrimSpace(name))
		}
	}
	return names
}

var hostLegacyRouting = regexp.MustCompile(`"EnableHostLegacyRouting"\s*:\s*(true|false)`)

// ciliumHostRouting says whether Cilium's agent routes by BPF, as far as it left a word of that.
// Pods with netkit in place of veth are routed so always.
func (s surveyor) ciliumHostRouting() *bool {
	for _, state := range []string{"run/cilium/state", "var/run/cilium/state"} {
		if m := hostLegacyRouting.FindStringSubmatch(s.text(state + "/agent-runtime-config.json")); m != nil {
			yes := m[1] == "false"
			return &yes
		}
		if defines := s.text(state + "/globals/node_config.h"); defines != "" {
			yes := strings.Contains(defines, "#define ENABLE_HOST_ROUTING")
			return &yes
		}
	}
	return nil
}

// text is what a file holds, "" if it cannot be read.
func (s surveyor) text(name string) string {
	b, err := os.ReadFile(filepath.Join(s.root, name))
	if err != nil {
		return ""
	}
	return string(b)
}

func (s surveyor) there(pattern string) bool { return s.find(pattern) != "" }

func (s surveyor) find(pattern string) string {
	found, _ := filepath.Glob(filepath.Join(s.root, pattern)) // the pattern is a constant
	if len(found) == 0 {
		return ""
	}
	return "/" + strings.TrimPrefix(strings.TrimPrefix(found[0], s.root), "/")
}

// version runs a command for what it says of itself.
func version(ctx context.Context, command string) string {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, command, "--version").Output()
	if err != nil {
		return ""
	}
	line, _, _ := bytes.Cut(out, []byte("\n"))
	return string(line)
}

// iptablesVersion reads "iptables v1.8.9 (nf_tables)"; older ones than 1.8 name no backend, and
// have the legacy one.
func iptablesVersion(line string) (version, backend string) {
	version = field(line, 1)
	switch {
	case version == "":
	case strings.Contains(line, "(nf_tables)"):
		backend = "nf_tables"
	default:
		backend = "legacy"
	}
	return version, backend
}

func field(line string, i int) string {
	if f := strings.Fields(line); i < len(f) {
		return strings.TrimPrefix(f[i], "v")
	}
	return ""
}

// haveNFTables asks the kernel, which tells only those who may change rules.
func haveNFTables() bool {
	_, err := nft.Generation()
	return err == nil
}

// whoListens names the program that gets connections to the address; "" = nobody.
func whoListens(a netip.AddrPort) string {
	l := Listener(a)
	if l.At.IsValid() {
		return l.String()
	}
	return ""
}
