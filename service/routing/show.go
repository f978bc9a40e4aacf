package routing

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
)

// Show returns what Install puts on a node that has nothing of it yet, as shell commands.
func Show(p Plan) (string, error) {
	p, err := p.checked()
	if err != nil {
		return "", err
	}
	var s nodeFacts
	if !p.guardAlone() {
		if s, err = (&router{plan: p, hostCgroups: HostCgroups()}).look(false); err != nil {
			return "", err
		}
	}
	command := ""
	if p.traits().runsIPTables {
		command, _ = backends(p)
	}
	return text(p, s, command)
}

func text(p Plan, s nodeFacts, command string) (string, error) {
	var b strings.Builder
	if p.traits().localServer {
		fmt.Fprintf(&b, "# the metadata server's address is this node's own, "+
			"for those whom the rules below send to that table\n%s\n",
			netobj.Commands(loopbackRoute))
		if p.Link != "" {
			fmt.Fprintf(&b, "# and everybody's, by a link\n%s%s\n",
				netobj.Commands(ownLink(p.Link)), netobj.Commands(linkAddress(p.Link)))
		}
	} else if a := p.Listen.Addr(); a.Is4() && listenObject(a) != nil {
		fmt.Fprintf(&b, "# the emulator's address, unless the node has it already\n%s\n",
			netobj.Commands(listenObject(a)))
	}
	if a := s.listen6.Addr(); network6.Contains(a) {
		fmt.Fprintf(&b, "# its IPv6 address, unless the node has it already\n%s\n", netobj.Commands(listenObject(a)))
	}
	if rules := guardRules(p, s); len(rules) > 0 {
		b.WriteString("# the guard that survives a flush of the firewall; " +
			"where others have rules with a lower preference it goes before those\n")
		for _, r := range rules {
			b.WriteString(netobj.Commands(r))
		}
	}
	if p.guardAlone() {
		return b.String(), nil
	}
	rules, err := modeText(p, s, command)
	if err != nil {
		return "", err
	}
	b.WriteString(rules)
	if needsRoute(p, s) {
		source := p.Listen.Addr()
		if !source.IsLinkLocalUnicast() {
			source = netip.Addr{}
		}
		fmt.Fprintf(&b, "\n# only on a node that has no other route there\n%s", netobj.Commands(metadataRoute(source)))
	}
	return b.String(), nil
}
