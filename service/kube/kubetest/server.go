// Package kubetest is a small Kubernetes API server for tests and for the demo. It speaks the wire
// protocol over TLS as the real one does (protobuf and JSON, watches with initial events and
// bookmarks, 410 Gone), authorizes as Node, RBAC and NodeRestriction do, and refuses in the real
// one's words: the table in testdata/answers.txt was taken from kube-apiserver 1.37 and runs
// against it. Tokens are real RS256 JWTs.
//
// It knows pods, ServiceAccounts, nodes, TokenRequest and SelfSubjectReview, as far as a node agent
// meets them, and nothing else.
package kubetest

import (
	"context"
	"crypto/rsa"
	"crypto/tls"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// Options say what the server is. The zero value listens on a free port of 127.0.0.1.
type Options struct {
	Listener    net.Listener     // for example one in another network namespace; closed by Close
	Hosts       []string         // further names and addresses for the server's certificate
	Now         func() time.Time // of tokens and certificates; nil = time.Now
	Issuer      string           // iss and default aud of tokens; "" = the URL
	NoWatchList bool             // refuse sendInitialEvents, as servers before 1.32 do
}

// Server is a running API server. Its methods may be called from many goroutines, at any time.
type Server struct {
	url, issuer string
	now         func() time.Time
	noWatchList bool
	ca          *pair
	signer      jose.Signer
	key         *rsa.PrivateKey
	http        *http.Server
	listener    *gate
	served      chan struct{}
	stop        context.CancelFunc
	stopped     context.Context
	codecs      codecs

	mu     sync.Mutex
	world  world
	rbac   rbac
	users  map[string]user  // by bearer token
	nodes  map[string]*pair // current client certificate by node name
	dead   map[string]bool  // serial numbers that are no longer accepted
	faults []*Fault
	calls  map[string]int
	issued []string
}

// New starts a server.
func New(o Options) (*Server, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	l := o.Listener
	if l == nil {
		var err error
		if l, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			return nil, fmt.Errorf("kubetest: %w", err)
		}
	}
	s, err := start(l, o)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("kubetest: %w", err), l.Close())
	}
	return s, nil
}

func start(l net.Listener, o Options) (*Server, error) {
	host, _, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		return nil, err
	}
	s := &Server{
		url: "https://" + l.Addr().String(), issuer: o.Issuer, now: o.Now, noWatchList: o.NoWatchList,
		listener: &gate{Listener: l, open: map[net.Conn]struct{}{}}, served: make(chan struct{}),
		codecs: newCodecs(), world: newWorld(), rbac: rbac{}, users: map[string]user{}, nodes: map[string]*pair{},
		dead: map[string]bool{}, calls: map[string]int{},
	}
	if s.issuer == "" {
		s.issuer = s.url
	}
	if s.ca, err = newCA(o.Now()); err != nil {
		return nil, err
	}
	cert, err := s.ca.server(append([]string{host, "localhost", "kubernetes", "kubernetes.default.svc"}, o.Hosts...),
		o.Now())
	if err != nil {
		return nil, err
	}
	if err := s.newSigner(); err != nil {
		return nil, err
	}
	s.stopped, s.stop = context.WithCancel(context.Background())
	s.http = &http.Server{
		Handler: http.HandlerFunc(s.serve),
		TLSConfig: &tls.Config{
			MinVersion:   tls.VersionTLS12,
			Certificates: []tls.Certificate{cert.tls()},
			// verified per request, as the real one does: a certificate expires on a living connection too
			ClientAuth: tls.RequestClientCert,
		},
		ErrorLog:          log.New(discard{}, "", 0), // refused handshakes are the test's business
		ReadHeaderTimeout: 10 * time.Second,
		BaseContext:       func(net.Listener) context.Context { return s.stopped },
	}
	go func() {
		defer close(s.served)
		_ = s.http.ServeTLS(s.listener, "", "") // ends with Close
	}()
	return s, nil
}

type discard struct{}

func (discard) Write(b []byte) (int, error) { return len(b), nil }

// Close stops the server and closes every connection.
func (s *Server) Close() {
	s.stop()
	_ = s.http.Close() // the listener and every connection; nothing is left that could fail usefully
	s.listener.closeAll()
	<-s.served
}

// URL is the server's address, https://host:port.
func (s *Server) URL() string { return s.url }

// Issuer is the iss of the tokens, and the API server's own audience.
func (s *Server) Issuer() string { return s.issuer }

// CA is the PEM of the authority of the server's and of the nodes' certificates.
func (s *Server) CA() []byte { return s.ca.certPEM }

// serve is the one way in: count, authenticate, fault, route.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	q := parse(r)
	q.out = s.codecs.negotiate(r.Header.Get("Accept"), q.watching())
	u, known := s.authenticate(r)
	s.mu.Lock()
	s.calls[q.verb+" "+q.kind()]++
	f := s.faultFor(q)
	s.mu.Unlock()
	a := &answerer{s: s, w: w, q: q}
	if f != nil && !f.apply(s.stopped, r.Context(), a) {
		return
	}
	switch {
	case !known:
		a.fail(unauthorized())
	case q.out == nil:
		a.q.out = s.codecs.json()
		a.fail(notAcceptable())
	default:
		s.route(a, r, u)
	}
}

// Calls returns how many requests there were, for example Calls("create", "serviceaccounts/token");
// refused ones count too.
func (s *Server) Calls(verb, resource string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls[verb+" "+resource]
}

// AllCalls returns the same for every "verb resource".
func (s *Server) AllCalls() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := make(map[string]int, len(s.calls))
	for k, v := range s.calls {
		m[k] = v
	}
	return m
}

// IssuedTokens returns every token value that was ever issued, for tests that look for them
// where they must not be.
func (s *Server) IssuedTokens() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.issued...)
}
