package server

import (
	"net/http"
	"net/netip"
	"strings"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
)

// A headerRule refuses a request for its method or header alone, from any client.
type headerRule struct {
	refuses func(*request) bool
	refusal
}

// headerRules are tried in order. `/` is answered without the last three: Go's and .NET's probes
// send no header there and look only at the response's (E-02). What is for another cloud's server
// has that one's methods and headers (passthrough.go).
var headerRules = []headerRule{
	// H-14
	{notGetOrHead, refusal{Status: http.StatusMethodNotAllowed, Text: "method not allowed: use GET or HEAD",
		Allow: "GET, HEAD"}},
	// H-13
	{forwarded, refusal{Status: http.StatusForbidden, Text: "X-Forwarded-For is present: requests must not come " +
		"through a proxy"}},
	// H-16
	{foreignHost, refusal{Status: http.StatusForbidden, Text: "the Host header names another server: use " +
		"metadata.google.internal or 169.254.169.254"}},
	// H-01
	{flavorMissing, refusal{Status: http.StatusForbidden, Text: `Missing required header "Metadata-Flavor": "Google"`}},
}

// refusedBy returns the refusal of the first rule that refuses, or nil.
func refusedBy(r *request) error {
	for _, rule := range headerRules {
		if rule.refuses(r) {
			return rule.refusal
		}
	}
	return nil
}

func notGetOrHead(r *request) bool {
	return !r.foreign && r.Method != http.MethodGet && r.Method != http.MethodHead
}

func forwarded(r *request) bool {
	_, ok := r.Header["X-Forwarded-For"]
	return ok && !r.open
}

func flavorMissing(r *request) bool {
	f := r.Header["Metadata-Flavor"] // net/http made the name canonical; the value is compared as it is
	return !r.open && !r.foreign && (len(f) == 0 || f[0] != "Google")
}

// foreignHost guards against DNS rebinding: a browser in a pod that was sent here by another name
// (H-16).
func foreignHost(r *request) bool {
	return !r.open && r.hostCheck && !hostAccepted(r.Host, r.peer)
}

// hostAccepted reports whether the Host header is one of the server's names, or this connection's
// own local address before or after DNAT, each with its port or without.
func hostAccepted(host string, p *attest.Peer) bool {
	host = strings.ToLower(host)
	switch strings.TrimSuffix(host, ":80") {
	case "", "metadata.google.internal", "169.254.169.254", "metadata.google.internal.", "metadata", "metadata.goog",
		"[fd20:ce::254]":
		return true
	}
	return hostIs(host, p.Original) || hostIs(host, p.Server)
}

func hostIs(host string, a netip.AddrPort) bool {
	if ap, err := netip.ParseAddrPort(host); err == nil {
		return ap == a
	}
	addr, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(host, "["), "]"))
	return err == nil && addr == a.Addr()
}
