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
	nodeSecret    = "the-node's-own-cloud-credentials" // what the cloud's own metadata server gives to whoever asks
	metadataAddr  = "169.254.169.254"
	metadataAddr6 = "[fd20:ce::254]" // as a URL has it
	listenAddr    = "169.254.169.252:988"
	cgroupRoot    = "/sys/fs/cgroup" // where the emulator looks
)

// world is a node and what surrounds it.
type world struct {
	node       *netnstest.Node
	cgroups    *netnstest.Cgroups // where pods are born; nil: nowhere, since no cgroups can be made
	kubepods   string             // kubelet's part of it: "kubepods.slice/", or "" where the whole is kubelet's
	noCgroups  error              // why
	reader     *pod
	writer     *pod
	host       *pod          // on the node's network; nil without cgroups
	stranger   *pod          // a pod's process on the pod network, and Kubernetes does not know it
	neighbour  *netnstest.NS // another host of the LAN
	kube       *kubetest.Server
	google     *googletest.Server
	cloud      *http.Server
	others     *http.Server
	cloudAsked atomic.Int32
	probe      *probe
	all        []*pod // that were started
	dir        string // configuration, kubeconfig, status socket
	temporary  string // dir, where it is to go in the end
}

// newWorld makes one that is gone after close.
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

// makeCgroups has a place for pods beside what else is on this machine: in its own cgroups, or
// where it has none of version 2 in some that nobody else sees. Where there are neither, pods are
// known by their addresses.
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

// populate puts the stand-ins, a neighbour and pods around the node.
func (w *world) populate(ctx context.Context) (err error) {
	if w.neighbour, err = w.node.AddNeighbour("neighbour"); err != nil {
		return err
	}
	// whatever it can
	ways := map[netip.Addr][]string{w.node.Addr: {"169.254.169.254/32", "169.254.169.252/32", "10.244.0.0/16",
		"10.245.0.0/16"}}
	if haveIPv6() {
		ways[w.node.Six] = []string{"fd20:ce::254/128", "fd20:ce::252/128", "fd00:244::/64", "fd00:245::/64"}
	}
	for via, all := range ways {
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

// startPod starts a pod, of which Kubernetes knows before, or not at all.
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

// startCloud serves what many a cloud has at 169.254.169.254: the node's own credentials, for
// whoever asks.
func (w *world) startCloud() error {
	w.cloud = &http.Server{ReadHeaderTimeout: 5 * time.Second,
		Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			// The node may ask what is there, and does so once; its pods' packets keep their own addresses.
			if from, err := netip.ParseAddrPort(r.RemoteAddr); err != nil || from.Addr() != w.node.Addr &&
				from.Addr() != w.node.Six {
				w.cloudAsked.Add(1)
			}
			_, _ = io.WriteString(rw, nodeSecret)
		})}
	servers := []string{"169.254.169.254:80", "169.254.169.254:443"} // H-25
	if haveIPv6() {
		servers = append(servers, "[fd00:ec2::254]:80", "[fd20:ce::254]:80") // R-32, H-24
	}
	for _, at := range servers {
		l, err := w.node.Cloud.Listen("tcp", at)
		if err != nil {
			return err
		}
		go func() { _ = w.cloud.Serve(l) }()
	}
	// What is nobody's to keep from anybody: a name server beside it, and what node and pods have for
	// other hosts.
	w.others = &http.Server{ReadHeaderTimeout: 5 * time.Second,
		Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			_, _ = io.WriteString(rw, "not the metadata server: "+r.Host)
		})}
	if err := w.serveOther(w.node.Cloud, "169.254.169.254:53"); err != nil {
		return err
	}
	return w.serveOther(w.node.NS, netip.AddrPortFrom(w.node.Addr, 10250).String())
}

// haveIPv6 says whether the kernel has it.
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

// configure writes what an operator would write.
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

// secrets are all tokens that the stand-ins gave out or were shown.
func (w *world) secrets() []string { return append(w.google.Secrets(), w.kube.IssuedTokens()...) }

// verifyIDToken does what the service that the token is for would do.
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
		return fmt.Errorf("the ID token is %s's, and not %s's", claims.Email, email)
	}
	return nil
}
