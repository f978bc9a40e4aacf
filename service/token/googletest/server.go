// Package googletest is a stand-in for Google's Security Token Service and IAM Credentials. It is a
// TLS server that verifies every field and signature as strictly as the real services do, and
// refuses with their messages. It is for tests and for the demo, and is not part of the shipped
// binary.
package googletest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// Options say what Google knows. The zero value has no provider.
type Options struct {
	// Listener is where to serve, which may be in another network namespace; nil is a free port of
	// 127.0.0.1.
	Listener net.Listener
	// Hosts are the names and addresses in the server's certificate beside the listener's own and
	// 127.0.0.1.
	Hosts []string
	// Providers are the workload identity pool providers, by what a request names as its audience
	// (G-03).
	Providers map[string]Provider
	// FederatedLifetime is the most that a federated token lives; 0 is an hour. It never outlives the
	// subject token.
	FederatedLifetime time.Duration
}

// Provider is a workload identity pool provider with the attribute mapping
// google.subject=assertion.sub.
type Provider struct {
	Issuer string
	JWKS   func() jose.JSONWebKeySet // asked anew for each token; nil is an issuer that Google cannot reach
	// AllowedAudiences is what the subject token's aud must be one of. Empty: the provider's own name,
	// with https: or without (G-17).
	AllowedAudiences []string
	// MapSubject is the attribute mapping of google.subject; nil is assertion.sub.
	MapSubject func(sub string) string
}

// Server stands for Google. Its methods may be called concurrently.
type Server struct {
	o    Options
	url  string
	http *http.Server
	ca   *x509.Certificate
	key  *rsa.PrivateKey // signs ID tokens

	mu       sync.Mutex
	policies map[string]map[string]bool // email → subjects with roles/iam.workloadIdentityUser
	issued   map[string]Issued
	secrets  []string
	calls    map[Method]int
	faults   map[Method]*Fault
}

// New starts a server. The caller closes it.
func New(o Options) (*Server, error) {
	if o.FederatedLifetime <= 0 {
		o.FederatedLifetime = time.Hour
	}
	ln := o.Listener
	if ln == nil {
		var err error
		if ln, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			return nil, err
		}
	}
	key, err := idKey()
	if err != nil {
		return nil, err
	}
	host, _, err := net.SplitHostPort(ln.Addr().String())
	if err != nil {
		return nil, err
	}
	ca, cert, err := certificates(append([]string{host, "127.0.0.1", "localhost"}, o.Hosts...))
	if err != nil {
		return nil, err
	}
	s := &Server{
		o:        o,
		url:      "https://" + ln.Addr().String(),
		ca:       ca,
		key:      key,
		policies: map[string]map[string]bool{},
		issued:   map[string]Issued{},
		calls:    map[Method]int{},
		faults:   map[Method]*Fault{},
	}
	s.http = &http.Server{
		Handler:           http.HandlerFunc(s.serve),
		TLSConfig:         &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12},
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          log.New(io.Discard, "", 0), // tests close connections on purpose
	}
	go func() { _ = s.http.ServeTLS(ln, "", "") }()
	return s, nil
}

// idKey is shared by all servers of a process, since it takes long to generate.
var idKey = sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, 2048) })

// Close ends the server and its connections.
func (s *Server) Close() { _ = s.http.Close() }

// URL is the server's scheme, host and port, in place of https://iamcredentials.googleapis.com.
func (s *Server) URL() string { return s.url }

// STSURL is the whole URL of the token endpoint.
func (s *Server) STSURL() string { return s.url + "/v1/token" }

// CA is the certificate of the authority that signed the server's, in PEM form.
func (s *Server) CA() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.ca.Raw})
}

// WriteCA writes CA to a file.
func (s *Server) WriteCA(path string) error { return os.WriteFile(path, s.CA(), 0o644) }

// CertPool holds CA.
func (s *Server) CertPool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(s.ca)
	return pool
}

// Client trusts the server and nobody else.
func (s *Server) Client() *http.Client {
	return &http.Client{Transport: &http.Transport{
		TLSClientConfig:     &tls.Config{RootCAs: s.CertPool(), MinVersion: tls.VersionTLS12},
		ForceAttemptHTTP2:   true,
		MaxIdleConnsPerHost: 100,
	}}
}

// JWKS verifies the ID tokens that the server signs.
func (s *Server) JWKS() jose.JSONWebKeySet {
	return jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: s.key.Public(), KeyID: idKeyID, Algorithm: "RS256",
		Use: "sig"}}}
}

// certificates makes an authority, and a certificate of it for the hosts.
func certificates(hosts []string) (*x509.Certificate, tls.Certificate, error) {
	caKey, err1 := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	key, err2 := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err := errors.Join(err1, err2); err != nil {
		return nil, tls.Certificate{}, err
	}
	now := time.Now()
	template := x509.Certificate{
		SerialNumber:          big.NewInt(now.UnixNano()),
		Subject:               pkix.Name{CommonName: "googletest CA"},
		NotBefore:             now.Add(-time.Hour),
		NotAfter:              now.Add(7 * 24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	raw, err := x509.CreateCertificate(rand.Reader, &template, &template, caKey.Public(), caKey)
	if err != nil {
		return nil, tls.Certificate{}, err
	}
	ca, err := x509.ParseCertificate(raw)
	if err != nil {
		return nil, tls.Certificate{}, err
	}
	leaf := x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano() + 1),
		Subject:      pkix.Name{CommonName: "googletest"},
		NotBefore:    template.NotBefore,
		NotAfter:     template.NotAfter,
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			leaf.IPAddresses = append(leaf.IPAddresses, ip)
		} else {
			leaf.DNSNames = append(leaf.DNSNames, h)
		}
	}
	raw, err = x509.CreateCertificate(rand.Reader, &leaf, ca, key.Public(), caKey)
	if err != nil {
		return nil, tls.Certificate{}, err
	}
	return ca, tls.Certificate{Certificate: [][]byte{raw, ca.Raw}, PrivateKey: key}, nil
}
