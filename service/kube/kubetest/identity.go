package kubetest

import (
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// user is who a request comes from.
type user struct {
	name   string
	groups []string
}

const nodeUser = "system:node:"

func (u user) node() (string, bool) {
	n, is := strings.CutPrefix(u.name, nodeUser)
	return n, is && slices.Contains(u.groups, "system:nodes")
}

// authenticate takes a client certificate or a bearer token. Nothing at all is anonymous; something
// wrong is refused.
func (s *Server) authenticate(r *http.Request) (user, bool) {
	if len(r.TLS.PeerCertificates) > 0 {
		cert := r.TLS.PeerCertificates[0]
		roots := x509.NewCertPool()
		roots.AddCert(s.ca.cert)
		_, err := cert.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: s.now(),
			KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
		s.mu.Lock()
		dead := s.dead[cert.SerialNumber.String()]
		s.mu.Unlock()
		return user{cert.Subject.CommonName, append(slices.Clone(cert.Subject.Organization), "system:authenticated")},
			err == nil && !dead
	}
	h := r.Header.Get("Authorization")
	if h == "" {
		return user{"system:anonymous", []string{"system:unauthenticated"}}, true
	}
	token, bearer := strings.CutPrefix(h, "Bearer ")
	s.mu.Lock()
	u, is := s.users[token]
	s.mu.Unlock()
	return u, bearer && is
}

// AddUser makes a dedicated identity with a bearer token and the rules of the RBAC manifest for it:
// pods list and watch, serviceaccounts get and watch, serviceaccounts/token create.
// `make test-kube` holds it against the manifest.
func (s *Server) AddUser(name, token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.users[token] = user{name, []string{"system:authenticated"}}
	for _, g := range []grant{
		{"list", "pods", ""}, {"watch", "pods", ""},
		{"get", "serviceaccounts", ""}, {"watch", "serviceaccounts", ""}, {"create", "serviceaccounts/token", ""},
	} {
		s.rbac.allow(name, g)
	}
}

// AddToken makes a further bearer token for any user, for example system:node:NAME of group
// system:nodes, as an exec plugin gets it.
func (s *Server) AddToken(token, name string, groups ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.users[token] = user{name, append(groups, "system:authenticated")}
}

// RevokeToken has a bearer token refused from now on: 401.
func (s *Server) RevokeToken(token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.users, token)
}

// NodeCert returns the client certificate and key of a node's kubelet, in one PEM as kubelet keeps
// it. It makes them, and the Node object, the first time.
func (s *Server) NodeCert(node string) ([]byte, error) {
	s.mu.Lock()
	p := s.nodes[node]
	s.mu.Unlock()
	if p == nil {
		return s.RotateNodeCert(node)
	}
	return append(slices.Clone(p.certPEM), p.keyPEM...), nil
}

// RotateNodeCert makes a new certificate for the node's kubelet and refuses the old one from now
// on: 401, also on living connections.
func (s *Server) RotateNodeCert(node string) ([]byte, error) {
	return s.RotateNodeCertFor(node, usualLife)
}

// RotateNodeCertFor is RotateNodeCert with a certificate that expires so long from now.
func (s *Server) RotateNodeCertFor(node string, life time.Duration) ([]byte, error) {
	p, err := s.ca.client(nodeUser+node, []string{"system:nodes"}, s.now(), life)
	if err != nil {
		return nil, fmt.Errorf("kubetest: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.nodes[node]; old != nil {
		s.dead[old.cert.SerialNumber.String()] = true
	}
	s.nodes[node] = p
	s.world.addNode(node)
	return append(slices.Clone(p.certPEM), p.keyPEM...), nil
}

// Kubeconfig returns one that holds its credential: the kubelet's of the node.
func (s *Server) Kubeconfig(node string) ([]byte, error) {
	both, err := s.NodeCert(node)
	if err != nil {
		return nil, err
	}
	return s.kubeconfig(map[string]any{"client-certificate-data": both, "client-key-data": both})
}

// TokenKubeconfig returns one with a bearer token.
func (s *Server) TokenKubeconfig(token string) ([]byte, error) {
	return s.kubeconfig(map[string]any{"token": token})
}

// ExecKubeconfig returns one that runs a credential plugin.
func (s *Server) ExecKubeconfig(command string, args ...string) ([]byte, error) {
	return s.kubeconfig(map[string]any{"exec": map[string]any{
		"apiVersion": "client.authentication.k8s.io/v1", "command": command, "args": args, "interactiveMode": "Never"}})
}

// WriteKubelet writes dir/kubelet.conf and the certificate that it names, as kubeadm and kubelet
// do; written again after RotateNodeCert it replaces the certificate in one step. It returns the
// kubeconfig's path.
func (s *Server) WriteKubelet(dir, node string) (string, error) {
	both, err := s.NodeCert(node)
	if err != nil {
		return "", err
	}
	pem := filepath.Join(dir, "pki", "kubelet-client-current.pem")
	conf, err := s.kubeconfig(map[string]any{"client-certificate": pem, "client-key": pem})
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Dir(pem), 0o700); err != nil {
		return "", fmt.Errorf("kubetest: %w", err)
	}
	path := filepath.Join(dir, "kubelet.conf")
	for _, f := range []struct {
		path string
		data []byte
	}{{pem, both}, {path, conf}} {
		if err := os.WriteFile(f.path+".new", f.data, 0o600); err != nil {
			return "", fmt.Errorf("kubetest: %w", err)
		}
		if err := os.Rename(f.path+".new", f.path); err != nil {
			return "", fmt.Errorf("kubetest: %w", err)
		}
	}
	return path, nil
}

// kubeconfig is JSON, which is YAML.
func (s *Server) kubeconfig(auth map[string]any) ([]byte, error) {
	return json.MarshalIndent(map[string]any{
		"apiVersion": "v1", "kind": "Config", "current-context": "kubetest",
		"clusters": []any{map[string]any{"name": "kubetest", "cluster": map[string]any{"server": s.url,
			"certificate-authority-data": s.ca.certPEM}}},
		"users": []any{map[string]any{"name": "kubetest", "user": auth}},
		"contexts": []any{map[string]any{"name": "kubetest", "context": map[string]any{"cluster": "kubetest",
			"user": "kubetest"}}},
	}, "", "  ")
}
