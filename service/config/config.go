// Package config answers one question: what did the operator ask for?
//
// Raw text (YAML and flags) goes in, a typed and resolved Config comes out, or every fault at once. One table of keys
// (keys.go) is what the YAML check, the flags, `config show`, the reference configuration and the documentation come from.
package config

import (
	"net/netip"
	"time"
)

// DefaultFile is where the packages put the configuration.
const DefaultFile = "/etc/gke-metadata-emulator/config.yaml"

// Config is a valid configuration with everything resolved that can be resolved without a cluster and without Google:
// nobody has to know a default or a grammar again after Load.
type Config struct {
	WorkloadIdentity     WorkloadIdentity
	CredentialConfigFile string // where Google's side was read from (G-18); absolute, "" if it was not
	Project              Project
	Kubeconfig           string // absolute; "" = search kubelet's usual places
	NodeName             string // "" = find out
	TokenAudience        string // `aud` of the ServiceAccount's token (G-17); never ""
	Listen               netip.AddrPort
	Listen6              netip.AddrPort // invalid = IPv6 is not served (H-24)
	HealthListen         netip.AddrPort
	Routing              Routing
	Attestation          Attestation
	HostIdentities       []HostIdentity // the first that fits counts
	Passthrough          []string       // ServiceAccounts, NAMESPACE/NAME, that may reach the cloud's metadata server from the host network (U-02)
	Google               Google
	Instance             Instance
	Cluster              Cluster           // all three or none (E-16)
	ExtraMetadata        map[string]string // path below /computeMetadata/v1/, cleaned, e.g. "instance/machine-type" → value (U-17)
	EmailForUnlinked     string            // E-24; never ""
	ImpersonateUnlinked  string            // the Google service account of every pod that is not linked (G-18); "" = none
	Prefetch             string            // linked | all | none
	Limits               Limits
	HostCheck            bool // H-16
	Log                  Log

	Warnings []string // valid, but worth a line in the log and in `config check`
}

// WorkloadIdentity is the pool and provider that Google's token service exchanges for.
type WorkloadIdentity struct {
	Audience string // what STS wants (G-03): //iam.googleapis.com/<PoolName>/providers/<provider>, or identitynamespace:POOL:ISSUER
	Pool     string // the pool's id
	PoolName string // projects/NUMBER/locations/global/workloadIdentityPools/POOL; "" for an identitynamespace
}

// Project is the Google Cloud project that pods are told they are in.
type Project struct {
	ID     string
	Number string // all digits (E-07)
}

// Routing is how pods' packets get to Listen.
type Routing struct {
	Mode              string
	Uplinks           []string // interfaces that lead off the node, "eth+" for all that begin so; none: found out
	Spare             []string // interfaces whose requests are left alone: docker0, virbr0
	InterceptHostPods string   // auto | on | off
	Guard             []netip.AddrPort
	Link              string // mode loopback: the link that gets the metadata server's address
	Force             bool   // mode loopback also where a metadata server answers this node
	OnStop            string // remove | keep, when the service is stopped for good
}

// Attestation is what tells who asks.
type Attestation struct {
	Mode      string   // kernel | source-ip
	ByAddress []string // RuntimeClasses of pods that are known by address in any mode
	Proxies   []string // ServiceAccounts, NAMESPACE/NAME, of proxies that ask for the pod whose network namespace they are in
}

// Google is where Google is and how it is asked.
type Google struct {
	UniverseDomain    string
	STSURL            string // the whole URL of the token endpoint (G-08), path included
	IAMCredentialsURL string // scheme and host, no path and no trailing slash (G-11)
	CAFile            string // absolute; "" = the system's roots
	TokenLifetime     time.Duration
	QuotaProject      string // out of the credential configuration; "" = none
}

// Instance is what the node says of itself. Empty fields are found out or, as Name, not served (E-12).
type Instance struct {
	Hostname string
	ID       string // decimal, a positive int64 (E-10), or ""
	Zone     string // the short form, europe-west4-a
	Name     string
}

// Cluster is what instance/attributes/ says; all of it or none (E-16).
type Cluster struct{ Name, Location, UID string }

// Limits bound what one pod can take from the others.
type Limits struct{ ConnectionsPerPod, MintsPerPod, KeysPerPod int }

// Log is how much is logged and in which form.
type Log struct {
	Level  string // debug | info | warning | error
	Format string // auto | journal | text | json
}
