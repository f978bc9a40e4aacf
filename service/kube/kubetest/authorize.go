package kubetest

import (
	"fmt"
	"slices"
)

// grant is one RBAC rule; namespace "" is everywhere.
type grant struct{ verb, resource, namespace string }

// rbac is what users and groups were granted.
type rbac map[string][]grant

func (r rbac) allow(subject string, g grant) { r[subject] = append(r[subject], g) }

func (r rbac) revoke(subject string, g grant) {
	r[subject] = slices.DeleteFunc(r[subject], func(h grant) bool { return h == g })
}

func (r rbac) allows(u user, verb, resource, namespace string) bool {
	for _, subject := range append([]string{u.name}, u.groups...) {
		for _, g := range r[subject] {
			if g.verb == verb && g.resource == resource && (g.namespace == "" || g.namespace == namespace) {
				return true
			}
		}
	}
	return false
}

const (
	audienceVerb = "request-serviceaccounts-token-audience"
	nodes        = "system:nodes"
)

// Allow grants a verb on a resource to a user or a group, everywhere.
func (s *Server) Allow(subject, verb, resource string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rbac.allow(subject, grant{verb, resource, ""})
}

// Revoke takes it back.
func (s *Server) Revoke(subject, verb, resource string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rbac.revoke(subject, grant{verb, resource, ""})
}

// GrantAudience lets every node ask for tokens with this audience (N-05).
func (s *Server) GrantAudience(audience string) { s.Allow(nodes, audienceVerb, audience) }

// RevokeAudience takes it back.
func (s *Server) RevokeAudience(audience string) { s.Revoke(nodes, audienceVerb, audience) }

// GrantServiceAccountWatch lets every node watch ServiceAccounts, which it may not by itself
// (N-03).
func (s *Server) GrantServiceAccountWatch() { s.Allow(nodes, "watch", "serviceaccounts") }

// DenyServiceAccountGet makes the server one of Kubernetes 1.33 or older (N-02).
func (s *Server) DenyServiceAccountGet(deny bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.world.oldNodeAuthorizer = deny
}

// authorize returns nil, or the refusal in the real server's words. Called with s.mu held.
func (s *Server) authorize(u user, q *request) error {
	if q.resource == "" { // a path that is no resource
		if q.path == "/version" || q.path == "/readyz" || q.path == "/livez" || q.path == "/healthz" {
			return nil
		}
		if s.rbac.allows(u, q.verb, q.path, "") {
			return nil
		}
		return forbiddenPath(u, q)
	}
	if q.kind() == "selfsubjectreviews" {
		return nil // system:basic-user
	}
	if s.rbac.allows(u, q.verb, q.kind(), q.namespace) {
		return nil
	}
	reason := ""
	if node, is := u.node(); is {
		if reason = s.nodeAuthorizer(node, q); reason == "" {
			return nil
		}
		if reason == "-" {
			reason = ""
		}
	}
	return forbidden(u, q, reason)
}

// nodeAuthorizer returns "" for yes, a reason for no, and "-" for a no without a reason.
func (s *Server) nodeAuthorizer(node string, q *request) string {
	unrelated := fmt.Sprintf("node: no relationship found between node '%s' and this object", node)
	switch {
	case q.kind() == "pods" && (q.verb == "list" || q.verb == "watch"):
		if v, found := q.fields.RequiresExactMatch("spec.nodeName"); found && v == node {
			return ""
		}
		return "node: can only list/watch pods with spec.nodeName field selector"
	case q.kind() == "pods" && q.verb == "get":
		if p := s.world.pod(q.namespace, q.name); p != nil && p.Spec.NodeName == node {
			return ""
		}
		return unrelated
	case q.kind() == "serviceaccounts" && q.verb == "get":
		switch {
		case s.world.oldNodeAuthorizer:
			return "node: not allowed to get service accounts"
		case s.world.uses(node, q.namespace, q.name):
			return ""
		}
		return unrelated
	case q.kind() == "serviceaccounts/token" && q.verb == "create":
		if s.world.uses(node, q.namespace, q.name) {
			return ""
		}
		return unrelated
	case q.resource == "serviceaccounts":
		return "node: can only create tokens for individual service accounts"
	case q.kind() == "nodes" && (q.verb == "get" || q.verb == "list" || q.verb == "watch"):
		switch {
		case q.name == node:
			return ""
		case q.name == "":
			return fmt.Sprintf("node: node '%s' cannot read all nodes, only its own Node object", node)
		}
		return fmt.Sprintf("node: node '%s' cannot read '%s', only its own Node object", node, q.name)
	}
	return "-"
}
