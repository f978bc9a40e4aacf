package doctor

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/status"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

const (
	audience = "//iam.googleapis.com/projects/123456789012/locations/global/workloadIdentityPools/my-pool/" +
		"providers/my-cluster"
	gsa = "reader@my-project.iam.gserviceaccount.com"
)

// healthy is a node on which all is well.
func healthy() *nodeReport {
	now := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	listen, mds := netip.MustParseAddrPort("169.254.169.252:988"), routing.MetadataServer()
	seven := uint64(7)
	c := config.Default()
	c.WorkloadIdentity.Audience, c.TokenAudience = audience, audience
	plan := routing.Plan{Mode: routing.ModeIPTables, Listen: listen, Guard: routing.DefaultGuard()}
	return &nodeReport{
		root: true, now: now, file: "config.yaml", version: "1.2.3", config: c, plan: plan, ports: [2]uint16{32768, 60999},
		status: &status.Status{Version: "1.2.3", Started: now.Add(-time.Hour), State: "serving", Listen: listen.String(),
			Requests: 3, Attestation: status.Attestation{Mode: "kernel", Kernel: &attest.KernelStatus{Hierarchy: "cgroup2",
				Helper: true, Evidence: "cgroup"}},
			Cluster: &kube.Status{Server: "https://k:6443", User: "system:node:n1", Kubeconfig: "/etc/kubernetes/kubelet.conf",
				Synced: true, Watching: true,
				Pods: []kube.PodStatus{{Namespace: "ns", Name: "p", ServiceAccount: "a", Evidence: "cgroup"},
					{Namespace: "ns", Name: "h", HostNetwork: true}}},
			Tokens: []token.EntryStatus{{ServiceAccount: "ns/a"}}},
		watcher: "active",
		state: routing.State{Desired: routing.Installed, Mode: routing.ModeIPTables, Listen: listen.String(),
			Since:    now.Add(-time.Hour),
			Standing: routing.Standing{Time: now.Add(-20 * time.Second), Good: true}},
		node: routing.Examination{Uplinks: []routing.Uplink{{Name: "eth0", Why: "default route"}}, Local: true, IPv6: true,
			Holder: routing.ListenedBy{At: listen, PID: "1", Exe: "systemd", Own: true}, CgroupV2: "/sys/fs/cgroup",
			HostSlices: []string{"system.slice"},
			Redirected: &seven, Policies: []string{}, Facts: routing.Facts{IPTables: "1.8.9", Backend: "nf_tables",
				CgroupV2: true, CNI: []string{"ptp"}}},
		cloud: answered{err: context.DeadlineExceeded},
		probe: probed{answered: answered{status: 200, server: "GKE Metadata Server", ours: true},
			from:     "198.18.169.254 by interface gme-doctor",
			attested: attested{status: 403, reason: "not a pod: a process of the node asks"}},
		podProbe: probed{answered: answered{status: 200, ours: true}, from: "ns/p, 10.244.0.2"},
		names:    []netip.Addr{mds.Addr()},
		cluster: kube.Attempt{Kubeconfig: "/etc/kubernetes/kubelet.conf", Credential: "client certificate",
			Server: "https://k:6443", User: "system:node:n1", Node: "n1",
			Asked: now, Date: now, Pods: 1, HostPods: 1, Pod: "p", ServiceAccount: workload.ServiceAccount{Namespace: "ns",
				Name: "a"}, Account: workload.Account{GoogleEmail: gsa}},
		sts:      token.Reached{URL: "https://sts.googleapis.com/v1/token", Status: 404, Asked: now, Date: now},
		iam:      token.Reached{URL: "https://iamcredentials.googleapis.com", Status: 404, Asked: now, Date: now},
		exchange: &exchanged{email: gsa},
	}
}

// dualStack has it serve IPv6 too.
func dualStack(r *nodeReport) {
	r.plan.Listen6 = netip.MustParseAddrPort("[fd20:ce::252]:988")
	r.state.Listen6 = r.plan.Listen6.String()
	r.node.Holder6 = routing.ListenedBy{At: r.plan.Listen6, PID: "1", Exe: "systemd", Own: true}
	r.probe6 = probed{answered: r.probe.answered, attested: r.probe.attested,
		from: "2001:2::a9fe:a9fe by interface gme-doctor"}
	r.node.Redirected6, r.status.Requests6 = new(uint64), 2
}

// answering has it answer for metadata.google.internal, which its own DNS does not know.
func answering(r *nodeReport) {
	r.config.DNS, r.plan.DNS, r.state.DNS = "answer", true, true
	r.node.Queries = routing.ListenedBy{At: r.plan.Listen, PID: "1", Exe: "systemd", Own: true}
	r.names, r.namesErr = nil, &net.DNSError{IsNotFound: true}
}

// ipv6Alone has the pod on the pod network have no IPv4.
func ipv6Alone(r *nodeReport) {
	dualStack(r)
	r.status.Requests6 = 0
	r.status.Cluster.Pods[0].Addresses = []netip.Addr{netip.MustParseAddr("fd00:244::2")}
}

// observing has it be a node before a rollout.
func observing(r *nodeReport) { r.plan.Mode, r.state.Mode = routing.ModeObserve, routing.ModeObserve }

func TestDoctorOfAHealthyNode(t *testing.T) {
	ipv4Only, dual := healthy(), healthy()
	dualStack(dual)
	// those of IPv6 are for who serves it
	for n, lines := range map[*nodeReport]int{ipv4Only: len(checks) - 2, dual: len(checks)} {
		r := diagnose(n)
		for _, f := range r.Checks {
			if f.Verdict != OK || f.Remedy != "" || f.Finding == "" {
				t.Errorf("%+v", f)
			}
		}
		if r.Failed() != 0 || len(r.Checks) != lines {
			t.Errorf("%d failed of %d, want none of %d", r.Failed(), len(r.Checks), lines)
		}
	}
}

// sickNode is a node on which one thing is wrong, and what the check that sees it says.
type sickNode struct {
	check   string
	sick    func(p *nodeReport)
	verdict Verdict
	finding string // in it
	remedy  string // in it
}

var (
	other     = netip.MustParseAddrPort("127.0.0.1:1")
	forbidden = &kube.ForbiddenError{User: "system:node:n1", Verb: "get", Resource: "serviceaccounts", Message: "no"}
	yes       = true
)

// Each check is made to fail, or to say why it cannot tell.
func TestDoctorOfASickNode(t *testing.T) {
	tried := map[string]bool{}
	for _, c := range slices.Concat(sickNodes, sickClusters) {
		tried[c.check] = tried[c.check] || c.verdict != OK
		r := healthy()
		c.sick(r)
		if r.status == nil && r.statusErr == nil {
			r.statusErr = status.ErrNotRunning
		}
		var got Finding
		for _, f := range diagnose(r).Checks {
			if f.Check == c.check {
				got = f
			}
		}
		if got.Verdict != c.verdict || !strings.Contains(got.Finding, c.finding) ||
			!strings.Contains(got.Remedy, c.remedy) || (c.verdict == Warn || c.verdict == Fail) != (got.Remedy != "") {
			t.Errorf("%s: %+v, want %s, … %s … and to do … %s …", c.check, got, c.verdict, c.finding, c.remedy)
		}
		if strings.HasPrefix(got.Remedy, "apply rbac") != (got.Manifest != "") {
			t.Errorf("%s: the manifest of %+v", c.check, got)
		}
	}
	for _, c := range checks {
		if !tried[c.name] {
			t.Errorf("nothing makes check %s fail", c.name)
		}
	}
}

func TestReportText(t *testing.T) {
	n := healthy()
	n.cluster.Get = &kube.ForbiddenError{User: "system:node:n1", Verb: "get", Resource: "serviceaccounts", Message: "no"}
	n.cluster.Mint = n.cluster.Get
	n.broken = errors.New("a\nb")
	var b strings.Builder
	r := diagnose(n)
	if err := r.Text(&b); err != nil {
		t.Fatal(err)
	}
	text := b.String()
	if r.Failed() != 3 || strings.Count(text, "MISSING GRANT") != 1 || !strings.Contains(text, "\nkind: ClusterRole\n") {
		t.Errorf("%d failed, and\n%s", r.Failed(), text)
	}
	const begin = "fail  configuration    the configuration on disk does not load: the previous one stays in force, and " +
		"a restart would refuse pods: a; b → correct the file, and check it: gke-metadata-emulator config check\n" +
		"ok    service          serving, version 1.2.3, up 1h0m0s, 0 connections\n"
	if !strings.HasPrefix(text, begin) {
		t.Error(text)
	}
}

// The last line is the count.
func TestReportEndsWithACount(t *testing.T) {
	r := Report{Checks: []Finding{{Verdict: OK}, {Verdict: OK}, {Verdict: Warn}, {Verdict: Fail}}}
	for want, more := range map[string]Verdict{
		"5 checks: 2 ok, 1 warning, 1 failed, 1 skipped": Skip,
		"5 checks: 2 ok, 2 warnings, 1 failed":           Warn,
	} {
		var b strings.Builder
		if err := (Report{Checks: append(slices.Clone(r.Checks), Finding{Verdict: more})}).Text(&b); err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(b.String(), "\n\n"+want+"\n") {
			t.Errorf("%s\ndoes not end with %q", &b, want)
		}
	}
}
