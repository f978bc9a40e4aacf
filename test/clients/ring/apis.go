package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// apiNames are names of Google's APIs, which are in the pods' /etc/hosts: gargle requests
// information about each token from the first, and Prometheus lists machines at the second.
var (
	apiNames = []string{"www.googleapis.com", "compute.googleapis.com"}
	apiAddr  = netip.MustParseAddr("203.0.113.10")
)

// startAPIs serves the APIs that clients use besides tokens. Answers contain the token of the
// request in place of a name. The handlers do not verify tokens; check does.
func (w *world) startAPIs() error {
	certificate, err := w.certificate()
	if err != nil {
		return err
	}
	if w.storage, err = w.serve(netip.AddrPortFrom(w.node.Cloud.Addr, 8080), nil); err != nil {
		return err
	}
	_, err = w.serve(netip.AddrPortFrom(apiAddr, 443), &tls.Config{Certificates: []tls.Certificate{certificate}})
	return err
}

func (w *world) serve(at netip.AddrPort, secure *tls.Config) (url string, err error) {
	l, err := w.node.Cloud.Listen("tcp4", at.String())
	if err != nil {
		return "", err
	}
	s := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(answerAPI), TLSConfig: secure}
	go func() { // until the namespace closes its listeners
		if secure == nil {
			_ = s.Serve(l)
		} else {
			_ = s.ServeTLS(l, "", "")
		}
	}()
	return "http://" + at.String(), nil
}

// answerAPI answers like Cloud Storage, Compute Engine and tokeninfo.
func answerAPI(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json; charset=UTF-8")
	token, found := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	bucket := map[string]any{"kind": "storage#bucket", "id": token, "name": token, "location": "EU",
		"timeCreated": "2026-01-01T00:00:00.000Z", "updated": "2026-01-01T00:00:00.000Z"}
	machine := map[string]any{"kind": "compute#instance", "id": "1", "name": token, "status": "RUNNING",
		"networkInterfaces": []any{map[string]any{"networkIP": "192.0.2.1", "network": "n", "subnetwork": "s"}}}
	var a any
	switch {
	case strings.HasSuffix(r.URL.Path, "/tokeninfo"):
		a = map[string]any{"scope": tokenScope, "email": "unknown", "expires_in": "10"}
	case strings.HasPrefix(r.URL.Path, "/discovery/"): // which services there are
		a = map[string]any{"items": []any{}}
	case !found:
		w.WriteHeader(http.StatusUnauthorized)
		a = map[string]any{"error": map[string]any{"code": 401, "message": "Request had no credentials."}}
	case strings.HasSuffix(r.URL.Path, "/instances"):
		a = map[string]any{"kind": "compute#instanceList", "items": []any{machine}}
	case strings.HasSuffix(r.URL.Path, "/b"):
		a = map[string]any{"kind": "storage#buckets", "items": []any{bucket}}
	default:
		a = bucket
	}
	_ = json.NewEncoder(w).Encode(a) // an error: the client has left
}

// certificate makes a self-signed certificate for apiNames, and writes it for the pods.
func (w *world) certificate() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test-clients"}, DNSNames: apiNames,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	raw, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw})
	return tls.Certificate{Certificate: [][]byte{raw}, PrivateKey: key},
		errors.Join(err, os.WriteFile(filepath.Join(w.dir, "authorities.pem"), text, 0o644))
}
