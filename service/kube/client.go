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

	// client-go's default of 5 a second would make 100 pods wait 20 s (N-16). The API server has limits of its own
	// (priority and fairness); these only stop a bug of ours.
	qps, burst = 200, 400
)

// Client-go repeats a request ten times, a second apart, before it says that something is wrong. The reflector has a pace of its own, and
// pods wait for the others: once will do, for a connection that died unnoticed.
const noRetry, retryOnce = 0, 1

// client is one credential's connections. It is thrown away with it.
type client struct {
	core, auth rest.Interface
	http       *http.Client
	conns      *connrotation.Dialer
}

// codec speaks core/v1 and authentication/v1 and nothing else: the whole clientset is 15 MB of binary more.
type codec struct {
	runtime.NegotiatedSerializer
	runtime.ParameterCodec
}

func newCodec() codec {
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, authenticationv1.AddToScheme} {
		if err := add(s); err != nil {
			panic(fmt.Sprintf("kube: %v", err)) // two constant type tables that contradict each other
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
	// A dialer of our own also keeps client-go from sharing this transport with the previous credential's.
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

// close ends every connection, also those in use.
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

func (c *Cluster) watch(ctx context.Context, k *client, namespace, resource string, o metav1.ListOptions) (watch.Interface, error) {
	o.Watch = true
	r := k.core.Get().MaxRetries(noRetry)
	if namespace != "" {
		r = r.Namespace(namespace)
	}
	w, err := r.Resource(resource).VersionedParams(&o, c.codec).Watch(ctx)
	return w, brief(err)
}

// whoami asks the API server who we are. An identity that may not ask, and a server that is too old to be asked, is "".
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
	return r.Status.UserInfo.Username, c.judge(ctx, call, err)
}

// identify finds this node's name: configured, else the credential's, else the host's.
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
			return c.nodeName, user, nil // said before
		}
		c.log.Errorf("nodeName is %q, but the credential is node %q's: the configured name is used, and Kubernetes will refuse it unless it is granted more; correct or remove nodeName", c.nodeName, own)
		return c.nodeName, user, nil
	case c.nodeName != "":
		c.mismatch.Store(nil)
		return c.nodeName, user, nil
	case isNode && own != "":
		c.log.WithField("source", source).Infof("this node is %q", own)
		return own, user, nil
	}
	h, err := os.Hostname()
	if err != nil {
		return "", "", fmt.Errorf("nodeName is not set and the host has no name: %w", err)
	}
	h = strings.ToLower(strings.TrimSpace(h)) // as kubelet does
	c.log.WithField("source", "host name").Infof("this node is %q", h)
	return h, user, nil
}

var errNoToken = errors.New("the API server's answer to a TokenRequest cannot be read")
