// Package workload holds the types that all other packages share: the caller of a request, and its
// identity at Google.
package workload

// ServiceAccount names a Kubernetes ServiceAccount. It is comparable. The zero value names none.
type ServiceAccount struct{ Namespace, Name string }

// String returns "namespace/name".
func (s ServiceAccount) String() string { return s.Namespace + "/" + s.Name }

// Subject returns the claim sub of the ServiceAccount's tokens, which Google maps to google.subject
// (E-25, principal as email; G-06, length of google.subject).
func (s ServiceAccount) Subject() string {
	return "system:serviceaccount:" + s.Namespace + ":" + s.Name
}

// Caller is the pod behind a connection, or a process of the node that has an identity. Nothing in
// it is from a request. It is comparable.
type Caller struct {
	PodUID, PodName string         // "" for a process of the node
	HostNetwork     bool           // the pod uses the node's network
	RuntimeClass    string         // the pod's; "" = the node's default
	Unit            string         // of a process of the node: its systemd unit or else its cgroup; "" for a pod
	ServiceAccount  ServiceAccount // its namespace is also the pod's; a static pod's has no name
}

// String returns "namespace/pod", or the unit.
func (c Caller) String() string {
	if c.PodUID == "" {
		return c.Unit
	}
	return c.ServiceAccount.Namespace + "/" + c.PodName
}

// ID identifies the caller among all callers: the pod's UID, or the unit.
func (c Caller) ID() string {
	if c.PodUID == "" {
		return c.Unit
	}
	return c.PodUID
}

// Account holds a ServiceAccount's annotations (K-01, GKE's annotations) after they were checked
// (K-00, untrusted annotations). It is comparable. The zero value is a ServiceAccount that is not
// linked to Google.
type Account struct {
	GoogleEmail      string // iam.gke.io/gcp-service-account; "" when the ServiceAccount is not linked
	PrincipalAsEmail bool   // iam.gke.io/return-principal-id-as-email (E-25, principal as email)
	QuotaProject     string // iam.gke.io/credential-quota-project (G-15, quota project)
}

// Linked reports whether the ServiceAccount impersonates a Google service account.
func (a Account) Linked() bool { return a.GoogleEmail != "" }
