package token

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"golang.org/x/time/rate"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// GoogleOptions says where Google is, and as what it knows this cluster.
type GoogleOptions struct {
	Audience          string        // what STS wants (G-03)
	PoolName          string        // projects/N/locations/global/workloadIdentityPools/POOL, for hints; "" for an identitynamespace
	STSURL            string        // the whole URL of the token endpoint (G-08); without a path it gets STS's own, /v1/token
	IAMCredentialsURL string        // scheme and host (G-11)
	Lifetime          time.Duration // of impersonated access tokens; 0 means an hour, which is also IAM's usual limit
	QuotaProject      string        // of a ServiceAccount whose annotations name none (G-15); "" for none
	CAFile            string        // PEM, trusted beside the system's; "" for none
	HTTPClient        *http.Client  // instead of the one made here; redirects are not followed all the same
	Kubernetes        Kubernetes
	Log               logrus.FieldLogger
	Registerer        prometheus.Registerer // may be nil
}

// Federation is where Google gets the federated tokens that it impersonates with: a Cache in front of that Google, so
// that there is one exchange a ServiceAccount (G-07).
type Federation interface {
	Source
	Forget(r Request, t Token) // Google no longer takes t
}

// Google mints tokens: TokenRequest, then STS, then IAM where the ServiceAccount is linked. It is a Source.
type Google struct {
	// Federated is to be set before the first use. With nil each impersonation makes an exchange of its own.
	Federated Federation

	o       GoogleOptions
	sts     string
	iam     string
	client  *http.Client
	metrics mintMetrics
	warn    *rate.Limiter
}

// NewGoogle returns a Google. It fails when the CA file cannot be used.
func NewGoogle(o GoogleOptions) (*Google, error) {
	g := &Google{
		o:       o,
		sts:     strings.TrimSuffix(o.STSURL, "/"),
		iam:     strings.TrimSuffix(o.IAMCredentialsURL, "/"),
		metrics: newMintMetrics(o.Registerer),
		warn:    rate.NewLimiter(1, 20), // a node full of refused pods writes a line a second
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

// Token mints a new token. It takes as long as ctx lets it; Cache sets a limit.
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
	// The annotations may have changed a moment ago: they are read again, and what the asker saw is not believed.
	account, err := g.o.Kubernetes.Account(ctx, sa, time.Second)
	if err != nil {
		return Token{}, err
	}
	if account != r.Account {
		return Token{}, ErrAccountChanged
	}
	if !account.Linked() {
		if r.Audience != "" {
			return Token{}, fmt.Errorf("ServiceAccount %s is not linked to a Google service account, and Google has no ID token for it", sa)
		}
		return g.federated(ctx, federatedToken(sa, r.Scopes))
	}
	t, err := g.impersonate(ctx, r)
	var refusal *GoogleError
	if errors.As(err, &refusal) && refusal.Step == "STS" {
		err = refusal.of(r) // the exchange does not know what it was for
	}
	return t, err
}

// impersonate asks IAM with a federated token, and with another one if IAM does not take the first: what STS gave an
// hour ago may have been revoked since.
func (g *Google) impersonate(ctx context.Context, r Request) (Token, error) {
	from := federatedToken(r.ServiceAccount, cloudPlatform) // G-14
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

// report writes a line for a mint, and for a refusal as long as there are not too many. A federated token is a step of
// another mint, which has its own line.
func (g *Google) report(r Request, began time.Time, t Token, err error) {
	log := g.o.Log.WithFields(fields(r)).WithField("duration", time.Since(began).Round(time.Millisecond).String())
	switch {
	case err != nil && (r.federated || errors.Is(err, ErrAccountChanged)):
		log.WithError(err).Debug("token not minted")
	case err != nil:
		if g.warn.Allow() {
			log.WithError(err).Warn("token not minted")
		}
	case r.federated:
		log.WithField("expires", t.Expires.UTC().Format(time.RFC3339)).Debug("token minted")
	default:
		log.WithField("expires", t.Expires.UTC().Format(time.RFC3339)).Info("token minted")
	}
}

func fields(r Request) logrus.Fields {
	f := logrus.Fields{"service_account": r.ServiceAccount.String()}
	if r.Account.Linked() {
		f["google_service_account"] = r.Account.GoogleEmail
	}
	if r.Audience != "" {
		f["audience"] = clean(r.Audience)
	} else {
		f["scopes"] = clean(r.Scopes)
	}
	return f
}

// unavailable wraps what stood in the way of an answer of step. Its text can hold what the other end sent, and so is
// cleaned of the secrets.
func unavailable(step string, err error, secrets ...string) error {
	return fmt.Errorf("%s: %w: %w", step, ErrUnavailable, &cleaned{err, clean(err.Error(), secrets...)})
}

type cleaned struct {
	err  error
	text string
}

func (c *cleaned) Error() string { return c.text }
func (c *cleaned) Unwrap() error { return c.err }

// subjectToken is the ServiceAccount's own token: the one thing that Google believes.
func (g *Google) subjectToken(ctx context.Context, sa workload.ServiceAccount) (string, error) {
	began := time.Now()
	jwt, err := g.o.Kubernetes.Token(ctx, sa)
	g.metrics.observe(stepTokenRequest, began, err)
	return jwt, err
}
