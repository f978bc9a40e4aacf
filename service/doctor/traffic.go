package doctor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/status"
)

// What becomes of pods' packets: of a pod's that is none, in either family, and of those that run
// here.

// policiesCheck: ACCEPT is not final across base chains. Whether one that drops by its
// policy is in the way is for the connection to say.
func policiesCheck(r *nodeReport) Finding {
	hook := "input"
	if !r.node.Local {
		hook = "forward"
	}
	switch {
	case r.node.Policies == nil:
		return skip("to read the chains of other programs, %s", asRoot)
	case len(r.node.Policies) == 0:
		return good("no chain at hook %s has policy drop", hook)
	case r.probe.ours && (r.probe6.ours || !r.plan.Listen6.IsValid() || r.notIPv6() != ""):
		return good("%s at hook %s have policy drop, and accept requests of pods", strings.Join(r.node.Policies, ", "), hook)
	}
	return warn("accept packets to "+r.plan.Listen.String()+" in these chains",
		"%s at hook %s have policy drop, and may drop requests of pods", strings.Join(r.node.Policies, ", "), hook)
}

// connectionCheck is a real connection by way of everybody's rules.
func connectionCheck(r *nodeReport) Finding {
	f, t := r.connection(r.probe, r.plan.Listen), r.podProbe
	switch {
	case f.Verdict != OK:
		return f
	case t.impossible != nil:
		return good("%s; not tried from a pod: %v", f.Finding, t.impossible)
	case t.ours:
		return good("%s, and from pod %s", f.Finding, t.from)
	case t.err == nil:
		return fail(installRules, "from pod %s: %s answered instead of this service", t.from, answeredBy(t.answered))
	}
	if chains := r.node.Untrack; len(chains) > 0 {
		return fail("set routing.mode: nftables, whose rules come first",
			"from pod %s: %v: %s excludes packets from conntrack before the rules", t.from, inner(t.err), some(chains))
	}
	return fail("find the rule for pods' addresses or interfaces: iptables-save; nft list ruleset; ip rule",
		"from pod %s: %v, but %s", t.from, inner(t.err), f.Finding)
}

// connection6Check is one by IPv6.
func connection6Check(r *nodeReport) Finding {
	switch why := r.notIPv6(); {
	case !r.plan.Listen6.IsValid():
		return Finding{}
	case why != "":
		return skip("requests by IPv6 are not redirected: %s", why)
	case r.probe6.impossible != nil && r.probe.impossible == nil:
		return warn("if new interfaces get no IPv6: sysctl net.ipv6.conf.default.disable_ipv6=0", "%v", r.probe6.impossible)
	}
	return r.connection(r.probe6, r.plan.Listen6)
}

// connection judges a probe of what should end at the listen address.
func (r *nodeReport) connection(t probed, listen netip.AddrPort) Finding {
	from := "from a temporary namespace, " + t.from
	if r.plan.Mode == routing.ModeNone {
		from += fmt.Sprintf(", to %s, the value of GCE_METADATA_HOST", r.entry())
	}
	switch {
	case r.plan.Closed:
		return skip("no valid configuration: see check configuration")
	case r.observes():
		return skip("mode observe redirects no connections")
	case routing.NotPermitted(t.impossible) || t.impossible != nil && !r.root:
		return skip("a temporary namespace needs root: %s", asRoot)
	case t.impossible != nil:
		return warn("wait for another doctor to end; load the kernel module veth", "%v", t.impossible)
	case r.state.Mode == routing.ModeEBPF && !t.ours:
		return skip("mode ebpf redirects only processes of pods: see check traffic")
	case t.ours:
		return good("%s: this service answered", from)
	case t.err == nil && r.state.Desired != routing.Installed:
		return fail(installRules, "%s: %s answered", from, answeredBy(t.answered))
	case t.err == nil:
		return fail(installRules, "%s: %s answered instead of this service", from, answeredBy(t.answered))
	case len(t.dropped) > 0:
		return fail(fmt.Sprintf("accept packets of pods to %s in that chain, unless a rule there accepts the interfaces or "+
			"addresses of pods already", listen),
			"%s: dropped by %s", from, strings.Join(t.dropped, "; "))
	case isRefused(t.err):
		return fail("see checks listener and rules",
			"%s: connection refused, and no chain was seen to reject it", from)
	}
	reason := fmt.Sprintf("%v, and no chain was seen to drop it", inner(t.err))
	if t.traceErr != nil {
		reason = fmt.Sprintf("%v; tracing the packet failed: %v", inner(t.err), t.traceErr)
	}
	return fail("see check rules, and check network for one that bypasses netfilter", "%s: %s", from, reason)
}

// inner is what went wrong, without what was asked.
func inner(err error) error {
	var asked *url.Error
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return errors.New("no answer")
	case errors.As(err, &asked):
		return asked.Err
	}
	return err
}

func isRefused(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && strings.Contains(op.Err.Error(), "refused")
}

// countedNothing is what to do where nobody's requests arrive.
const countedNothing = "request a token in a pod and run doctor again; if nothing arrives, see check network for one " +
	"that bypasses netfilter"

// podsOn counts the pods on the pod network that have such addresses, as far as the service knows
// of pods.
func (r *nodeReport) podsOn(such func([]netip.Addr) bool) (n int, known bool) {
	if r.status == nil || r.status.Cluster == nil || !r.status.Cluster.Synced {
		return 0, false
	}
	for _, q := range r.status.Cluster.Pods {
		if !q.HostNetwork && such(q.Addresses) {
			n++
		}
	}
	return n, true
}

// count is a number of pods.
func count(pods int) string { return fmt.Sprintf("%d pod%s", pods, textIf(pods != 1, "s")) }

func have(pods int) string {
	if pods == 1 {
		return "has"
	}
	return "have"
}

// trafficCheck is the truth signal: pods run, and nothing of what they send was ever redirected, or
// none has ever asked the service for anything. Doctor's own connections are counted by the rule,
// and not by the service.
func trafficCheck(r *nodeReport) Finding {
	pods, known := r.podsOn(func([]netip.Addr) bool { return true })
	if !known {
		pods = r.cluster.Pods
	}
	n := r.node.Redirected
	switch {
	case r.plan.Closed || r.state.Desired != routing.Installed:
		return skip("no rules redirect pods to the service: see check rules")
	case r.observes():
		return skip("mode observe redirects no connections: gke-metadata-emulator routing observe prints what it counted")
	case r.status != nil && r.status.Requests > 0:
		return good("%d requests since the service started %s ago", r.status.Requests, status.Age(r.now, r.status.Started))
	case pods == 0 && (r.status != nil || r.cluster.List == nil && r.cluster.Reach == nil):
		return good("no pod runs on this node")
	case n != nil && *n == 0:
		return warn(countedNothing, "no connection was ever redirected, with %s on this node", count(pods))
	case r.status != nil:
		return warn(countedNothing, "no request since the service started %s ago, with %s on this node",
			status.Age(r.now, r.status.Started), count(pods))
	case n != nil:
		return good("%d connections were redirected since the rules were installed, including doctor's own", *n)
	case !r.root:
		return skip("to read the counter of the rule that redirects, %s", asRoot)
	}
	return skip("mode %s counts no connections, and the service does not answer: see check service", r.state.Mode)
}

// traffic6Check is the same of IPv6. Clients ask by it where there is no IPv4: that pods which have
// both never did tells nothing.
func traffic6Check(r *nodeReport) Finding {
	pods, known := r.podsOn(func(at []netip.Addr) bool { return len(at) > 0 && !slices.ContainsFunc(at, netip.Addr.Is4) })
	n, why := r.node.Redirected6, r.notIPv6()
	switch {
	case !r.plan.Listen6.IsValid():
		return Finding{}
	case why != "":
		return skip("requests by IPv6 are not redirected: %s", why)
	case r.state.Desired != routing.Installed:
		return skip("no rules redirect pods to the service: see check rules")
	case r.status != nil && r.status.Requests6 > 0:
		return good("%d requests by IPv6 since the service started %s ago", r.status.Requests6,
			status.Age(r.now, r.status.Started))
	case known && pods == 0:
		return good("no requests by IPv6, and no pod of this node has only IPv6")
	case known && n != nil && *n == 0:
		return warn(countedNothing, "no connection by IPv6 was ever redirected, with %s on this node that %s only IPv6",
			count(pods),
			have(pods))
	case known:
		return warn(countedNothing, "no request by IPv6 since the service started %s ago, with %s on this node that %s only "+
			"IPv6", status.Age(r.now, r.status.Started), count(pods), have(pods))
	case n != nil:
		return good("%d connections by IPv6 were redirected since the rules were installed, including doctor's own", *n)
	case !r.root:
		return skip("to read the counter of the rule that redirects requests by IPv6, %s", asRoot)
	}
	return skip("the rule that redirects requests by IPv6 has no counter, and the service does not answer: see check " +
		"service")
}
