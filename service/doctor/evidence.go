package doctor

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/probe"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/status"
)

// attested is what the service answered a probe's connection that asked for what only a known
// caller gets.
type attested struct {
	err    error // it was not tried, or nobody answered
	status int   // 0: it was not tried
	reason string
}

// proven reports whether the kernel's evidence of the probe's own socket was found: the service
// says that a process of the node asks, which doctor is, or gives it the identity that
// hostIdentities name. Neither is said without the cgroup of that very socket.
func (a attested) proven() bool {
	return a.status == http.StatusOK ||
		a.status == http.StatusForbidden && strings.HasPrefix(a.reason, attest.ErrNotPod.Error())
}

// attest asks for the project's ID, which is no secret, in a connection of its own. Once more where
// it fails: a namespace that is new may take the helper longer than the service waits for it.
func (t *probed) attest(ctx context.Context, pod *probe.Pod, at netip.AddrPort, inhabited error) {
	if !t.ours {
		return // connection says why
	}
	if t.attested.err = inhabited; inhabited != nil {
		return
	}
	for range 2 {
		if t.attested = askProject(ctx, pod, at); t.attested.proven() {
			return
		}
	}
}

func askProject(ctx context.Context, pod *probe.Pod, at netip.AddrPort) attested {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	client := http.Client{Transport: &http.Transport{DialContext: pod.Dial, DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet,
		"http://"+strings.TrimSuffix(at.String(), ":80")+"/computeMetadata/v1/project/project-id", nil)
	if err != nil {
		return attested{err: err}
	}
	req.Header.Set("Metadata-Flavor", "Google")
	res, err := client.Do(req)
	if err != nil {
		return attested{err: err}
	}
	defer func() { _ = res.Body.Close() }()
	text, err := io.ReadAll(io.LimitReader(res.Body, 1<<10))
	return attested{err: err, status: res.StatusCode, reason: status.Bounded(status.OneLine(string(text)))}
}

// noEvidence is why no connection can be attested by the kernel's evidence; "": one can.
func (r *nodeReport) noEvidence() string {
	switch {
	case r.status == nil || r.status.State != "serving":
		return notServing
	case r.status.Attestation.Mode != "kernel":
		return fmt.Sprintf("attestation.mode is %s: there is no evidence besides the address", r.status.Attestation.Mode)
	}
	return ""
}

// evidenceCheck: a connection is attested as a pod's is, so what leaves the connection alone and
// breaks only the evidence is seen.
func evidenceCheck(r *nodeReport) Finding {
	const remedy = "find rules that rewrite packets of pods: iptables-save; nft list ruleset; " +
		"if there are none: systemctl restart gke-metadata-emulator-attest (see check attestation)"
	switch why := r.noEvidence(); {
	case why != "":
		return skip("%s", why)
	case !r.probe.ours && !r.probe6.ours:
		return skip("no connection reached the service: see check connection")
	}
	var proven []string
	for _, t := range []probed{r.probe, r.probe6} {
		a := t.attested
		switch {
		case !t.ours:
		case a.proven():
			proven = append(proven, t.from)
		case a.status == 0:
			return warn("run doctor again", "from %s: the connection was not identified: %v", t.from, inner(a.err))
		default:
			return fail(remedy, "from %s: the service does not find the socket of the connection, and refuses pods: %d %s",
				t.from, a.status, a.reason)
		}
	}
	return good("the service found the socket of doctor's connection from %s", strings.Join(proven, " and from "))
}
