package doctor

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/probe"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/status"
)

// sickNodes are those on which something of the node itself is wrong.
var sickNodes = []sickNode{
	{"configuration", func(r *nodeReport) { r.status, r.broken = nil, errors.New("config.yaml:3: x: bad: mend it") },
		Fail, "not configured: config.yaml:3: x: bad: mend it", "config check"},
	{"configuration", func(r *nodeReport) {
		r.status = nil
		r.broken = &config.Error{Faults: []config.Fault{{File: "c", Line: 1, Problem: "a", Remedy: "b"},
			{File: "c", Line: 2, Problem: "d", Remedy: "e"}}}
	}, Fail, "not configured: 2 faults: c:1: b; c:2: e: see `gke-metadata-emulator config check`", "config check"},
	{"configuration", func(r *nodeReport) { r.config.Warnings = []string{"hostCheck: off"} }, Warn, "hostCheck: off",
		"intended"},

	{"service", func(r *nodeReport) { r.status, r.statusErr = nil, status.ErrNotRunning }, Fail, "not running",
		"systemctl restart gke-metadata-emulator"},
	{"service", func(r *nodeReport) {
		r.status, r.statusErr = nil, status.ErrNotRunning
		r.unit = status.Unit{Active: "activating", Sub: "auto-restart", Result: "exit-code", Code: 78, Restarts: 23}
	}, Fail, "not running: systemd: activating (auto-restart), last result exit-code, exit status 78, 23 restarts",
		"journalctl"},
	{"service", func(r *nodeReport) {
		r.status, r.statusErr = nil, status.ErrNotRunning
		r.install = &routing.Failure{Error: "lock:\nno space", Times: 7, Last: r.now.Add(-time.Second)}
		r.unit = status.Unit{Active: "activating", Sub: "start-pre"}
	}, Fail, "routing install failed 7 times in a row, last 1s ago: lock:; no space; systemd: activating (start-pre)",
		"correct the cause"},
	{"rules", func(r *nodeReport) { r.install = &routing.Failure{Error: "no space", Times: 1, Last: r.now} }, Fail,
		"routing install failed 1 times in a row, last 0s ago: no space", "routing install"},
	{"configuration", func(r *nodeReport) { r.broken = errors.New("config.yaml:3: x: there is no such key") }, Fail,
		"the configuration on disk does not load: the previous one stays in force, and a restart would refuse pods: " +
			"config.yaml:3: x: there is no such key", "config check"},
	{"configuration", func(r *nodeReport) { r.status.ConfigFile = config.Outdated(errors.New("x")) }, Fail,
		"for the service's user, the configuration", "config check"},
	{"configuration", func(r *nodeReport) { r.flags = "/etc/default/x" }, OK, "config.yaml loads, with the flags of " +
		"/etc/default/x", ""},
	{"service", func(r *nodeReport) { r.status, r.statusErr = nil, fs.ErrPermission }, Skip, "as root", ""},
	{"service", func(r *nodeReport) { r.status, r.statusErr = nil, errors.New("500") }, Fail, "500", "systemctl restart"},
	{"service", func(r *nodeReport) { r.status.State, r.status.Reason = "not configured", "not configured: line 3" }, Fail,
		"not configured: line 3", "correct config.yaml"},
	{"service", func(r *nodeReport) { r.status.Reason = "no usable kubeconfig: x" }, Fail,
		"serving, not ready: no usable kubeconfig: x", "see the failed checks below"},
	{"service", func(r *nodeReport) {
		r.status, r.statusErr, r.notReady = nil, fs.ErrPermission, "not configured: x"
	}, Fail, "not configured: x", "see the failed checks below"},
	{"credential", func(r *nodeReport) {
		r.status.Cluster.Watching, r.status.Cluster.Problem = false, "the Kubernetes API is unavailable since T: x"
		r.cluster.Reach = &kube.AwayError{Err: errors.New("refused")}
	}, Fail, "the Kubernetes API is unavailable since T: x", "check that the API server runs"},
	{"service", func(r *nodeReport) { r.status.State = "stopping" }, Warn, "stopping", "again"},
	{"service", func(r *nodeReport) { r.status.Version = "1.2.2" }, Warn, "version 1.2.2 is running, version 1.2.3 is " +
		"installed",
		"systemctl restart"},

	{"listener", func(r *nodeReport) { r.node.Holder = routing.ListenedBy{}; r.status = nil }, Fail,
		"no process listens on 169.254.169.252:988", "gke-metadata-emulator.socket"},
	{"listener", func(r *nodeReport) { r.node.Holder = routing.ListenedBy{}; r.status.Listen = other.String() }, Fail,
		"the service listens on 127.0.0.1:1", "daemon-reload"},
	{"listener", func(r *nodeReport) { r.status.Listen = other.String() }, Fail,
		"systemd (process 1) holds 169.254.169.252:988, but the service listens on 127.0.0.1:1", "daemon-reload"},
	{"listener", func(r *nodeReport) {
		r.node.Holder = routing.ListenedBy{At: r.plan.Listen, PID: "7", Exe: "/x/gke-metadata-server"}
		r.status = nil
	}, Fail, "gke-metadata-server (process 7) listens on 169.254.169.252:988", "GKE's own"},
	{"listener", func(r *nodeReport) {
		r.node.Holder = routing.ListenedBy{At: netip.MustParseAddrPort("0.0.0.0:988"), PID: "7", Exe: "lustre"}
	}, Fail, "Lustre uses", "one address"},
	{"listener", func(r *nodeReport) {
		r.node.Holder, r.root, r.status = routing.ListenedBy{At: r.plan.Listen}, false, nil
	}, Skip, "as root", ""},
	{"listener", func(r *nodeReport) {
		r.plan.Listen = routing.MetadataServer()
		r.node.Holder = routing.ListenedBy{At: netip.MustParseAddrPort("0.0.0.0:80"), PID: "7", Exe: "nginx"}
	}, Fail, "nginx (process 7) listens on 0.0.0.0:80, which mode loopback needs for 169.254.169.254:80",
		"one address"},
	{"listener", func(r *nodeReport) {
		r.direct.err, r.direct.dropped = context.DeadlineExceeded, []string{"nft chain ip filter OUTPUT (policy drop)"}
	}, Warn, "systemd (process 1); packets from the node itself are dropped by nft chain ip filter OUTPUT " +
		"(policy drop)", "accept packets from the node to 169.254.169.252:988"},
	{"listener", func(r *nodeReport) { // at a first boot the socket unit fails, and there is no configuration yet
		r.plan.Closed, r.node.Local = true, false
		r.node.Holder = routing.ListenedBy{At: netip.MustParseAddrPort("0.0.0.0:988"), PID: "7", Exe: "/x/nginx",
			Unit: "nginx.service"}
		r.status = nil
	}, Fail, "nginx (process 7, nginx.service) listens on 0.0.0.0:988", "systemctl restart gke-metadata-emulator"},
	{"listener", func(r *nodeReport) { r.plan.Closed = true }, Skip, "no valid configuration", ""},
	{"listener", func(r *nodeReport) { r.node.Local = false }, OK, "forwarded", ""},
	{"listener", func(r *nodeReport) { r.status = nil }, OK, "systemd (process 1) holds", ""},

	{"ports", func(r *nodeReport) {
		r.health = routing.ListenedBy{At: netip.MustParseAddrPort("0.0.0.0:16322"), PID: "7", Exe: "/x/nginx"}
	}, Fail, "healthListen 127.0.0.1:16322 is held by nginx (process 7) at 0.0.0.0:16322", "systemctl restart"},
	{"ports", func(r *nodeReport) { r.config.Listen = netip.MustParseAddrPort("169.254.169.252:40000") }, Warn,
		"listen: port 40000 is in the ephemeral range 32768-60999", "ip_local_reserved_ports=40000"},
	{"ports", func(r *nodeReport) { r.config.HealthListen = netip.MustParseAddrPort("127.0.0.1:60999") }, Warn,
		"healthListen: port 60999", "another port"},

	{"rules", func(r *nodeReport) { r.stateErr = errors.New("no JSON") }, Fail, "no JSON", installRules},
	{"rules", func(r *nodeReport) { r.state.Desired = routing.Removed }, Fail, "removed 1h0m0s ago", installRules},
	{"rules", func(r *nodeReport) { r.state = routing.State{}; r.node.Rules = errors.New("missing: a") }, Fail,
		"never installed", installRules},
	{"rules", func(r *nodeReport) { r.state.Closed = true }, Fail, "installed without a valid configuration",
		installRules},
	{"rules", func(r *nodeReport) { r.plan.Closed, r.state.Closed = true, true }, Warn, "no valid configuration",
		"correct the configuration"},
	{"rules", func(r *nodeReport) { r.state.Listen = other.String() }, Fail,
		"installed for listen 127.0.0.1:1, but listen is 169.254.169.252:988", "routing install"},
	{"rules", func(r *nodeReport) { r.node.Rules = errors.New("missing: a\nmissing: b\nmissing: c") }, Fail,
		"missing or wrong: a, and 2 more", installRules},
	{"rules", func(r *nodeReport) { r.node.Rules = unix.EPERM; r.state.Standing = routing.Standing{} }, Skip, "as root",
		""},
	{"rules", func(r *nodeReport) {
		r.node.Rules = fault.ErrPermission
		r.state.Standing = routing.Standing{Time: r.now.Add(-time.Minute), Faults: []string{"missing: a"}}
	}, Fail, "checked 1m0s ago: missing: a", installRules},
	{"rules", func(r *nodeReport) { r.node.Rules = fault.ErrPermission }, OK, "complete 20s ago", ""},
	{"rules", func(r *nodeReport) { r.state.Reason = "it fits" }, OK, "auto: it fits", ""},

	{"rules", observing, OK, "counted and not redirected", ""},
	{"guard", observing, Warn, "guards nothing", "another routing.mode"},
	{"cloud", func(r *nodeReport) { observing(r); r.cloud = answered{server: "EC2ws", status: 401} }, OK,
		"AWS's metadata server answers the node's own processes and pods", ""},
	{"connection", func(r *nodeReport) { observing(r); r.probe.answered = answered{server: "EC2ws", status: 401} },
		Skip, "redirects no connections", ""},
	{"traffic", observing, Skip, "routing observe", ""},

	{"watcher", func(r *nodeReport) { r.watcher = "failed" }, Warn, "gke-metadata-emulator-routing.service is failed",
		"systemctl enable --now"},
	{"watcher", func(r *nodeReport) { r.watcher = ""; r.state.Standing.Time = r.now.Add(-time.Hour) }, Warn,
		"does not run, or hangs", "systemctl enable --now"},
	{"watcher", func(r *nodeReport) { r.state.Standing = routing.Standing{} }, Warn, "has not run since",
		"systemctl enable --now"},
	{"watcher", func(r *nodeReport) { r.state.Standing.Good, r.state.Standing.Faults = false, []string{"a", "b"} },
		Fail, "checked 20s ago: a, and 1 more", "journalctl"},
	{"watcher", func(r *nodeReport) { r.state.Repairs = routing.Repairs{"iptables": {"nftables": 3}} }, OK,
		"repaired 3 times", ""},

	{"guard", func(r *nodeReport) { r.node.Guard = []string{"ip rule: a"} }, Fail, "missing: ip rule: a", installRules},
	{"guard", func(r *nodeReport) { r.node.Bypass = []string{"ip rule: pref 0 from all lookup 7"} }, Fail,
		"bypassed by a policy rule or route that comes first: ip rule: pref 0 from all lookup 7", "preference of 1 or more"},
	{"guard", func(r *nodeReport) { r.plan.Guard = nil }, Warn, "169.254.169.254:80 is not guarded", "routing.guard"},

	{"uplinks", func(r *nodeReport) { r.node.Uplinks = nil }, Warn, "no uplink found", "routing.uplinks"},
	{"uplinks", func(r *nodeReport) { r.node.Remarks = []string{"bridge br0 has both"} }, Warn, "bridge br0 has both",
		"routing.uplinks"},
	{"uplinks", func(r *nodeReport) { r.plan.ExcludeInterfaces = []string{"docker0"} }, OK,
		"routing.excludeInterfaces: docker0", ""},

	{"network", func(r *nodeReport) { r.node.Facts.Cilium, r.node.Facts.CiliumHost = true, &yes }, Fail,
		"mode iptables does not fit: Cilium routes", "bpf.hostLegacyRouting=true in Cilium"},
	{"network", func(r *nodeReport) {
		r.node.Facts.Cilium, r.node.Facts.CiliumHost, r.state.Mode, r.plan.Mode = true, &yes, routing.ModeLoopback,
			routing.ModeLoopback
	}, Fail, "needs routing.link", "routing.link: gme0"},
	{"network", func(r *nodeReport) {
		r.node.Facts.Cilium, r.node.Facts.CiliumHost, r.state.Mode, r.plan.Mode, r.plan.Link = true, &yes,
			routing.ModeLoopback, routing.ModeLoopback, "gme0"
	}, OK, "Cilium routes", ""},
	{"network", func(r *nodeReport) { r.node.Facts.Cilium = true }, Warn, "is not known", "hostLegacyRouting"},
	{"network", func(r *nodeReport) { r.node.Facts.CalicoBPF = true }, Warn, "Calico's eBPF", "bpfExcludeCIDRsFromNAT"},
	{"network", func(r *nodeReport) { r.node.Facts.GKE = true }, Fail, "node of GKE", "remove the package"},
	{"network", func(r *nodeReport) { r.cloud = answered{ours: true, server: "GKE Metadata Server"}; r.status = nil },
		Fail, "node of GKE", "remove the package"},
	{"network", func(r *nodeReport) { r.node.Facts.OpenShift = true }, Fail, "OpenShift", "none"},
	{"network", func(r *nodeReport) { r.node.Facts.Denied = true }, Fail, "denies",
		"routing.mode: loopback, then: systemctl daemon-reload"},
	{"network", func(r *nodeReport) {
		r.node.Facts.Bridged, r.status.Attestation = true, status.Attestation{Mode: "source-ip"}
	}, Warn, "use another pod's address", "attestation.mode: kernel"},
	{"network", func(r *nodeReport) {
		r.config.Routing.Mode, r.node.Facts.Denied = routing.ModeAuto, true
	}, Fail, "denies", ""},
	{"network", func(r *nodeReport) { r.plan.Closed = true }, OK, "mode iptables fits", ""},
	{"network", func(r *nodeReport) { r.state.Mode = routing.ModeLoopback }, OK, "mode loopback; mode iptables fits, too",
		""},

	{"cloud", func(r *nodeReport) {
		r.cloud = answered{status: 401, server: "EC2ws"}
		r.node.Guard = []string{"ip rule: a"}
	}, Fail, "AWS's metadata server answers the node's own processes, and the guard is incomplete", installRules},
	{"cloud", func(r *nodeReport) { r.cloud = answered{status: 200, ours: true}; r.status = nil }, Warn, "GKE's own",
		"GKE"},
	{"cloud", func(r *nodeReport) { r.cloud = answered{status: 400, server: "nginx"} }, OK,
		`with the Server header "nginx" (status 400) answers the node's own processes; pods do not`, ""},

	{"ipv6", func(r *nodeReport) { r.plan.Guard = r.plan.Guard[:1] }, Warn,
		"not guarded: [fd00:c1::a9fe:a9fe]:80, [fd00:ec2::254]:80, [fd20:ce::254]:80", "[fd00:ec2::254]:80"},
	{"ipv6", func(r *nodeReport) { r.plan.Guard = r.plan.Guard[:3] }, Warn, "not guarded: [fd20:ce::254]:80: ",
		"[fd20:ce::254]:80 to routing.guard"},
	{"ipv6", func(r *nodeReport) { r.node.IPv6 = false }, OK, "no IPv6", ""},
	{"ipv6", func(r *nodeReport) { dualStack(r); r.node.IPv6 = false }, Warn,
		"no IPv6: nothing is redirected to listen6 [fd20:ce::252]:988", "remove listen6"},
	{"ipv6", func(r *nodeReport) { dualStack(r) }, OK, "requests to [fd20:ce::254]:80 are redirected to " +
		"[fd20:ce::252]:988, " +
		"where systemd (process 1) listens", ""},
	{"ipv6", func(r *nodeReport) { dualStack(r); r.state.IPv6 = "ip6tables: no nat" }, Warn,
		"not redirected to [fd20:ce::252]:988: ip6tables: no nat", "routing install"},
	{"ipv6", func(r *nodeReport) { dualStack(r); r.node.Holder6 = routing.ListenedBy{} }, Fail,
		"no process listens on [fd20:ce::252]:988", "daemon-reload"},
	{"ipv6", func(r *nodeReport) {
		dualStack(r)
		r.node.Holder6 = routing.ListenedBy{At: r.plan.Listen6, PID: "7", Exe: "/x/lustre"}
	}, Fail, "lustre (process 7) listens on", "choose another listen6"},
	{"ipv6", func(r *nodeReport) {}, OK, "listen6 is not set; guarded: [fd00:c1::a9fe:a9fe]:80, " +
		"[fd00:ec2::254]:80, [fd20:ce::254]:80", ""},
	{"ipv6", func(r *nodeReport) { r.plan.Mode = routing.ModeEBPF }, OK,
		"mode ebpf serves IPv4 only; guarded: [", ""},
	{"ipv6", func(r *nodeReport) {
		r.plan.Mode, r.config.Listen6 = routing.ModeEBPF, netip.MustParseAddrPort("[fd20:ce::252]:988")
	}, Warn, "mode ebpf serves IPv4 only: listen6 is not used; guarded: [",
		"routing.mode to iptables or nftables"},
	{"ipv6", observing, Skip, "guards nothing", ""},
	{"rules", func(r *nodeReport) { dualStack(r); r.state.Listen6 = "" }, Fail,
		`installed for listen6 "", but listen6 is "[fd20:ce::252]:988"`, installRules},

	{"cgroups", func(r *nodeReport) { r.node.CgroupV2 = "" }, Warn, "no cgroup v2", "unified_cgroup_hierarchy"},
	{"cgroups", func(r *nodeReport) { r.node.CgroupV2, r.config.Routing.InterceptHostPods = "", "on" }, Fail,
		"not redirected", "interceptHostPods: off"},
	{"cgroups", func(r *nodeReport) { r.node.HostSlices, r.config.Routing.InterceptHostPods = nil, "on" }, Fail,
		"none of the node's own slices", "off"},

	{"policies", func(r *nodeReport) { r.node.Policies, r.probe.ours = []string{"inet foreign late"}, false }, Warn,
		"inet foreign late at hook input", "169.254.169.252:988"},
	{"policies", func(r *nodeReport) { r.node.Policies, r.node.Local = []string{"ip filter FORWARD"}, false }, OK,
		"ip filter FORWARD at hook forward have policy drop, and accept", ""},
	{"policies", func(r *nodeReport) { r.node.Policies = nil }, Skip, "as root", ""},

	{"connection", func(r *nodeReport) {
		r.probe.answered, r.probe.dropped = answered{err: context.DeadlineExceeded},
			[]string{"nft chain inet foreign late (policy drop)"}
	}, Fail, "dropped by nft chain inet foreign late (policy drop)", "accept packets of pods to 169.254.169.252:988"},
	{"connection", func(r *nodeReport) { r.probe.answered = answered{err: context.DeadlineExceeded} }, Fail,
		"no answer, and no chain was seen to drop it", "rules"},
	{"connection", func(r *nodeReport) {
		r.probe.answered, r.probe.traceErr = answered{err: errors.New("odd")}, errors.New("no tracing")
	}, Fail, "odd; tracing the packet failed: no tracing", "rules"},
	{"connection", func(r *nodeReport) { r.probe.answered = answered{err: &net.OpError{Err: unix.ECONNREFUSED}} }, Fail,
		"connection refused, and no chain", "listener"},
	{"connection", func(r *nodeReport) { r.probe.answered = answered{status: 200, server: "EC2ws"} }, Fail,
		"AWS's metadata server answered instead of this service", installRules},
	{"connection", func(r *nodeReport) {
		r.probe.answered, r.state.Desired = answered{status: 200}, routing.Removed
	}, Fail, "without a Server header (status 200) answered", installRules},
	{"connection", func(r *nodeReport) { r.probe = probed{impossible: fault.ErrPermission}; r.root = false }, Skip,
		"as root", ""},
	{"connection", func(r *nodeReport) { r.probe = probed{impossible: errors.New("file exists")} }, Warn, "file exists",
		"another doctor"},
	{"connection", func(r *nodeReport) { r.plan.Mode = routing.ModeNone }, OK,
		"to 169.254.169.252:988, the value of GCE_METADATA_HOST: this service answered", ""},
	{"connection", func(r *nodeReport) { r.podProbe = probed{impossible: probe.ErrNoPod} }, OK,
		"not tried from a pod: no process runs", ""},
	{"connection", func(r *nodeReport) { r.podProbe.answered = answered{err: context.DeadlineExceeded} }, Fail,
		"from pod ns/p, 10.244.0.2: no answer, but from a temporary namespace", "the rule for pods' addresses"},
	{"connection", func(r *nodeReport) {
		r.podProbe.answered, r.node.Untrack = answered{err: context.DeadlineExceeded}, []string{"nft chain inet net raw"}
	}, Fail, "from pod ns/p, 10.244.0.2: no answer: nft chain inet net raw excludes packets from conntrack", "nftables"},
	{"connection", func(r *nodeReport) { r.podProbe.answered = answered{status: 200, server: "EC2ws"} }, Fail,
		"from pod ns/p, 10.244.0.2: AWS's metadata server answered", installRules},
	{"connection", func(r *nodeReport) { r.plan.Closed = true }, Skip, "no valid configuration", ""},
	{"connection", func(r *nodeReport) {
		r.state.Mode, r.probe = routing.ModeEBPF, probed{answered: answered{err: unix.ETIMEDOUT}}
	}, Skip, "ebpf", ""},

	{"evidence", func(r *nodeReport) {}, OK, "found the socket of doctor's connection from 198.18.169.254 by interface " +
		"gme-doctor", ""},
	{"evidence", dualStack, OK, "gme-doctor and from 2001:2::a9fe:a9fe by", ""},
	{"evidence", func(r *nodeReport) { r.probe.attested = attested{status: 200, reason: "my-project"} }, OK,
		"found the socket of doctor's connection", ""},
	{"evidence", func(r *nodeReport) { r.probe.attested = attested{status: 503, reason: "no socket"} }, Fail,
		"refuses pods: 503 no socket", "restart gke-metadata-emulator-attest"},
	{"evidence", func(r *nodeReport) { r.probe.attested = attested{status: 403, reason: "sockets of two"} }, Fail,
		"refuses pods: 403 sockets of two", "iptables-save"},
	{"evidence", func(r *nodeReport) { dualStack(r); r.probe6.attested = attested{status: 503, reason: "no socket"} },
		Fail,
		"from 2001:2::a9fe:a9fe", "iptables-save"},
	{"evidence", func(r *nodeReport) { r.probe.attested = attested{err: errors.New("no cat")} }, Warn, "no cat", "again"},
	{"evidence", func(r *nodeReport) { r.probe = probed{impossible: errors.New("x")} }, Skip, "see check connection", ""},
	{"evidence", func(r *nodeReport) { r.status.Attestation = status.Attestation{Mode: "source-ip"} }, Skip,
		"source-ip", ""},
	{"evidence", func(r *nodeReport) { r.status, r.statusErr = nil, status.ErrNotRunning }, Skip, "see check service", ""},

	{"connection6", func(r *nodeReport) {}, "", "", ""},
	{"connection6", dualStack, OK, "from a temporary namespace, 2001:2::a9fe:a9fe by interface gme-doctor: this " +
		"service answered", ""},
	{"connection6", func(r *nodeReport) { dualStack(r); r.probe = probed{impossible: errors.New("x")} }, OK, "answered",
		""},
	{"connection6", func(r *nodeReport) {
		dualStack(r)
		r.probe6.answered, r.probe6.dropped = answered{err: context.DeadlineExceeded},
			[]string{"nft chain ip6 foreign late (policy drop)"}
	}, Fail, "2001:2::a9fe:a9fe by interface gme-doctor: dropped by nft chain ip6 foreign late (policy drop)",
		"accept packets of pods to [fd20:ce::252]:988"},
	{"connection6", func(r *nodeReport) {
		dualStack(r)
		r.probe6.answered = answered{status: 200, server: "Metadata Server for VM"}
	}, Fail, "Google Compute Engine's metadata server answered instead of this service", installRules},
	{"connection6", func(r *nodeReport) { dualStack(r); r.probe6 = probed{impossible: errors.New("no IPv6 here")} },
		Warn, "no IPv6 here", "default.disable_ipv6"},
	{"connection6", func(r *nodeReport) {
		dualStack(r)
		r.probe = probed{impossible: fault.ErrPermission}
		r.probe6, r.root = r.probe, false
	}, Skip, "as root", ""},
	{"connection6", func(r *nodeReport) { dualStack(r); r.node.IPv6 = false }, Skip,
		"not redirected: this node has no IPv6",
		""},
	{"connection6", func(r *nodeReport) { dualStack(r); r.state.IPv6 = "ip6tables: no nat" }, Skip,
		"not redirected: ip6tables: no nat", ""},
	{"connection", func(r *nodeReport) { dualStack(r); r.probe6.answered = answered{err: context.DeadlineExceeded} }, OK,
		"answered", ""},
	{"policies", func(r *nodeReport) {
		dualStack(r)
		r.node.Policies, r.probe6.ours = []string{"ip6 foreign late"}, false
	},
		Warn, "ip6 foreign late", "accept"},

	{"attestation", func(r *nodeReport) {}, OK, "mode kernel, by cgroup; gke-metadata-emulator-attest.service " +
		"is connected; evidence of pods: 1 by cgroup, 1 by nothing (ns/h: static pod, no ServiceAccount)", ""},
	{"attestation", func(r *nodeReport) {
		r.status.Cluster.Pods[0].UID = "u"
		r.status.Attestation.Kernel.Conflicts = []attest.Conflict{{Address: netip.MustParseAddr("10.0.0.7"),
			Between: [2]string{"u", "network namespace 7 of /x"}, Refused: 3}}
	}, Warn, "ns/p and network namespace 7 of /x have sockets with address 10.0.0.7: 3 connections were refused; evidence",
		"remove 10.0.0.7 from the one that does not own it"},
	{"attestation", func(r *nodeReport) { r.status.Cluster.Pods = nil }, OK, "evidence of pods: none", ""},
	{"attestation", func(r *nodeReport) { r.status = nil }, Skip, "does not answer: see check service", ""},
	{"attestation", func(r *nodeReport) {
		r.status.Cluster, r.status.Reason = nil, "config.yaml: bad"
	}, Skip, "does not serve: see check service", ""},
	{"attestation", func(r *nodeReport) {
		r.status.Attestation = status.Attestation{Mode: "source-ip"}
		r.status.Cluster.Pods[0].Evidence = "source-ip"
	}, Warn, "mode source-ip: the source address identifies a pod, and a dead pod shares it with the address's next " +
		"owner; evidence of pods: " +
		"1 by nothing (ns/h: static pod, no ServiceAccount), 1 by source-ip (ns/p: attestation.mode is " +
		"source-ip)", "attestation.mode: kernel"},
	{"attestation", func(r *nodeReport) {
		r.status.Cluster.Pods = []kube.PodStatus{{Namespace: "ns", Name: "a", ServiceAccount: "a", Evidence: "source-ip",
			RuntimeClass: "gvisor"},
			{Namespace: "ns", Name: "b", ServiceAccount: "a", Evidence: "source-ip", RuntimeClass: "gvisor"}}
	}, OK, "2 by source-ip (ns/a, and 1 more: RuntimeClass gvisor is in attestation.byAddress)", ""},
	{"attestation", func(r *nodeReport) {
		r.status.Cluster.Pods[0].RuntimeClass = "kata-qemu"
		r.status.Cluster.Pods = append(r.status.Cluster.Pods,
			kube.PodStatus{Namespace: "ns", Name: "g", ServiceAccount: "a", Evidence: "cgroup", RuntimeClass: "my-gvisor"},
			kube.PodStatus{Namespace: "ns", Name: "w", ServiceAccount: "a", Evidence: "cgroup", RuntimeClass: "wasm"})
	}, Warn, "RuntimeClass kata-qemu, my-gvisor may be a sandbox with its own network stack, whose pods are " +
		"refused: ns/p, and 1 more; evidence", "attestation.byAddress: [kata-qemu, my-gvisor]"},
	{"attestation", func(r *nodeReport) {
		r.status.Attestation.Kernel.Evidence, r.status.Attestation.Kernel.Lacks = "netns", []string{"cgroup v2: x"}
		r.status.Cluster.Pods = []kube.PodStatus{{Namespace: "ns", Name: "p", ServiceAccount: "a", Evidence: "netns"},
			{Namespace: "ns", Name: "h", ServiceAccount: "a", HostNetwork: true}}
	}, Warn, "mode kernel: limited: cgroup v2: x; evidence of pods: 1 by netns, 1 by nothing (ns/h: on the host network",
		"cgroup v2 and Linux 5.9"},
	{"attestation", func(r *nodeReport) {
		r.status.Attestation.Kernel = &attest.KernelStatus{Hierarchy: "cgroup2", Problem: "connection refused"}
	}, Fail, "mode kernel, but gke-metadata-emulator-attest.service is not connected, and new pods are refused: " +
		"connection refused", "systemctl restart gke-metadata-emulator-attest"},
	{"attestation", func(r *nodeReport) { r.status.Attestation.Kernel.Problem = "no such file" }, Warn,
		"no such file; evidence", "journalctl"},
	{"attestation", func(r *nodeReport) {
		r.status.Attestation.Kernel.Lacks = []string{"cgroup /x cannot be watched"}
	}, Warn, "limited: cgroup /x cannot be watched; evidence", "raise the named limit"},
	{"attestation", func(r *nodeReport) {
		r.status.Attestation.Kernel = &attest.KernelStatus{Lacks: []string{"no tcp_diag"}}
	}, Fail, "the kernel cannot be queried: no tcp_diag", "journalctl -u gke-metadata-emulator"},
}
