package routing

import (
	"cmp"
	"fmt"
	"strings"
)

// ModeAuto is a choice and no mode: what Detect says.
const ModeAuto = "auto"

// Facts are what of a node decides which mode fits it. They are plain data; ReadFacts collects
// them. The zero value is a node of which nothing is known.
type Facts struct {
	Kernel   string // release, such as 6.1.0-18-amd64
	IPTables string // version; "" = there is no such command
	Backend  string // of iptables: nf_tables or legacy
	Bundled  string // the iptables that k3s or RKE2 brings, which is not in PATH
	NFT      string // version of the nft command; "" = there is none
	NFTables bool   // the kernel has nf_tables, as far as this process may know
	CgroupV2 bool
	BPF      bool // a bpffs is mounted

	CNI        []string // plugins in /etc/cni/net.d, and those whose interfaces are there
	Bridged    bool     // pods hang on a bridge, where one can speak with another's address
	Cilium     bool
	CiliumHost *bool // it routes by BPF, past the node's netfilter; nil: that is not known
	CalicoBPF  bool
	Denied     bool // a security module denies changes of the firewall, whoever asks (AKS)
	GKE        bool // the node is GKE's own
	OpenShift  bool

	Server string // what calls itself so at 169.254.169.254:80; "" = nobody, or nobody asked
	Port80 string // who listens on port 80 of every address; "" = nobody
}

// picks say which mode fits which node (the table "Which mode on which network"). The first row
// that fits decides; where none does, DNAT works, and iptables is what every node has.
var picks = []struct {
	when   func(Facts) bool
	mode   string
	reason string
}{
	{func(f Facts) bool { return f.GKE || strings.HasPrefix(f.Server, "GKE Metadata Server") }, ModeNone,
		"this is a node of GKE, whose own metadata server has the address"},
	{func(f Facts) bool { return f.OpenShift }, ModeNone,
		"OpenShift rejects 169.254.169.254 inside each pod's own network namespace: give pods GCE_METADATA_HOST instead"},
	{func(f Facts) bool { return f.Denied }, withoutNetfilter,
		"a security module denies every change of the firewall, as on AKS with eBPF host routing"},
	{func(f Facts) bool { return f.Cilium && f.CiliumHost != nil && *f.CiliumHost }, withoutNetfilter,
		"Cilium routes pods' packets by BPF, past the node's netfilter (mode loopback needs routing.link there)"},
	{func(f Facts) bool { return f.Cilium && f.CiliumHost == nil }, withoutNetfilter,
		"this is Cilium; whether it routes by BPF, past the node's netfilter, is not known (mode loopback needs " +
			"routing.link there)"},
	{func(f Facts) bool { return f.CalicoBPF }, withoutNetfilter,
		"Calico's eBPF mode translates addresses before the node's netfilter does"},
	{func(f Facts) bool { return f.IPTables == "" && f.NFTables }, ModeNFTables,
		"there is no iptables command, and the kernel has nf_tables"},
	{func(f Facts) bool { return f.IPTables == "" }, withoutNetfilter,
		"there is no iptables command in PATH, and no nf_tables in the kernel"},
	{func(f Facts) bool { return f.Cilium }, ModeIPTables,
		"Cilium routes by the host's own stack (bpf.hostLegacyRouting), which iptables sees"},
}

// withoutNetfilter stands for loopback, or for ebpf where somebody else has port 80 of every
// address (U-03).
const withoutNetfilter = ""

// Detect returns the mode that fits the node, and why in one sentence. It knows all modes, also
// those that New does not.
func Detect(f Facts) (mode, reason string) {
	for _, p := range picks {
		if !p.when(f) {
			continue
		}
		if p.mode != withoutNetfilter {
			return p.mode, p.reason
		}
		reason = p.reason
		if f.IPTables == "" && f.Bundled != "" {
			reason += " (k3s' own is " + f.Bundled + ")"
		}
		if f.Port80 == "" {
			return ModeLoopback, reason
		}
		if f.CgroupV2 && f.BPF {
			return ModeEBPF, fmt.Sprintf(
				"%s, and %s has port 80 of every address, so 169.254.169.254 cannot be one of this node's",
				reason,
				f.Port80,
			)
		}
		return ModeLoopback, fmt.Sprintf(
			"%s; %s has port 80 of every address, which has to end, since mode ebpf needs cgroup v2 and a bpffs",
			reason,
			f.Port80,
		)
	}
	network := "this node's network"
	if len(f.CNI) > 0 {
		network = strings.Join(f.CNI, ", ")
	}
	return ModeIPTables, fmt.Sprintf(
		"iptables %s (%s) sees what pods send on %s",
		f.IPTables,
		cmp.Or(f.Backend, "backend not known"),
		network,
	)
}
