package routing

import (
	"fmt"
	"strings"
)

// Show returns what Install puts on a node that has nothing of it yet, as shell commands.
func Show(p Plan) (string, error) {
	p, err := p.checked()
	if err != nil {
		return "", err
	}
	var s nodeFacts
	if !p.Closed {
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
	if p.traits().localServer && !p.Closed {
		fmt.Fprintf(&b, "# the metadata server's address is this node's own, "+
			"for those whom the rules below send to that table\n"+
			"ip route add %s\n\n", localRouteText())
		if p.Link != "" {
			fmt.Fprintf(&b, "# and everybody's, by a link\nip link add %[1]s type dummy\n"+
				"ip link set %[1]s alias %[2]s up\nip address add %[3]s\n\n", p.Link, comment, linkAddressText(p.Link))
		}
	} else if a := p.Listen.Addr(); !p.Closed && a.Is4() && a.IsLinkLocalUnicast() {
		fmt.Fprintf(&b, "# the emulator's address, unless the node has it already\nip address add %s\n\n",
			addressText(p.Listen.Addr()))
	}
	if a := s.listen6.Addr(); network6.Contains(a) {
		fmt.Fprintf(&b, "# its IPv6 address, unless the node has it already\nip -6 route add %s\n\n", listenRouteText(a))
	}
	if rules := guardRules(p, s); len(rules) > 0 {
		b.WriteString("# the guard that survives a flush of the firewall; " +
			"where others have rules with a lower preference it goes before those\n")
		b.WriteString(ruleTexts(rules))
	}
	if p.Closed {
		return b.String(), nil
	}
	rules, err := modeText(p, s, command)
	if err != nil {
		return "", err
	}
	b.WriteString(rules)
	if wantsRoute(p, s) {
		fmt.Fprintf(&b, "\n# only on a node that has no other route there\nip route add %s\n",
			routeText(metadataRoute(p.Listen.Addr(), p.Listen.Addr().IsLinkLocalUnicast())))
	}
	return b.String(), nil
}
