package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// authority signs certificates into a directory.
type authority struct {
	dir  string
	cert *x509.Certificate
	key  crypto.Signer
}

// credentials makes every certificate, and a kubeconfig for each user. A second start goes on with
// the first one's.
func credentials(o options, server string) error {
	dir := filepath.Join(o.dir, "pki")
	if _, err := os.Stat(filepath.Join(dir, "complete")); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	ca := &authority{dir: dir}
	if err := ca.create(); err != nil {
		return err
	}
	// RSA, as in a cluster of kubeadm's: the tokens are RS256.
	tokens, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	if err := writeKey(filepath.Join(dir, "tokens.key"), tokens); err != nil {
		return err
	}
	services, err := netip.ParsePrefix(o.services)
	if err != nil {
		return err
	}
	first := services.Masked().Addr().Next() // of the Service kubernetes
	err = ca.sign("apiserver", &x509.Certificate{
		Subject:     pkix.Name{CommonName: "kube-apiserver"},
		DNSNames:    []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"},
		IPAddresses: []net.IP{net.ParseIP(o.address), net.IPv4(127, 0, 0, 1), first.AsSlice()},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	for _, s := range o.serving {
		name, address, _ := strings.Cut(s, "=")
		err = errors.Join(err, ca.sign(name+"-serving", &x509.Certificate{
			Subject:     pkix.Name{CommonName: "system:node:" + name, Organization: []string{"system:nodes"}},
			DNSNames:    []string{name},
			IPAddresses: []net.IP{net.ParseIP(address)},
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		}))
	}
	users := append(
		[]string{"admin=admin,system:masters", "kubelet-client=kube-apiserver-kubelet-client,system:masters"},
		o.users...)
	for _, u := range users {
		name, who, _ := strings.Cut(u, "=")
		groups := strings.Split(who, ",")
		err = errors.Join(err, ca.sign(name, &x509.Certificate{
			Subject:     pkix.Name{CommonName: groups[0], Organization: groups[1:]},
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		}), kubeconfig(filepath.Join(o.dir, name+".kubeconfig"), server, filepath.Join(dir, name)))
	}
	return errors.Join(err, os.WriteFile(filepath.Join(dir, "complete"), nil, 0o600))
}

func (a *authority) create() error {
	return a.sign("ca", &x509.Certificate{
		Subject: pkix.Name{
			CommonName: "controlplane-ca",
		}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	})
}

// sign makes a key and a certificate, NAME.key and NAME.crt. The first one is the authority's own.
func (a *authority) sign(name string, t *x509.Certificate) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	if t.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120)); err != nil {
		return err
	}
	now := time.Now()
	t.KeyUsage |= x509.KeyUsageDigitalSignature
	t.NotBefore, t.NotAfter = now.Add(-time.Hour), now.Add(10*24*time.Hour)
	parent, signer := t, crypto.Signer(key)
	if a.cert != nil {
		parent, signer = a.cert, a.key
	}
	der, err := x509.CreateCertificate(rand.Reader, t, parent, key.Public(), signer)
	if err != nil {
		return fmt.Errorf("certificate %s: %w", name, err)
	}
	if a.cert == nil {
		if a.cert, err = x509.ParseCertificate(der); err != nil {
			return err
		}
		a.key = key
	}
	file := filepath.Join(a.dir, name)
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return errors.Join(os.WriteFile(file+".crt", text, 0o644), writeKey(file+".key", key))
}

func writeKey(file string, key crypto.Signer) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
}

// kubeconfig writes one in JSON, which is YAML. pki is the path of the user's files without .crt
// and .key.
func kubeconfig(file, server, pki string) error {
	b, err := json.MarshalIndent(map[string]any{
		"apiVersion": "v1", "kind": "Config", "current-context": "controlplane",
		"clusters": []any{map[string]any{"name": "controlplane", "cluster": map[string]any{
			"server": server, "certificate-authority": filepath.Join(filepath.Dir(pki), "ca.crt")}}},
		"users": []any{map[string]any{"name": "controlplane", "user": map[string]any{
			"client-certificate": pki + ".crt", "client-key": pki + ".key"}}},
		"contexts": []any{map[string]any{"name": "controlplane", "context": map[string]any{
			"cluster": "controlplane", "user": "controlplane"}}},
	}, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, b, 0o600)
}

// adminClient is a client with the administrator's certificate.
func adminClient(dir string) (*http.Client, error) {
	pki := filepath.Join(dir, "pki")
	cert, err := tls.LoadX509KeyPair(filepath.Join(pki, "admin.crt"), filepath.Join(pki, "admin.key"))
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(filepath.Join(pki, "ca.crt"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	t := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{cert}}}
	return &http.Client{Transport: t, Timeout: 2 * time.Second}, nil
}
