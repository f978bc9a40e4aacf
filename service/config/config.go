// Package config answers one question: what did the operator configure?
//
// Its input is text (YAML and flags). Its output is a typed and resolved Config, or all faults at
// once. One table of keys (keys.go) is the source of the YAML check, the flags, `config show`, the
// reference configuration and the documentation.
package config

import (
	"net/netip"
	"time"
)

// DefaultFile is the path of the configuration in the packages.
const DefaultFile = "/etc/gke-metadata-emulator/config.yaml"

// Config is a valid configuration with all defaults resolved, except those that need a cluster or
// Google. Nothing after Load has to know a default or a grammar.
type Config struct {
	WorkloadIdentity     WorkloadIdentity
	CredentialConfigFile string // gcloud's credential configuration (G-18, external_account); absolute, "" = none
	Project              Project
	Kubeconfig           string // absolute; "" = search kubelet's usual paths
	NodeName             string // "" = detect
	TokenAudience        string // `aud` of the ServiceAccount's token (G-17, the token's audience); never ""
	Listen               netip.AddrPort
	Listen6              netip.AddrPort // invalid = IPv6 is not served (H-24, IPv6)
	DNS                  string         // off | answer: whether the node answers for the metadata server's name
	HealthListen         netip.AddrPort
	HealthAllow          []string // networks in CIDR notation that may ask HealthListen; none = whoever reaches it
	Routing              Routing
	Attestation          Attestation
	HostIdentities       []HostIdentity // the first match counts
	// NAMESPACE/NAME of ServiceAccounts that may use the cloud's server (U-02, passthrough)
	Passthrough         []string
	Google              Google
	Instance            Instance
	Cluster             Cluster           // all three or none (E-16, cluster attributes)
	ExtraMetadata       map[string]string // cleaned path such as "instance/machine-type" → value (U-17, extra paths)
	EmailForUnlinked    string            // E-24, email of unlinked accounts; never ""
	ImpersonateUnlinked string            // Google service account of pods that are not linked; "" = none
	Prefetch            string            // linked | all | none
	Limits              Limits
	HostCheck           bool // H-16, header Host
	Log                 Log

	Warnings []string // for the log and `config check`: settings that are valid but rarely intended
}

// WorkloadIdentity is the pool and the provider of the token exchange.
type WorkloadIdentity struct {
	// Audience is STS's: //iam.googleapis.com/<PoolName>/providers/<provider>, or
	// identitynamespace:POOL:ISSUER (G-03, STS audience).
	Audience string
	Pool     string // the pool's id
	PoolName string // projects/NUMBER/locations/global/workloadIdentityPools/POOL; "" for an identitynamespace
}

// Project is the Google Cloud project that the metadata tree names.
type Project struct {
	ID     string
	Number string // digits (E-07, project number)
}

// Routing says how pods' packets get to Listen.
type Routing struct {
	Mode              string
	Uplinks           []string // interfaces that lead off the node, or "eth+"; none = detect (R-05, uplinks)
	ExcludeInterfaces []string // interfaces whose requests are never redirected: docker0, virbr0
	InterceptHostPods string   // auto | on | off
	Guard             []netip.AddrPort
	Link              string // mode loopback: the link that gets the metadata server's address
	Force             bool   // allows mode loopback where a metadata server answers this node
	OnStop            string // remove | keep, when the service is stopped (R-01, life of the rules)
}

// Attestation says what identifies the caller.
type Attestation struct {
	Mode string // kernel | source-ip
	// RuntimeClasses, NAMESPACE/NAME and NAMESPACE/* of pods that are identified by address in any
	// mode (A-14, sandboxes)
	ByAddress []string
	Proxies   []string // NAMESPACE/NAME of proxies that act for the pod of their network namespace (A-20, node proxies)
}

// Google says where Google's services are and how to use them.
type Google struct {
	UniverseDomain    string
	STSURL            string // of the token endpoint, with its path (G-08, STS URL)
	IAMCredentialsURL string // scheme and host, without path and trailing slash
	CAFile            string // absolute; "" = the system's roots
	TokenLifetime     time.Duration
	QuotaProject      string // of the credential configuration; "" = none
}

// Instance holds the values below instance/. Empty fields are detected or, as Name, not served
// (E-12, instance name).
type Instance struct {
	Hostname string
	ID       string // decimal, a positive int64 (E-10, instance id), or ""
	Zone     string // the short form, europe-west4-a
	Name     string
}

// Cluster holds the values below instance/attributes/: all or none (E-16, cluster attributes).
type Cluster struct{ Name, Location, UID string }

// Limits bound what one pod can use. RequestsPerPod is for each second.
type Limits struct{ ConnectionsPerPod, RequestsPerPod, MintsPerPod, KeysPerPod int }

// Log says how much is logged and in which form.
type Log struct {
	Level  string // debug | info | warning | error
	Format string // auto | journal | text | json
}
