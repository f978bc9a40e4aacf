package routing

import (
	"os/exec"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/nft"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/xtables"
)

// backends returns the command to use and, where the choice was ours, the other backend's if it may
// hold rules of ours from an earlier choice.
//
// Two backends can be in use on one node, and each is blind for the other's rules. What kubelet
// uses decides: it marks its own by a chain in table mangle. Before its first start that is the
// command "iptables".
func backends(p Plan) (use, other string) {
	if p.Binary != "" && p.Binary != "iptables" {
		return p.Binary, ""
	}
	use, other = "iptables", "iptables-legacy"
	legacy := other
	if _, err := exec.LookPath(use); err != nil {
		return use, ""
	}
	if xtables.IsLegacy(use) {
		legacy, other = use, "iptables-nft"
	}
	if _, err := exec.LookPath(other); err != nil {
		return use, ""
	}
	if kubelets := kubeletChains(legacy); kubelets[xtables.IsLegacy(other)] && !kubelets[xtables.IsLegacy(use)] {
		p.Log.WithFields(map[string]any{"command": other, "default": use}).
			Info("routing: kubelet uses the other iptables backend: using that, too")
		use, other = other, use
	}
	return use, other
}

// kubeletChains says in which backend kubelet has marked its own, by whether that is the legacy
// one, which has the command.
func kubeletChains(legacy string) map[bool]bool {
	found := map[bool]bool{}
	for _, name := range []string{"KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"} {
		if yes, err := nft.ChainExists(netobj.IPv4, "mangle", name); err == nil && yes {
			found[false] = true
		}
		if yes, err := xtables.LegacyTable("mangle", netobj.IPv4); err == nil && yes && !found[true] {
			if x, err := xtables.Open(legacy, true, netobj.IPv4); err == nil {
				found[true], _ = x.ChainExists("mangle", name)
			}
		}
	}
	return found
}
