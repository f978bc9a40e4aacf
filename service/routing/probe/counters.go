package probe

import (
	"context"
	"fmt"
	"maps"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/xtables"
)

// LegacyDrops counts the packets of one family that each rule and each policy of the legacy tables
// has dropped in this network namespace. Without such tables it is empty: asking for one would make
// it.
func LegacyDrops(ctx context.Context, family netobj.Family) map[string]uint64 {
	drops, command := map[string]uint64{}, "iptables"
	if family == netobj.IPv6 {
		command = xtables.IP6Tables(command)
	}
	save := command + "-legacy-save"
	if _, err := exec.LookPath(save); err != nil {
		save = command + "-save" // a node that has the legacy backend alone
		if !xtables.IsLegacy(command) {
			return drops
		}
	}
	for _, table := range []string{"raw", "mangle", "nat", "filter", "security"} {
		if exists, _ := xtables.LegacyTable(table, family); !exists {
			continue
		}
		out, err := exec.CommandContext(ctx, save, "-c", "-t", table).Output()
		if err == nil {
			savedDrops(command, table, string(out), drops)
		}
	}
	return drops
}

var (
	savedPolicy = regexp.MustCompile(`^:(\S+) DROP \[(\d+):\d+\]`)
	savedRule   = regexp.MustCompile(`^\[(\d+):\d+\] -A ((\S+) .*-j (?:DROP|REJECT)\b.*)$`)
)

// savedDrops reads the text of iptables-save -c, or ip6tables-save.
func savedDrops(command, table, text string, drops map[string]uint64) {
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if m := savedPolicy.FindStringSubmatch(line); m != nil {
			name := fmt.Sprintf("%s chain %s of table %s (policy DROP)", command, m[1], table)
			drops[name], _ = strconv.ParseUint(m[2], 10, 64)
		}
		if m := savedRule.FindStringSubmatch(line); m != nil {
			n, _ := strconv.ParseUint(m[1], 10, 64)
			drops[fmt.Sprintf("%s chain %s of table %s (rule: -A %s)", command, m[3], table, m[2])] += n
		}
	}
}

// risen names the counters that are higher than before, sorted.
func risen(before, after map[string]uint64) (names []string) {
	for _, name := range slices.Sorted(maps.Keys(after)) {
		if after[name] > before[name] {
			names = append(names, name)
		}
	}
	return names
}
