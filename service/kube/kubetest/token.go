package kubetest

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// tokenKey is shared by all servers of a process, since it takes long to generate.
var tokenKey = sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, 2048) })

func (s *Server) newSigner() error {
	key, err := tokenKey()
	if err != nil {
		return fmt.Errorf("make the key of tokens: %w", err)
	}
	s.key = key
	s.signer, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256,
		Key: jose.JSONWebKey{Key: key, KeyID: keyID(key)}}, nil)
	return err
}

// keyID is the hash of the public key, as the real server makes it.
func keyID(key *rsa.PrivateKey) string {
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		panic(fmt.Sprintf("kubetest: %v", err)) // an RSA key
	}
	h := sha256.Sum256(der)
	return base64.RawURLEncoding.EncodeToString(h[:])
}

// JWKS are the public keys of the tokens, as /openid/v1/jwks answers them.
func (s *Server) JWKS() jose.JSONWebKeySet {
	return jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: s.key.Public(), KeyID: keyID(s.key),
		Algorithm: string(jose.RS256), Use: "sig"}}}
}

func (s *Server) serveJWKS(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/jwk-set+json")
	_ = json.NewEncoder(w).Encode(s.JWKS()) // the client left: nobody to tell
}

// claims are those of a bound ServiceAccount token; times in seconds since 1970. Aud is always an
// array, as the real server writes it.
type claims struct {
	Aud        []string         `json:"aud"`
	Exp        int64            `json:"exp"`
	Iat        int64            `json:"iat"`
	Iss        string           `json:"iss"`
	JTI        string           `json:"jti"`
	Kubernetes kubernetesClaims `json:"kubernetes.io"`
	Nbf        int64            `json:"nbf"`
	Sub        string           `json:"sub"`
}

type kubernetesClaims struct {
	Namespace      string `json:"namespace"`
	Node           *ref   `json:"node,omitempty"`
	Pod            *ref   `json:"pod,omitempty"`
	ServiceAccount ref    `json:"serviceaccount"`
	WarnAfter      int64  `json:"warnafter,omitempty"`
}

type ref struct {
	Name string `json:"name"`
	UID  string `json:"uid,omitempty"`
}

func (s *Server) sign(c claims) (string, error) {
	b, err := json.Marshal(c)
	if err != nil {
		return "", err
	}
	signed, err := s.signer.Sign(b)
	if err != nil {
		return "", err
	}
	return signed.CompactSerialize()
}

const uidMismatch = "the UID in the bound object reference (%s) does not match the UID in record. The object might " +
	"have been deleted and then recreated"

// token answers a TokenRequest: first NodeRestriction's rules (for nodes), then the registry's, in
// the real order.
func (s *Server) token(q *request, r *http.Request, u user) (runtime.Object, error) {
	t := new(authenticationv1.TokenRequest)
	if err := s.codecs.decode(r, t); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if node, is := u.node(); is {
		if err := s.nodeRestriction(q, u, node, t); err != nil {
			return nil, err
		}
	}
	sa := s.world.serviceAccount(q.namespace, q.name)
	if sa == nil {
		return nil, apierrors.NewNotFound(schema.GroupResource{Resource: "serviceaccounts"}, q.name)
	}
	seconds := int64(3600)
	if t.Spec.ExpirationSeconds != nil {
		seconds = *t.Spec.ExpirationSeconds
	}
	invalid := func(msg string) error {
		return apierrors.NewInvalid(schema.GroupKind{Group: authenticationv1.GroupName, Kind: "TokenRequest"}, t.Name,
			field.ErrorList{field.Invalid(field.NewPath("spec", "expirationSeconds"), seconds, msg)})
	}
	switch {
	case seconds < 600:
		return nil, invalid("may not specify a duration less than 10 minutes")
	case seconds > 1<<32:
		return nil, invalid("may not specify a duration larger than 2^32 seconds")
	}
	k := kubernetesClaims{Namespace: q.namespace, ServiceAccount: ref{sa.Name, string(sa.UID)}}
	if err := s.bind(q, t.Spec.BoundObjectRef, &k); err != nil {
		return nil, err
	}
	audiences := t.Spec.Audiences
	if len(audiences) == 0 {
		audiences = []string{s.issuer}
	}
	now := s.now()
	life := time.Duration(seconds) * time.Second
	// N-09: 3607 s is what kubelet asks for, and means "as long as legacy tokens, but warn".
	if seconds == 3607 && slices.Equal(audiences, []string{s.issuer}) {
		k.WarnAfter = now.Add(life).Unix()
		life = 365 * 24 * time.Hour
	}
	value, err := s.sign(claims{
		Iss: s.issuer, Sub: fmt.Sprintf("system:serviceaccount:%s:%s", q.namespace, q.name), Aud: audiences,
		Iat: now.Unix(), Nbf: now.Unix(), Exp: now.Add(life).Unix(), JTI: string(newUID()), Kubernetes: k,
	})
	if err != nil {
		return nil, apierrors.NewInternalError(err)
	}
	s.issued = append(s.issued, value)
	t.Namespace, t.Name = q.namespace, q.name
	t.Spec.Audiences, t.Spec.ExpirationSeconds = audiences, &seconds
	t.Status = authenticationv1.TokenRequestStatus{Token: value,
		ExpirationTimestamp: metav1.NewTime(now.Add(time.Duration(seconds) * time.Second))}
	return t, nil
}

// nodeRestriction is the admission plugin: a node gets tokens only for its own pods (N-05 to N-08).
func (s *Server) nodeRestriction(q *request, u user, node string, t *authenticationv1.TokenRequest) error {
	no := func(message string, args ...any) error {
		return forbid("", "serviceaccounts", q.name, fmt.Sprintf(message, args...))
	}
	b := t.Spec.BoundObjectRef
	switch {
	case b == nil, b.Kind != "Pod", b.APIVersion != "v1", b.Name == "":
		return no("node requested token not bound to a pod")
	case b.UID == "":
		return no("node requested token with a pod binding without a uid")
	}
	p := s.world.pod(q.namespace, b.Name)
	switch {
	case p == nil:
		return apierrors.NewNotFound(schema.GroupResource{Resource: "pod"}, b.Name)
	case p.UID != b.UID:
		return no(uidMismatch, b.UID)
	case p.Spec.NodeName != node:
		return no("node requested token bound to a pod scheduled on a different node")
	case len(t.Spec.Audiences) > 1:
		return no("node may only request 0 or 1 audiences")
	}
	for _, a := range t.Spec.Audiences {
		if a != "" && !projects(p, a) && !s.rbac.allows(u, audienceVerb, a, q.namespace) {
			return no("%s is not authorized to request tokens for audience %q", u.name, a)
		}
	}
	return nil
}

func projects(p *corev1.Pod, audience string) bool {
	for _, v := range p.Spec.Volumes {
		if v.Projected == nil {
			continue
		}
		for _, src := range v.Projected.Sources {
			if src.ServiceAccountToken != nil && src.ServiceAccountToken.Audience == audience {
				return true
			}
		}
	}
	return false
}

// bind checks the object that the token is bound to, and notes it in the claims.
func (s *Server) bind(q *request, b *authenticationv1.BoundObjectReference, k *kubernetesClaims) error {
	if b == nil {
		return nil
	}
	var uid string
	switch {
	case b.Kind == "Pod" && b.APIVersion == "v1":
		p := s.world.pod(q.namespace, b.Name)
		if p == nil {
			return apierrors.NewNotFound(schema.GroupResource{Resource: "pods"}, b.Name)
		}
		if p.Spec.ServiceAccountName != q.name {
			return apierrors.NewBadRequest(fmt.Sprintf("cannot bind token for serviceaccount %q to pod running with different "+
				"serviceaccount name.", q.name))
		}
		uid = string(p.UID)
		k.Pod = &ref{p.Name, uid}
		if n := s.world.node(p.Spec.NodeName); n != nil {
			k.Node = &ref{n.Name, string(n.UID)}
		}
	case b.Kind == "Node" && b.APIVersion == "v1":
		n := s.world.node(b.Name)
		if n == nil {
			return apierrors.NewNotFound(schema.GroupResource{Resource: "nodes"}, b.Name)
		}
		uid = string(n.UID)
		k.Node = &ref{n.Name, uid}
	default:
		return apierrors.NewBadRequest(fmt.Sprintf("cannot bind token to object of type %s",
			schema.FromAPIVersionAndKind(b.APIVersion, b.Kind)))
	}
	if b.UID != "" && string(b.UID) != uid {
		return apierrors.NewConflict(schema.GroupResource{Resource: b.Kind}, b.Name, fmt.Errorf(uidMismatch, b.UID))
	}
	return nil
}
