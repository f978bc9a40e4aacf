package kubetest

import (
	"fmt"
	"net/http"
	"strconv"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/version"
)

// route authorizes and answers.
func (s *Server) route(a *answerer, r *http.Request, u user) {
	q := a.q
	s.mu.Lock()
	err := s.authorize(u, q)
	s.mu.Unlock()
	if err == nil && q.fieldsErr != nil {
		err = apierrors.NewBadRequest(q.fieldsErr.Error())
	}
	if err == nil {
		err = supported(q)
	}
	if err != nil {
		a.fail(err)
		return
	}
	var o runtime.Object
	code := http.StatusOK
	switch {
	case q.resource == "":
		s.plain(a)
		return
	case q.verb == "watch":
		s.watch(a, r)
		return
	case q.verb == "list":
		o, err = s.list(q)
	case q.verb == "get" && q.subresource == "":
		o, err = s.get(q)
	case q.kind() == "serviceaccounts/token" && q.verb == "create":
		code = http.StatusCreated
		o, err = s.token(q, r, u)
	case q.kind() == "selfsubjectreviews" && q.verb == "create":
		code = http.StatusCreated
		o, err = s.review(r, u)
	default:
		err = apierrors.NewMethodNotSupported(schema.GroupResource{Group: q.group, Resource: q.resource}, q.verb)
	}
	if err != nil {
		a.fail(err)
		return
	}
	a.write(code, o)
}

// supported refuses what this server does not know, and selectors that the real one does not.
func supported(q *request) error {
	labels := map[string]bool{"metadata.name": true, "metadata.namespace": true}
	switch {
	case q.resource == "", q.group == "" && q.version == "v1" && q.resource == "serviceaccounts",
		q.group == "" && q.version == "v1" && q.resource == "nodes",
		q.group == authenticationv1.GroupName && q.version == "v1" && q.resource == "selfsubjectreviews":
	case q.group == "" && q.version == "v1" && q.resource == "pods":
		for k := range fieldsOf(&corev1.Pod{}) {
			labels[k] = true
		}
	default:
		return &apierrors.StatusError{ErrStatus: metav1.Status{Status: metav1.StatusFailure, Code: http.StatusNotFound,
			Reason:  metav1.StatusReasonNotFound,
			Message: "the server could not find the requested resource", Details: &metav1.StatusDetails{}}}
	}
	for _, r := range q.fields.Requirements() {
		if !labels[r.Field] {
			return apierrors.NewBadRequest(fmt.Sprintf("field label not supported: %s", r.Field))
		}
	}
	return nil
}

// plain answers the paths that are no resources.
func (s *Server) plain(a *answerer) {
	switch a.q.path {
	case "/version":
		a.w.Header().Set("Content-Type", "application/json")
		v := version.Info{Major: "1", Minor: "37", GitVersion: "v1.37.2"}
		_, _ = fmt.Fprintf(a.w, `{"major":%q,"minor":%q,"gitVersion":%q}`, v.Major, v.Minor, v.GitVersion)
	case "/openid/v1/jwks":
		s.serveJWKS(a.w)
	case "/.well-known/openid-configuration":
		a.w.Header().Set("Content-Type", "application/json")
		_, _ = fmt.Fprintf(a.w, `{"issuer":%q,"jwks_uri":%q,"response_types_supported":["id_token"],`+
			`"subject_types_supported":["public"],"id_token_signing_alg_values_supported":["RS256"]}`,
			s.issuer, s.url+"/openid/v1/jwks")
	default:
		_, _ = fmt.Fprint(a.w, "ok")
	}
}

// checkVersion refuses a resourceVersion that is no number, or that the server has not reached.
func (w *world) checkVersion(q *request) (uint64, error) {
	rv := q.query.Get("resourceVersion")
	if rv == "" || rv == "0" {
		return 0, nil
	}
	v, err := strconv.ParseUint(rv, 10, 64)
	if err != nil {
		return 0, apierrors.NewBadRequest(fmt.Sprintf("resourceVersion: Invalid value: %q: %v", rv, err))
	}
	if v > w.version {
		e := apierrors.NewTimeoutError(fmt.Sprintf("Too large resource version: %d, current: %d", v, w.version), 1)
		e.ErrStatus.Details.Causes = []metav1.StatusCause{{Type: metav1.CauseTypeResourceVersionTooLarge,
			Message: "Too large resource version"}}
		return 0, e
	}
	return v, nil
}

func (s *Server) list(q *request) (runtime.Object, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.world.checkVersion(q); err != nil {
		return nil, err
	}
	m := metav1.ListMeta{ResourceVersion: strconv.FormatUint(s.world.version, 10)}
	objects := s.world.list(q)
	switch q.resource {
	case "pods":
		l := &corev1.PodList{ListMeta: m, Items: []corev1.Pod{}}
		for _, o := range objects {
			l.Items = append(l.Items, *o.(*corev1.Pod))
		}
		return l, nil
	case "serviceaccounts":
		l := &corev1.ServiceAccountList{ListMeta: m, Items: []corev1.ServiceAccount{}}
		for _, o := range objects {
			l.Items = append(l.Items, *o.(*corev1.ServiceAccount))
		}
		return l, nil
	case "nodes":
		l := &corev1.NodeList{ListMeta: m, Items: []corev1.Node{}}
		for _, o := range objects {
			l.Items = append(l.Items, *o.(*corev1.Node))
		}
		return l, nil
	}
	return nil, apierrors.NewMethodNotSupported(schema.GroupResource{Group: q.group, Resource: q.resource}, "list")
}

func (s *Server) get(q *request) (runtime.Object, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.world.objects[q.resource][q.namespace+"/"+q.name]
	if o == nil {
		return nil, apierrors.NewNotFound(schema.GroupResource{Group: q.group, Resource: q.resource}, q.name)
	}
	return o, nil
}

func (s *Server) review(r *http.Request, u user) (runtime.Object, error) {
	o := new(authenticationv1.SelfSubjectReview)
	if err := s.codecs.decode(r, o); err != nil {
		return nil, err
	}
	o.Status.UserInfo = authenticationv1.UserInfo{Username: u.name, Groups: u.groups}
	return o, nil
}
