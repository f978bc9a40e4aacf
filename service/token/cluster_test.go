package token

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"io"
	"maps"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

const (
	testIssuer   = "https://kubernetes.default.svc"
	testPool     = "projects/123/locations/global/workloadIdentityPools/pool"
	testAudience = "//iam.googleapis.com/" + testPool + "/providers/prov"
)

// cluster is a Kubernetes that signs tokens for real.
type cluster struct {
	key *rsa.PrivateKey

	mu       sync.Mutex
	accounts map[workload.ServiceAccount]workload.Account
	reads    int
	tokens   int
	claims   map[string]any // in place of the right ones
	err      error
}

var testKey = sync.OnceValue(func() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return key
})

func newCluster() *cluster {
	return &cluster{key: testKey(), accounts: map[workload.ServiceAccount]workload.Account{}}
}

func (c *cluster) jwks() jose.JSONWebKeySet {
	return jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: c.key.Public(), KeyID: "k", Algorithm: "RS256"}}}
}

func (c *cluster) annotate(sa workload.ServiceAccount, a workload.Account) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.accounts[sa] = a
}

func (c *cluster) Account(_ context.Context, sa workload.ServiceAccount, _ time.Duration) (workload.Account, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reads++
	return c.accounts[sa], c.err
}

func (c *cluster) Token(_ context.Context, sa workload.ServiceAccount) (string, error) {
	c.mu.Lock()
	c.tokens++
	now := time.Now()
	claims := map[string]any{"iss": testIssuer, "sub": sa.Subject(), "aud": []string{testAudience},
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(time.Hour).Unix(), "jti": c.tokens}
	maps.Copy(claims, c.claims)
	c.mu.Unlock()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: c.key, KeyID: "k"}},
		nil)
	if err != nil {
		return "", err
	}
	raw, err := json.Marshal(claims)
	if err != nil {
		return "", err
	}
	jws, err := signer.Sign(raw)
	if err != nil {
		return "", err
	}
	return jws.CompactSerialize()
}

// world is a cluster, a Google, and what stands between them.
type world struct {
	*cluster
	google   *googletest.Server
	minter   *Google
	cache    *Cache
	registry *prometheus.Registry
	log      *logrus.Logger
	lines    *lines
}

type lines struct {
	mu sync.Mutex
	bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.Buffer.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.Buffer.String()
}

func newWorld(t testing.TB, change ...func(*GoogleOptions, *CacheOptions)) *world {
	t.Helper()
	w := &world{cluster: newCluster(), registry: prometheus.NewRegistry(), log: logrus.New(), lines: &lines{}}
	w.log.SetOutput(w.lines)
	w.log.SetLevel(logrus.TraceLevel)
	var err error
	w.google, err = googletest.New(googletest.Options{Providers: map[string]googletest.Provider{
		testAudience: {Issuer: testIssuer, JWKS: w.jwks},
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.google.Close)
	metrics := NewMetrics(w.registry)
	g := GoogleOptions{
		Audience: testAudience, PoolName: testPool, STSURL: w.google.STSURL(), IAMCredentialsURL: w.google.URL(),
		HTTPClient: w.google.Client(), Kubernetes: w, Log: w.log, Metrics: metrics,
	}
	c := CacheOptions{Metrics: metrics}
	for _, f := range change {
		f(&g, &c)
	}
	if w.minter, err = NewGoogle(g); err != nil {
		t.Fatal(err)
	}
	if g.HTTPClient != nil {
		t.Cleanup(g.HTTPClient.CloseIdleConnections)
	}
	c.Source = w.minter
	w.cache = NewCache(c)
	w.minter.Federated = w.cache
	return w
}

// linked makes a ServiceAccount that may impersonate.
func (w *world) linked(namespace, name string) (workload.ServiceAccount, workload.Account) {
	sa := workload.ServiceAccount{Namespace: namespace, Name: name}
	a := workload.Account{GoogleEmail: name + "@project.iam.gserviceaccount.com"}
	w.annotate(sa, a)
	w.google.Allow(sa.Subject(), a.GoogleEmail)
	return sa, a
}

func (w *world) calls(t *testing.T, exchange, access, id int) {
	t.Helper()
	got := [3]int{w.google.Calls(googletest.Exchange), w.google.Calls(googletest.GenerateAccessToken),
		w.google.Calls(googletest.GenerateIDToken)}
	if want := [3]int{exchange, access, id}; got != want {
		t.Errorf("calls of STS, generateAccessToken, generateIdToken: %v, want %v", got, want)
	}
}

// noSecrets looks for every secret that was ever about.
func (w *world) noSecrets(t *testing.T, more ...string) {
	t.Helper()
	var metrics strings.Builder
	families, err := w.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		_, _ = io.WriteString(&metrics, f.String())
	}
	status, err := json.Marshal(w.cache.Status())
	if err != nil {
		t.Fatal(err)
	}
	where := append([]string{w.lines.String(), metrics.String(), string(status)}, more...)
	secrets := w.google.Secrets()
	if len(secrets) == 0 {
		t.Fatal("no secrets were about: the test shows nothing")
	}
	for _, secret := range secrets {
		// A part of a token is a secret too: the signature of a JWT, the middle of an opaque token.
		for _, part := range []string{secret, secret[len(secret)/2:], secret[10 : len(secret)/2]} {
			for _, text := range where {
				if strings.Contains(text, part) {
					t.Errorf("a secret shows in %q", redact(text, secret))
				}
			}
		}
	}
}
