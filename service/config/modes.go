package config

// modeRule is what a routing mode asks of the other keys. The fields have the names that the traits
// of the mode have in service/routing/mode.go, which refuses the same in a Plan;
// TestModesOfConfiguration holds the two to each other.
type modeRule struct {
	mode string

	localServer  bool // the service listens at the metadata server's address: routing.link, and no other listen
	anyListener  bool // listen may be any address
	dnat         bool // the destination is translated: listen6
	readsQueries bool // rules see for which name a DNS query asks: dns
	redirects    bool // pods on the host network can be redirected: routing.interceptHostPods
	observes     bool // nothing is redirected, whatever the other keys say
	blindToLinks bool // a connection's interface is not known: no routing.excludeInterfaces
}

// modeRules has the choices of routing.mode, in the order of the documents.
var modeRules = []modeRule{
	// what does not fit the mode that is found, `routing install` says
	{mode: "auto", dnat: true, readsQueries: true, redirects: true},
	{mode: "iptables", dnat: true, readsQueries: true, redirects: true},
	{mode: "nftables", dnat: true, readsQueries: true, redirects: true},
	{mode: "loopback", localServer: true},
	{mode: "ebpf", redirects: true, blindToLinks: true},
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
