package routing

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/nft"
)

// untracking names the base chains of nft's that in mode iptables a pod's packet may meet before
// ours, and whose table takes packets out of conntrack, so that pods may not be redirected.
// Those of iptables-nft's table raw are put in order by install, and mode nftables overrules all of
// them: the kernel has a packet tracked that is given a zone, whatever was said of it before.
func untracking(p Plan) (names []string) {
	if !p.traits().firstTargetCT || p.guardAlone() {
		return nil
	}
	const ours = -300 // of table raw
	chains, err := nft.Ask(unix.NFT_MSG_GETCHAIN, unix.NLM_F_DUMP, unix.NFT_MSG_NEWCHAIN, unix.AF_UNSPEC)
	if err != nil {
		return nil // who may not ask has no rules to install either, and a kernel without nf_tables has no such chains
	}
	for _, c := range chains {
		hook := nft.Attribute(c, unix.NFTA_CHAIN_HOOK)
		number, priority := nft.Within(hook, unix.NFTA_HOOK_HOOKNUM), nft.Within(hook, unix.NFTA_HOOK_PRIORITY)
		if len(number) != 4 || nft.Uint32(number) != unix.NF_INET_PRE_ROUTING ||
			len(priority) != 4 || int32(nft.Uint32(priority)) > ours {
			continue
		}
		family, table := nft.FamilyWord(c), unix.ByteSliceToString(nft.Attribute(c, unix.NFTA_CHAIN_TABLE))
		if family != "ip" && family != "inet" || family == "ip" && table == "raw" || !tableUntracks(c[0], table) {
			continue
		}
		name := unix.ByteSliceToString(nft.Attribute(c, unix.NFTA_CHAIN_NAME))
		names = append(names, fmt.Sprintf("nft chain %s %s %s", family, table, name))
	}
	return names
}

// tableUntracks says whether a rule of the table takes packets out of conntrack.
func tableUntracks(family uint8, table string) bool {
	of := nft.NameAttr(unix.NFTA_RULE_TABLE, table)
	rules, _ := nft.Ask(unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP, unix.NFT_MSG_NEWRULE, family, of)
	for _, m := range rules {
		// old kernels tell all rules of the family
		if unix.ByteSliceToString(nft.Attribute(m, unix.NFTA_RULE_TABLE)) != table {
			continue
		}
		for _, e := range nft.Attributes(nft.Attribute(m, unix.NFTA_RULE_EXPRESSIONS)) {
			if unix.ByteSliceToString(nft.Within(e.Value, unix.NFTA_EXPR_NAME)) == "notrack" {
				return true
			}
		}
	}
	return false
}
