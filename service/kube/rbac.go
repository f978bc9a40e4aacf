package kube

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"fmt"
	"strings"
)

// The manifests, which the packages ship too. rbacNode adds rights to kubelet's own credential.
// rbacDedicated is for an identity made for this service.
var (
	//go:embed rbac.yaml
	rbacNode string
	//go:embed rbac-dedicated.yaml
	rbacDedicated string
)

const (
	placeholderAudience = `"//iam.googleapis.com/projects/NUMBER/locations/global/workloadIdentityPools/POOL/providers/PROVIDER"`
	placeholderSubject  = `{apiGroup: rbac.authorization.k8s.io, kind: User, name: "gke-metadata-emulator"}`
	optionalGet         = `# - {apiGroups: [""], resources: ["serviceaccounts"], verbs: ["get"]}`
)

// manifest fills in the user and the audience. getAccounts adds the rule that Kubernetes 1.33 and
// older need (N-02, reads of ServiceAccounts).
func manifest(user, audience string, getAccounts bool) string {
	if user != "" && !strings.HasPrefix(user, nodeUser) {
		subject := fmt.Sprintf(`{apiGroup: rbac.authorization.k8s.io, kind: User, name: %s}`, quote(user))
		if ns, name, is := strings.Cut(strings.TrimPrefix(user, saUser), ":"); is && strings.HasPrefix(user, saUser) {
			subject = fmt.Sprintf(`{kind: ServiceAccount, namespace: %s, name: %s}`, quote(ns), quote(name))
		}
		return strings.Replace(rbacDedicated, placeholderSubject, subject, 1)
	}
	m := rbacNode
	if audience != "" {
		m = strings.Replace(m, placeholderAudience, quote(audience), 1)
	}
	if getAccounts {
		m = strings.Replace(m, optionalGet, strings.TrimPrefix(optionalGet, "# "), 1)
	}
	return m
}

const (
	nodeUser = "system:node:"
	saUser   = "system:serviceaccount:"
)

// quote returns a YAML string. JSON's quoting is YAML's double-quoted style.
func quote(s string) string {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	_ = e.Encode(s) // a string and a buffer cannot fail
	return strings.TrimSpace(b.String())
}
