// Package status is what `gke-metadata-emulator status` shows: the state of the running service, as
// values, as text, and how another process asks for it. The service fills a Status in; `status` and
// doctor read it.
package status

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"syscall"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token"
)

// Status is what `status` shows: never a token, only how old it is.
type Status struct {
	Version string    `json:"version"`
	Started time.Time `json:"started"`
	State   string    `json:"state"`            // serving | not configured | stopping
	Reason  string    `json:"reason,omitempty"` // why it is not ready, in the words of /readyz; "" = it is
	// that the configuration on disk does not load, and why; what was read before is in force
	ConfigFile string `json:"configFileProblem,omitempty"`
	Listen     string `json:"listen"`
	Listen6    string `json:"listen6,omitempty"` // "" = IPv6 is not served
	// why the node's own connections to Listen fail, where pods' do not
	Unreachable string           `json:"unreachable,omitempty"`
	Connections int              `json:"connections"`
	Attestation Attestation      `json:"attestation"`
	Requests    uint64           `json:"requests"`            // since Started, for anything but `/`
	Requests6   uint64           `json:"requests6,omitempty"` // those of them that came by IPv6
	Routing     *routing.State   `json:"routing,omitempty"`
	RoutingErr  string           `json:"routingError,omitempty"` // why Routing is not known
	LastInstall *routing.Failure `json:"lastInstallFailed,omitempty"`
	Cluster     *kube.Status     `json:"cluster,omitempty"`
	// by which Google is asked, without its user's name and password
	Proxy           string              `json:"proxy,omitempty"`
	Tokens          []token.EntryStatus `json:"tokens,omitempty"`
	SkippedHostPods []SkippedHostPod    `json:"notPassedThrough,omitempty"`
}

// Attestation is what tells who asks.
type Attestation struct {
	Mode           string               `json:"mode,omitempty"`   // attestation.mode; "" while there is no configuration
	Kernel         *attest.KernelStatus `json:"kernel,omitempty"` // in mode kernel
	HostIdentities []HostIdentity       `json:"hostIdentities,omitempty"`
}

// HostIdentity is what processes of the node are.
type HostIdentity struct {
	Unit   string `json:"unit,omitempty"`
	Cgroup string `json:"cgroup,omitempty"`
	kube.HostStatus
}

// SkippedHostPod is a ServiceAccount whose pods on the host network asked for another cloud's
// metadata, and which the key passthrough does not name: their requests are refused.
type SkippedHostPod struct {
	ServiceAccount string `json:"serviceAccount"`
	Requests       uint64 `json:"requests"` // since the service started
}

// SkippedRemedy says what lets a SkippedHostPod through.
const SkippedRemedy = "name it in passthrough, or set routing.interceptHostPods to off"

// ErrNotRunning is wrapped by Fetch where there is no service to ask.
var ErrNotRunning = errors.New("the service is not running")

// Denied adds to Fetch's error, for a user who may not use the socket, what /readyz says to every
// user.
func Denied(ctx context.Context, err error, healthListen netip.AddrPort) error {
	reason, answered := FetchReadiness(ctx, healthListen)
	switch {
	case !answered:
		return err
	case reason == "":
		reason = "ok"
	}
	return fmt.Errorf("%w; /readyz says: %s", err, reason)
}

// FetchReadiness asks a running service for /readyz at healthListen, as every user of the node may.
// It returns why the service is not ready, "" where it is, and whether there was an answer. Another
// process may listen there: the text is for a person's eyes alone.
func FetchReadiness(ctx context.Context, healthListen netip.AddrPort) (reason string, answered bool) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+healthListen.String()+"/readyz", nil)
	if err != nil {
		return "", false
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}} // and never by a proxy
	resp, err := client.Do(req)
	if err != nil {
		return "", false
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	switch {
	case err != nil:
		return "", false
	case resp.StatusCode == http.StatusOK:
		return "", true
	}
	return OneLine(string(text)), resp.StatusCode == http.StatusServiceUnavailable
}

// Fetch asks the running service over its Unix socket for its Status, as JSON.
func Fetch(ctx context.Context, socket string) ([]byte, error) {
	const most = 64 << 20 // thousands of pods and their tokens' ages
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn,
		error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://service/status", nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w: there is no %s: systemctl restart gke-metadata-emulator", ErrNotRunning, socket)
	case errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("%w: no process answers at %s: systemctl restart gke-metadata-emulator", ErrNotRunning, socket)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%s: %w: run as root or as a member of the service's group", socket, fs.ErrPermission)
	case err != nil:
		return nil, fmt.Errorf("ask the service at %s: %w", socket, err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(io.LimitReader(resp.Body, most))
	if err != nil {
		return nil, fmt.Errorf("ask the service at %s: %w", socket, err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("ask the service at %s: %s", socket, resp.Status)
	}
	return text, nil
}
