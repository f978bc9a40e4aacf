package doctor

import (
	"errors"
	"fmt"
	"io/fs"
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
	seeBelow       = "see the failed checks below"
	installRules   = "gke-metadata-emulator routing install"
	restartService = "systemctl restart gke-metadata-emulator"
	restartSocket  = "systemctl daemon-reload && systemctl restart gke-metadata-emulator.socket"
	restartAll     = "systemctl daemon-reload && " + restartService // the socket with it, where that failed
)

func configurationCheck(r *nodeReport) Finding {
	serving := r.status != nil && r.status.State == "serving"
	const correct = "correct the file, and check it: gke-metadata-emulator config check"
	switch {
	case r.broken != nil && serving:
		return fail(correct, "%s", config.Outdated(r.broken))
	case r.broken != nil:
		return fail(correct, "%s", config.NotConfigured(r.broken))
	case serving && r.status.ConfigFile != "": // its user cannot read what root can
		return fail(correct, "for the service's user, %s", r.status.ConfigFile)
	case len(r.config.Warnings) > 0:
		return warn("correct the file unless this is intended", "%s", strings.Join(r.config.Warnings, "; "))
	}
	return good("%s loads%s", r.file, textIf(r.flags != "", ", with the flags of "+r.flags))
}

func serviceCheck(r *nodeReport) Finding {
	switch {
	case errors.Is(r.statusErr, status.ErrNotRunning) && r.install != nil:
		return fail("correct the cause: systemd tries again within 15s: journalctl -u gke-metadata-emulator",
			"not running: %s%s",
			status.FailureText(r.install, r.now), textIf(r.unit.String() != "", "; "+r.unit.String()))
	case errors.Is(r.statusErr, status.ErrNotRunning):
		return fail(restartService+textIf(r.unit.Result != "" && r.unit.Result != "success", "; journalctl -u "+
			"gke-metadata-emulator"),
			"not running%s", textIf(r.unit.String() != "", ": "+r.unit.String()))
	case errors.Is(r.statusErr, fs.ErrPermission) && r.notReady != "": // in the words that root gets
		return fail(seeBelow, "%s", r.notReady)
	case errors.Is(r.statusErr, fs.ErrPermission):
		return skip("only root and the service's group may read its status: %s", asRoot)
	case r.statusErr != nil:
		return fail(restartService, "%v", r.statusErr)
	case r.status.State != "serving" && r.status.Reason != "":
		return fail("correct "+r.file+": the service reads it again by itself", "%s", r.status.Reason)
	case r.status.State != "serving":
		return warn("run doctor again after the restart", "%s", r.status.State)
	case r.status.Reason != "":
		return fail(seeBelow, "serving, not ready: %s", r.status.Reason)
	case r.status.Version != r.version:
		return warn(restartService, "version %s is running, version %s is installed", r.status.Version, r.version)
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
	case r.plan.Closed && (by.Own || by.PID == ""):
		return skip("no valid configuration, so no listen address")
	case !r.node.Local && !r.plan.Closed:
		return good("%s is not an address of this node: requests are forwarded there", want)
	case !by.At.IsValid() && adopted != "":
		return fail(restartSocket, "no process listens on %s, where pods are redirected: the service listens on %s", want,
			adopted)
	case !by.At.IsValid():
		return fail("systemctl restart gke-metadata-emulator.socket", "no process listens on %s, where pods are redirected",
			want)
	case adopted == by.At.String() && len(r.direct.dropped) > 0:
		return warn(fmt.Sprintf("accept packets from the node to %s, and their answers, in that chain: hostIdentities and "+
			"pods on the host network need it", want),
			"%s, adopted by the service from %s; packets from the node itself are dropped by %s", by.At, by,
			strings.Join(r.direct.dropped, "; "))
	case adopted == by.At.String():
		return good("%s, adopted by the service from %s", by.At, by)
	case by.PID == "" && !r.root:
		return skip("a process listens on %s: to see which, %s", by.At, asRoot)
	case by.Own && adopted != "":
		return fail(restartSocket, "%s holds %s, but the service listens on %s", by, by.At, adopted)
	case by.Own:
		return good("%s holds %s", by, by.At)
	case by.At.Addr().IsUnspecified() && want.Port() == 988:
		return fail("stop it, configure one address for it, or choose another listen address; then "+restartAll,
			"%s listens on %s: Lustre uses port 988 of every address, too", by, by.At)
	case want == routing.MetadataServer(): // mode loopback, which listens nowhere else
		return fail("stop it, or configure one address for it", "%s listens on %s, which mode loopback needs for %s",
			by, by.At, want)
	}
	return fail("stop it, or choose another listen address; then "+restartAll+"; it may be GKE's own metadata server",
		"%s listens on %s", by, by.At)
}

// portsCheck: a port that the kernel gives to connections may be taken when the service starts
// . Who has taken that of listen, listenerCheck says.
func portsCheck(r *nodeReport) Finding {
	if by := r.health; by.PID != "" && !by.Own {
		return fail("stop it or choose another healthListen, then "+restartService,
			"healthListen %s is held by %s at %s: /healthz, /readyz and /metrics are not served", r.config.HealthListen, by,
			by.At)
	}
	for key, a := range map[string]netip.AddrPort{"listen": r.config.Listen, "healthListen": r.config.HealthListen} {
		if a.Port() != 0 && a.Port() >= r.ports[0] && a.Port() <= r.ports[1] {
			return warn(fmt.Sprintf("choose another port, or reserve it: sysctl net.ipv4.ip_local_reserved_ports=%d", a.Port()),
				"%s: port %d is in the ephemeral range %d-%d: an outgoing connection may use it when the service starts", key,
				a.Port(), r.ports[0], r.ports[1])
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
		return fail(installRules, "removed %s ago: pods reach the cloud's own metadata server",
			status.Age(r.now, r.state.Since))
	case r.install != nil && r.status != nil: // else the service's line says so
		return fail("correct the cause, then: "+installRules, "%s", status.FailureText(r.install, r.now))
	case r.state.Desired == "" && len(faults) > 0 && !routing.NotPermitted(r.node.Rules):
		return fail(installRules, "never installed")
	case r.state.Closed && !r.plan.Closed:
		return fail(installRules, "installed without a valid configuration, and there is one now")
	case r.plan.Closed && len(faults) == 0:
		pods := "pods are sent to the service, which answers 503 with the reason"
		if r.state.Desired == routing.Installed && !r.state.Closed {
			pods = "the rules of the last valid one are installed"
		} else if r.state.Mode == routing.ModeObserve {
			pods = "mode observe: pods reach the cloud's own metadata server as before"
		} else if r.state.Listen == "" {
			pods = "pods are only kept from the cloud's metadata server"
		}
		return warn("correct the configuration", "no valid configuration: %s", pods)
	case r.state.Desired == routing.Installed && r.state.Listen != r.plan.Listen.String():
		return fail(installRules, "installed for listen %s, but listen is %s", r.state.Listen, r.plan.Listen)
	case r.state.Desired == routing.Installed && r.state.DNS != r.plan.DNS && routing.NoDNS(r.plan.Mode) == "":
		return fail(installRules, "installed for another value of dns, but dns is %s", r.config.DNS)
	case r.state.Desired == routing.Installed && r.state.Listen6 != addressText(r.plan.Listen6):
		return fail(installRules, "installed for listen6 %q, but listen6 is %q", r.state.Listen6, addressText(r.plan.Listen6))
	case routing.NotPermitted(r.node.Rules) && r.state.Standing.Time.IsZero():
		return skip("to check them, %s", asRoot)
	case routing.NotPermitted(r.node.Rules) && !r.state.Standing.Good:
		return fail(installRules, "checked %s ago: %s", status.Age(r.now, r.state.Standing.Time),
			some(r.state.Standing.Faults))
	case routing.NotPermitted(r.node.Rules):
		return good("mode %s to %s: complete %s ago (to check them now, %s)", mode, r.state.Listen,
			status.Age(r.now, r.state.Standing.Time), asRoot)
	case len(faults) > 0:
		return fail(installRules, "missing or wrong: %s", some(faults))
	}
	if r.observes() {
		return good("mode observe: connections are counted and not redirected: gke-metadata-emulator routing observe")
	}
	if r.state.Reason != "" {
		mode += fmt.Sprintf(" (auto: %s)", r.state.Reason)
	}
	return good("mode %s to %s: complete", mode, r.state.Listen)
}

// watcherFresh is how old what the watcher publishes every half minute may be.
const watcherFresh = 2 * time.Minute

func watcherCheck(r *nodeReport) Finding {
	const start = "systemctl enable --now gke-metadata-emulator-routing"
	read := r.state.Standing
	published := fmt.Sprintf("the rules were checked %s ago: complete", status.Age(r.now, read.Time))
	if !read.Good {
		published = fmt.Sprintf("the rules were checked %s ago: %s", status.Age(r.now, read.Time), some(read.Faults))
	}
	if n := r.state.Repairs.Total(); n > 0 {
		published += fmt.Sprintf("; repaired %d times since the node booted", n)
	}
	const unrepaired = "rules that other programs remove are not repaired"
	switch {
	case r.watcher != "" && r.watcher != "active":
		return warn(start, "gke-metadata-emulator-routing.service is %s: %s", r.watcher, unrepaired)
	case read.Time.IsZero():
		return warn(start, "gke-metadata-emulator-routing.service has not run since the node booted: %s", unrepaired)
	case r.state.Desired == routing.Installed && r.now.Sub(read.Time) > watcherFresh:
		return warn(start, "gke-metadata-emulator-routing.service does not run, or hangs: %s: %s", unrepaired, published)
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
		return warn("choose another routing.mode to serve pods", "mode observe guards nothing: pods reach the cloud's own "+
			"metadata server as before")
	case len(r.node.Guard) > 0:
		return fail(installRules, "incomplete: pods may get the cloud's own credentials when the firewall is flushed: "+
			"missing: %s",
			some(r.node.Guard))
	case !r.plan.Closed && !slices.Contains(r.plan.Guard, routing.MetadataServer()):
		return warn("add it to routing.guard", "%s is not guarded: pods may get the cloud's own credentials",
			routing.MetadataServer())
	}
	if len(r.node.Bypass) > 0 {
		return fail("delete the rule and add it again with a preference of 1 or more; move the route to table main",
			"bypassed by a policy rule or route that comes first: %s", some(r.node.Bypass))
	}
	return good("closed for %s, also while the firewall is flushed", strings.Join(guarded, ", "))
}

func uplinksCheck(r *nodeReport) Finding {
	var names []string
	for _, u := range r.node.Uplinks {
		names = append(names, fmt.Sprintf("%s (%s)", u.Name, u.Why))
	}
	text := strings.Join(names, ", ") + "; packets from these interfaces are never redirected"
	if len(r.plan.ExcludeInterfaces) > 0 {
		text += "; routing.excludeInterfaces: " + strings.Join(r.plan.ExcludeInterfaces, ", ")
	}
	switch {
	case len(names) == 0:
		return warn("set routing.uplinks", "no uplink found: a host behind an interface of this node may be served like a "+
			"pod")
	case len(r.node.Remarks) > 0:
		return warn("set routing.uplinks", "%s; %s", text, strings.Join(r.node.Remarks, "; "))
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
		remedy = "set bpf.hostLegacyRouting=true in Cilium, or routing.mode: loopback with routing.link: gme0, then: " +
			restartSocket
	case !routing.Supported(fits):
		remedy = "this version has no mode " + fits + ": change the network"
	case fits == routing.ModeLoopback:
		remedy += ", then: " + restartSocket
	case r.config.Routing.Mode == routing.ModeAuto:
		remedy = installRules + " (mode auto chooses again)"
	}
	switch {
	case facts.Cilium && fits == routing.ModeLoopback && mode == fits && r.plan.Link == "" && !r.plan.Closed:
		return fail("routing.link: gme0", "%s", reason)
	case r.plan.Closed || r.plan.Mode == routing.ModeNone && fits != routing.ModeNone:
		return good("mode %s fits: %s", fits, reason)
	case fits == mode && spoofed:
		return warn("set attestation.mode: kernel", "%s; on a bridge a pod can use another pod's address, and "+
			"attestation.mode source-ip has no other evidence", reason)
	case fits == mode:
		return good("%s", reason)
	case fits == routing.ModeNone:
		return fail(remedy+", or remove the package from this node", "%s", reason)
	case fits == routing.ModeIPTables, !routing.DNATs(mode): // what iptables sees the others see too
		return good("mode %s; mode %s fits, too: %s", mode, fits, reason)
	case facts.CalicoBPF:
		return warn("add 169.254.169.254/32 to Calico's bpfExcludeCIDRsFromNAT, or set "+remedy, "%s", reason)
	case facts.Cilium && facts.CiliumHost == nil:
		return warn("see check traffic below; if nothing arrives: "+remedy, "%s", reason)
	}
	return fail(remedy, "mode %s does not fit: %s", mode, reason)
}

// cloudCheck: a metadata server behind us, which only the guard and the rules keep pods from.
func cloudCheck(r *nodeReport) Finding {
	a := r.cloud
	switch {
	case a.err != nil:
		return good("no metadata server answers the node's own processes")
	case a.ours && r.status == nil:
		return warn("on a node of GKE: remove this package", "GKE's own metadata server answers, or another emulator")
	case a.ours:
		return good("this service answers the node's own processes, too")
	case len(r.node.Guard) > 0:
		return fail(installRules, "%s answers the node's own processes, and the guard is incomplete", answeredBy(a))
	case r.observes():
		return good("%s answers the node's own processes and pods: see check guard", answeredBy(a))
	}
	return good("%s answers the node's own processes; pods do not reach it", answeredBy(a))
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
		return fmt.Sprintf("a metadata server without a Server header (status %d)", a.status)
	}
	return fmt.Sprintf("a metadata server with the Server header %q (status %d)", a.server, a.status)
}

func ipv6Check(r *nodeReport) Finding {
	open := ipv6Of(slices.DeleteFunc(routing.DefaultGuard(),
		func(g netip.AddrPort) bool { return slices.Contains(r.plan.Guard, g) || r.plan.Closed }))
	mode := r.plan.Mode
	switch {
	case !r.node.IPv6 && r.plan.Listen6.IsValid():
		return warn("remove listen6", "this node has no IPv6: nothing is redirected to listen6 %s", r.plan.Listen6)
	case !r.node.IPv6:
		return good("this node has no IPv6")
	case r.observes():
		return skip("mode observe redirects and guards nothing")
	case open != "":
		return warn(fmt.Sprintf("add %s to routing.guard", open), "this node has IPv6, and these addresses are not guarded: "+
			"%s: a cloud may give pods the node's credentials there", open)
	}
	if to := r.plan.Listen6; to.IsValid() {
		closes := ipv6Of(r.plan.Guard)
		switch {
		case r.state.IPv6 != "":
			return warn("correct the cause, then: "+installRules+"; or remove listen6",
				"requests by IPv6 are not redirected to %s: %s", to, r.state.IPv6)
		case !r.node.Holder6.At.IsValid():
			return fail(restartSocket, "no process listens on %s, where pods are redirected by IPv6", to)
		case !r.node.Holder6.Own && r.node.Holder6.PID != "":
			return fail("stop it, or choose another listen6", "%s listens on %s", r.node.Holder6, r.node.Holder6.At)
		}
		return good("requests to [fd20:ce::254]:80 are redirected to %s, where %s listens; guarded: %s", to, r.node.Holder6,
			closes)
	}
	switch {
	case r.config.Listen6.IsValid() && !r.plan.Closed: // auto's choice
		return warn("remove listen6, or set routing.mode to iptables or nftables",
			"mode %s serves IPv4 only: listen6 is not used; guarded: %s", mode, ipv6Of(r.plan.Guard))
	case !routing.DNATs(mode) && !r.plan.Closed:
		return good("mode %s serves IPv4 only; guarded: %s", mode, ipv6Of(r.plan.Guard))
	}
	return good("listen6 is not set; guarded: %s", ipv6Of(r.plan.Guard))
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
		return fail("boot with systemd.unified_cgroup_hierarchy=1, or set routing.interceptHostPods: off",
			"no cgroup v2 hierarchy is mounted: pods on the host network are not redirected")
	case r.node.CgroupV2 == "":
		return warn("boot with systemd.unified_cgroup_hierarchy=1",
			"no cgroup v2 hierarchy is mounted: pods on the host network cannot be distinguished from the node's processes")
	case wanted && len(r.node.HostSlices) == 0:
		return fail("set routing.interceptHostPods: off", "none of the node's own slices exists (system.slice, …): pods "+
			"on the host "+
			"network are not redirected")
	}
	return good("cgroup v2 at %s", r.node.CgroupV2)
}

// passthroughCheck: pods on the host network that need the cloud's own server and are redirected to
// us (U-02).
func passthroughCheck(r *nodeReport) Finding {
	named := len(r.config.Passthrough)
	switch {
	case r.status == nil || r.status.Attestation.Mode == "":
		return skip(notServing)
	case len(r.status.SkippedHostPods) > 0:
		var who []string
		for _, u := range r.status.SkippedHostPods {
			who = append(who, fmt.Sprintf("%s (%d)", u.ServiceAccount, u.Requests))
		}
		text := "pods on the host network were refused the cloud's own metadata: " + strings.Join(who, ", ")
		if r.cloud.err != nil {
			return good("%s; this node has no cloud's metadata server", text)
		}
		return warn(status.SkippedRemedy, "%s", text)
	case named == 0:
		return good("no pod on the host network was refused the cloud's own metadata")
	case r.config.Routing.InterceptHostPods != "on":
		return good("routing.interceptHostPods is not on: pods on the host network reach the cloud's metadata server " +
			"themselves, where there is one")
	case r.status.Attestation.Kernel == nil || r.status.Attestation.Kernel.Evidence != attest.ByCgroup:
		return fail("boot with cgroup v2 and Linux 5.9 or later, or set routing.interceptHostPods: off",
			"pods on the host network cannot be identified: passthrough lets none of them through")
	}
	return good("ServiceAccounts that may ask the cloud's own metadata server from the host network: %d", named)
}
