package kube

import (
	"context"
	"errors"
	"fmt"
	"slices"

	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

const (
	tokens = "serviceaccounts/token"

	// tokenSeconds is not 3607: with the API server's own audience, 3607 gives a token of one year
	// (N-09, extended tokens).
	tokenSeconds = 3600

	podsToTry = 3 // at most, when one pod after the other turns out to be gone
)

// Token requests a token of the ServiceAccount with Options.Audience. The token is bound by name
// and UID to a live pod of this node that uses the account, and expires with the pod (N-04, bound
// tokens). A running pod is preferred to a starting one, and either to a terminating one.
//
// For an account of Options.Hosts that no such pod uses, the token is bound to nothing. A node's
// own credential may not request such a token (N-07, unbound requests).
//
// Errors: ErrNoPod, ErrNotFound, *ForbiddenError, *AwayError, ErrNotConfigured.
func (c *Cluster) Token(ctx context.Context, sa workload.ServiceAccount) (jwt string, err error) {
	k, err := c.reach()
	if err != nil {
		return "", fmt.Errorf("token of ServiceAccount %s: %w", sa, err)
	}
	x := c.pods.current.Load()
	if !x.synced {
		return "", fmt.Errorf("token of ServiceAccount %s: %w", sa, c.problem())
	}
	users := slices.Clone(x.byAccount[sa])
	slices.SortStableFunc(users, func(a, b *pod) int { return a.rank() - b.rank() })
	err = ErrNoPod
	for _, p := range users[:min(len(users), podsToTry)] {
		if jwt, err = c.request(ctx, k, sa, p); !errors.Is(err, ErrNoPod) {
			break
		}
		c.log.WithError(err).Debugf("no token of %s for pod %s", sa, p.caller)
	}
	if errors.Is(err, ErrNoPod) && slices.Contains(c.pods.hosts, sa) {
		jwt, err = c.request(ctx, k, sa, nil)
	}
	if err != nil {
		return "", fmt.Errorf("token of ServiceAccount %s: %w", sa, err)
	}
	return jwt, nil
}

// rank orders pods by the expected life of a token that is bound to them; 0 is best.
func (p *pod) rank() int {
	switch {
	case p.terminating:
		return 2
	case !p.running:
		return 1
	}
	return 0
}

// request requests a token that is bound to p. With nil it is bound to nothing.
func (c *Cluster) request(ctx context.Context, k *client, sa workload.ServiceAccount, p *pod) (string, error) {
	cctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	seconds := int64(tokenSeconds)
	ask := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &seconds}}
	if p != nil {
		ask.Spec.BoundObjectRef = &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod",
			Name: p.caller.PodName, UID: types.UID(p.caller.PodUID)}
	}
	if c.audience != "" {
		ask.Spec.Audiences = []string{c.audience}
	}
	got := new(authenticationv1.TokenRequest)
	r := k.core.Post().MaxRetries(retryOnce).Namespace(sa.Namespace).Resource("serviceaccounts").Name(sa.Name).
		SubResource("token").
		VersionedParams(&metav1.CreateOptions{}, c.codec).Body(ask).Do(cctx)
	var code int
	err := brief(r.StatusCode(&code).Into(got))
	if code >= 200 && code < 300 && (err != nil || got.Status.Token == "") {
		err = errNoToken // not the decoder's message: the body that it could not decode is a token
	}
	err = c.classify(ctx, call{verb: "create", resource: tokens, namespace: sa.Namespace, unbound: p == nil}, err)
	if err != nil {
		return "", tokenError(err)
	}
	return got.Status.Token, nil
}

// tokenError recognises refusals because of the pod (N-08, errors of TokenRequest) or of the
// ServiceAccount.
func tokenError(err error) error {
	var status apierrors.APIStatus
	if !errors.As(err, &status) {
		return err
	}
	var away *AwayError
	if errors.As(err, &away) {
		return err
	}
	st := status.Status()
	switch {
	case apierrors.IsNotFound(err) && st.Details != nil && st.Details.Kind == "serviceaccounts":
		return fmt.Errorf("%w: %w", ErrNotFound, err)
	case apierrors.IsNotFound(err), apierrors.IsConflict(err), apierrors.IsBadRequest(err):
		return fmt.Errorf("%w: %w", ErrNoPod, err)
	}
	return fmt.Errorf("the API server refused the TokenRequest: %w", err)
}
