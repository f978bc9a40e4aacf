package doctor

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
)

// dnsCheck: Go's clients need the name although they ask by address (C-GO-1).
func dnsCheck(r *nodeReport) Finding {
	const name = "metadata.google.internal"
	remedy := "add the record " + name + " A 169.254.169.254 to the cluster's DNS, which Go's, Python's and Java's " +
		"clients need (docs/clients.md)"
	if routing.NoDNS(r.plan.Mode) == "" && !r.plan.DNS {
		remedy = "set dns to answer, or " + remedy
	}
	held, missing := queriesTaken(r)
	switch {
	case !r.plan.DNS || r.plan.Closed:
	case routing.NoDNS(r.plan.Mode) != "":
		return warn(routing.DNSRemedy, "mode %s does not see the name in a DNS query, so this node does not answer for %s",
			r.plan.Mode, name)
	case held != "":
		return fail("stop it or change listen, then "+restartSocket, "this node does not answer for %s: %s", name, held)
	case r.state.DNSRefused != "":
		return warn(routing.DNSRemedy, "this node does not answer for %s: %s", name, r.state.DNSRefused)
	case missing.IsValid():
		return fail(restartSocket, "DNS queries for %s are redirected to UDP %s, where no process listens", name, missing)
	default:
		return good("this node answers its pods for %s, whichever name server they ask over UDP", name)
	}
	switch {
	case slices.Contains(r.names, routing.MetadataServer().Addr()):
		return good("metadata.google.internal resolves to %s on this node; pods ask the cluster's DNS",
			routing.MetadataServer().Addr())
	case len(r.names) > 0:
		return warn(remedy, "metadata.google.internal resolves to %s on this node", r.names[0])
	}
	reason := "the name does not exist"
	var dns *net.DNSError
	if errors.As(r.namesErr, &dns) && !dns.IsNotFound {
		reason = dns.Err
	}
	return warn(remedy, "metadata.google.internal does not resolve on this node: %s; pods ask the cluster's DNS", reason)
}

// queriesTaken says who else has UDP of an address where DNS queries are redirected to, or which of
// these addresses nobody has.
func queriesTaken(r *nodeReport) (held string, missing netip.AddrPort) {
	for _, to := range []struct {
		at      netip.AddrPort
		by      routing.ListenedBy
		applies bool
	}{
		{r.plan.Listen, r.node.Queries, r.node.Local},
		{r.plan.Listen6, r.node.Queries6, r.plan.Listen6.IsValid() && r.node.IPv6},
	} {
		switch {
		case !to.applies:
		case to.by.HoldsFrom(to.at):
			return fmt.Sprintf("UDP %s, where queries are redirected, is held by %s at %s", to.at, to.by, to.by.At), missing
		case !to.by.At.IsValid():
			missing = to.at
		}
	}
	return "", missing
}
