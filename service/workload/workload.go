// Package workload holds the nouns that every other package speaks: who asks, and as what Google knows them.
package workload

// ServiceAccount names a Kubernetes ServiceAccount. It is comparable; the zero value names none.
type ServiceAccount struct{ Namespace, Name string }

// String returns "namespace/name".
func (s ServiceAccount) String() string { return s.Namespace + "/" + s.Name }

// Subject returns the `sub` claim of the ServiceAccount's tokens, which Google maps to google.subject (E-25, G-06).
func (s ServiceAccount) Subject() string {
	return "system:serviceaccount:" + s.Namespace + ":" + s.Name
}

// Caller is who is behind a connection: a pod, or a process of the node that the operator gave an identity. Nothing in it
// comes from a request. It is comparable.
type Caller struct {
	PodUID, PodName string         // of a pod
	HostNetwork     bool           // the pod is on the node's network
	RuntimeClass    string         // the pod's; "" is the node's default
	Unit            string         // of a process of the node: its systemd unit, else its cgroup
	ServiceAccount  ServiceAccount // its namespace is the pod's too; without a name, the pod has none (a static pod)
}

// String returns "namespace/pod", or the unit.
func (c Caller) String() string {
	if c.PodUID == "" {
		return c.Unit
	}
	return c.ServiceAccount.Namespace + "/" + c.PodName
}

// ID is what tells one caller from all others: the pod's UID, or the unit.
func (c Caller) ID() string {
	if c.PodUID == "" {
		return c.Unit
	}
	return c.PodUID
}

// Account is what a ServiceAccount's annotations say (K-01), after they were checked (K-00).
// It is comparable; the zero value is a ServiceAccount that is not linked to Google.
type Account struct {
	GoogleEmail      string // iam.gke.io/gcp-service-account; "" when the ServiceAccount is not linked
	PrincipalAsEmail bool   // iam.gke.io/return-principal-id-as-email (E-25)
	QuotaProject     string // iam.gke.io/credential-quota-project (G-15)
}

// Linked reports whether the ServiceAccount impersonates a Google service account.
func (a Account) Linked() bool { return a.GoogleEmail != "" }
