package kube

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/connrotation"
)

const (
	callTimeout = 10 * time.Second // one call; a watch lives longer
	listTimeout = 30 * time.Second

	// With client-go's default of 5 a second 100 pods would wait for 20 s (N-16, client-go's limiter).
	// The API server has its own limits (priority and fairness). These stop a bug of this service.
	qps, burst = 200, 400
)

// Client-go repeats a request ten times, a second apart, before it returns an error. The reflector
// has its own backoff, and pods wait for the other requests. One retry covers a connection that
// died unnoticed.
const noRetry, retryOnce = 0, 1

// client holds the connections of one credential. A new credential gets a new client.
type client struct {
	core, auth rest.Interface
	http       *http.Client
	conns      *connrotation.Dialer
}

// codec encodes core/v1 and authentication/v1 only. The whole clientset would add 15 MB to the
// binary.
type codec struct {
	runtime.NegotiatedSerializer
	runtime.ParameterCodec
}

func newCodec() codec {
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, authenticationv1.AddToScheme} {
		if err := add(s); err != nil {
			panic(fmt.Sprintf("kube: %v", err)) // two constant type tables contradict each other
		}
	}
	metav1.AddToGroupVersion(s, schema.GroupVersion{Version: "v1"})
	return codec{serializer.NewCodecFactory(s).WithoutConversion(), runtime.NewParameterCodec(s)}
}

func newClient(cfg *rest.Config, codec codec, userAgent string) (*client, error) {
	cfg = rest.CopyConfig(cfg)
	cfg.UserAgent = userAgent
	cfg.QPS, cfg.Burst = qps, burst
	cfg.WarningHandlerWithContext = rest.NoWarnings{}
	cfg.NegotiatedSerializer = codec.NegotiatedSerializer
	cfg.ContentType = runtime.ContentTypeProtobuf
	cfg.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	// With its own dialer, client-go does not share this transport with the previous credential.
	conns := connrotation.NewDialer((&net.Dialer{Timeout: callTimeout, KeepAlive: 30 * time.Second}).DialContext)
	cfg.Dial = conns.DialContext
	cfg.Wrap(func(rt http.RoundTripper) http.RoundTripper { return bounding{rt} })
	h, err := rest.HTTPClientFor(cfg)
	if err != nil {
		return nil, err
	}
	c := &client{http: h, conns: conns}
	for _, g := range []struct {
		path string
		gv   schema.GroupVersion
		to   *rest.Interface
	}{
		{"/api", corev1.SchemeGroupVersion, &c.core},
		{"/apis", authenticationv1.SchemeGroupVersion, &c.auth},
	} {
		cfg := rest.CopyConfig(cfg)
		cfg.APIPath, cfg.GroupVersion = g.path, &g.gv
		if *g.to, err = rest.RESTClientForConfigAndClient(cfg, h); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// close ends every connection, also connections in use.
func (c *client) close() {
	if c.http == nil {
		return
	}
	c.conns.CloseAll()
	c.http.CloseIdleConnections()
}

// reach returns the client in use, or why there is none.
func (c *Cluster) reach() (*client, error) {
	if k := c.client.Load(); k != nil {
		return k, nil
	}
	return nil, c.problem()
}

func (c *Cluster) listPods(ctx context.Context, k *client, o metav1.ListOptions) (*corev1.PodList, error) {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	l := new(corev1.PodList)
	err := k.core.Get().MaxRetries(noRetry).Resource("pods").VersionedParams(&o, c.codec).Do(ctx).Into(l)
	return l, brief(err)
}

func (c *Cluster) watch(ctx context.Context, k *client, namespace, resource string,
	o metav1.ListOptions) (watch.Interface, error) {
	o.Watch = true
	r := k.core.Get().MaxRetries(noRetry)
	if namespace != "" {
		r = r.Namespace(namespace)
	}
	w, err := r.Resource(resource).VersionedParams(&o, c.codec).Watch(ctx)
	return w, brief(err)
}

// whoami asks the API server for the name of this credential's user. It returns "" where the
// identity may not ask, and where the API server has no SelfSubjectReview.
func (c *Cluster) whoami(ctx context.Context, k *client) (string, error) {
	call := call{verb: "create", resource: "selfsubjectreviews"}
	cctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	r := new(authenticationv1.SelfSubjectReview)
	err := brief(k.auth.Post().Resource(call.resource).Body(new(authenticationv1.SelfSubjectReview)).Do(cctx).Into(r))
	if apierrors.IsForbidden(err) || apierrors.IsNotFound(err) {
		c.contact()
		return "", nil
	}
	return r.Status.UserInfo.Username, c.classify(ctx, call, err)
}

// identify returns this node's name: the configured name, else the credential's, else the host
// name.
func (c *Cluster) identify(ctx context.Context, k *client, cred *credential) (name, user string, err error) {
	user, source := cred.user, "client certificate"
	if user == "" {
		user, err = c.whoami(ctx, k)
		source = "SelfSubjectReview"
		if err != nil && (ctx.Err() != nil || c.nodeName == "") {
			return "", "", err
		}
	}
	own, isNode := strings.CutPrefix(user, nodeUser)
	switch {
	case c.nodeName != "" && isNode && own != c.nodeName:
		m := nameMismatch{configured: c.nodeName, credential: own}
		if old := c.mismatch.Swap(&m); old != nil && *old == m {
			return c.nodeName, user, nil // logged before
		}
		c.log.Errorf("nodeName is %q, but the credential belongs to node %q: Kubernetes refuses other nodes' pods: correct "+
			"or remove nodeName", c.nodeName, own)
		return c.nodeName, user, nil
	case c.nodeName != "":
		c.mismatch.Store(nil)
		return c.nodeName, user, nil
	case isNode && own != "":
		c.log.WithField("source", source).Infof("node name %q", own)
		return own, user, nil
	}
	h, err := os.Hostname()
	if err != nil {
		return "", "", fmt.Errorf("node name unknown: nodeName is not set and the host has no name: %w", err)
	}
	h = strings.ToLower(strings.TrimSpace(h)) // as kubelet does
	c.log.WithField("source", "host name").Infof("node name %q", h)
	return h, user, nil
}

var errNoToken = errors.New("the API server's answer to a TokenRequest holds no token")
