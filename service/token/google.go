package token

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/time/rate"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// GoogleOptions say where Google's services are, and how Google knows this cluster.
type GoogleOptions struct {
	Audience string // of the request to STS (G-03, STS audience)
	// PoolName is projects/N/locations/global/workloadIdentityPools/POOL, for hints; "" for an
	// identitynamespace.
	PoolName          string
	STSURL            string        // of the token endpoint (G-08, STS URL); without a path, /v1/token is added
	IAMCredentialsURL string        // scheme and host (G-11, generateAccessToken)
	Lifetime          time.Duration // of impersonated access tokens; 0 = an hour, IAM's usual limit
	QuotaProject      string        // of a ServiceAccount without the annotation (G-15, quota project); "" = none
	CAFile            string        // PEM, trusted beside the system's roots; "" = none
	HTTPClient        *http.Client  // nil = a new one; redirects are never followed
	Kubernetes        Kubernetes
	Log               logrus.FieldLogger
	Metrics           *Metrics // nil: nobody reads what is counted
}

// Federation supplies the federated tokens that Google impersonates with. In service it is a Cache
// in front of the same Google, so there is one exchange per ServiceAccount (G-07, limits of STS).
type Federation interface {
	Source
	Forget(r Request, t Token) // Google no longer accepts t
}

// Google is a Source that mints tokens: TokenRequest, then STS, and then IAM where the
// ServiceAccount is linked.
type Google struct {
	// Federated is set before the first use. With nil, each impersonation exchanges a token of its
	// own.
	Federated Federation

	o       GoogleOptions
	sts     string
	iam     string
	client  *http.Client
	metrics mintMetrics
	warn    *rate.Limiter

	mu     sync.Mutex
	failed map[workload.ServiceAccount]failure // what was logged last for each
}

// NewGoogle returns a Google. The error is about o.CAFile.
func NewGoogle(o GoogleOptions) (*Google, error) {
	g := &Google{
		o:       o,
		sts:     strings.TrimSuffix(o.STSURL, "/"),
		iam:     strings.TrimSuffix(o.IAMCredentialsURL, "/"),
		metrics: unread(o.Metrics).mints,
		warn:    rate.NewLimiter(1, 20), // a node full of refused pods logs one line a second
	}
	if scheme, rest, _ := strings.Cut(g.sts, "://"); scheme != "" && !strings.Contains(rest, "/") {
		g.sts += "/v1/token"
	}
	if g.o.Lifetime <= 0 {
		g.o.Lifetime = time.Hour
	}
	if g.o.Log == nil {
		l := logrus.New()
		l.SetLevel(logrus.PanicLevel)
		g.o.Log = l
	}
	if o.HTTPClient != nil {
		c := *o.HTTPClient
		c.CheckRedirect = notFollowed
		g.client = &c
		return g, nil
	}
	var err error
	g.client, err = newClient(o.CAFile)
	return g, err
}

// Token mints a new token. Only ctx bounds its time; Cache sets a deadline.
func (g *Google) Token(ctx context.Context, r Request) (Token, error) {
	began := time.Now()
	t, err := g.mint(ctx, r)
	g.report(r, began, t, err)
	return t, err
}

func (g *Google) mint(ctx context.Context, r Request) (Token, error) {
	sa := r.ServiceAccount
	if r.federated {
		return g.exchange(ctx, sa, r.Scopes)
	}
	// The annotations may have changed: they are read again, and Request.Account is not trusted.
	account, err := g.o.Kubernetes.Account(ctx, sa, time.Second)
	if err != nil {
		return Token{}, err
	}
	if account != r.Account {
		return Token{}, ErrAccountChanged
	}
	if !account.Linked() {
		if r.Audience != "" {
			return Token{}, fmt.Errorf("no ID token: ServiceAccount %s is not linked to a Google service account: annotate it "+
				"with iam.gke.io/gcp-service-account", sa)
		}
		// Only the usual scopes' token is the base of others. Others, which a pod may make up without
		// end, are held once, by an entry that counts against the pod's limits.
		if from := federatedToken(sa, r.Scopes); from.Scopes == cloudPlatform {
			return g.federated(ctx, from)
		}
		return g.exchange(ctx, sa, r.Scopes)
	}
	t, err := g.impersonate(ctx, r)
	var refusal *GoogleError
	if errors.As(err, &refusal) && refusal.Step == "STS" {
		err = refusal.of(r) // the exchange does not know the kind of token
	}
	return t, err
}

// impersonate asks IAM with a federated token. If IAM does not accept the token, impersonate asks
// once more with a new one, because a token that STS issued an hour ago may be revoked.
func (g *Google) impersonate(ctx context.Context, r Request) (Token, error) {
	from := federatedToken(r.ServiceAccount, cloudPlatform) // G-14, scope of the exchange
	for again := false; ; again = true {
		federated, err := g.federated(ctx, from)
		if err != nil {
			return Token{}, err
		}
		t, err := g.generate(ctx, r, federated.Value)
		var refusal *GoogleError
		if again || g.Federated == nil || !errors.As(err, &refusal) || refusal.Status != http.StatusUnauthorized {
			return t, err
		}
		g.Federated.Forget(from, federated)
	}
}

func (g *Google) federated(ctx context.Context, r Request) (Token, error) {
	if g.Federated == nil {
		return g.exchange(ctx, r.ServiceAccount, r.Scopes)
	}
	return g.Federated.Token(ctx, r)
}

// report logs a mint, and limits the rate of failed ones. A federated token is a step of another
// mint, which has its own line.
func (g *Google) report(r Request, began time.Time, t Token, err error) {
	log := g.o.Log.WithFields(fields(r)).WithField("duration", time.Since(began).Round(time.Millisecond).String())
	switch {
	case err != nil && (r.federated || errors.Is(err, ErrAccountChanged)):
		log.WithError(err).Debug("token not minted")
	case err != nil:
		if g.news(r.ServiceAccount, err) && g.warn.Allow() {
			log.WithError(err).Warn("token not minted")
		}
	case r.federated:
		log.WithField("expires", t.Expires.UTC().Format(time.RFC3339)).Debug("token minted")
	default:
		log.WithField("expires", t.Expires.UTC().Format(time.RFC3339)).Info("token minted")
	}
}

// sayAgain is the shortest time between two log lines about one failure of one ServiceAccount,
// whose tokens fail one by one.
const sayAgain = time.Minute

// news reports whether the failure is not the one that was logged last for the ServiceAccount.
func (g *Google) news(sa workload.ServiceAccount, err error) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	if last := g.failed[sa]; last.text == err.Error() && now.Sub(last.at) < sayAgain {
		return false
	}
	if g.failed == nil || len(g.failed) >= maxFailed {
		g.failed = map[workload.ServiceAccount]failure{}
	}
	g.failed[sa] = failure{err.Error(), now}
	return true
}

// failure is what was logged, and when.
type failure struct {
	text string
	at   time.Time
}

const maxFailed = 256 // ServiceAccounts whose failures are remembered

func fields(r Request) logrus.Fields {
	f := logrus.Fields{"service_account": r.ServiceAccount.String()}
	if r.Account.Linked() {
		f["google_service_account"] = r.Account.GoogleEmail
	}
	if r.Audience != "" {
		f["audience"] = sanitize(r.Audience)
	} else {
		f["scopes"] = sanitize(r.Scopes)
	}
	return f
}

// unavailable wraps err as an ErrUnavailable of the step. Its text may hold a part of the answer,
// so secrets are removed.
func unavailable(step string, err error, secrets ...string) error {
	return fmt.Errorf("%s: %w: %w", step, ErrUnavailable, &sanitizedError{err, sanitize(err.Error(), secrets...)})
}

type sanitizedError struct {
	err  error
	text string
}

func (s *sanitizedError) Error() string { return s.text }
func (s *sanitizedError) Unwrap() error { return s.err }

// subjectToken returns the ServiceAccount's Kubernetes token, which is the proof for STS.
func (g *Google) subjectToken(ctx context.Context, sa workload.ServiceAccount) (string, error) {
	began := time.Now()
	jwt, err := g.o.Kubernetes.Token(ctx, sa)
	g.metrics.observe(stepTokenRequest, began, err)
	return jwt, err
}
