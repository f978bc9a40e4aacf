package config

// modeRule is what a routing mode asks of the other keys. service/routing refuses the same in a
// Plan; TestModesOfConfiguration holds the two to each other.
type modeRule struct {
	mode string

	localServer  bool // the service listens at the metadata server's address: routing.link, and no other listen
	anyListener  bool // listen may be any address
	translates   bool // rules of a firewall see packets: listen6, and the name in a DNS query
	hostPods     bool // pods on the host network can be redirected
	observes     bool // nothing is redirected, whatever the other keys say
	blindToLinks bool // a connection's interface is not known: no routing.excludeInterfaces
}

// modeRules has the choices of routing.mode, in the order of the documents.
var modeRules = []modeRule{
	{mode: "auto", translates: true, hostPods: true}, // what does not fit the mode that is found, `routing install` says
	{mode: "iptables", translates: true, hostPods: true},
	{mode: "nftables", translates: true, hostPods: true},
	{mode: "loopback", localServer: true},
	{mode: "ebpf", hostPods: true, blindToLinks: true},
	{mode: "observe", observes: true},
	{mode: "none", anyListener: true},
}

func modeChoices() (names []string) {
	for _, m := range modeRules {
		names = append(names, m.mode)
	}
	return names
}

// modeRule is that of routing.mode, which is one of the choices.
func (r Routing) modeRule() modeRule {
	for _, m := range modeRules {
		if m.mode == r.Mode {
			return m
		}
	}
	return modeRule{mode: r.Mode}
}
