package routing

import (
	"context"
	"fmt"
	"strings"
)

// Show returns what Install puts on a node that has nothing of it yet, as shell commands: the same text that iptables-restore gets.
func Show(ctx context.Context, p Plan) (string, error) {
	p, err := p.checked()
	if err != nil {
		return "", err
	}
	r := &iptablesRouter{plan: p, hostCgroups: hostCgroups()}
	var s surroundings
	if !p.Closed {
		if s, err = r.look(false); err != nil {
			return "", err
		}
	}
	command, _ := backends(ctx, p)
	return text(p, s, command), nil
}

func text(p Plan, s surroundings, command string) string {
	var b strings.Builder
	if !p.Closed && p.Listen.Addr().IsLinkLocalUnicast() {
		fmt.Fprintf(&b, "# the emulator's address, unless the node has it already\nip address add %s\n\n", addressText(p.Listen.Addr()))
	}
	for i, r := range guardRules(p) {
		if i == 0 {
			b.WriteString("# the guard that survives a flush of the firewall\n")
		}
		ip := "ip"
		if r.to.Is6() {
			ip = "ip -6"
		}
		fmt.Fprintf(&b, "%s rule add %s\n", ip, r)
	}
	if p.Closed {
		return b.String()
	}
	for _, six := range []bool{true, false} {
		chains := chainsFor(p, s, six)
		if chains[0].absent {
			continue
		}
		what, restore := "the way to the emulator", command+"-restore"
		if six {
			what, restore = "the guard of the other family", strings.Replace(command, "iptables", "ip6tables", 1)+"-restore"
		}
		var present []chain
		for _, c := range chains {
			if !c.absent {
				present = append(present, c)
			}
		}
		fmt.Fprintf(&b, "\n# %s\n%s --wait --noflush <<'END'\n%sEND\n", what, restore, restoreText(present, nil))
	}
	if interceptsHost(p, s) {
		fmt.Fprintf(&b, "\n# only on a node that has no other route there\nip route add %s\n",
			routeText(metadataRoute(p.Listen.Addr(), p.Listen.Addr().IsLinkLocalUnicast())))
	}
	return b.String()
}
