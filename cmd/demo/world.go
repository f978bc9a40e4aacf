package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
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
	readerEmail = "reader@my-project.iam.gserviceaccount.com"
	writerEmail = "writer@my-project.iam.gserviceaccount.com"
	provider    = "projects/123456789012/locations/global/workloadIdentityPools/my-pool/providers/my-cluster"
	audience    = "//iam.googleapis.com/" + provider
	nodeName    = "node1"
	nodeSecret  = "the-node's-own-cloud-credentials" // what the cloud's own metadata server gives to whoever asks
)

// world is a node and what surrounds it.
type world struct {
	node       *netnstest.Node
	reader     *netnstest.NS // default/reader, linked to readerEmail
	writer     *netnstest.NS // default/writer, linked to writerEmail
	stranger   *netnstest.NS // on the pod network, and Kubernetes does not know it
	neighbour  *netnstest.NS // another host of the LAN
	kube       *kubetest.Server
	google     *googletest.Server
	cloud      *http.Server
	cloudAsked atomic.Int32
	probe      *probe
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

// populate puts pods, a neighbour and the stand-ins around the node.
func (w *world) populate(ctx context.Context) (err error) {
	for _, p := range []struct {
		name string
		ns   **netnstest.NS
	}{{"reader", &w.reader}, {"writer", &w.writer}, {"stranger", &w.stranger}} {
		if *p.ns, err = w.node.AddPod(p.name); err != nil {
			return err
		}
	}
	if w.neighbour, err = w.node.AddNeighbour("neighbour"); err != nil {
		return err
	}
	for _, to := range []string{"169.254.169.254/32", "169.254.169.252/32"} {
		if out, err := w.neighbour.Command(ctx, "ip", "route", "add", to, "via", w.node.Addr.String()).CombinedOutput(); err != nil {
			return fmt.Errorf("ip route add %s: %w: %s", to, err, out)
		}
	}
	if err := w.startCloud(); err != nil {
		return err
	}
	if err := w.startKubernetes(); err != nil {
		return err
	}
	return w.startGoogle()
}

// startCloud serves what many a cloud has at 169.254.169.254: the node's own credentials, for whoever asks.
func (w *world) startCloud() error {
	l, err := w.node.Cloud.Listen("tcp4", "169.254.169.254:80")
	if err != nil {
		return err
	}
	w.cloud = &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		w.cloudAsked.Add(1)
		_, _ = io.WriteString(rw, nodeSecret)
	})}
	go func() { _ = w.cloud.Serve(l) }()
	return nil
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
	for _, p := range []struct {
		name, email string
		ns          *netnstest.NS
	}{{"reader", readerEmail, w.reader}, {"writer", writerEmail, w.writer}} {
		w.kube.SetServiceAccount("default", p.name, map[string]string{"iam.gke.io/gcp-service-account": p.email})
		w.kube.SetPod(kubetest.Pod{Namespace: "default", Name: p.name, ServiceAccount: p.name, Node: nodeName, Addresses: []string{p.ns.Addr.String()}})
	}
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
	w.google.Allow("system:serviceaccount:default:reader", readerEmail)
	w.google.Allow("system:serviceaccount:default:writer", writerEmail)
	return w.google.WriteCA(filepath.Join(w.dir, "google-ca.pem"))
}

// configure writes what an operator would write.
func (w *world) configure(kubeconfig string) error {
	return os.WriteFile(filepath.Join(w.dir, "config.yaml"), fmt.Appendf(nil, `workloadIdentityProvider: %s
projectID: my-project
kubeconfig: %q
google: {stsURL: %s, iamCredentialsURL: %s, caFile: %s/google-ca.pem}
log: {format: text}
`, provider, kubeconfig, w.google.STSURL(), w.google.URL(), w.dir), 0o644)
}

func (w *world) close() error {
	var err error
	if w.probe != nil {
		err = w.probe.end()
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
	if err := claims.Validate(jwt.Expected{AnyAudience: jwt.Audience{"https://run.example.com"}, Time: time.Now()}); err != nil {
		return err
	}
	if claims.Email != email {
		return fmt.Errorf("the ID token is %s's, and not %s's", claims.Email, email)
	}
	return nil
}

// answered is what somebody got.
type answered struct {
	status int
	body   string
}

// ask sends what a client library sends, from inside a namespace.
func ask(ctx context.Context, from *netnstest.NS, path string) (answered, error) {
	return askAt(ctx, from, "169.254.169.254", path)
}

func askAt(ctx context.Context, from *netnstest.NS, host, path string) (answered, error) {
	client := http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return from.Dial(ctx, network, addr)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+host+path, nil)
	if err != nil {
		return answered{}, err
	}
	req.Header.Set("Metadata-Flavor", "Google")
	res, err := client.Do(req)
	if err != nil {
		return answered{}, err
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	return answered{res.StatusCode, string(body)}, err
}
