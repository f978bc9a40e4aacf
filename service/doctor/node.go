package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/status"
)

const (
	installRules   = "gke-metadata-emulator routing install"
	restartService = "systemctl restart gke-metadata-emulator"
	restartSocket  = "systemctl daemon-reload && systemctl restart gke-metadata-emulator.socket"
)

func configurationCheck(r *nodeReport) Finding {
	serving := r.status != nil && r.status.State == "serving"
	const beforeRestart = "correct it before anything restarts the service"
	text := fmt.Sprint(r.broken)
	if broken := (*config.Error)(nil); errors.As(r.broken, &broken) && len(broken.Faults) > 1 {
		text = fmt.Sprintf("%d faults: %v", len(broken.Faults), broken)
	}
	switch {
	case r.broken != nil && serving:
		return fail(beforeRestart,
			"%s; the service runs on with what it read before, and would refuse pods after a restart", text)
	case r.broken != nil:
		return fail("pods are refused until it is mended", "%s", text)
	case serving && r.status.ConfigFile != "": // its user cannot read what root can
		return fail(beforeRestart, "it does not load for the service, which runs on with what it read before: %s",
			r.status.ConfigFile)
	case len(r.config.Warnings) > 0:
		return warn("is that meant?", "%s", strings.Join(r.config.Warnings, "; "))
	}
	return good("%s%s", r.file, textIf(r.flags != "", " and the flags of "+r.flags))
}

func serviceCheck(r *nodeReport) Finding {
	switch {
	case errors.Is(r.statusErr, status.ErrNotRunning) && r.install != nil:
		return fail("correct that; systemd tries again within 15s; journalctl -u gke-metadata-emulator",
			"it is not running: %s%s",
			status.FailureText(r.install, r.now), textIf(r.unit.String() != "", "; "+r.unit.String()))
	case errors.Is(r.statusErr, status.ErrNotRunning):
		return fail(restartService+textIf(r.unit.Result != "" && r.unit.Result != "success", "; journalctl -u "+
			"gke-metadata-emulator"),
			"it is not running%s", textIf(r.unit.String() != "", ": "+r.unit.String()))
	case errors.Is(r.statusErr, fs.ErrPermission):
		return skip("only root and the service's group may ask it: %s", asRoot)
	case r.statusErr != nil:
		return fail(restartService, "%v", r.statusErr)
	case r.status.State != "serving" && r.status.Reason != "":
		return fail("what is in force is what the service last read: correct "+r.file, "%s: %s", r.status.State,
			r.status.Reason)
	case r.status.State != "serving":
		return warn("ask again when it has been started anew", "%s", r.status.State)
	case r.status.Version != r.version:
		return warn(restartService, "version %s is running, and version %s is installed", r.status.Version, r.version)
	}
	return good("serving, version %s, up %s, %d connections", r.status.Version, status.Age(r.now, r.status.Started),
		r.status.Connections)
}

// listenerCheck says who has the address that the rules send pods to, and whether the service has
// adopted it.
func listenerCheck(r *nodeReport) Finding {
	want, by := r.plan.Listen, r.node.Holder
	adopted := ""
	if r.status != nil {
		adopted = r.status.Listen
	}
	switch {
	case r.plan.Closed:
		return skip("without a configuration no address is known")
	case !r.node.Local:
		return good("%s is not this node's: requests are forwarded there", want)
	case !by.At.IsValid() && adopted != "":
		return fail(restartSocket, "nobody listens on %s, where pods are sent: the service listens on %s", want, adopted)
	case !by.At.IsValid():
		return fail("systemctl restart gke-metadata-emulator.socket", "nobody listens on %s, where pods are sent", want)
	case adopted == by.At.String() && len(r.direct.dropped) > 0:
		return warn(fmt.Sprintf("have it accept what the node sends to %s, and what is sent back; pods on the pod "+
			"network do not need it", want),
			"%s, adopted by the service from %s; but what the node itself sends there is dropped by %s", by.At, by,
			strings.Join(r.direct.dropped, "; "))
	case adopted == by.At.String():
		return good("%s, adopted by the service from %s", by.At, by)
	case by.PID == "" && !r.root:
		return skip("somebody listens on %s; to see who, %s", by.At, asRoot)
	case by.Own && adopted != "":
		return fail(restartSocket, "%s holds %s, and the service listens on %s", by, by.At, adopted)
	case by.Own:
		return good("%s holds %s", by, by.At)
	case by.At.Addr().IsUnspecified() && want.Port() == 988:
		return fail("name one address for the other program to listen on, or choose another listen address",
			"%s listens on %s: port 988 of every address is Lustre's as well", by, by.At)
	case want == routing.MetadataServer(): // mode loopback, which listens nowhere else
		return fail("stop it, or have it listen on an address of its own", "%s listens on %s, and mode loopback needs %s",
			by, by.At, want)
	}
	return fail("choose another listen address, or stop it; this may be GKE's own metadata server", "%s listens on %s",
		by, by.At)
}

// portsCheck: a port that the kernel gives to connections may be taken when the service starts
//
func portsCheck(r *nodeReport) Finding {
	for key, a := range map[string]netip.AddrPort{"listen": r.config.Listen, "healthListen": r.config.HealthListen} {
		if a.Port() != 0 && a.Port() >= r.ports[0] && a.Port() <= r.ports[1] {
			return warn(fmt.Sprintf("choose another port, or reserve it: sysctl net.ipv4.ip_local_reserved_ports=%d", a.Port()),
				"%s: port %d lies in the ephemeral range %d-%d, so another program's connection may hold it when the service "+
					"starts", key, a.Port(), r.ports[0], r.ports[1])
		}
	}
	return good("%d and %d are outside the ephemeral range %d-%d", r.config.Listen.Port(), r.config.HealthListen.Port(),
		r.ports[0], r.ports[1])
}

func rulesCheck(r *nodeReport) Finding {
	mode := r.state.Mode
	if r.stateErr != nil {
		return fail(installRules, "%v", r.stateErr)
	}
	faults := routing.Faults(r.node.Rules)
	switch {
	case r.state.Desired == routing.Removed:
		return fail(installRules, "they were removed %s ago: pods reach the cloud's own metadata server",
			status.Age(r.now, r.state.Since))
	case r.install != nil && r.status != nil: // else the service's line says so
		return fail("correct that, then "+installRules, "%s", status.FailureText(r.install, r.now))
	case r.state.Desired == "" && len(faults) > 0 && !routing.NotPermitted(r.node.Rules):
		return fail(installRules, "they were never installed")
	case r.state.Closed && !r.plan.Closed:
		return fail(installRules, "the closed guard stands alone: the configuration was broken when it was put up")
	case r.plan.Closed && len(faults) == 0:
		return warn("correct the configuration", "the closed guard, which is all that can stand without one")
	case r.state.Desired == routing.Installed && r.state.Listen != r.plan.Listen.String():
		return fail(installRules, "they lead to %s, and listen is %s", r.state.Listen, r.plan.Listen)
	case r.state.Desired == routing.Installed && r.state.DNS != r.plan.DNS && routing.NoDNS(r.plan.Mode) == "":
		return fail(installRules, "dns is %s, and was not when they were put up", r.config.DNS)
	case r.state.Desired == routing.Installed && r.state.Listen6 != addressText(r.plan.Listen6):
		return fail(installRules, "listen6 is %q, and they were put up for %q", addressText(r.plan.Listen6), r.state.Listen6)
	case routing.NotPermitted(r.node.Rules) && r.state.Standing.Time.IsZero():
		return skip("to read them, %s", asRoot)
	case routing.NotPermitted(r.node.Rules) && !r.state.Standing.Good:
		return fail(installRules, "%s before: %s", status.Age(r.now, r.state.Standing.Time), some(r.state.Standing.Faults))
	case routing.NotPermitted(r.node.Rules):
		return good("mode %s to %s: all stood %s ago (to read them now, %s)", mode, r.state.Listen,
			status.Age(r.now, r.state.Standing.Time), asRoot)
	case len(faults) > 0:
		return fail(installRules, "missing or wrong: %s", some(faults))
	}
	if r.observes() {
		return good("mode observe: nothing is redirected, those who would be are counted: gke-metadata-emulator routing " +
			"observe")
	}
	if r.state.Reason != "" {
		mode += fmt.Sprintf(" (auto: %s)", r.state.Reason)
	}
	return good("mode %s to %s: all stand", mode, r.state.Listen)
}

// watcherFresh is how old what the watcher publishes every half minute may be.
const watcherFresh = 2 * time.Minute

func watcherCheck(r *nodeReport) Finding {
	const start = "systemctl enable --now gke-metadata-emulator-routing"
	read := r.state.Standing
	published := fmt.Sprintf("what stands was read %s ago: all of it", status.Age(r.now, read.Time))
	if !read.Good {
		published = fmt.Sprintf("what stands was read %s ago: %s", status.Age(r.now, read.Time), some(read.Faults))
	}
	if n := r.state.Repairs.Total(); n > 0 {
		published += fmt.Sprintf("; what others flushed was put back %d times since the node booted", n)
	}
	switch {
	case r.watcher != "" && r.watcher != "active":
		return warn(start, "it is %s, so what others flush stays flushed", r.watcher)
	case read.Time.IsZero():
		return warn(start, "it has not run since this node booted, so what others flush stays flushed")
	case r.state.Desired == routing.Installed && r.now.Sub(read.Time) > watcherFresh:
		return warn(start, "it does not run, or hangs, so what others flush stays flushed: %s", published)
	case !read.Good:
		return fail("journalctl -u gke-metadata-emulator-routing", "%s", published)
	}
	return good("%s", published)
}

// some is the first of many lines, and how many more there are.
func some(lines []string) string {
	switch len(lines) {
	case 0:
		return "nothing"
	case 1:
		return lines[0]
	}
	return fmt.Sprintf("%s, and %d more", lines[0], len(lines)-1)
}

func guardCheck(r *nodeReport) Finding {
	var guarded []string
	for _, g := range r.plan.Guard {
		guarded = append(guarded, g.String())
	}
	switch {
	case r.observes():
		return warn("choose another routing.mode for that", "mode observe guards nothing: pods reach the cloud's own "+
			"metadata server as they did before")
	case len(r.node.Guard) > 0:
		return fail(installRules, "a pod may reach the cloud's own credentials when the firewall is flushed: missing %s",
			some(r.node.Guard))
	case !r.plan.Closed && !slices.Contains(r.plan.Guard, routing.MetadataServer()):
		return warn("add it to routing.guard", "%s is not guarded, so pods may reach the cloud's own credentials",
			routing.MetadataServer())
	}
	if len(r.node.Bypass) > 0 {
		return fail("delete that rule and add it again with a preference of 1 or more, or that route to table main",
			"the guard does not hold for what comes before it: %s", some(r.node.Bypass))
	}
	return good("closed for %s, whatever becomes of the firewall", strings.Join(guarded, ", "))
}

func uplinksCheck(r *nodeReport) Finding {
	var names []string
	for _, u := range r.node.Uplinks {
		names = append(names, fmt.Sprintf("%s (%s)", u.Name, u.Why))
	}
	text := "not pods' are " + strings.Join(names, ", ")
	if len(r.plan.ExcludeInterfaces) > 0 {
		text += "; left alone: " + strings.Join(r.plan.ExcludeInterfaces, ", ")
	}
	switch {
	case len(names) == 0:
		return warn("name them in routing.uplinks", "none was found: a host behind an interface of this node may be "+
			"served like a pod")
	case len(r.node.Remarks) > 0:
		return warn("see routing.uplinks", "%s; %s", text, strings.Join(r.node.Remarks, "; "))
	}
	return good("%s", text)
}

// networkCheck compares the mode that is in force with what fits the node's network.
func networkCheck(r *nodeReport) Finding {
	facts := r.node.Facts
	if r.cloud.ours && r.status == nil {
		facts.Server = r.cloud.server // no emulator of ours runs: it is GKE's
	}
	fits, reason := routing.Detect(facts)
	mode := r.plan.Mode
	if r.state.Desired == routing.Installed && r.state.Mode != "" {
		mode = r.state.Mode
	}
	spoofed := r.status != nil && r.status.Attestation.Mode == "source-ip" && facts.Bridged
	remedy := "routing.mode: " + fits
	switch {
	case facts.Cilium && !facts.Denied && fits == routing.ModeLoopback:
		remedy = "bpf.hostLegacyRouting=true of Cilium has it use the host's stack; or routing.mode: loopback with " +
			"routing.link: gme0, and for the listener to follow: " + restartSocket
	case !routing.Supported(fits):
		remedy = "this version has no mode " + fits + ": the network has to be set up otherwise"
	case fits == routing.ModeLoopback:
		remedy += ", and for the listener to follow: " + restartSocket
	case r.config.Routing.Mode == routing.ModeAuto:
		remedy = installRules + ": it takes over what fits now"
	}
	switch {
	case facts.Cilium && fits == routing.ModeLoopback && mode == fits && r.plan.Link == "" && !r.plan.Closed:
		return fail("routing.link: gme0", "%s", reason)
	case r.plan.Closed || r.plan.Mode == routing.ModeNone && fits != routing.ModeNone:
		return good("mode %s would fit: %s", fits, reason)
	case fits == mode && spoofed:
		return warn("see SECURITY.md", "%s; on a bridge a pod can speak with another's address, and the address is all "+
			"the evidence", reason)
	case fits == mode:
		return good("%s", reason)
	case fits == routing.ModeNone:
		return fail(remedy+", or remove the package from this node", "%s", reason)
	case fits == routing.ModeIPTables, mode != routing.ModeIPTables && mode != routing.ModeNFTables:
		// what iptables sees the others see too, and loopback and ebpf need no netfilter
		return good("mode %s; %s would do: %s", mode, fits, reason)
	case facts.CalicoBPF:
		return warn("have Calico's bpfExcludeCIDRsFromNAT hold 169.254.169.254/32, or "+remedy, "%s", reason)
	case facts.Cilium && facts.CiliumHost == nil:
		return warn("see traffic below; "+remedy, "%s", reason)
	}
	return fail(remedy, "mode %s does not fit: %s", mode, reason)
}

// cloudCheck: a metadata server behind us, which only the guard and the rules keep pods from.
func cloudCheck(r *nodeReport) Finding {
	a := r.cloud
	switch {
	case a.err != nil:
		return good("no metadata server answers this node's own processes")
	case a.ours && r.status == nil:
		return warn("do not install it on nodes of GKE", "GKE's own metadata server answers, or another emulator")
	case a.ours:
		return good("the emulator answers this node's own processes too")
	case len(r.node.Guard) > 0:
		return fail(installRules, "%s answers, and the guard is not complete", answeredBy(a))
	case r.observes():
		return good("%s answers this node's own processes, and pods: see guard", answeredBy(a))
	}
	return good("%s answers this node's own processes; pods are kept from it", answeredBy(a))
}

// answeredBy names a metadata server by its header.
func answeredBy(a answered) string {
	for _, known := range []struct{ server, name string }{
		{"EC2ws", "AWS's"}, {"Metadata Server for VM", "Google Compute Engine's"}, {"Microsoft-IIS", "Azure's"},
		{"IMDS", "Azure's"},
	} {
		if strings.HasPrefix(a.server, known.server) {
			return known.name + " metadata server"
		}
	}
	if a.server == "" {
		return fmt.Sprintf("a metadata server without a name (status %d)", a.status)
	}
	return fmt.Sprintf("a metadata server that calls itself %q (status %d)", a.server, a.status)
}

func ipv6Check(r *nodeReport) Finding {
	open := ipv6Of(slices.DeleteFunc(routing.DefaultGuard(),
		func(g netip.AddrPort) bool { return slices.Contains(r.plan.Guard, g) || r.plan.Closed }))
	mode := r.plan.Mode
	switch {
	case !r.node.IPv6 && r.plan.Listen6.IsValid():
		return warn("remove listen6", "this node has none, so requests by IPv6 are not redirected to %s", r.plan.Listen6)
	case !r.node.IPv6:
		return good("this node has none")
	case r.observes():
		return skip("mode observe redirects and guards nothing")
	case open != "":
		return warn(fmt.Sprintf("add %s to routing.guard", open), "this node has IPv6, and the guard does not close %s, "+
			"where a cloud may give pods the node's credentials", open)
	}
	if to := r.plan.Listen6; to.IsValid() {
		closes := ipv6Of(r.plan.Guard)
		switch {
		case r.state.IPv6 != "":
			return warn("mend that and run "+installRules+", or remove listen6",
				"requests by IPv6 are not redirected to %s: %s", to, r.state.IPv6)
		case !r.node.Holder6.At.IsValid():
			return fail(restartSocket, "nobody listens on %s, where pods are sent by IPv6", to)
		case !r.node.Holder6.Own && r.node.Holder6.PID != "":
			return fail("choose another listen6, or stop it", "%s listens on %s", r.node.Holder6, r.node.Holder6.At)
		}
		return good("requests to [fd20:ce::254]:80 go to %s, which %s holds; the guard closes %s", to, r.node.Holder6, closes)
	}
	switch {
	case r.config.Listen6.IsValid() && !r.plan.Closed: // auto's choice
		return warn("remove listen6, or set routing.mode to iptables or nftables",
			"mode %s serves IPv4 alone, so listen6 is not in force; the guard closes %s", mode, ipv6Of(r.plan.Guard))
	case mode != routing.ModeIPTables && mode != routing.ModeNFTables && !r.plan.Closed:
		return good("mode %s serves IPv4 alone; the guard closes %s", mode, ipv6Of(r.plan.Guard))
	}
	return good("requests are IPv4; the guard closes %s", ipv6Of(r.plan.Guard))
}

// addressText is an address as the state has it.
func addressText(a netip.AddrPort) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

// ipv6Of are those of IPv6, as text.
func ipv6Of(all []netip.AddrPort) string {
	var texts []string
	for _, a := range all {
		if a.Addr().Is6() {
			texts = append(texts, a.String())
		}
	}
	return strings.Join(texts, ", ")
}

// cgroupsCheck: pods on the host network are told apart by the v2 hierarchy only.
func cgroupsCheck(r *nodeReport) Finding {
	wanted := r.config.Routing.InterceptHostPods == "on"
	switch {
	case r.node.CgroupV2 == "" && wanted:
		return fail("boot with systemd.unified_cgroup_hierarchy=1, or routing.interceptHostPods: off",
			"no cgroup v2 hierarchy is mounted, so pods on the host network are not redirected")
	case r.node.CgroupV2 == "":
		return warn("boot with systemd.unified_cgroup_hierarchy=1",
			"no cgroup v2 hierarchy is mounted: pods on the host network cannot be told from the node's own processes")
	case wanted && len(r.node.HostSlices) == 0:
		return fail("routing.interceptHostPods: off", "none of the host's own slices is there, so pods on the host "+
			"network are not redirected")
	}
	return good("version 2 at %s", r.node.CgroupV2)
}

// passthroughCheck: pods on the host network that need the cloud's own server and are redirected to
// us (U-02).
func passthroughCheck(r *nodeReport) Finding {
	named := len(r.config.Passthrough)
	switch {
	case r.status == nil || r.status.Attestation.Mode == "":
		return skip("the service would tell who asks for the cloud's own metadata, and it does not serve")
	case len(r.status.SkippedHostPods) > 0:
		var who []string
		for _, u := range r.status.SkippedHostPods {
			who = append(who, fmt.Sprintf("%s (%d)", u.ServiceAccount, u.Requests))
		}
		text := "pods on the host network asked for the cloud's own metadata, and are not let through: " +
			strings.Join(who, ", ")
		if r.cloud.err != nil {
			return good("%s; there is no server to let them through to", text)
		}
		return warn(status.SkippedRemedy, "%s", text)
	case named == 0:
		return good("no pod on the host network was kept from what the cloud's own metadata server has")
	case r.config.Routing.InterceptHostPods != "on":
		return good("pods on the host network are redirected only where there is no server to let them through to")
	case r.status.Attestation.Kernel == nil || r.status.Attestation.Kernel.Evidence != attest.ByCgroup:
		return fail("boot with cgroup v2 and Linux 5.9 or later, or routing.interceptHostPods: off",
			"the kernel does not tell who on the host network asks, so nobody is let through to the cloud's own metadata server")
	}
	return good("ServiceAccounts that are let through to the cloud's own metadata server from the host network: %d", named)
}

// dnsCheck: Go's clients need the name although they ask by address (C-GO-1).
func dnsCheck(r *nodeReport) Finding {
	const name = "metadata.google.internal"
	remedy := "give the name that address in the cluster's DNS (docs/clients.md), for Go's, Python's and Java's clients"
	if routing.NoDNS(r.plan.Mode) == "" && !r.plan.DNS {
		remedy = "set dns to answer, or " + remedy
	}
	switch {
	case !r.plan.DNS || r.plan.Closed:
	case routing.NoDNS(r.plan.Mode) != "":
		return warn(routing.DNSRemedy, "mode %s does not see the name in a DNS query, so this node does not answer for %s",
			r.plan.Mode, name)
	case r.state.DNSRefused != "":
		return warn(routing.DNSRemedy, "this node does not answer for %s: %s", name, r.state.DNSRefused)
	case r.node.Local && !r.node.Queries:
		return fail("systemctl daemon-reload && systemctl restart gke-metadata-emulator.socket",
			"DNS queries for %s are redirected to UDP %s, and nobody listens there", name, r.plan.Listen)
	default:
		return good("this node answers its pods for %s, whichever name server they ask over UDP", name)
	}
	switch {
	case slices.Contains(r.names, routing.MetadataServer().Addr()):
		return good("metadata.google.internal is %s for this node; pods ask the cluster's DNS",
			routing.MetadataServer().Addr())
	case len(r.names) > 0:
		return warn(remedy, "metadata.google.internal is %s for this node", r.names[0])
	}
	reason := "not known to"
	var dns *net.DNSError
	if errors.As(r.namesErr, &dns) && !dns.IsNotFound {
		reason = "not to be had of"
	}
	return warn(remedy, "metadata.google.internal is %s this node's DNS; pods ask the cluster's, and need it", reason)
}
