// Package api calls the real API server that test/kubernetes/controlplane runs, with one of its
// credentials.
package api

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// Admin is the administrator's credential.
const Admin = "admin"

// waitLimit bounds one call.
const waitLimit = 30 * time.Second

// The two kinds of patches in use.
const (
	Merge = "application/merge-patch+json"
	Apply = "application/apply-patch+yaml" // needs ?fieldManager= in the path
)

// Server is a control plane, as controlplane prints it when it is ready.
type Server struct {
	URL string `json:"URL"`
	Dir string `json:"Dir"`
}

// Kubeconfig is the path of a credential's kubeconfig.
func (s Server) Kubeconfig(credential string) string {
	return filepath.Join(s.Dir, credential+".kubeconfig")
}

// Client returns a client with the certificate of a credential.
func (s Server) Client(credential string) (*http.Client, error) {
	var files [3][]byte
	for i, name := range []string{"ca.crt", credential + ".crt", credential + ".key"} {
		var err error
		if files[i], err = os.ReadFile(filepath.Join(s.Dir, "pki", name)); err != nil {
			return nil, err
		}
	}
	return NewClient(files[0], append(files[1], files[2]...))
}

// NewClient returns a client that trusts ca. pair is a client certificate with its key, or nil.
func NewClient(ca, pair []byte) (*http.Client, error) {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	cfg := &tls.Config{RootCAs: roots}
	if pair != nil {
		cert, err := tls.X509KeyPair(pair, pair)
		if err != nil {
			return nil, err
		}
		cfg.Certificates = []tls.Certificate{cert}
	}
	return &http.Client{Transport: &http.Transport{TLSClientConfig: cfg, ForceAttemptHTTP2: true}, Timeout: waitLimit}, nil
}

// StatusError is a response with a status of 300 or more.
type StatusError struct {
	Code int
	Text string
}

func (e *StatusError) Error() string { return e.Text }

// Caller sends requests with one credential.
type Caller struct {
	URL    string
	Client *http.Client
}

// Caller returns a Caller with a credential.
func (s Server) Caller(credential string) (*Caller, error) {
	k, err := s.Client(credential)
	if err != nil {
		return nil, err
	}
	return &Caller{s.URL, k}, nil
}

// Call sends the object o, unless it is nil, and reads the answer into into, unless that is nil. A
// refusal is a *StatusError.
func (c *Caller) Call(ctx context.Context, method, path, contentType string, o, into any) error {
	var body io.Reader
	if o != nil {
		b, err := json.Marshal(o)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	r, err := http.NewRequestWithContext(ctx, method, c.URL+path, body)
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", contentType)
	resp, err := c.Client.Do(r)
	if err != nil {
		return err
	}
	b, err := io.ReadAll(resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return err
	}
	switch {
	case resp.StatusCode >= 300:
		return &StatusError{resp.StatusCode, fmt.Sprintf("%s %s: %s: %s", method, path, resp.Status, b)}
	case into != nil:
		return json.Unmarshal(b, into)
	}
	return nil
}

// Get reads an object.
func (c *Caller) Get(ctx context.Context, path string, into any) error {
	return c.Call(ctx, http.MethodGet, path, "application/json", nil, into)
}

// Post creates an object.
func (c *Caller) Post(ctx context.Context, path string, o, into any) error {
	return c.Call(ctx, http.MethodPost, path, "application/json", o, into)
}

// Patch changes an object.
func (c *Caller) Patch(ctx context.Context, path, kind string, o any) error {
	return c.Call(ctx, http.MethodPatch, path, kind, o, nil)
}

// Delete removes an object. options are DeleteOptions or nil.
func (c *Caller) Delete(ctx context.Context, path string, options any) error {
	return c.Call(ctx, http.MethodDelete, path, "application/json", options, nil)
}
