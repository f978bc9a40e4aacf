package kube

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// Places returns the usual paths of kubelet's kubeconfig, most common first. The first that exists
// is used.
func Places() []string {
	return []string{
		"/etc/kubernetes/kubelet.conf",                          // kubeadm, kubespray, Cluster API
		"/var/lib/rancher/k3s/agent/kubelet.kubeconfig",         // k3s
		"/var/lib/rancher/rke2/agent/kubelet.kubeconfig",        // RKE2
		"/var/lib/kubelet/kubeconfig",                           // EKS (exec plugin), AKS, kOps, OpenShift
		"/var/lib/kubelet/kubeconfig-real",                      // Gardener
		"/var/lib/k0s/kubelet.conf",                             // k0s
		"/var/snap/microk8s/current/credentials/kubelet.config", // MicroK8s
		"/etc/kubernetes/kubeconfig-kubelet",                    // Talos
		"/etc/kubernetes/kubelet/kubeconfig",                    // Bottlerocket
	}
}

// credential holds a kubeconfig and the contents of all files that it names. Client-go would read
// rotated certificates again every five minutes. This package reads all files every few seconds and
// makes a new client when a byte changed. So config holds contents and no file names.
type credential struct {
	path   string
	server string
	user   string // CN of the client certificate; "" when there is none
	// expires is when that certificate does; zero when there is none.
	expires time.Time
	config  *rest.Config
	digest  [sha256.Size]byte
}

// kind names the form of the credential. It shows nothing of the credential itself.
func (c *credential) kind() string {
	switch {
	case c.config.ExecProvider != nil:
		return "plugin " + c.config.ExecProvider.Command
	case len(c.config.CertData) > 0:
		return "client certificate"
	case c.config.BearerToken != "":
		return "bearer token"
	}
	return "none"
}

// find reads the configured kubeconfig, or the first of the usual paths that exists. Where this
// user may not read the file, find reads root's copy (R-27, copy of the credential).
func (c *Cluster) find() (*credential, error) {
	k, err := locate(c.kubeconfig, c.places)
	if errors.Is(err, fs.ErrPermission) && c.copied != "" {
		if k, err = loadCopy(c.copied, c.kubeconfig, err); err != nil {
			return nil, err
		}
	}
	if err != nil {
		return nil, err
	}
	return k.credential()
}

// locate loads the given kubeconfig, or with "" the first of the places that exists.
func locate(kubeconfig string, places []string) (*contents, error) {
	if kubeconfig != "" {
		return load(kubeconfig)
	}
	for _, p := range places {
		k, err := load(p)
		if errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errReferenced) {
			continue
		}
		return k, err
	}
	return nil, fmt.Errorf("%w: none of %s exists: kubelet writes its kubeconfig when it joins the cluster, "+
		"else set kubeconfig", errNowhere, strings.Join(places, ", "))
}

// errNowhere: none of the places exists.
var errNowhere = fmt.Errorf("%w", ErrNotConfigured)

var errReferenced = errors.New("named in the kubeconfig")

// errAbsent is fs.ErrNotExist of a file that kubelet writes after its kubeconfig.
var errAbsent = fmt.Errorf("%w: kubelet writes it when its certificate is signed", fs.ErrNotExist)

// ErrIncomplete: the kubeconfig or a file that it names is empty, or that file does not exist. At a
// TLS bootstrap kubelet writes the kubeconfig first, and the certificate when it is signed.
var ErrIncomplete = errors.New("not complete yet")

// contents is a kubeconfig that names no files.
type contents struct {
	path   string
	config *clientcmdapi.Config
	digest [sha256.Size]byte // of all the files
}

func unusable(path string, err error) error {
	return fmt.Errorf("%w: %s: %w", ErrNotConfigured, path, err)
}

// waitForCopy is the remedy for a kubeconfig that this user may not read (R-27, copy of the
// credential). At a TLS bootstrap there is no copy before kubelet's certificate, which is normal.
const waitForCopy = "waiting for the copy that gke-metadata-emulator-credential.service makes once kubelet has its " +
	"certificate: systemctl status gke-metadata-emulator-credential.service"

func load(path string) (*contents, error) {
	wrong := func(err error) (*contents, error) {
		if errors.Is(err, fs.ErrPermission) {
			err = fmt.Errorf("%w: %s", fs.ErrPermission, waitForCopy)
		}
		return nil, unusable(path, err)
	}
	raw, err := os.ReadFile(path)
	if p := (*fs.PathError)(nil); errors.As(err, &p) {
		return wrong(p.Err) // unusable names the path
	}
	if err != nil {
		return wrong(err)
	}
	if len(bytes.TrimSpace(raw)) == 0 {
		return wrong(fmt.Errorf("%w: the file is empty", ErrIncomplete))
	}
	sum := sha256.New()
	sum.Write(raw)
	k, err := clientcmd.Load(raw)
	if err != nil {
		// Not the parser's message: it may quote the file, and the file may hold keys.
		return wrong(errors.New("not a kubeconfig (YAML or JSON of kind Config)"))
	}
	for _, a := range k.AuthInfos {
		a.LocationOfOrigin = path
	}
	for _, a := range k.Clusters {
		a.LocationOfOrigin = path
	}
	if err := clientcmd.ResolveLocalPaths(k); err != nil {
		return wrong(err)
	}
	if err := inline(k, func(name string) ([]byte, error) {
		b, err := os.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%w: %s, %w, %w", ErrIncomplete, name, errReferenced, errAbsent)
		}
		if err != nil {
			return nil, fmt.Errorf("%w, %w", err, errReferenced)
		}
		sum.Write([]byte(name))
		sum.Write(b)
		return b, nil
	}); err != nil {
		return wrong(err)
	}
	c := &contents{path: path, config: k}
	sum.Sum(c.digest[:0])
	return c, nil
}

func (k *contents) credential() (*credential, error) {
	cfg, err := clientcmd.NewDefaultClientConfig(*k.config, &clientcmd.ConfigOverrides{}).ClientConfig()
	if err != nil {
		return nil, unusable(k.path, err)
	}
	cred := &credential{path: k.path, server: cfg.Host, config: cfg, digest: k.digest}
	if len(cfg.CertData) > 0 {
		if cert := certificate(cfg.CertData); cert != nil {
			cred.user, cred.expires = commonName(cert), cert.NotAfter
		}
	}
	return cred, nil
}

// inline replaces the names of the files that the current context needs by their contents.
func inline(k *clientcmdapi.Config, load func(string) ([]byte, error)) error {
	ctx := k.Contexts[k.CurrentContext]
	if ctx == nil {
		return fmt.Errorf("current-context %q does not exist", k.CurrentContext)
	}
	take := func(name *string, data *[]byte) error {
		if *name == "" {
			return nil
		}
		if len(*data) == 0 {
			b, err := load(*name)
			if err != nil {
				return err
			}
			if len(bytes.TrimSpace(b)) == 0 {
				return fmt.Errorf("%w: %s, %w, is empty", ErrIncomplete, *name, errReferenced)
			}
			*data = b
		}
		*name = ""
		return nil
	}
	if cl := k.Clusters[ctx.Cluster]; cl != nil {
		if err := take(&cl.CertificateAuthority, &cl.CertificateAuthorityData); err != nil {
			return err
		}
	}
	a := k.AuthInfos[ctx.AuthInfo]
	if a == nil {
		return nil
	}
	if a.TokenFile != "" {
		b, err := load(a.TokenFile)
		if err != nil {
			return err
		}
		a.Token, a.TokenFile = strings.TrimSpace(string(b)), ""
	}
	if err := take(&a.ClientCertificate, &a.ClientCertificateData); err != nil {
		return err
	}
	return take(&a.ClientKey, &a.ClientKeyData)
}

// certificate returns the first certificate, which is the client's; nil when there is none.
func certificate(chain []byte) *x509.Certificate {
	for b, rest := pem.Decode(chain); b != nil; b, rest = pem.Decode(rest) {
		if b.Type != "CERTIFICATE" {
			continue // kubelet keeps certificate and key in one file
		}
		cert, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil
		}
		return cert
	}
	return nil
}

// commonName returns the CN. A node's name counts only together with the group of nodes.
func commonName(cert *x509.Certificate) string {
	if strings.HasPrefix(cert.Subject.CommonName, nodeUser) && !slices.Contains(cert.Subject.Organization,
		"system:nodes") {
		return ""
	}
	return cert.Subject.CommonName
}
