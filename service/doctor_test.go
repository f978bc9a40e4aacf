package service

import (
	"context"
	"crypto/x509"
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// healthy is a node on which all is well.
func healthy() *patient {
	now := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	listen, mds := netip.MustParseAddrPort("169.254.169.252:988"), routing.MetadataServer()
	seven := uint64(7)
	c := config.Default()
	c.WorkloadIdentity.Audience, c.TokenAudience = audience, audience
	plan := routing.Plan{Mode: routing.ModeIPTables, Listen: listen, Guard: routing.DefaultGuard()}
	return &patient{
		root: true, now: now, file: "config.yaml", version: "1.2.3", config: c, plan: plan, ports: [2]uint16{32768, 60999},
		status: &Status{Version: "1.2.3", Started: now.Add(-time.Hour), State: "serving", Listen: listen.String(), Requests: 3, Attestation: Attestation{Mode: "kernel", Kernel: &attest.KernelStatus{Hierarchy: "cgroup2", Helper: true, Evidence: "cgroup"}},
			Cluster: &kube.Status{Server: "https://k:6443", User: "system:node:n1", Kubeconfig: "/etc/kubernetes/kubelet.conf", Synced: true, Watching: true,
				Pods: []kube.PodStatus{{Namespace: "ns", Name: "p", ServiceAccount: "a", Evidence: "cgroup"}, {Namespace: "ns", Name: "h", HostNetwork: true}}},
			Tokens: []token.EntryStatus{{ServiceAccount: "ns/a"}}},
		watcher: "active",
		state: routing.State{Desired: routing.Installed, Mode: routing.ModeIPTables, Listen: listen.String(), Since: now.Add(-time.Hour),
			Standing: routing.Standing{Time: now.Add(-20 * time.Second), Good: true}},
		node: routing.Examination{Uplinks: []routing.Uplink{{Name: "eth0", Why: "default route"}}, Local: true, IPv6: true,
			Holder: routing.ListenedBy{At: listen, PID: "1", Exe: "systemd", Own: true}, CgroupV2: "/sys/fs/cgroup", HostSlices: []string{"system.slice"},
			Redirected: &seven, Policies: []string{}, Facts: routing.Facts{IPTables: "1.8.9", Backend: "nf_tables", CgroupV2: true, CNI: []string{"ptp"}}},
		cloud: answered{err: context.DeadlineExceeded},
		trial: trial{answered: answered{status: 200, server: "GKE Metadata Server", ours: true}, from: "198.18.169.254 by interface gme-doctor",
			attested: attested{status: 403, reason: "not a pod: a process of the node asks"}},
		podTrial: trial{answered: answered{status: 200, ours: true}, from: "ns/p, 10.244.0.2"},
		names:    []netip.Addr{mds.Addr()},
		cluster: kube.Attempt{Kubeconfig: "/etc/kubernetes/kubelet.conf", Credential: "client certificate", Server: "https://k:6443", User: "system:node:n1", Node: "n1",
			Asked: now, Date: now, Pods: 1, HostPods: 1, Pod: "p", ServiceAccount: workload.ServiceAccount{Namespace: "ns", Name: "a"}, Account: workload.Account{GoogleEmail: gsa}},
		sts:      token.Reached{URL: "https://sts.googleapis.com/v1/token", Status: 404, Asked: now, Date: now},
		iam:      token.Reached{URL: "https://iamcredentials.googleapis.com", Status: 404, Asked: now, Date: now},
		exchange: &exchanged{email: gsa},
	}
}

// six has it serve IPv6 too.
func six(p *patient) {
	p.plan.Listen6 = netip.MustParseAddrPort("[fd20:ce::252]:988")
	p.state.Listen6 = p.plan.Listen6.String()
	p.node.Holder6 = routing.ListenedBy{At: p.plan.Listen6, PID: "1", Exe: "systemd", Own: true}
	p.trial6 = trial{answered: p.trial.answered, attested: p.trial.attested, from: "2001:2::a9fe:a9fe by interface gme-doctor"}
	p.node.Redirected6, p.status.Requests6 = new(uint64), 2
}

// sixAlone has the pod on the pod network have no IPv4.
func sixAlone(p *patient) {
	six(p)
	p.status.Requests6 = 0
	p.status.Cluster.Pods[0].Addresses = []netip.Addr{netip.MustParseAddr("fd00:244::2")}
}

// observing has it be a node before a rollout.
func observing(p *patient) { p.plan.Mode, p.state.Mode = routing.ModeObserve, routing.ModeObserve }

func TestDoctorOfAHealthyNode(t *testing.T) {
	four, both := healthy(), healthy()
	six(both)
	for p, lines := range map[*patient]int{four: len(checks) - 2, both: len(checks)} { // those of IPv6 are for who serves it
		r := diagnose(p)
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

// Each check is made to fail, or to say why it cannot tell.
func TestDoctorOfASickNode(t *testing.T) {
	other := netip.MustParseAddrPort("127.0.0.1:1")
	forbidden := &kube.ForbiddenError{User: "system:node:n1", Verb: "get", Resource: "serviceaccounts", Message: "no"}
	yes := true
	tried := map[string]bool{}
	for _, c := range []struct {
		check   string
		sick    func(p *patient)
		verdict Verdict
		finding string // in it
		remedy  string // in it
	}{
		{"configuration", func(p *patient) { p.status, p.broken = nil, errors.New("config.yaml:3: x: bad: mend it") }, Fail, "config.yaml:3: x: bad: mend it", "pods are refused"},
		{"configuration", func(p *patient) {
			p.status = nil
			p.broken = &config.Error{Faults: []config.Fault{{File: "c", Line: 1, Problem: "a", Remedy: "b"}, {File: "c", Line: 2, Problem: "d", Remedy: "e"}}}
		}, Fail, "2 faults: c:1: a: b\nc:2: d: e", "pods are refused"},
		{"configuration", func(p *patient) { p.config.Warnings = []string{"hostCheck: off"} }, Warn, "hostCheck: off", "meant"},

		{"service", func(p *patient) { p.status, p.statusErr = nil, ErrNotRunning }, Fail, "not running", "systemctl restart gke-metadata-emulator"},
		{"service", func(p *patient) {
			p.status, p.statusErr = nil, ErrNotRunning
			p.unit = reportOf(map[string]any{"ActiveState": "activating", "SubState": "auto-restart", "Result": "exit-code", "ExecMainStatus": int32(78), "NRestarts": uint32(23), "StatusText": ""})
		}, Fail, "it is not running: systemd: activating (auto-restart), last result exit-code, exit status 78, 23 restarts", "journalctl"},
		{"service", func(p *patient) {
			p.status, p.statusErr = nil, ErrNotRunning
			p.install = &routing.Failure{Error: "lock:\nno space", Times: 7, Last: p.now.Add(-time.Second)}
			p.unit = unitReport{active: "activating", sub: "start-pre"}
		}, Fail, "routing install failed 7 times in a row, last 1s ago: lock:; no space; systemd: activating (start-pre)", "correct that"},
		{"rules", func(p *patient) { p.install = &routing.Failure{Error: "no space", Times: 1, Last: p.now} }, Fail, "routing install failed 1 times in a row, last 0s ago: no space", "routing install"},
		{"configuration", func(p *patient) { p.broken = errors.New("config.yaml:3: x: there is no such key") }, Fail, "there is no such key; the service runs on with what it read before", "before anything restarts"},
		{"configuration", func(p *patient) { p.status.ConfigFile = "config.yaml: permission denied" }, Fail, "does not load for the service, which runs on with what it read before: config.yaml: permission denied", "before anything restarts"},
		{"configuration", func(p *patient) { p.flags = "/etc/default/x" }, OK, " and the flags of /etc/default/x", ""},
		{"service", func(p *patient) { p.status, p.statusErr = nil, fs.ErrPermission }, Skip, "as root", ""},
		{"service", func(p *patient) { p.status, p.statusErr = nil, errors.New("500") }, Fail, "500", "systemctl restart"},
		{"service", func(p *patient) { p.status.State, p.status.Reason = "not configured", "line 3" }, Fail, "not configured: line 3", "correct config.yaml"},
		{"service", func(p *patient) { p.status.State = "stopping" }, Warn, "stopping", "again"},
		{"service", func(p *patient) { p.status.Version = "1.2.2" }, Warn, "1.2.2 is running, and version 1.2.3", "systemctl restart"},

		{"listener", func(p *patient) { p.node.Holder = routing.ListenedBy{}; p.status = nil }, Fail, "nobody listens on 169.254.169.252:988", "gke-metadata-emulator.socket"},
		{"listener", func(p *patient) { p.node.Holder = routing.ListenedBy{}; p.status.Listen = other.String() }, Fail, "the service listens on 127.0.0.1:1", "daemon-reload"},
		{"listener", func(p *patient) { p.status.Listen = other.String() }, Fail, "systemd (process 1) holds 169.254.169.252:988, and the service listens on 127.0.0.1:1", "daemon-reload"},
		{"listener", func(p *patient) {
			p.node.Holder = routing.ListenedBy{At: p.plan.Listen, PID: "7", Exe: "/x/gke-metadata-server"}
			p.status = nil
		}, Fail, "gke-metadata-server (process 7) listens on 169.254.169.252:988", "GKE's own"},
		{"listener", func(p *patient) {
			p.node.Holder = routing.ListenedBy{At: netip.MustParseAddrPort("0.0.0.0:988"), PID: "7", Exe: "lustre"}
		}, Fail, "Lustre's", "one address"},
		{"listener", func(p *patient) {
			p.node.Holder, p.root, p.status = routing.ListenedBy{At: p.plan.Listen}, false, nil
		}, Skip, "as root", ""},
		{"listener", func(p *patient) {
			p.plan.Listen = routing.MetadataServer()
			p.node.Holder = routing.ListenedBy{At: netip.MustParseAddrPort("0.0.0.0:80"), PID: "7", Exe: "nginx"}
		}, Fail, "nginx (process 7) listens on 0.0.0.0:80, and mode loopback needs 169.254.169.254:80", "an address of its own"},
		{"listener", func(p *patient) {
			p.direct.err, p.direct.dropped = context.DeadlineExceeded, []string{"nft chain ip filter OUTPUT (policy drop)"}
		}, Warn, "systemd (process 1); but what the node itself sends there is dropped by nft chain ip filter OUTPUT (policy drop)", "have it accept what the node sends to 169.254.169.252:988"},
		{"listener", func(p *patient) { p.plan.Closed = true }, Skip, "without a configuration", ""},
		{"listener", func(p *patient) { p.node.Local = false }, OK, "forwarded", ""},
		{"listener", func(p *patient) { p.status = nil }, OK, "systemd (process 1) holds", ""},

		{"ports", func(p *patient) { p.config.Listen = netip.MustParseAddrPort("169.254.169.252:40000") }, Warn, "listen: port 40000 lies in the ephemeral range 32768-60999", "ip_local_reserved_ports=40000"},
		{"ports", func(p *patient) { p.config.HealthListen = netip.MustParseAddrPort("127.0.0.1:60999") }, Warn, "healthListen: port 60999", "another port"},

		{"rules", func(p *patient) { p.stateErr = errors.New("no JSON") }, Fail, "no JSON", installRules},
		{"rules", func(p *patient) { p.state.Desired = routing.Removed }, Fail, "removed 1h0m0s ago", installRules},
		{"rules", func(p *patient) { p.state = routing.State{}; p.node.Rules = errors.New("missing: a") }, Fail, "never installed", installRules},
		{"rules", func(p *patient) { p.state.Closed = true }, Fail, "guard stands alone", installRules},
		{"rules", func(p *patient) { p.plan.Closed, p.state.Closed = true, true }, Warn, "closed guard", "correct the configuration"},
		{"rules", func(p *patient) { p.state.Listen = other.String() }, Fail, "lead to 127.0.0.1:1, and listen is 169.254.169.252:988", "routing install"},
		{"rules", func(p *patient) { p.node.Rules = errors.New("missing: a\nmissing: b\nmissing: c") }, Fail, "missing or wrong: a, and 2 more", installRules},
		{"rules", func(p *patient) { p.node.Rules = unix.EPERM; p.state.Standing = routing.Standing{} }, Skip, "as root", ""},
		{"rules", func(p *patient) {
			p.node.Rules = routing.ErrPermission
			p.state.Standing = routing.Standing{Time: p.now.Add(-time.Minute), Faults: []string{"missing: a"}}
		}, Fail, "1m0s before: missing: a", installRules},
		{"rules", func(p *patient) { p.node.Rules = routing.ErrPermission }, OK, "all stood 20s ago", ""},
		{"rules", func(p *patient) { p.state.Reason = "it fits" }, OK, "auto: it fits", ""},

		{"rules", observing, OK, "nothing is redirected", ""},
		{"guard", observing, Warn, "guards nothing", "another routing.mode"},
		{"cloud", func(p *patient) { observing(p); p.cloud = answered{server: "EC2ws", status: 401} }, OK, "AWS's metadata server answers this node's own processes, and pods", ""},
		{"connection", func(p *patient) { observing(p); p.trial.answered = answered{server: "EC2ws", status: 401} }, Skip, "redirects nobody", ""},
		{"traffic", observing, Skip, "routing observe", ""},

		{"watcher", func(p *patient) { p.watcher = "failed" }, Warn, "it is failed", "systemctl enable --now"},
		{"watcher", func(p *patient) { p.watcher = ""; p.state.Standing.Time = p.now.Add(-time.Hour) }, Warn, "does not run, or hangs", "systemctl enable --now"},
		{"watcher", func(p *patient) { p.state.Standing = routing.Standing{} }, Warn, "has not run since", "systemctl enable --now"},
		{"watcher", func(p *patient) { p.state.Standing.Good, p.state.Standing.Faults = false, []string{"a", "b"} }, Fail, "read 20s ago: a, and 1 more", "journalctl"},
		{"watcher", func(p *patient) { p.state.Repairs = routing.Repairs{"iptables": {"nftables": 3}} }, OK, "put back 3 times", ""},

		{"guard", func(p *patient) { p.node.Guard = []string{"ip rule: a"} }, Fail, "missing ip rule: a", installRules},
		{"guard", func(p *patient) { p.node.Bypass = []string{"ip rule: pref 0 from all lookup 7"} }, Fail, "does not hold for what comes before it: ip rule: pref 0 from all lookup 7", "preference of 1 or more"},
		{"guard", func(p *patient) { p.plan.Guard = nil }, Warn, "169.254.169.254:80 is not guarded", "routing.guard"},

		{"uplinks", func(p *patient) { p.node.Uplinks = nil }, Warn, "none was found", "routing.uplinks"},
		{"uplinks", func(p *patient) { p.node.Remarks = []string{"bridge br0 has both"} }, Warn, "bridge br0 has both", "routing.uplinks"},
		{"uplinks", func(p *patient) { p.plan.Spare = []string{"docker0"} }, OK, "left alone: docker0", ""},

		{"network", func(p *patient) { p.node.Facts.Cilium, p.node.Facts.CiliumHost = true, &yes }, Fail, "mode iptables does not fit: Cilium routes", "bpf.hostLegacyRouting=true of Cilium"},
		{"network", func(p *patient) {
			p.node.Facts.Cilium, p.node.Facts.CiliumHost, p.state.Mode, p.plan.Mode = true, &yes, routing.ModeLoopback, routing.ModeLoopback
		}, Fail, "wants routing.link", "routing.link: gme0"},
		{"network", func(p *patient) {
			p.node.Facts.Cilium, p.node.Facts.CiliumHost, p.state.Mode, p.plan.Mode, p.plan.Link = true, &yes, routing.ModeLoopback, routing.ModeLoopback, "gme0"
		}, OK, "Cilium routes", ""},
		{"network", func(p *patient) { p.node.Facts.Cilium = true }, Warn, "cannot be told", "hostLegacyRouting"},
		{"network", func(p *patient) { p.node.Facts.CalicoBPF = true }, Warn, "Calico's eBPF", "bpfExcludeCIDRsFromNAT"},
		{"network", func(p *patient) { p.node.Facts.GKE = true }, Fail, "node of GKE", "remove the package"},
		{"network", func(p *patient) { p.cloud = answered{ours: true, server: "GKE Metadata Server"}; p.status = nil }, Fail, "node of GKE", "remove the package"},
		{"network", func(p *patient) { p.node.Facts.OpenShift = true }, Fail, "OpenShift", "none"},
		{"network", func(p *patient) { p.node.Facts.Denied = true }, Fail, "denies", "routing.mode: loopback, and for the listener to follow: systemctl daemon-reload"},
		{"network", func(p *patient) {
			p.node.Facts.Bridged, p.status.Attestation = true, Attestation{Mode: "source-ip"}
		}, Warn, "speak with another's address", "SECURITY.md"},
		{"network", func(p *patient) {
			p.config.Routing.Mode, p.node.Facts.Denied = routing.ModeAuto, true
		}, Fail, "denies", ""},
		{"network", func(p *patient) { p.plan.Closed = true }, OK, "mode iptables would fit", ""},
		{"network", func(p *patient) { p.state.Mode = routing.ModeLoopback }, OK, "mode loopback; iptables would do", ""},

		{"cloud", func(p *patient) {
			p.cloud = answered{status: 401, server: "EC2ws"}
			p.node.Guard = []string{"ip rule: a"}
		}, Fail, "AWS's metadata server answers, and the guard is not complete", installRules},
		{"cloud", func(p *patient) { p.cloud = answered{status: 200, ours: true}; p.status = nil }, Warn, "GKE's own", "GKE"},
		{"cloud", func(p *patient) { p.cloud = answered{status: 400, server: "nginx"} }, OK, `calls itself "nginx" (status 400) answers this node's own processes; pods are kept`, ""},

		{"ipv6", func(p *patient) { p.plan.Guard = p.plan.Guard[:1] }, Warn, "does not close [fd00:c1::a9fe:a9fe]:80, [fd00:ec2::254]:80, [fd20:ce::254]:80", "[fd00:ec2::254]:80"},
		{"ipv6", func(p *patient) { p.plan.Guard = p.plan.Guard[:3] }, Warn, "does not close [fd20:ce::254]:80, ", "[fd20:ce::254]:80 to routing.guard"},
		{"ipv6", func(p *patient) { p.node.IPv6 = false }, OK, "has none", ""},
		{"ipv6", func(p *patient) { six(p); p.node.IPv6 = false }, Warn, "has none, so requests by IPv6 are not redirected to [fd20:ce::252]:988", "remove listen6"},
		{"ipv6", func(p *patient) { six(p) }, OK, "requests to [fd20:ce::254]:80 go to [fd20:ce::252]:988, which systemd (process 1) holds", ""},
		{"ipv6", func(p *patient) { six(p); p.state.IPv6 = "ip6tables: no nat" }, Warn, "not redirected to [fd20:ce::252]:988: ip6tables: no nat", "routing install"},
		{"ipv6", func(p *patient) { six(p); p.node.Holder6 = routing.ListenedBy{} }, Fail, "nobody listens on [fd20:ce::252]:988", "daemon-reload"},
		{"ipv6", func(p *patient) {
			six(p)
			p.node.Holder6 = routing.ListenedBy{At: p.plan.Listen6, PID: "7", Exe: "/x/lustre"}
		}, Fail, "lustre (process 7) listens on", "choose another listen6"},
		{"ipv6", func(p *patient) {}, OK, "requests are IPv4; the guard closes [fd00:c1::a9fe:a9fe]:80, [fd00:ec2::254]:80, [fd20:ce::254]:80", ""},
		{"ipv6", func(p *patient) { p.plan.Mode = routing.ModeEBPF }, OK, "mode ebpf serves IPv4 alone; the guard closes", ""},
		{"ipv6", func(p *patient) {
			p.plan.Mode, p.config.Listen6 = routing.ModeEBPF, netip.MustParseAddrPort("[fd20:ce::252]:988")
		}, Warn, "mode ebpf serves IPv4 alone, so listen6 is not in force; the guard closes", "routing.mode to iptables or nftables"},
		{"ipv6", observing, Skip, "guards nothing", ""},
		{"rules", func(p *patient) { six(p); p.state.Listen6 = "" }, Fail, `listen6 is "[fd20:ce::252]:988", and they were put up for ""`, installRules},

		{"cgroups", func(p *patient) { p.node.CgroupV2 = "" }, Warn, "no cgroup v2", "unified_cgroup_hierarchy"},
		{"cgroups", func(p *patient) { p.node.CgroupV2, p.config.Routing.InterceptHostPods = "", "on" }, Fail, "not redirected", "interceptHostPods: off"},
		{"cgroups", func(p *patient) { p.node.HostSlices, p.config.Routing.InterceptHostPods = nil, "on" }, Fail, "none of the host's own slices", "off"},

		{"policies", func(p *patient) { p.node.Policies, p.trial.ours = []string{"inet foreign late"}, false }, Warn, "inet foreign late at hook input", "169.254.169.252:988"},
		{"policies", func(p *patient) { p.node.Policies, p.node.Local = []string{"ip filter FORWARD"}, false }, OK, "ip filter FORWARD at hook forward drop by their policy, and let", ""},
		{"policies", func(p *patient) { p.node.Policies = nil }, Skip, "as root", ""},

		{"connection", func(p *patient) {
			p.trial.answered, p.trial.dropped = answered{err: context.DeadlineExceeded}, []string{"nft chain inet foreign late (policy drop)"}
		}, Fail, "dropped by nft chain inet foreign late (policy drop)", "accept what pods send to 169.254.169.252:988"},
		{"connection", func(p *patient) { p.trial.answered = answered{err: context.DeadlineExceeded} }, Fail, "no answer, and no chain was seen to drop it", "rules"},
		{"connection", func(p *patient) {
			p.trial.answered, p.trial.traceErr = answered{err: errors.New("odd")}, errors.New("no tracing")
		}, Fail, "odd; who drops it could not be seen: no tracing", "rules"},
		{"connection", func(p *patient) { p.trial.answered = answered{err: &net.OpError{Err: unix.ECONNREFUSED}} }, Fail, "refused, by no chain", "listener"},
		{"connection", func(p *patient) { p.trial.answered = answered{status: 200, server: "EC2ws"} }, Fail, "AWS's metadata server answered in the emulator's place", installRules},
		{"connection", func(p *patient) {
			p.trial.answered, p.state.Desired = answered{status: 200}, routing.Removed
		}, Fail, "without a name (status 200) answered", installRules},
		{"connection", func(p *patient) { p.trial = trial{impossible: routing.ErrPermission}; p.root = false }, Skip, "as root", ""},
		{"connection", func(p *patient) { p.trial = trial{impossible: errors.New("file exists")} }, Warn, "file exists", "another doctor"},
		{"connection", func(p *patient) { p.plan.Mode = routing.ModeNone }, OK, "at 169.254.169.252:988 as GCE_METADATA_HOST says: answered", ""},
		{"connection", func(p *patient) { p.podTrial = trial{impossible: routing.ErrNoPod} }, OK, "rules for pods' own addresses and interfaces were not met: no process runs", ""},
		{"connection", func(p *patient) { p.podTrial.answered = answered{err: context.DeadlineExceeded} }, Fail, "from pod ns/p, 10.244.0.2: no answer, while from a throw-away namespace", "names pods' addresses"},
		{"connection", func(p *patient) {
			p.podTrial.answered, p.node.Untrack = answered{err: context.DeadlineExceeded}, []string{"nft chain inet net raw"}
		}, Fail, "from pod ns/p, 10.244.0.2: no answer: nft chain inet net raw takes packets out of conntrack", "nftables"},
		{"connection", func(p *patient) { p.podTrial.answered = answered{status: 200, server: "EC2ws"} }, Fail, "from pod ns/p, 10.244.0.2: AWS's metadata server answered", installRules},
		{"connection", func(p *patient) { p.plan.Closed = true }, Skip, "without a configuration", ""},
		{"connection", func(p *patient) {
			p.state.Mode, p.trial = routing.ModeEBPF, trial{answered: answered{err: unix.ETIMEDOUT}}
		}, Skip, "ebpf", ""},

		{"evidence", func(p *patient) {}, OK, "found doctor's own socket from 198.18.169.254 by interface gme-doctor", ""},
		{"evidence", six, OK, "gme-doctor and from 2001:2::a9fe:a9fe by", ""},
		{"evidence", func(p *patient) { p.trial.attested = attested{status: 200, reason: "my-project"} }, OK, "found doctor's own socket", ""},
		{"evidence", func(p *patient) { p.trial.attested = attested{status: 503, reason: "no socket"} }, Fail, "refuses pods: 503 no socket", "restart gke-metadata-emulator-attest"},
		{"evidence", func(p *patient) { p.trial.attested = attested{status: 403, reason: "sockets of two"} }, Fail, "refuses pods: 403 sockets of two", "iptables-save"},
		{"evidence", func(p *patient) { six(p); p.trial6.attested = attested{status: 503, reason: "no socket"} }, Fail, "from 2001:2::a9fe:a9fe", "iptables-save"},
		{"evidence", func(p *patient) { p.trial.attested = attested{err: errors.New("no cat")} }, Warn, "no cat", "again"},
		{"evidence", func(p *patient) { p.trial = trial{impossible: errors.New("x")} }, Skip, "see connection", ""},
		{"evidence", func(p *patient) { p.status.Attestation = Attestation{Mode: "source-ip"} }, Skip, "source-ip", ""},
		{"evidence", func(p *patient) { p.status, p.statusErr = nil, ErrNotRunning }, Skip, "see service", ""},

		{"connection6", func(p *patient) {}, "", "", ""},
		{"connection6", six, OK, "from a throw-away namespace, 2001:2::a9fe:a9fe by interface gme-doctor: answered", ""},
		{"connection6", func(p *patient) { six(p); p.trial = trial{impossible: errors.New("x")} }, OK, "answered", ""},
		{"connection6", func(p *patient) {
			six(p)
			p.trial6.answered, p.trial6.dropped = answered{err: context.DeadlineExceeded}, []string{"nft chain ip6 foreign late (policy drop)"}
		}, Fail, "2001:2::a9fe:a9fe by interface gme-doctor: dropped by nft chain ip6 foreign late (policy drop)", "accept what pods send to [fd20:ce::252]:988"},
		{"connection6", func(p *patient) { six(p); p.trial6.answered = answered{status: 200, server: "Metadata Server for VM"} }, Fail, "Google Compute Engine's metadata server answered in the emulator's place", installRules},
		{"connection6", func(p *patient) { six(p); p.trial6 = trial{impossible: errors.New("no IPv6 on gme-doctor")} }, Warn, "no IPv6 on gme-doctor", "default.disable_ipv6"},
		{"connection6", func(p *patient) {
			six(p)
			p.trial = trial{impossible: routing.ErrPermission}
			p.trial6, p.root = p.trial, false
		}, Skip, "as root", ""},
		{"connection6", func(p *patient) { six(p); p.node.IPv6 = false }, Skip, "not redirected: this node has no IPv6", ""},
		{"connection6", func(p *patient) { six(p); p.state.IPv6 = "ip6tables: no nat" }, Skip, "not redirected: ip6tables: no nat", ""},
		{"connection", func(p *patient) { six(p); p.trial6.answered = answered{err: context.DeadlineExceeded} }, OK, "answered", ""},
		{"policies", func(p *patient) { six(p); p.node.Policies, p.trial6.ours = []string{"ip6 foreign late"}, false }, Warn, "ip6 foreign late", "accept"},

		{"attestation", func(p *patient) {}, OK, "mode kernel, by cgroup, and gke-metadata-emulator-attest.service is connected; pods are known: 1 by cgroup, 1 by nothing (ns/h: static, without a ServiceAccount)", ""},
		{"attestation", func(p *patient) {
			p.status.Cluster.Pods[0].UID = "u"
			p.status.Attestation.Kernel.Conflicts = []attest.Conflict{{Address: netip.MustParseAddr("10.0.0.7"), Between: [2]string{"u", "network namespace 7 of /x"}, Refused: 3}}
		}, Warn, "ns/p and network namespace 7 of /x have sockets of 10.0.0.7, and 3 connections were refused for it; pods", "remove 10.0.0.7 from the one that does not own it"},
		{"attestation", func(p *patient) { p.status.Cluster.Pods = nil }, OK, "pods are known: none", ""},
		{"attestation", func(p *patient) { p.status = nil }, Skip, "does not answer: the service is not running", ""},
		{"attestation", func(p *patient) {
			p.status.Cluster, p.status.Reason = nil, "config.yaml: bad"
		}, Skip, "does not serve: config.yaml: bad", ""},
		{"attestation", func(p *patient) {
			p.status.Attestation = Attestation{Mode: "source-ip"}
			p.status.Cluster.Pods[0].Evidence = "source-ip"
		}, Warn, "mode source-ip: an address says who asks, which a dead pod shares with the next owner; pods are known: 1 by nothing (ns/h: static, without a ServiceAccount), 1 by source-ip (ns/p: attestation.mode is source-ip)", "attestation.mode: kernel"},
		{"attestation", func(p *patient) {
			p.status.Cluster.Pods = []kube.PodStatus{{Namespace: "ns", Name: "a", ServiceAccount: "a", Evidence: "source-ip", RuntimeClass: "gvisor"},
				{Namespace: "ns", Name: "b", ServiceAccount: "a", Evidence: "source-ip", RuntimeClass: "gvisor"}}
		}, OK, "2 by source-ip (ns/a, and 1 more: RuntimeClass gvisor is in attestation.byAddress)", ""},
		{"attestation", func(p *patient) {
			p.status.Cluster.Pods[0].RuntimeClass = "kata-qemu"
			p.status.Cluster.Pods = append(p.status.Cluster.Pods, kube.PodStatus{Namespace: "ns", Name: "g", ServiceAccount: "a", Evidence: "cgroup", RuntimeClass: "my-gvisor"},
				kube.PodStatus{Namespace: "ns", Name: "w", ServiceAccount: "a", Evidence: "cgroup", RuntimeClass: "wasm"})
		}, Warn, "RuntimeClass kata-qemu, my-gvisor looks like a sandbox with a network of its own, whose pods are refused then: ns/p, and 1 more; pods", "attestation.byAddress: [kata-qemu, my-gvisor]"},
		{"attestation", func(p *patient) {
			p.status.Attestation.Kernel.Evidence, p.status.Attestation.Kernel.Lacks = "netns", []string{"cgroup v2: x"}
			p.status.Cluster.Pods = []kube.PodStatus{{Namespace: "ns", Name: "p", ServiceAccount: "a", Evidence: "netns"}, {Namespace: "ns", Name: "h", ServiceAccount: "a", HostNetwork: true}}
		}, Warn, "mode kernel: lacking: cgroup v2: x; pods are known: 1 by netns, 1 by nothing (ns/h: on the host network", "cgroup v2 and Linux 5.9"},
		{"attestation", func(p *patient) {
			p.status.Attestation.Kernel = &attest.KernelStatus{Hierarchy: "cgroup2", Problem: "connection refused"}
		}, Fail, "mode kernel, but pods that start now are refused, since gke-metadata-emulator-attest.service is away: connection refused", "systemctl restart gke-metadata-emulator-attest"},
		{"attestation", func(p *patient) { p.status.Attestation.Kernel.Problem = "no such file" }, Warn, "no such file; pods", "journalctl"},
		{"attestation", func(p *patient) {
			p.status.Attestation.Kernel.Lacks = []string{"cgroup /x cannot be watched"}
		}, Warn, "lacking: cgroup /x cannot be watched; pods", "raise the limit"},
		{"attestation", func(p *patient) {
			p.status.Attestation.Kernel = &attest.KernelStatus{Lacks: []string{"no tcp_diag"}}
		}, Fail, "the kernel cannot be asked: no tcp_diag", "journalctl -u gke-metadata-emulator"},

		{"passthrough", func(p *patient) { p.status.Unnamed = []Unnamed{{"kube-system/aws-node", 7}} }, OK, "no server to let them", ""},
		{"passthrough", func(p *patient) {
			p.cloud.err, p.status.Unnamed = nil, []Unnamed{{"kube-system/aws-node", 7}, {"kube-system/ebs", 1}}
		}, Warn, "not let through: kube-system/aws-node (7), kube-system/ebs (1)", "name it in passthrough, or set routing.interceptHostPods to off"},
		{"passthrough", func(p *patient) { p.config.Passthrough = []string{"a/b"} }, OK, "redirected only where there is no server", ""},
		{"passthrough", func(p *patient) {
			p.config.Passthrough, p.config.Routing.InterceptHostPods, p.status.Attestation.Kernel.Evidence = []string{"a/b"}, "on", attest.ByNamespace
		}, Fail, "the kernel does not tell", "cgroup v2"},
		{"passthrough", func(p *patient) {
			p.config.Passthrough, p.config.Routing.InterceptHostPods = []string{"a/b"}, "on"
		}, OK, "from the host network: 1", ""},
		{"passthrough", func(p *patient) { p.status = nil }, Skip, "does not serve", ""},

		{"traffic", func(p *patient) { p.node.Redirected, p.status.Requests = new(uint64), 0 }, Warn, "of the pods that run here (1) no connection was ever redirected", "network"},
		{"traffic", func(p *patient) { p.node.Redirected, p.status = new(uint64), nil }, Warn, "run here (1) no connection", "network"},
		{"traffic", func(p *patient) { p.status.Requests = 0 }, Warn, "run here (1) none has asked for anything since the service started 1h0m0s ago", "network"},
		{"traffic", func(p *patient) { p.status = nil }, OK, "7 connections were redirected since", ""},
		{"traffic", func(p *patient) { p.status.Requests, p.status.Cluster.Pods = 0, nil }, OK, "no pod runs here", ""},
		{"traffic", func(p *patient) { p.node.Redirected, p.status, p.root = nil, nil, false }, Skip, "as root", ""},
		{"traffic", func(p *patient) { p.node.Redirected, p.status, p.state.Mode = nil, nil, routing.ModeEBPF }, Skip, "mode ebpf counts no", ""},
		{"traffic", func(p *patient) { p.state.Desired = routing.Removed }, Skip, "nothing leads to the service", ""},

		{"traffic6", func(p *patient) {}, "", "", ""},
		{"traffic6", six, OK, "2 requests by IPv6 since the service started 1h0m0s ago", ""},
		{"traffic6", func(p *patient) { six(p); p.status.Requests6 = 0 }, OK, "no pod that runs here has IPv6 alone", ""},
		{"traffic6", sixAlone, Warn, "with IPv6 alone (1) no connection was ever redirected", "netfilter"},
		{"traffic6", func(p *patient) { sixAlone(p); *p.node.Redirected6 = 3 }, Warn, "with IPv6 alone (1) none has asked for anything by IPv6 since the service started 1h0m0s ago", "netfilter"},
		{"traffic6", func(p *patient) { sixAlone(p); p.node.Redirected6 = nil }, Warn, "none has asked for anything by IPv6", "netfilter"},
		{"traffic6", func(p *patient) { six(p); *p.node.Redirected6, p.status = 4, nil }, OK, "4 connections by IPv6 were redirected", ""},
		{"traffic6", func(p *patient) { six(p); p.node.Redirected6, p.status, p.root = nil, nil, false }, Skip, "as root", ""},
		{"traffic6", func(p *patient) { six(p); p.node.Redirected6, p.status = nil, nil }, Skip, "see service", ""},
		{"traffic6", func(p *patient) { six(p); p.node.IPv6 = false }, Skip, "this node has no IPv6", ""},
		{"traffic6", func(p *patient) { six(p); p.state.Desired = routing.Removed }, Skip, "nothing leads", ""},
		{"traffic", func(p *patient) { sixAlone(p) }, OK, "3 requests", ""},

		{"dns", func(p *patient) { p.names, p.namesErr = nil, &net.DNSError{IsNotFound: true} }, Warn, "not known to this node's DNS", "cluster's DNS"},
		{"dns", func(p *patient) { p.names, p.namesErr = nil, &net.DNSError{IsTimeout: true} }, Warn, "not to be had", "cluster's DNS"},
		{"dns", func(p *patient) { p.names = []netip.Addr{netip.MustParseAddr("192.0.2.1")} }, Warn, "is 192.0.2.1", "cluster's DNS"},

		{"credential", func(p *patient) { p.status.Cluster.NodeNameProblem = "nodeName is a" }, Fail, "nodeName is a", "nodeName"},
		{"credential", func(p *patient) { p.status.Cluster.Watching, p.status.Cluster.Problem = false, "permission denied" }, Fail, "the service says: permission denied; doctor itself", "gke-metadata-emulator-credential"},
		{"credential", func(p *patient) { p.status.Cluster.Watching = false }, Warn, "does not watch this node's pods now", "journalctl"},
		{"credential", func(p *patient) { p.status, p.cluster.Reach = nil, &kube.AwayError{Err: errors.New("refused")} }, Fail, "client certificate of /etc/kubernetes/kubelet.conf: refused", "still valid"},
		{"credential", func(p *patient) { p.status, p.cluster.Reach = nil, kube.ErrNotConfigured }, Fail, "no kubeconfig", "kubelet writes it"},
		{"credential", func(p *patient) { p.status, p.cluster.Reach, p.root = nil, kube.ErrNotConfigured, false }, Skip, "as root", ""},
		{"credential", func(p *patient) { p.status, p.cluster.Mismatch = nil, "nodeName is b" }, Fail, "nodeName is b", "nodeName"},
		{"credential", func(p *patient) { p.status = nil }, OK, "answers to system:node:n1, the client certificate of", ""},

		{"pods", func(p *patient) { p.cluster.List = &kube.ForbiddenError{Verb: "list", Resource: "pods", Message: "no"} }, Fail, "missing grant: list pods: no", "rbac"},
		{"pods", func(p *patient) { p.cluster.Watch = errors.New("cut") }, Fail, "cut", "watch"},
		{"pods", func(p *patient) { p.cluster.Reach = kube.ErrNotConfigured }, Skip, "see credential", ""},
		{"pods", func(p *patient) { p.status.Cluster.Pods[0].AccountError = "bad annotation" }, Warn, "pod ns/p is refused: bad annotation", "ServiceAccount"},

		{"serviceaccounts", func(p *patient) { p.cluster.Get = forbidden }, Fail, "missing grant: get serviceaccounts: no", "apply rbac.yaml"},
		{"serviceaccounts", func(p *patient) { p.cluster.Get = &kube.AnnotationError{Key: "k", Reason: "r"} }, Warn, "annotation k: r", "correct the annotation"},
		{"serviceaccounts", func(p *patient) { p.cluster.Get = kube.ErrNotFound }, Fail, "no such ServiceAccount", "exist"},
		{"serviceaccounts", func(p *patient) { p.cluster.Pod = "" }, Skip, "no pod runs", ""},
		{"serviceaccounts", func(p *patient) { p.cluster.List = errors.New("x") }, Skip, "see pods", ""},

		{"tokenrequest", func(p *patient) {
			p.cluster.Mint = &kube.ForbiddenError{User: "system:serviceaccount:a:b", Verb: "create", Resource: "serviceaccounts/token", Message: "no"}
		}, Fail, "create serviceaccounts/token", "apply rbac-dedicated.yaml"},
		{"tokenrequest", func(p *patient) { p.cluster.Mint = kube.ErrNoPod }, Skip, "went away", ""},
		{"tokenrequest", func(p *patient) { p.config.TokenAudience = "" }, Skip, "no audience", ""},

		{"sts", func(p *patient) { p.sts.Err = errors.New("no such host") }, Fail, "no such host", "HTTPS_PROXY"},
		{"sts", func(p *patient) { p.sts.Err = x509.UnknownAuthorityError{} }, Fail, "unknown authority", "google.caFile"},
		{"sts", func(p *patient) { p.sts.Err = x509.CertificateInvalidError{Reason: x509.Expired} }, Fail, "expired", "clock"},
		{"sts", func(p *patient) { p.sts.Proxy = "http://proxy:3128" }, OK, "by proxy http://proxy:3128", ""},
		{"sts", func(p *patient) {
			p.sts.Err, p.status.Proxy = errors.New("no such host"), "http://proxy:3128"
		}, Warn, "the service goes there by proxy http://proxy:3128; doctor itself fails: ", "HTTPS_PROXY of the service's unit"},
		{"sts", func(p *patient) {
			p.sts.Err, p.sts.Proxy, p.status.Proxy = errors.New("no such host"), "http://proxy:3128", "http://proxy:3128"
		}, Fail, "no such host", "HTTPS_PROXY"},
		{"exchange", func(p *patient) {
			p.exchange.err, p.sts.Proxy = token.ErrUnavailable, "http://proxy:3128"
		}, Warn, "the service goes there without a proxy", "HTTPS_PROXY"},
		{"iam", func(p *patient) { p.iam = token.Reached{Err: errors.New("google.caFile: no such file")} }, Fail, "google.caFile", ""},

		{"exchange", func(p *patient) { p.exchange = nil }, Skip, "see tokenrequest", ""},
		{"exchange", func(p *patient) {
			p.exchange.err = &token.GoogleError{Step: "STS", Status: 400, Message: "bad audience"}
		}, Fail, "bad audience", "providers describe"},
		{"exchange", func(p *patient) {
			p.exchange.err = &token.GoogleError{Step: "IAM", Status: 403, Message: "no binding", Hint: "gcloud this."}
		}, Warn, "no binding Hint: gcloud this.", "one ServiceAccount"},
		{"exchange", func(p *patient) { p.exchange.err = &token.GoogleError{Step: "STS", Status: 503} }, Fail, "503", "see sts"},
		{"exchange", func(p *patient) { p.exchange.email = "" }, OK, "STS takes the token of ns/a", ""},

		{"clock", func(p *patient) { p.cluster.Date, p.sts.Date = p.now.Add(5*time.Minute), p.now.Add(5*time.Minute) }, Fail, "5m0s off", "chrony"},
		{"clock", func(p *patient) { p.cluster.Date = p.now.Add(-5 * time.Minute) }, Fail, "the API server's clock and STS's are 5m0s apart", "NTP"},
		{"clock", func(p *patient) { p.sts.Date = p.now.Add(-20 * time.Second) }, Warn, "20s off from STS's", "chrony"},
		{"clock", func(p *patient) { p.sts.Date, p.cluster.Date = time.Time{}, time.Time{} }, Skip, "what time it is", ""},

		{"tokens", func(p *patient) { p.status.Tokens[0].LastError = "503" }, Warn, "1 of 1 could not be minted or refreshed the last time, such as that of ns/a: 503", "status"},
		{"tokens", func(p *patient) { p.status = nil }, Skip, "see service", ""},
	} {
		tried[c.check] = tried[c.check] || c.verdict != OK
		p := healthy()
		c.sick(p)
		if p.status == nil && p.statusErr == nil {
			p.statusErr = ErrNotRunning
		}
		var got Finding
		for _, f := range diagnose(p).Checks {
			if f.Check == c.check {
				got = f
			}
		}
		if got.Verdict != c.verdict || !strings.Contains(got.Finding, c.finding) || !strings.Contains(got.Remedy, c.remedy) || (c.verdict == Warn || c.verdict == Fail) != (got.Remedy != "") {
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
	p := healthy()
	p.cluster.Get = &kube.ForbiddenError{User: "system:node:n1", Verb: "get", Resource: "serviceaccounts", Message: "no"}
	p.cluster.Mint = p.cluster.Get
	p.broken = errors.New("a\nb")
	var b strings.Builder
	r := diagnose(p)
	if err := r.Text(&b); err != nil {
		t.Fatal(err)
	}
	text := b.String()
	if r.Failed() != 3 || strings.Count(text, "MISSING GRANT") != 1 || !strings.Contains(text, "\nkind: ClusterRole\n") {
		t.Errorf("%d failed, and\n%s", r.Failed(), text)
	}
	const begin = "fail  configuration    a; b; the service runs on with what it read before, and would refuse pods " +
		"after a restart → correct it before anything restarts the service\n" +
		"ok    service          serving, version 1.2.3, up 1h0m0s, 0 connections\n"
	if !strings.HasPrefix(text, begin) {
		t.Error(text)
	}
}
