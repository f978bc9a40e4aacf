package config

import (
	"net/netip"
	"slices"
	"strings"
	"time"
	"unicode"
)

// Key is one setting. The table of keys defines the whole form of a configuration.
type Key struct {
	Path    string   // dotted: routing.mode
	Default string   // in the form of the flag; "" where there is none, or where Usage describes it
	Values  []string // of a choice; nil for other types
	Usage   string   // one line, without a full stop

	field func(*raw) any // a pointer to the value, whose type is the setting's
	// check returns the normal form of a text, of an item of a list, or of a path of a map.
	check func(string) (string, *trouble)
}

// raw is a configuration whose settings were checked one by one and not yet together.
type raw struct {
	Config
	provider            string // projects/… or identitynamespace:…
	impersonateUnlinked bool
}

var keys = []Key{
	{Path: "workloadIdentityProvider", check: provider,
		Usage: "projects/NUMBER/locations/global/workloadIdentityPools/POOL/providers/PROVIDER, or " +
			"identitynamespace:POOL:ISSUER",
		field: func(r *raw) any { return &r.provider }},
	{Path: "credentialConfigFile", check: filePath,
		Usage: "the JSON file of `gcloud iam workload-identity-pools create-cred-config`, instead of " +
			"workloadIdentityProvider",
		field: func(r *raw) any { return &r.CredentialConfigFile }},
	{Path: "projectID", check: projectID,
		Usage: "the ID of the Google Cloud project that pods are told they are in",
		field: func(r *raw) any { return &r.Project.ID }},
	{Path: "numericProjectID", check: projectNumber,
		Usage: "the project's number; default: the number in workloadIdentityProvider",
		field: func(r *raw) any { return &r.Project.Number }},
	{Path: "kubeconfig", check: filePath,
		Usage: "kubeconfig for the API server; default: the first of kubelet's usual paths that exists",
		field: func(r *raw) any { return &r.Kubeconfig }},
	{Path: "nodeName", check: nodeName,
		Usage: "this node's name in Kubernetes; default: the name in the kubeconfig's credential, else the host name",
		field: func(r *raw) any { return &r.NodeName }},
	{Path: "tokenAudience", check: audience,
		Usage: "audience of the ServiceAccounts' tokens, as in the RBAC manifest; default: " +
			"//iam.googleapis.com/<workloadIdentityProvider>",
		field: func(r *raw) any { return &r.TokenAudience }},
	{Path: "listen", Default: "169.254.169.252:988",
		Usage: "address and port that pods' requests are redirected to; in routing.mode loopback it is 169.254.169.254:80",
		field: func(r *raw) any { return &r.Listen }},
	{Path: "listen6",
		Usage: "address and port that requests to [fd20:ce::254]:80 are redirected to in routing.mode iptables and " +
			"nftables, such as [fd20:ce::252]:988; default: IPv6 is not served",
		field: func(r *raw) any { return &r.Listen6 }},
	{Path: "dns", Default: "off", Values: []string{"off", "answer"},
		Usage: "whether this node answers what its pods ask any name server over UDP for metadata.google.internal, in " +
			"routing.mode iptables and nftables; no other name is touched",
		field: func(r *raw) any { return &r.DNS }},
	{Path: "healthListen", Default: "127.0.0.1:16322",
		Usage: "address and port of /healthz, /readyz and /metrics",
		field: func(r *raw) any { return &r.HealthListen }},
	{Path: "healthAllow", check: network,
		Usage: "networks whose hosts healthListen answers, such as 10.0.0.0/8, besides this node's loopback; " +
			"default: every host",
		field: func(r *raw) any { return &r.HealthAllow }},

	{Path: "routing.mode", Default: "iptables", Values: modeChoices(),
		Usage: "how pods' requests reach the listen address; auto: by the mode that fits the node, with the reason in log " +
			"and status; none: by GCE_METADATA_HOST in the pods' environment; observe: not at all, the connections that would " +
			"be redirected are counted",
		field: func(r *raw) any { return &r.Routing.Mode }},
	{Path: "routing.uplinks", check: interfacePattern,
		Usage: "interfaces that lead off the node, where eth+ means every name that begins with eth; default: detected",
		field: func(r *raw) any { return &r.Routing.Uplinks }},
	{Path: "routing.excludeInterfaces", check: interfaceName,
		Usage: "interfaces whose requests are never redirected, such as docker0 or virbr0",
		field: func(r *raw) any { return &r.Routing.ExcludeInterfaces }},
	{Path: "routing.interceptHostPods", Default: "auto", Values: []string{"auto", "on", "off"},
		Usage: "redirect pods on the host network too; auto: only where no metadata server of a cloud answers the node",
		field: func(r *raw) any { return &r.Routing.InterceptHostPods }},
	{Path: "routing.guard", Default: "169.254.169.254:80,[fd00:c1::a9fe:a9fe]:80,[fd00:ec2::254]:80,[fd20:ce::254]:80",
		Usage: "the cloud's own metadata servers, which no pod may reach",
		field: func(r *raw) any { return &r.Routing.Guard }},
	{Path: "routing.link", check: interfaceName,
		Usage: "in mode loopback, a dummy link that gets 169.254.169.254, for Cilium with BPF host routing; the node's own " +
			"daemons then cannot reach the cloud's server",
		field: func(r *raw) any { return &r.Routing.Link }},
	{Path: "routing.force", Default: "false",
		Usage: "install mode loopback also where a metadata server of the cloud answers this node",
		field: func(r *raw) any { return &r.Routing.Force }},
	{Path: "routing.onStop", Default: "remove", Values: []string{"remove", "keep"},
		Usage: "what happens to the rules when the service is stopped; keep: the rules stay, and pods get no answer until " +
			"the service is started again",
		field: func(r *raw) any { return &r.Routing.OnStop }},

	{Path: "attestation.mode", Default: "kernel", Values: []string{"kernel", "source-ip"},
		Usage: "what identifies the caller: the kernel's record of the client's socket, or only the client's address, " +
			"which a new pod may get from a dead one",
		field: func(r *raw) any { return &r.Attestation.Mode }},
	{Path: "attestation.byAddress", check: byAddress,
		Usage: "pods that are identified by address where the kernel does not have the client's socket: RuntimeClasses of " +
			"sandboxes, such as gvisor; ServiceAccounts as NAMESPACE/NAME or NAMESPACE/* of pods that run containers " +
			"themselves, such as Docker in a pod",
		field: func(r *raw) any { return &r.Attestation.ByAddress }},
	{Path: "attestation.proxies", check: accountName,
		Usage: "ServiceAccounts, NAMESPACE/NAME, of a service mesh's node proxies, such as istio-system/ztunnel: their " +
			"requests from a pod's network namespace count as the pod's",
		field: func(r *raw) any { return &r.Attestation.Proxies }},

	{Path: "hostIdentities",
		Usage: "processes of the node that get a ServiceAccount's identity: {unit: kubelet.service, serviceAccount: " +
			"NAMESPACE/NAME}, or {cgroup: /system.slice/docker-*.scope, serviceAccount: NAMESPACE/NAME}; the first match counts",
		field: func(r *raw) any { return &r.HostIdentities }},

	{Path: "passthrough", check: accountName,
		Usage: "ServiceAccounts, NAMESPACE/NAME, whose pods on the host network may use the cloud's own metadata server " +
			"for paths that are not Google's, where routing.interceptHostPods redirects them",
		field: func(r *raw) any { return &r.Passthrough }},

	{Path: "google.universeDomain", Default: "googleapis.com", check: domain,
		Usage: "the domain of Google's services",
		field: func(r *raw) any { return &r.Google.UniverseDomain }},
	{Path: "google.stsURL", check: stsURL,
		Usage: "URL of the token exchange; default: https://sts.<universeDomain>/v1/token",
		field: func(r *raw) any { return &r.Google.STSURL }},
	{Path: "google.iamCredentialsURL", check: iamCredentialsURL,
		Usage: "URL of the IAM Credentials service; default: https://iamcredentials.<universeDomain>",
		field: func(r *raw) any { return &r.Google.IAMCredentialsURL }},
	{Path: "google.caFile", check: filePath,
		Usage: "PEM file of certificate authorities for these two services, beside the system's",
		field: func(r *raw) any { return &r.Google.CAFile }},
	{Path: "google.tokenLifetime", Default: "1h", check: tokenLifetime,
		Usage: "lifetime of the access tokens of Google service accounts, 10m to 12h",
		field: func(r *raw) any { return &r.Google.TokenLifetime }},

	{Path: "instance.hostname", check: domain,
		Usage: "what instance/hostname answers; default: the node's host name",
		field: func(r *raw) any { return &r.Instance.Hostname }},
	{Path: "instance.id", check: instanceID,
		Usage: "what instance/id answers, a positive number; default: derived from the machine id",
		field: func(r *raw) any { return &r.Instance.ID }},
	{Path: "instance.zone", check: zone,
		Usage: "the zone, such as europe-west4-a; instance/zone answers projects/<numericProjectID>/zones/<zone>",
		field: func(r *raw) any { return &r.Instance.Zone }},
	{Path: "instance.name", check: domain,
		Usage: "what instance/name answers; default: 404, as on GKE",
		field: func(r *raw) any { return &r.Instance.Name }},

	{Path: "cluster.name", check: label,
		Usage: "what instance/attributes/cluster-name answers; programs then take this cluster for GKE",
		field: func(r *raw) any { return &r.Cluster.Name }},
	{Path: "cluster.location", check: label,
		Usage: "what instance/attributes/cluster-location answers",
		field: func(r *raw) any { return &r.Cluster.Location }},
	{Path: "cluster.uid", check: label,
		Usage: "what instance/attributes/cluster-uid answers",
		field: func(r *raw) any { return &r.Cluster.UID }},

	{Path: "extraMetadata", check: metadataPath,
		Usage: "further paths below /computeMetadata/v1/ and their values, such as instance/machine-type=n2-standard-4",
		field: func(r *raw) any { return &r.ExtraMetadata }},
	{Path: "emailForUnlinked", check: unlinkedEmail,
		Usage: "the email of ServiceAccounts that are not linked to Google; default: the pool's id",
		field: func(r *raw) any { return &r.EmailForUnlinked }},
	{Path: "impersonateUnlinked", Default: "false",
		Usage: "give every pod that is not linked the Google service account that credentialConfigFile impersonates",
		field: func(r *raw) any { return &r.impersonateUnlinked }},
	{Path: "prefetch", Default: "linked", Values: []string{"linked", "all", "none"},
		Usage: "whose tokens are minted before the first request",
		field: func(r *raw) any { return &r.Prefetch }},

	{Path: "limits.connectionsPerPod", Default: "256",
		Usage: "connections that one pod may hold open; those beyond are answered 503, and beyond twice the number " +
			"they are closed without an answer",
		field: func(r *raw) any { return &r.Limits.ConnectionsPerPod }},
	{Path: "limits.requestsPerPod", Default: "1000",
		Usage: "requests of one pod that are answered a second; those beyond wait, and none is refused",
		field: func(r *raw) any { return &r.Limits.RequestsPerPod }},
	{Path: "limits.mintsPerPod", Default: "16",
		Usage: "tokens that may be minted for one pod at the same time",
		field: func(r *raw) any { return &r.Limits.MintsPerPod }},
	{Path: "limits.keysPerPod", Default: "64",
		Usage: "different tokens, by scopes and audience, that may be cached for one pod; one more takes the place of its " +
			"oldest",
		field: func(r *raw) any { return &r.Limits.KeysPerPod }},

	{Path: "hostCheck", Default: "true",
		Usage: "refuse requests whose header Host is not a name of the metadata server, against DNS rebinding",
		field: func(r *raw) any { return &r.HostCheck }},
	{Path: "log.level", Default: "info", Values: []string{"debug", "info", "warning", "error"},
		Usage: "how much is logged; debug has a line for each request",
		field: func(r *raw) any { return &r.Log.Level }},
	{Path: "log.format", Default: "auto", Values: []string{"auto", "journal", "text", "json"},
		Usage: "form of the log; auto is journal under systemd, text on a terminal and json otherwise",
		field: func(r *raw) any { return &r.Log.Format }},
}

// Keys returns the table in the order of the reference configuration.
func Keys() []Key { return slices.Clone(keys) }

// Flag returns the name of the setting's flag, without dashes.
func (k Key) Flag() string { return FlagName(k.Path) }

// Type names the setting's type: text, choice, boolean, number, duration, address, list, addresses,
// map or identities.
func (k Key) Type() string {
	switch k.field(new(raw)).(type) {
	case *bool:
		return "boolean"
	case *int:
		return "number"
	case *time.Duration:
		return "duration"
	case *netip.AddrPort:
		return "address"
	case *[]string:
		return "list"
	case *[]netip.AddrPort:
		return "addresses"
	case *map[string]string:
		return "map"
	case *[]HostIdentity:
		return "identities"
	}
	if k.Values != nil {
		return "choice"
	}
	return "text"
}

// FlagName returns a dotted key in kebab case: google-iam-credentials-url for
// google.iamCredentialsURL.
func FlagName(path string) string {
	var b strings.Builder
	r := []rune(path)
	for i, c := range r {
		if c == '.' {
			b.WriteByte('-')
			continue
		}
		if unicode.IsUpper(c) && i > 0 && r[i-1] != '.' {
			afterLower := !unicode.IsUpper(r[i-1])
			beforeLower := i+1 < len(r) && unicode.IsLower(r[i+1])
			if afterLower || beforeLower {
				b.WriteByte('-')
			}
		}
		b.WriteRune(unicode.ToLower(c))
	}
	return b.String()
}

// Default returns the configuration without any setting. It is not valid, since provider and
// project have no default.
func Default() Config {
	r := defaults()
	r.resolveURLs()
	return r.Config
}

func defaults() raw {
	var r raw
	for _, k := range keys {
		if k.Default == "" {
			continue
		}
		k.set(&r, k.split(k.Default), func(_ int, t *trouble) {
			panic("config: the default of " + k.Path + ": " + t.problem) // a fault of the table fails every test
		})
	}
	return r
}
