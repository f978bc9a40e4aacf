package kubetest

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
)

// request is what the path, the query and the method ask for.
type request struct {
	path                        string
	verb, resource, subresource string
	group, version              string
	namespace, name             string
	query                       url.Values
	fields                      fields.Selector
	fieldsErr                   error
	out                         *format
}

// kind is resource or resource/subresource, as RBAC rules name it.
func (q *request) kind() string {
	if q.subresource != "" {
		return q.resource + "/" + q.subresource
	}
	return q.resource
}

func (q *request) watching() bool { return q.verb == "watch" }

func (q *request) matches(o runtime.Object) bool {
	if q.namespace != "" && accessor(o).GetNamespace() != q.namespace {
		return false
	}
	return q.fields.Matches(fieldsOf(o))
}

// parse reads /api/v1/[namespaces/NS/]RESOURCE[/NAME[/SUBRESOURCE]] and /apis/GROUP/VERSION/….
func parse(r *http.Request) *request {
	q := &request{path: r.URL.Path, query: r.URL.Query(), fields: fields.Everything(), verb: strings.ToLower(r.Method)}
	p := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	switch {
	case len(p) >= 3 && p[0] == "api":
		q.version, p = p[1], p[2:]
	case len(p) >= 4 && p[0] == "apis":
		q.group, q.version, p = p[1], p[2], p[3:]
	default:
		return q
	}
	if p[0] == "namespaces" && len(p) >= 2 {
		q.namespace = p[1]
		if len(p) == 2 {
			q.resource, q.name, p = "namespaces", p[1], nil
		} else {
			p = p[2:]
		}
	}
	for i, to := range []*string{&q.resource, &q.name, &q.subresource} {
		if i < len(p) {
			*to = p[i]
		}
	}
	switch {
	case r.Method == http.MethodPost:
		q.verb = "create"
	case r.Method == http.MethodGet && q.name == "" && (q.query.Get("watch") == "true" || q.query.Get("watch") == "1"):
		q.verb = "watch"
	case r.Method == http.MethodGet && q.name == "":
		q.verb = "list"
	}
	if f := q.query.Get("fieldSelector"); f != "" {
		if q.fields, q.fieldsErr = fields.ParseSelector(f); q.fieldsErr != nil {
			q.fields = fields.Everything()
		}
	}
	// As the real server does, so that authorizers can treat it as one object.
	if n, found := q.fields.RequiresExactMatch("metadata.name"); found && q.name == "" {
		q.name = n
	}
	return q
}

// codecs are the formats that the server speaks.
type codecs struct {
	scheme  *runtime.Scheme
	factory serializer.CodecFactory
}

func newCodecs() codecs {
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, authenticationv1.AddToScheme} {
		if err := add(s); err != nil {
			panic(fmt.Sprintf("kubetest: %v", err)) // two constant type tables that contradict each other
		}
	}
	metav1.AddToGroupVersion(s, schema.GroupVersion{Version: "v1"})
	return codecs{s, serializer.NewCodecFactory(s)}
}

// format is one negotiated format of answers.
type format struct {
	info   runtime.SerializerInfo
	stream bool
}

func (f *format) contentType() string {
	if f.stream && !f.info.EncodesAsText {
		return f.info.MediaType + ";stream=watch"
	}
	return f.info.MediaType
}

func (c codecs) json() *format {
	i, _ := runtime.SerializerInfoForMediaType(c.factory.SupportedMediaTypes(), runtime.ContentTypeJSON)
	return &format{info: i}
}

// negotiate takes the first acceptable format; nil when there is none.
func (c codecs) negotiate(accept string, stream bool) *format {
	if accept == "" {
		accept = "*/*"
	}
	for _, a := range strings.Split(accept, ",") {
		m, _, _ := strings.Cut(strings.TrimSpace(a), ";")
		if m == "*/*" || m == "application/*" {
			m = runtime.ContentTypeJSON
		}
		if i, ok := runtime.SerializerInfoForMediaType(c.factory.SupportedMediaTypes(), m); ok &&
			m != runtime.ContentTypeYAML {
			return &format{i, stream}
		}
	}
	return nil
}

// encode writes an object with its kind and version.
func (c codecs) encode(f *format, o runtime.Object) ([]byte, error) {
	gv := corev1.SchemeGroupVersion
	if gvks, _, err := c.scheme.ObjectKinds(o); err == nil && gvks[0].Group != "" {
		gv = gvks[0].GroupVersion()
	}
	// A copy: the encoder writes kind and version into the object, and stored ones are shared.
	return runtime.Encode(c.factory.EncoderForVersion(f.info.Serializer, gv), o.DeepCopyObject())
}

// maxBody bounds request bodies; a TokenRequest has a few hundred bytes.
const maxBody = 3 << 20

// decode reads a request's body, strictly.
func (c codecs) decode(r *http.Request, into runtime.Object) error {
	m, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	if m == "" {
		m = runtime.ContentTypeJSON
	}
	i, ok := runtime.SerializerInfoForMediaType(c.factory.SupportedMediaTypes(), m)
	if !ok {
		return &apierrors.StatusError{ErrStatus: metav1.Status{Status: metav1.StatusFailure,
			Code: http.StatusUnsupportedMediaType, Reason: metav1.StatusReasonUnsupportedMediaType,
			Message: fmt.Sprintf("the body of the request was in an unknown format - accepted media types include: %s, %s",
				runtime.ContentTypeJSON, runtime.ContentTypeProtobuf)}}
	}
	b, err := io.ReadAll(io.LimitReader(r.Body, maxBody))
	if err != nil {
		return apierrors.NewBadRequest(err.Error())
	}
	if _, _, err := i.StrictSerializer.Decode(b, nil, into); err != nil {
		return apierrors.NewBadRequest(err.Error())
	}
	return nil
}

// answerer writes one answer.
type answerer struct {
	s        *Server
	w        http.ResponseWriter
	q        *request
	truncate bool // cut the body in half
}

func (a *answerer) write(code int, o runtime.Object) {
	f := a.q.out
	if f == nil {
		f = a.s.codecs.json()
	}
	f = &format{info: f.info} // a refused watch is answered by one object
	b, err := a.s.codecs.encode(f, o)
	if err != nil {
		panic(fmt.Sprintf("kubetest: encode %T: %v", o, err))
	}
	if a.truncate {
		b = b[:len(b)/2]
	}
	a.w.Header().Set("Content-Type", f.contentType())
	a.w.Header().Set("Cache-Control", "no-cache, private")
	a.w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	a.w.WriteHeader(code)
	_, _ = a.w.Write(b) // the client left: nobody to tell
}

// fail writes an error as a Status.
func (a *answerer) fail(err error) {
	st := metav1.Status{Status: metav1.StatusFailure, Code: http.StatusInternalServerError,
		Reason: metav1.StatusReasonInternalError, Message: err.Error()}
	if s, is := err.(apierrors.APIStatus); is {
		st = s.Status()
	}
	if st.Details != nil && st.Details.RetryAfterSeconds > 0 {
		a.w.Header().Set("Retry-After", strconv.Itoa(int(st.Details.RetryAfterSeconds)))
	}
	a.write(int(st.Code), &st)
}

func unauthorized() error {
	return &apierrors.StatusError{ErrStatus: metav1.Status{Status: metav1.StatusFailure, Code: http.StatusUnauthorized,
		Reason: metav1.StatusReasonUnauthorized, Message: "Unauthorized"}}
}

func notAcceptable() error {
	return &apierrors.StatusError{ErrStatus: metav1.Status{Status: metav1.StatusFailure, Code: http.StatusNotAcceptable,
		Reason: metav1.StatusReasonNotAcceptable,
		Message: fmt.Sprintf("only the following media types are accepted: %s, %s", runtime.ContentTypeJSON,
			runtime.ContentTypeProtobuf)}}
}

func forbiddenPath(u user, q *request) error {
	return &apierrors.StatusError{ErrStatus: metav1.Status{Status: metav1.StatusFailure, Code: http.StatusForbidden,
		Reason:  metav1.StatusReasonForbidden,
		Message: fmt.Sprintf("forbidden: User %q cannot %s path %q", u.name, q.verb, q.path)}}
}

// forbidden is the authorizers' refusal.
func forbidden(u user, q *request, reason string) error {
	where := "at the cluster scope"
	if q.namespace != "" {
		where = fmt.Sprintf("in the namespace %q", q.namespace)
	}
	m := fmt.Sprintf("User %q cannot %s resource %q in API group %q %s", u.name, q.verb, q.kind(), q.group, where)
	if reason != "" {
		m += ": " + reason
	}
	return forbid(q.group, q.resource, q.name, m)
}

// forbid is any 403; without a name it is about the resource.
func forbid(group, resource, name, message string) error {
	what := resource
	if name != "" {
		what = fmt.Sprintf("%s %q", resource, name)
	}
	return &apierrors.StatusError{ErrStatus: metav1.Status{Status: metav1.StatusFailure, Code: http.StatusForbidden,
		Reason:  metav1.StatusReasonForbidden,
		Message: what + " is forbidden: " + message, Details: &metav1.StatusDetails{Group: group, Kind: resource,
			Name: name}}}
}
