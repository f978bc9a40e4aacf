package routing

import (
	"context"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// backends returns the command to use and, where the choice was ours, the other backend's if it may hold rules of ours from an
// earlier choice.
//
// Two backends can be in use on one node, and each is blind for the other's rules. What kubelet uses decides: it marks its own by a
// chain in table mangle. Before its first start that is the command "iptables".
func backends(ctx context.Context, p Plan) (use, other string) {
	if p.Binary != "" && p.Binary != "iptables" {
		return p.Binary, ""
	}
	use = "iptables"
	out, err := exec.CommandContext(ctx, use, "--version").Output()
	if err != nil {
		return use, ""
	}
	other = "iptables-nft"
	if strings.Contains(string(out), "nf_tables") {
		other = "iptables-legacy"
	}
	if _, err := exec.LookPath(other); err != nil {
		return use, ""
	}
	if !kubeletUses(use) && kubeletUses(other) {
		p.Log.WithFields(map[string]any{"command": other, "default": use}).Info("kubelet's iptables rules are in the other backend: using that")
		use, other = other, use
	}
	return use, other
}

func kubeletUses(command string) bool {
	if isLegacy(command) && !legacyTable("mangle", false) {
		return false // and asking would make the table
	}
	x, err := openXtables(command, false)
	if err != nil {
		return false
	}
	for _, name := range []string{"KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"} {
		if yes, err := x.ChainExists("mangle", name); err == nil && yes {
			return true
		}
	}
	return false
}

func isLegacy(command string) bool {
	if strings.HasSuffix(command, "-legacy") {
		return true
	}
	out, err := exec.Command(command, "--version").Output()
	return err == nil && !strings.Contains(string(out), "nf_tables")
}

// legacyTable says whether the legacy backend has the table in this network namespace. Listing a table would make it.
func legacyTable(table string, six bool) bool {
	names := "/proc/thread-self/net/ip_tables_names"
	if six {
		names = "/proc/thread-self/net/ip6_tables_names"
	}
	b, err := os.ReadFile(names)
	return err == nil && slices.Contains(strings.Fields(string(b)), table)
}
