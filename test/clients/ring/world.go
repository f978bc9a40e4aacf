package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
)

const (
	provider  = "projects/123456789012/locations/global/workloadIdentityPools/my-pool/providers/my-cluster"
	audience  = "//iam.googleapis.com/" + provider
	nodeName  = "node1"
	projectID = "my-project"
	universe  = "googleapis.com"
	listen    = "169.254.169.252:988"
	// federatedLifetime is short, so that clients refresh their tokens during the run.
	federatedLifetime = 15 * time.Second
)

// world is a node with the service, its pods, and the stand-ins for Google, Cloud Storage, the API
// server and name servers.
type world struct {
	node    *netnstest.Node
	kube    *kubetest.Server
	google  *googletest.Server
	dns     map[resolver]netip.Addr
	storage string // URL of Cloud Storage's stand-in
	dir     string
	service *emulator
}

func newWorld(ctx context.Context, binary, dir string) (_ *world, err error) {
	w := &world{dir: dir, dns: map[resolver]netip.Addr{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	if w.node, err = netnstest.New("clients"); err != nil {
		return nil, err
	}
	if err := w.startGoogle(); err != nil {
		return nil, err
	}
	if err := w.addAddress(ctx, apiAddr); err != nil {
		return nil, err
	}
	if err := w.startAPIs(); err != nil {
		return nil, err
	}
	for i, r := range []resolver{hasRecord, refuses, noName} {
		at := netip.AddrFrom4([4]byte{203, 0, 113, byte(1 + i)})
		if err := w.addAddress(ctx, at); err != nil {
			return nil, err
		}
		c, err := w.node.Cloud.ListenPacket("udp4", netip.AddrPortFrom(at, 53).String())
		if err != nil {
			return nil, err
		}
		go r.serveDNS(c)
		w.dns[r] = at
	}
	w.service = &emulator{world: w, binary: binary}
	return w, nil
}

// addAddress adds an address to the cloud's namespace.
func (w *world) addAddress(ctx context.Context, a netip.Addr) error {
	out, err := w.node.Cloud.Command(ctx, "ip", "address", "add", a.String()+"/32", "dev", "lo").CombinedOutput()
	if err != nil {
		return fmt.Errorf("ip address add %s: %w: %s", a, err, out)
	}
	return nil
}

func (w *world) startGoogle() error {
	l, err := w.node.Cloud.Listen("tcp4", netip.AddrPortFrom(w.node.Cloud.Addr, 6443).String())
	if err != nil {
		return err
	}
	if w.kube, err = kubetest.New(kubetest.Options{Listener: l}); err != nil {
		return err
	}
	w.kube.GrantAudience(audience)
	if l, err = w.node.Cloud.Listen("tcp4", netip.AddrPortFrom(w.node.Cloud.Addr, 443).String()); err != nil {
		return err
	}
	w.google, err = googletest.New(googletest.Options{Listener: l, FederatedLifetime: federatedLifetime,
		Providers: map[string]googletest.Provider{audience: {Issuer: w.kube.Issuer(), JWKS: w.kube.JWKS}}})
	if err != nil {
		return err
	}
	kubeconfig, err := w.kube.Kubeconfig(nodeName)
	return errors.Join(err, os.WriteFile(filepath.Join(w.dir, "kubeconfig"), kubeconfig, 0o600),
		w.google.WriteCA(filepath.Join(w.dir, "google-ca.pem")))
}

// pod is a pod: a network namespace whose address belongs to the pod in the API server.
type pod struct {
	*netnstest.NS
	subject string // of its tokens, google.subject
	email   string // of the Google service account that its ServiceAccount is linked to; "": none
}

// addPod makes a pod with a ServiceAccount of its name.
func (w *world) addPod(name string, linked bool) (*pod, error) {
	ns, err := w.node.AddPod(name)
	if err != nil {
		return nil, err
	}
	p := &pod{NS: ns, subject: "system:serviceaccount:default:" + name}
	var annotations map[string]string
	if linked {
		p.email = name + "@my-project.iam.gserviceaccount.com"
		annotations = map[string]string{"iam.gke.io/gcp-service-account": p.email}
		w.google.Allow(p.subject, p.email)
	}
	w.kube.SetServiceAccount("default", name, annotations)
	w.kube.SetPod(kubetest.Pod{Namespace: "default", Name: name, ServiceAccount: name, Node: nodeName,
		Addresses: []string{ns.Addr.String()}})
	return p, nil
}

// configure writes the configuration of an operator.
func (w *world) configure(mode, dns string) error {
	return os.WriteFile(filepath.Join(w.dir, "config.yaml"), fmt.Appendf(nil, `workloadIdentityProvider: %s
projectID: %s
kubeconfig: %s/kubeconfig
attestation: {mode: source-ip}
routing: {mode: %s}
listen: %s
dns: %s
instance: {zone: europe-west4-a, hostname: node1.example.com}
cluster: {name: my-cluster, location: europe-west4, uid: 00000000-0000-4000-8000-000000000000}
google: {stsURL: %s, iamCredentialsURL: %s, caFile: %s/google-ca.pem}
limits: {connectionsPerPod: 1024}
log: {format: text}
`, provider, projectID, w.dir, mode, listen, dns, w.google.STSURL(), w.google.URL(), w.dir), 0o644)
}

func (w *world) close() error {
	var err error
	if w.service != nil {
		err = w.service.close()
	}
	if w.google != nil {
		w.google.Close()
	}
	if w.kube != nil {
		w.kube.Close()
	}
	if w.node != nil {
		err = errors.Join(err, w.node.Close())
	}
	return err
}

// verifyAccessToken checks that a token is the pod's and valid now.
func (w *world) verifyAccessToken(token string, p *pod) (googletest.Issued, error) {
	issued, known := w.google.Lookup(token)
	switch {
	case !known:
		return issued, errors.New("Google did not issue the token")
	case issued.Subject != p.subject || issued.Email != p.email:
		return issued, &wrongError{fmt.Sprintf("the token is of %s %s, want %s %s", issued.Subject, issued.Email,
			p.subject, p.email)}
	case !time.Now().Before(issued.Expires):
		return issued, fmt.Errorf("the token expired %s ago", time.Since(issued.Expires).Round(time.Millisecond))
	}
	return issued, nil
}

// wrongError is an identity that is not the pod's: it fails the run, whatever the table says.
type wrongError struct{ text string }

func (e *wrongError) Error() string { return e.text }

// verifyIDToken verifies a token as its audience does: signature, audience, time and email.
func (w *world) verifyIDToken(token string, p *pod) error {
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.RS256})
	if err != nil {
		return errors.New("the token is no JWT")
	}
	var claims struct {
		jwt.Claims
		Email string `json:"email"`
	}
	if err := parsed.Claims(w.google.JWKS(), &claims); err != nil {
		return err
	}
	if err := claims.Validate(jwt.Expected{AnyAudience: jwt.Audience{idAudience}, Time: time.Now()}); err != nil {
		return err
	}
	if claims.Email != p.email {
		return &wrongError{fmt.Sprintf("the ID token is of %s, want %s", claims.Email, p.email)}
	}
	return nil
}
