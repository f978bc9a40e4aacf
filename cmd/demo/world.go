package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
)

const (
	provider      = "projects/123456789012/locations/global/workloadIdentityPools/my-pool/providers/my-cluster"
	audience      = "//iam.googleapis.com/" + provider
	nodeName      = "node1"
	nodeSecret    = "the-node's-own-cloud-credentials" // the answer of the cloud's metadata server
	metadataAddr  = "169.254.169.254"
	metadataAddr6 = "[fd20:ce::254]" // as a URL has it
	listenAddr    = "169.254.169.252:988"
	cgroupRoot    = "/sys/fs/cgroup" // where the emulator looks for cgroups
)

// world is a node and what surrounds it.
type world struct {
	node       *netnstest.Node
	cgroups    *netnstest.Cgroups // of the pods; nil: no cgroups can be made, see noCgroups
	kubepods   string             // kubelet's part of cgroups: "kubepods.slice/", or "": all of it
	noCgroups  error              // why there are no cgroups
	reader     *pod
	writer     *pod
	host       *pod          // on the node's network; nil without cgroups
	stranger   *pod          // on the pod network, and unknown to Kubernetes
	neighbour  *netnstest.NS // another host of the LAN
	kube       *kubetest.Server
	google     *googletest.Server
	cloud      *http.Server
	others     *http.Server
	cloudAsked atomic.Int32
	probe      *probe
	all        []*pod // all that were started
	dir        string // configuration, kubeconfig, status socket
	temporary  string // dir, if close removes it
}

// newWorld makes a node, its pods and the stand-ins. close removes all of it.
func newWorld(ctx context.Context) (_ *world, err error) {
	w := &world{}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	if w.node, err = netnstest.New("demo"); err != nil {
		return nil, err
	}
	if w.dir, err = os.MkdirTemp("", "gke-metadata-emulator-demo"); err != nil {
		return nil, err
	}
	w.temporary = w.dir
	if err := w.makeCgroups(); err != nil {
		return nil, err
	}
	if err := w.populate(ctx); err != nil {
		return nil, err
	}
	kubeconfig, err := w.kube.Kubeconfig(nodeName)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(w.dir, "kubeconfig")
	if err := os.WriteFile(path, kubeconfig, 0o600); err != nil {
		return nil, err
	}
	return w, w.configure(path)
}

// makeCgroups makes cgroups for the pods: below this machine's cgroups, or, if those are not of
// version 2, in a hierarchy that is mounted for this process alone. If neither is possible, pods
// are attested by address.
func (w *world) makeCgroups() error {
	name := fmt.Sprintf("gke-metadata-emulator-demo-%d", os.Getpid())
	for _, root := range []string{cgroupRoot, ""} {
		c, err := netnstest.NewCgroups(root, name)
		if err == nil {
			w.cgroups, w.kubepods = c, "kubepods.slice/" // the demo is a node in a container: its root is below the machine's
			return nil
		}
		if !errors.Is(err, netnstest.ErrNoCgroups) {
			return err
		}
		w.noCgroups = err
	}
	return nil
}

// populate adds the stand-ins, another host and the pods.
func (w *world) populate(ctx context.Context) (err error) {
	if w.neighbour, err = w.node.AddNeighbour("neighbour"); err != nil {
		return err
	}
	// The other host routes every address of the node and of the pods through the node (R-05, uplinks
	// are never redirected).
	routes := map[netip.Addr][]string{w.node.Addr: {"169.254.169.254/32", "169.254.169.252/32", "10.244.0.0/16",
		"10.245.0.0/16"}}
	if haveIPv6() {
		routes[w.node.Addr6] = []string{"fd20:ce::254/128", "fd20:ce::252/128", "fd00:244::/64", "fd00:245::/64"}
	}
	for via, all := range routes {
		for _, to := range all {
			if out, err := w.neighbour.Command(ctx, "ip", "route", "add", to, "via", via.String()).CombinedOutput(); err != nil {
				return fmt.Errorf("ip route add %s: %w: %s", to, err, out)
			}
		}
	}
	if err := w.startCloud(); err != nil {
		return err
	}
	if err := w.startKubernetes(); err != nil {
		return err
	}
	if err := w.startGoogle(); err != nil {
		return err
	}
	for _, p := range []struct {
		name string
		pod  **pod
	}{{"reader", &w.reader}, {"writer", &w.writer}, {"stranger", &w.stranger}} {
		ns, err := w.node.AddPod(p.name)
		if err != nil {
			return err
		}
		if *p.pod, err = w.startPod(p.name, ns, p.name != "stranger"); err != nil {
			return err
		}
	}
	if w.cgroups != nil {
		w.host, err = w.startPod("host", w.node.NS, true)
	}
	return err
}

// startPod starts a pod, after it was added to Kubernetes if known.
func (w *world) startPod(name string, ns *netnstest.NS, known bool) (*pod, error) {
	p := w.newPod(name, ns)
	if known {
		p.register()
	}
	if err := p.start(); err != nil {
		return nil, err
	}
	w.all = append(w.all, p)
	return p, nil
}

// startCloud starts the cloud's metadata server at 169.254.169.254: it gives the node's own
// credentials to every client, as on many clouds.
func (w *world) startCloud() error {
	w.cloud = &http.Server{ReadHeaderTimeout: 5 * time.Second,
		Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			// The node itself may send requests, and its probe sends one. Packets of pods keep their
			// addresses.
			if from, err := netip.ParseAddrPort(r.RemoteAddr); err != nil || from.Addr() != w.node.Addr &&
				from.Addr() != w.node.Addr6 {
				w.cloudAsked.Add(1)
			}
			_, _ = io.WriteString(rw, nodeSecret)
		})}
	servers := []string{"169.254.169.254:80", "169.254.169.254:443"} // H-25
	if haveIPv6() {
		servers = append(servers, "[fd00:c1::a9fe:a9fe]:80", "[fd00:ec2::254]:80", "[fd20:ce::254]:80") // R-32, H-24
	}
	for _, at := range servers {
		l, err := w.node.Cloud.Listen("tcp", at)
		if err != nil {
			return err
		}
		go func() { _ = w.cloud.Serve(l) }()
	}
	// Servers that must stay reachable: a name server at the same address, and servers of the node and
	// of pods for other hosts.
	w.others = &http.Server{ReadHeaderTimeout: 5 * time.Second,
		Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			_, _ = io.WriteString(rw, "not the metadata server: "+r.Host)
		})}
	if err := w.serveOther(w.node.Cloud, "169.254.169.254:53"); err != nil {
		return err
	}
	return w.serveOther(w.node.NS, netip.AddrPortFrom(w.node.Addr, 10250).String())
}

// haveIPv6 reports whether the kernel has IPv6.
func haveIPv6() bool {
	_, err := os.Stat("/proc/net/if_inet6")
	return err == nil
}

func (w *world) serveOther(ns *netnstest.NS, at string) error {
	l, err := ns.Listen("tcp4", at)
	if err == nil {
		go func() { _ = w.others.Serve(l) }()
	}
	return err
}

func (w *world) startKubernetes() error {
	l, err := w.node.Cloud.Listen("tcp4", netip.AddrPortFrom(w.node.Cloud.Addr, 6443).String())
	if err != nil {
		return err
	}
	if w.kube, err = kubetest.New(kubetest.Options{Listener: l}); err != nil {
		return err
	}
	w.kube.GrantAudience(audience)
	return nil
}

func (w *world) startGoogle() error {
	l, err := w.node.Cloud.Listen("tcp4", netip.AddrPortFrom(w.node.Cloud.Addr, 443).String())
	if err != nil {
		return err
	}
	if w.google, err = googletest.New(googletest.Options{Listener: l, Providers: map[string]googletest.Provider{
		audience: {Issuer: w.kube.Issuer(), JWKS: w.kube.JWKS},
	}}); err != nil {
		return err
	}
	return w.google.WriteCA(filepath.Join(w.dir, "google-ca.pem"))
}

// configure writes the configuration of an operator.
func (w *world) configure(kubeconfig string) error {
	attestation := ""
	if w.cgroups == nil {
		attestation = "attestation: {mode: source-ip}\n"
	}
	return os.WriteFile(filepath.Join(w.dir, "config.yaml"), fmt.Appendf(nil, `workloadIdentityProvider: %s
projectID: my-project
kubeconfig: %q
%sgoogle: {stsURL: %s, iamCredentialsURL: %s, caFile: %s/google-ca.pem}
log: {format: text}
`, provider, kubeconfig, attestation, w.google.STSURL(), w.google.URL(), w.dir), 0o644)
}

func (w *world) close() error {
	var err error
	if w.probe != nil {
		err = w.probe.end()
	}
	for _, p := range w.all {
		p.die()
	}
	if w.cgroups != nil {
		err = errors.Join(err, w.cgroups.Close())
	}
	if w.google != nil {
		w.google.Close()
	}
	if w.kube != nil {
		w.kube.Close()
	}
	if w.cloud != nil {
		_ = w.cloud.Close()
	}
	if w.others != nil {
		_ = w.others.Close()
	}
	if w.node != nil {
		err = errors.Join(err, w.node.Close())
	}
	if w.temporary != "" {
		err = errors.Join(err, os.RemoveAll(w.temporary))
	}
	return err
}

// secrets are all tokens that the stand-ins issued or received.
func (w *world) secrets() []string { return append(w.google.Secrets(), w.kube.IssuedTokens()...) }

// verifyIDToken verifies a token as its audience does: signature, audience, time and email.
func (w *world) verifyIDToken(token, email string) error {
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.RS256})
	if err != nil {
		return err
	}
	var claims struct {
		jwt.Claims
		Email string `json:"email"`
	}
	if err := parsed.Claims(w.google.JWKS(), &claims); err != nil {
		return err
	}
	if err := claims.Validate(jwt.Expected{AnyAudience: jwt.Audience{"https://run.example.com"},
		Time: time.Now()}); err != nil {
		return err
	}
	if claims.Email != email {
		return fmt.Errorf("the ID token has the email %q, want %q", claims.Email, email)
	}
	return nil
}
