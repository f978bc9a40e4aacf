package config

import (
	"crypto/x509"
	"maps"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
)

// resolve checks the settings together and derives values: missing settings, contradictions,
// defaults.
func (l *loader) resolve() {
	l.absolute("credentialConfigFile", &l.CredentialConfigFile)
	l.absolute("kubeconfig", &l.Kubeconfig)
	l.absolute("google.caFile", &l.Google.CAFile)

	l.resolveCredential()
	l.resolveIdentity()
	l.resolveURLs()
	l.checkCA()
	l.checkListen()
	l.checkListen6()
	l.checkCluster()
	l.checkExtraMetadata()
	l.checkHostIdentities()
	l.checkPassthrough()
	l.checkProxies()
	l.warn()
}

func (l *loader) resolveIdentity() {
	l.require("projectID", l.Project.ID, "write the ID of the project whose resources the pods use")
	if l.broken["workloadIdentityProvider"] || l.broken["credentialConfigFile"] {
		return
	}
	if !l.require("workloadIdentityProvider", l.provider, "write "+providerForm+", or set credentialConfigFile") {
		return
	}
	var number string
	l.WorkloadIdentity, number = identity(l.provider)
	if l.Project.Number == "" && number != "" {
		l.Project.Number = number
	}
	l.require("numericProjectID", l.Project.Number, "write the number of projectID: an identitynamespace does not hold it")
	if l.TokenAudience == "" {
		l.TokenAudience = l.WorkloadIdentity.Audience
		if l.WorkloadIdentity.PoolName == "" { // tokens of fleets and GKE have the pool's name as audience
			l.TokenAudience = l.WorkloadIdentity.Pool
		}
	}
	if l.EmailForUnlinked == "" {
		l.EmailForUnlinked = l.WorkloadIdentity.Pool
	}
}

// require reports whether a setting has a value. If it has neither a value nor a fault, require
// records one.
func (l *loader) require(key, text, remedy string) bool {
	if text != "" || l.broken[key] {
		return text != ""
	}
	l.incomplete = true
	if !l.unread { // otherwise the file's own fault is enough
		l.complain(key, 0, bad(remedy, "is not set"))
	}
	return false
}

// resolveURLs sets the URLs of Google's services in this universe (G-09, other universes).
func (r *raw) resolveURLs() {
	if r.Google.STSURL == "" {
		r.Google.STSURL = "https://sts." + r.Google.UniverseDomain + "/v1/token"
	}
	if r.Google.IAMCredentialsURL == "" {
		r.Google.IAMCredentialsURL = "https://iamcredentials." + r.Google.UniverseDomain
	}
}

func (l *loader) checkCA() {
	const key = "google.caFile"
	if l.Google.CAFile == "" || l.broken[key] {
		return
	}
	pem, err := l.read(l.Google.CAFile)
	if err != nil {
		l.complain(key, 0, bad("name a file that this user can read", "%s: %s", quote(l.Google.CAFile), reason(err)))
	} else if !x509.NewCertPool().AppendCertsFromPEM(pem) {
		l.complain(key, 0, bad("name a file of certificates in PEM", "%s holds no certificate", quote(l.Google.CAFile)))
	}
}

// metadataServer is the address that pods use.
var metadataServer = netip.MustParseAddrPort("169.254.169.254:80")

func (l *loader) checkListen() {
	mode := l.Routing.modeRule()
	if at := l.Routing.Link; at != "" && !mode.localServer && !l.broken["routing.mode"] {
		l.complain("routing.link", 0, bad("remove it", "routing.mode %s uses no link", l.Routing.Mode))
	} else if len(at) > 11 {
		l.complain("routing.link", 0, bad("write a name of 11 letters at most, such as gme0",
			"%s is too long for the label of its address", quote(at)))
	}
	if mode.localServer && l.Listen == Default().Listen {
		l.Listen = metadataServer
	}
	for _, s := range []struct {
		key string
		at  netip.AddrPort
	}{{"listen", l.Listen}, {"healthListen", l.HealthListen}} {
		if s.at.Port() == 0 && !s.at.Addr().IsLoopback() && !l.broken[s.key] {
			l.complain(s.key, 0, bad("write a port from 1 to 65535; 0 stands for any free one, on loopback only", "has no port"))
		}
	}
	if l.broken["listen"] || l.broken["healthListen"] || l.broken["routing.mode"] {
		return
	}
	a := l.Listen.Addr()
	if l.Listen.Port() != 0 && l.Listen.Port() == l.HealthListen.Port() &&
		(a == l.HealthListen.Addr() || a.IsUnspecified() || l.HealthListen.Addr().IsUnspecified()) {
		l.complain("healthListen", 0, bad("write another port", "is the same address as listen"))
	}
	if l.Routing.InterceptHostPods == "on" && !mode.redirects && !mode.observes {
		l.complain("routing.interceptHostPods", 0,
			bad("write off", "routing.mode %s cannot tell pods on the host network from the node itself", mode.mode))
	}
	switch {
	case mode.anyListener:
		return
	case mode.localServer:
		if l.Listen != metadataServer {
			l.complain("listen", 0, bad("remove it, or use another routing.mode",
				"routing.mode %s redirects nothing, so it listens where pods ask, at %s", mode.mode, metadataServer))
		}
		return
	}
	if mode.blindToLinks && len(l.Routing.ExcludeInterfaces) > 0 && !l.broken["routing.excludeInterfaces"] {
		l.complain("routing.excludeInterfaces", 0, bad("leave it empty, or set routing.mode to iptables",
			"routing.mode %s does not know the interface of a connection", mode.mode))
	}
	const remedy = "write an address that nobody else uses, such as 169.254.169.252:988, or set routing.mode to none"
	switch { // the target of a DNAT rule
	case !a.Is4():
		l.complain("listen", 0, bad(remedy, "routing.mode %s redirects IPv4 packets, so listen must be an IPv4 address",
			mode.mode))
	case a.IsUnspecified():
		l.complain("listen", 0, bad(remedy, "routing.mode %s redirects to one address, and %s means all addresses",
			mode.mode, a))
	case a.IsLoopback(): // R-04, the DNAT target
		l.complain("listen", 0, bad(remedy, "pods reach 127.0.0.0/8 only with route_localnet, which opens it to neighbour "+
			"hosts as well"))
	case slices.ContainsFunc(l.Routing.Guard, func(g netip.AddrPort) bool { return g.Addr() == a }):
		l.complain("listen", 0, bad(remedy, "%s is in routing.guard: it is the cloud's own metadata server", a))
	}
}

// metadataServer6 is the address that pods use by IPv6 (H-24, IPv6).
var metadataServer6 = netip.MustParseAddrPort("[fd20:ce::254]:80")

func (l *loader) checkListen6() {
	const remedy = "write an address that nobody else uses, such as [fd20:ce::252]:988"
	at, a := l.Listen6, l.Listen6.Addr()
	if !at.IsValid() || l.broken["listen6"] || l.broken["routing.mode"] {
		return
	}
	switch mode := l.Routing.modeRule(); {
	case !mode.dnat:
		l.complain("listen6", 0, bad("remove it, or set routing.mode to iptables or nftables",
			"routing.mode %s serves IPv4 alone", mode.mode))
	case !a.Is6():
		l.complain("listen6", 0, bad(remedy, "%s is not IPv6", a))
	case at.Port() == 0:
		l.complain("listen6", 0, bad("write a port from 1 to 65535", "has no port"))
	case !a.IsGlobalUnicast():
		l.complain("listen6", 0, bad(remedy, "%s is not a global unicast address", a))
	case a == metadataServer6.Addr() || slices.ContainsFunc(l.Routing.Guard,
		func(g netip.AddrPort) bool { return g.Addr() == a }):
		l.complain("listen6", 0, bad(remedy, "%s is the address of a metadata server", a))
	case at == l.HealthListen:
		l.complain("healthListen", 0, bad("write another port", "is the same address as listen6"))
	}
}

// checkCluster requires all of the cluster's values or none (E-16, cluster attributes): with a part
// of them programs take the cluster for GKE and then fail.
func (l *loader) checkCluster() {
	fields := []struct{ key, text string }{
		{"cluster.name", l.Cluster.Name}, {"cluster.location", l.Cluster.Location}, {"cluster.uid", l.Cluster.UID},
	}
	var set, missing []string
	for _, f := range fields {
		if l.broken[f.key] {
			return
		}
		if f.text != "" {
			set = append(set, f.key)
		} else {
			missing = append(missing, f.key)
		}
	}
	if len(set) > 0 && len(missing) > 0 {
		l.complain(set[0], 0, bad("set all of name, location and uid, or none; uid: kubectl get namespace kube-system -o "+
			"jsonpath='{.metadata.uid}'",
			"is set without %s", strings.Join(missing, " and ")))
	}
}

func (l *loader) checkExtraMetadata() {
	const key = "extraMetadata"
	line := map[string]int{}
	for _, it := range l.given[key].items {
		if p, t := metadataPath(it.name); t == nil {
			line[p] = it.line
		}
	}
	for _, p := range slices.Sorted(maps.Keys(l.ExtraMetadata)) {
		for dir := path.Dir(p); dir != "."; dir = path.Dir(dir) {
			_, value := l.ExtraMetadata[dir]
			if _, own := ownPaths[dir]; value || own {
				l.complain(key, line[p], bad("remove one of the two", "%s makes a directory of %s, which is a value", quote(p),
					quote(dir)))
			}
		}
	}
}

// checkPassthrough refuses settings that cannot work: only the kernel identifies pods on the host
// network, and passthrough needs a reachable server of the cloud.
func (l *loader) checkPassthrough() {
	const key = "passthrough"
	switch {
	case len(l.Passthrough) == 0:
	case l.Attestation.Mode == "source-ip" && !l.broken["attestation.mode"]:
		l.complain(key, 0, bad("remove it, or set attestation.mode to kernel",
			"attestation.mode source-ip cannot identify pods on the host network"))
	case l.Routing.Link != "" && !l.broken["routing.link"]:
		l.complain(key, 0, bad("remove it, or use another routing.mode",
			"routing.link makes %s an address of this node, so the cloud's server cannot be reached", metadataServer.Addr()))
	}
}

// checkProxies refuses a setting that cannot work: an address does not identify a proxy.
func (l *loader) checkProxies() {
	if len(l.Attestation.Proxies) > 0 && l.Attestation.Mode == "source-ip" && !l.broken["attestation.mode"] {
		l.complain("attestation.proxies", 0, bad("remove it, or set attestation.mode to kernel",
			"attestation.mode source-ip cannot identify a proxy"))
	}
}

// warn records settings that are valid but rarely intended.
func (l *loader) warn() {
	say := l.warning
	if l.Attestation.Mode == "source-ip" {
		say("attestation.mode is source-ip: a dead pod and the next pod with its address cannot be distinguished")
		if l.Routing.InterceptHostPods == "on" {
			say("routing.interceptHostPods is on: pods on the host network are redirected and then refused with 403, since " +
				"their address does not identify them")
		}
	}
	switch r := l.Routing; {
	case len(l.Passthrough) == 0:
	case !r.modeRule().redirects:
		say("passthrough: routing.mode %s redirects no pod on the host network, so they already reach the cloud's metadata "+
			"server directly", r.Mode)
	case r.InterceptHostPods == "off":
		say("passthrough: routing.interceptHostPods is off, so pods on the host network already reach the cloud's metadata " +
			"server directly")
	case r.InterceptHostPods == "auto":
		say("passthrough: routing.interceptHostPods is auto, which redirects pods on the host network only where no " +
			"metadata server of a cloud answers: set it to on")
	}
	if mode := l.Routing.modeRule(); l.DNS == "answer" && !mode.readsQueries {
		say("dns: routing.mode %s does not see the name in a DNS query, so metadata.google.internal is not answered by this "+
			"node: add a record to the cluster's DNS, hostAliases or GCE_METADATA_HOST to the pods", mode.mode)
	}
	if len(l.HostIdentities) > 0 && l.Kubeconfig == "" { // N-07, unbound requests
		say("hostIdentities: without a kubeconfig kubelet's own credential is used, and that gets tokens for pods only; " +
			"set kubeconfig to one of another identity")
	}
	low, high := l.ephemeral()
	if p := l.Listen.Port(); p >= low && p <= high { // R-19, ephemeral ports
		say("listen: port %d lies in the ephemeral range %d-%d: another program's connection may hold it when the service "+
			"starts", p, low, high)
	}
	if p := l.Listen6.Port(); l.Listen6.IsValid() && p >= low && p <= high {
		say("listen6: port %d lies in the ephemeral range %d-%d: another program's connection may hold it when the service "+
			"starts", p, low, high)
	}
	if p := l.HealthListen.Port(); p >= low && p <= high {
		say("healthListen: port %d lies in the ephemeral range %d-%d: another program's connection may hold it when the "+
			"service starts", p, low, high)
	}
	if l.Listen.Addr().IsUnspecified() && l.Listen.Port() == 988 {
		say("listen: port 988 on every address is what Lustre's client listens on as well: name one address")
	}
	if !l.HealthListen.Addr().IsLoopback() && len(l.HealthAllow) == 0 {
		say("healthListen: %s is not loopback: everybody who can reach it can read the metrics: name the networks of "+
			"whoever may in healthAllow", l.HealthListen)
	}
	if !slices.Contains(l.Routing.Guard, metadataServer) {
		say("routing.guard: without %s in it pods may reach the cloud's own credentials", metadataServer)
	}
	if l.Listen6.IsValid() && !slices.Contains(l.Routing.Guard, metadataServer6) {
		say("routing.guard: without %s in it pods may reach the cloud's own credentials by IPv6", metadataServer6)
	}
	if l.ImpersonateUnlinked != "" {
		say("impersonateUnlinked: every pod of this node that is not linked becomes %s", l.ImpersonateUnlinked)
	}
	if !l.HostCheck {
		say("hostCheck is off: a web page that rebinds its DNS name to 169.254.169.254 can request tokens")
	}
}

// ephemeral returns the kernel's range of ephemeral ports.
func (l *loader) ephemeral() (low, high uint16) {
	low, high = 32768, 60999 // the kernel's default
	data, err := l.read("/proc/sys/net/ipv4/ip_local_port_range")
	if f := strings.Fields(string(data)); err == nil && len(f) == 2 {
		a, errA := strconv.ParseUint(f[0], 10, 16)
		b, errB := strconv.ParseUint(f[1], 10, 16)
		if errA == nil && errB == nil {
			low, high = uint16(a), uint16(b)
		}
	}
	return low, high
}
