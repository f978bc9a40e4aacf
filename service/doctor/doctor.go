// Package doctor answers one question: does a pod of this node get its token, and if not, what is
// to be done? examine.go looks at the node and what it depends on, and changes nothing that
// outlives it. checks, in doctor.go, is the table of what is judged; each check reads what was seen
// and does nothing.
package doctor

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/sirupsen/logrus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/status"
)

// Verdict is what a check came to.
type Verdict string

const (
	OK   Verdict = "ok"
	Warn Verdict = "warn" // it works, and somebody should look
	Fail Verdict = "fail" // pods do not get what they should, or get what they should not
	Skip Verdict = "skip" // it could not be tried, and why
)

// Finding is one line of a Report.
type Finding struct {
	Check    string  `json:"check"`
	Verdict  Verdict `json:"verdict"`
	Finding  string  `json:"finding"`
	Remedy   string  `json:"remedy,omitempty"`   // what to do, for a warning or a failure
	Manifest string  `json:"manifest,omitempty"` // what to apply to the cluster, where that is the remedy
}

// Report is what Run found, in the order of the path from a pod's connect() to its token.
type Report struct {
	Checks []Finding `json:"checks"`
}

// checks are all that Run makes. Each reads what examine saw, and does nothing. Those of IPv6 have
// no verdict, and so no line, where listen6 is not set.
var checks = []struct {
	name  string
	judge func(*nodeReport) Finding
}{
	{"configuration", configurationCheck},
	{"service", serviceCheck},
	{"listener", listenerCheck},
	{"ports", portsCheck},
	{"rules", rulesCheck},
	{"watcher", watcherCheck},
	{"guard", guardCheck},
	{"uplinks", uplinksCheck},
	{"network", networkCheck},
	{"cloud", cloudCheck},
	{"ipv6", ipv6Check},
	{"cgroups", cgroupsCheck},
	{"policies", policiesCheck},
	{"connection", connectionCheck},
	{"connection6", connection6Check},
	{"evidence", evidenceCheck},
	{"attestation", attestationCheck},
	{"passthrough", passthroughCheck},
	{"traffic", trafficCheck},
	{"traffic6", traffic6Check},
	{"dns", dnsCheck},
	{"credential", credentialCheck},
	{"pods", podsCheck},
	{"serviceaccounts", serviceAccountsCheck},
	{"tokenrequest", tokenRequestCheck},
	{"sts", stsCheck},
	{"iam", iamCheck},
	{"exchange", exchangeCheck},
	{"clock", clockCheck},
	{"tokens", tokensCheck},
}

// Options are what Run needs to know that is not in the configuration.
type Options struct {
	Load           func() (config.Config, error)
	Plan           func(config.Config, error) routing.Plan // what the configuration, or its absence, wants to stand
	File           string                                  // what Load reads
	FlagFile       string                                  // what flags of the units Load takes into account; "": none
	RunDir         string
	StatusSocket   string // of the running service
	CredentialCopy string
	Version        string

	// Unit asks systemd how a unit is; the zero Unit: it could not be asked.
	Unit func(ctx context.Context, name string) status.Unit
}

// Run follows the path from a pod's connect() to its token, on this node, and says of each step
// whether it works and what to do if not. It asks the running service for what that knows better,
// and does without it. It changes nothing that outlives it.
//
// What it asks of others is what any pod would: GET / of the metadata server from a throw-away
// namespace, one TokenRequest for a pod of this node and one exchange of that token, which are
// thrown away unseen.
func Run(ctx context.Context, o Options) Report {
	quiet := logrus.New()
	quiet.SetOutput(io.Discard)
	kube.RouteKlog(quiet) // what client-go has to say is in its errors
	return diagnose(examine(ctx, o))
}

func diagnose(n *nodeReport) (r Report) {
	for _, c := range checks {
		if f := c.judge(n); f.Verdict != "" {
			f.Check = c.name
			r.Checks = append(r.Checks, f)
		}
	}
	return r
}

// Failed is how many checks failed.
func (r Report) Failed() (n int) {
	for _, f := range r.Checks {
		if f.Verdict == Fail {
			n++
		}
	}
	return n
}

// summary counts the checks by verdict.
func (r Report) summary() string {
	n := map[Verdict]int{}
	for _, f := range r.Checks {
		n[f.Verdict]++
	}
	return fmt.Sprintf("%d checks: %d ok, %d warning%s, %d failed%s", len(r.Checks), n[OK], n[Warn],
		textIf(n[Warn] != 1, "s"), n[Fail], textIf(n[Skip] > 0, fmt.Sprintf(", %d skipped", n[Skip])))
}

// Text writes a line for each check, below them the manifests that are missing, each once, and last
// how many checks came to what.
func (r Report) Text(w io.Writer) error {
	var b strings.Builder
	var manifests []string
	seen := map[string]bool{}
	for _, f := range r.Checks {
		fmt.Fprintf(&b, "%-4s  %-15s  %s", f.Verdict, f.Check, status.OneLine(f.Finding))
		if f.Remedy != "" {
			fmt.Fprintf(&b, " → %s", status.OneLine(f.Remedy))
		}
		b.WriteByte('\n')
		if f.Manifest != "" && !seen[f.Manifest] {
			seen[f.Manifest] = true
			manifests = append(manifests, f.Manifest)
		}
	}
	for _, m := range manifests {
		fmt.Fprintf(&b, "\nMISSING GRANT: apply this to the cluster (kubectl apply -f -):\n%s", m)
	}
	fmt.Fprintf(&b, "\n%s\n", r.summary())
	_, err := io.WriteString(w, b.String())
	return err
}

// textIf returns the text where on is true, else "".
func textIf(on bool, text string) string {
	if on {
		return text
	}
	return ""
}

func good(format string, args ...any) Finding {
	return Finding{Verdict: OK, Finding: fmt.Sprintf(format, args...)}
}

func warn(remedy, format string, args ...any) Finding {
	return Finding{Verdict: Warn, Finding: fmt.Sprintf(format, args...), Remedy: remedy}
}

func fail(remedy, format string, args ...any) Finding {
	return Finding{Verdict: Fail, Finding: fmt.Sprintf(format, args...), Remedy: remedy}
}

func skip(format string, args ...any) Finding {
	return Finding{Verdict: Skip, Finding: fmt.Sprintf(format, args...)}
}

const (
	asRoot     = "run doctor as root"
	notServing = "the service does not serve: see check service"
)
