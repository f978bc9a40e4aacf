package doctor

import (
	"context"
	"crypto/x509"
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
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token"
)

// sickNodes are those on which something of the node itself is wrong.
var sickNodes = []sickNode{
	{"configuration", func(r *nodeReport) { r.status, r.broken = nil, errors.New("config.yaml:3: x: bad: mend it") },
		Fail, "config.yaml:3: x: bad: mend it", "pods are refused"},
	{"configuration", func(r *nodeReport) {
		r.status = nil
		r.broken = &config.Error{Faults: []config.Fault{{File: "c", Line: 1, Problem: "a", Remedy: "b"},
			{File: "c", Line: 2, Problem: "d", Remedy: "e"}}}
	}, Fail, "2 faults: c:1: a: b\nc:2: d: e", "pods are refused"},
	{"configuration", func(r *nodeReport) { r.config.Warnings = []string{"hostCheck: off"} }, Warn, "hostCheck: off",
		"meant"},

	{"service", func(r *nodeReport) { r.status, r.statusErr = nil, status.ErrNotRunning }, Fail, "not running",
		"systemctl restart gke-metadata-emulator"},
	{"service", func(r *nodeReport) {
		r.status, r.statusErr = nil, status.ErrNotRunning
		r.unit = status.Unit{Active: "activating", Sub: "auto-restart", Result: "exit-code", Code: 78, Restarts: 23}
	}, Fail, "it is not running: systemd: activating (auto-restart), last result exit-code, exit status 78, 23 restarts",
		"journalctl"},
	{"service", func(r *nodeReport) {
		r.status, r.statusErr = nil, status.ErrNotRunning
		r.install = &routing.Failure{Error: "lock:\nno space", Times: 7, Last: r.now.Add(-time.Second)}
		r.unit = status.Unit{Active: "activating", Sub: "start-pre"}
	}, Fail, "routing install failed 7 times in a row, last 1s ago: lock:; no space; systemd: activating (start-pre)",
		"correct that"},
	{"rules", func(r *nodeReport) { r.install = &routing.Failure{Error: "no space", Times: 1, Last: r.now} }, Fail,
		"routing install failed 1 times in a row, last 0s ago: no space", "routing install"},
	{"configuration", func(r *nodeReport) { r.broken = errors.New("config.yaml:3: x: there is no such key") }, Fail,
		"there is no such key; the service runs on with what it read before", "before anything restarts"},
	{"configuration", func(r *nodeReport) { r.status.ConfigFile = "config.yaml: permission denied" }, Fail,
		"does not load for the service, which runs on with what it read before: config.yaml: permission denied",
		"before anything restarts"},
	{"configuration", func(r *nodeReport) { r.flags = "/etc/default/x" }, OK, " and the flags of /etc/default/x", ""},
	{"service", func(r *nodeReport) { r.status, r.statusErr = nil, fs.ErrPermission }, Skip, "as root", ""},
	{"service", func(r *nodeReport) { r.status, r.statusErr = nil, errors.New("500") }, Fail, "500", "systemctl restart"},
	{"service", func(r *nodeReport) { r.status.State, r.status.Reason = "not configured", "line 3" }, Fail,
		"not configured: line 3", "correct config.yaml"},
	{"service", func(r *nodeReport) { r.status.State = "stopping" }, Warn, "stopping", "again"},
	{"service", func(r *nodeReport) { r.status.Version = "1.2.2" }, Warn, "1.2.2 is running, and version 1.2.3",
		"systemctl restart"},

	{"listener", func(r *nodeReport) { r.node.Holder = routing.ListenedBy{}; r.status = nil }, Fail,
		"nobody listens on 169.254.169.252:988", "gke-metadata-emulator.socket"},
	{"listener", func(r *nodeReport) { r.node.Holder = routing.ListenedBy{}; r.status.Listen = other.String() }, Fail,
		"the service listens on 127.0.0.1:1", "daemon-reload"},
	{"listener", func(r *nodeReport) { r.status.Listen = other.String() }, Fail,
		"systemd (process 1) holds 169.254.169.252:988, and the service listens on 127.0.0.1:1", "daemon-reload"},
	{"listener", func(r *nodeReport) {
		r.node.Holder = routing.ListenedBy{At: r.plan.Listen, PID: "7", Exe: "/x/gke-metadata-server"}
		r.status = nil
	}, Fail, "gke-metadata-server (process 7) listens on 169.254.169.252:988", "GKE's own"},
	{"listener", func(r *nodeReport) {
		r.node.Holder = routing.ListenedBy{At: netip.MustParseAddrPort("0.0.0.0:988"), PID: "7", Exe: "lustre"}
	}, Fail, "Lustre's", "one address"},
	{"listener", func(r *nodeReport) {
		r.node.Holder, r.root, r.status = routing.ListenedBy{At: r.plan.Listen}, false, nil
	}, Skip, "as root", ""},
	{"listener", func(r *nodeReport) {
		r.plan.Listen = routing.MetadataServer()
		r.node.Holder = routing.ListenedBy{At: netip.MustParseAddrPort("0.0.0.0:80"), PID: "7", Exe: "nginx"}
	}, Fail, "nginx (process 7) listens on 0.0.0.0:80, and mode loopback needs 169.254.169.254:80",
		"an address of its own"},
	{"listener", func(r *nodeReport) {
		r.direct.err, r.direct.dropped = context.DeadlineExceeded, []string{"nft chain ip filter OUTPUT (policy drop)"}
	}, Warn, "systemd (process 1); but what the node itself sends there is dropped by nft chain ip filter OUTPUT " +
		"(policy drop)", "have it accept what the node sends to 169.254.169.252:988"},
	{"listener", func(r *nodeReport) { r.plan.Closed = true }, Skip, "without a configuration", ""},
	{"listener", func(r *nodeReport) { r.node.Local = false }, OK, "forwarded", ""},
	{"listener", func(r *nodeReport) { r.status = nil }, OK, "systemd (process 1) holds", ""},

	{"ports", func(r *nodeReport) { r.config.Listen = netip.MustParseAddrPort("169.254.169.252:40000") }, Warn,
		"listen: port 40000 lies in the ephemeral range 32768-60999", "ip_local_reserved_ports=40000"},
	{"ports", func(r *nodeReport) { r.config.HealthListen = netip.MustParseAddrPort("127.0.0.1:60999") }, Warn,
		"healthListen: port 60999", "another port"},

	{"rules", func(r *nodeReport) { r.stateErr = errors.New("no JSON") }, Fail, "no JSON", installRules},
	{"rules", func(r *nodeReport) { r.state.Desired = routing.Removed }, Fail, "removed 1h0m0s ago", installRules},
	{"rules", func(r *nodeReport) { r.state = routing.State{}; r.node.Rules = errors.New("missing: a") }, Fail,
		"never installed", installRules},
	{"rules", func(r *nodeReport) { r.state.Closed = true }, Fail, "guard stands alone", installRules},
	{"rules", func(r *nodeReport) { r.plan.Closed, r.state.Closed = true, true }, Warn, "closed guard",
		"correct the configuration"},
	{"rules", func(r *nodeReport) { r.state.Listen = other.String() }, Fail,
		"lead to 127.0.0.1:1, and listen is 169.254.169.252:988", "routing install"},
	{"rules", func(r *nodeReport) { r.node.Rules = errors.New("missing: a\nmissing: b\nmissing: c") }, Fail,
		"missing or wrong: a, and 2 more", installRules},
	{"rules", func(r *nodeReport) { r.node.Rules = unix.EPERM; r.state.Standing = routing.Standing{} }, Skip, "as root",
		""},
	{"rules", func(r *nodeReport) {
		r.node.Rules = fault.ErrPermission
		r.state.Standing = routing.Standing{Time: r.now.Add(-time.Minute), Faults: []string{"missing: a"}}
	}, Fail, "1m0s before: missing: a", installRules},
	{"rules", func(r *nodeReport) { r.node.Rules = fault.ErrPermission }, OK, "all stood 20s ago", ""},
	{"rules", func(r *nodeReport) { r.state.Reason = "it fits" }, OK, "auto: it fits", ""},

	{"rules", observing, OK, "nothing is redirected", ""},
	{"guard", observing, Warn, "guards nothing", "another routing.mode"},
	{"cloud", func(r *nodeReport) { observing(r); r.cloud = answered{server: "EC2ws", status: 401} }, OK,
		"AWS's metadata server answers this node's own processes, and pods", ""},
	{"connection", func(r *nodeReport) { observing(r); r.trial.answered = answered{server: "EC2ws", status: 401} },
		Skip, "redirects nobody", ""},
	{"traffic", observing, Skip, "routing observe", ""},

	{"watcher", func(r *nodeReport) { r.watcher = "failed" }, Warn, "it is failed", "systemctl enable --now"},
	{"watcher", func(r *nodeReport) { r.watcher = ""; r.state.Standing.Time = r.now.Add(-time.Hour) }, Warn,
		"does not run, or hangs", "systemctl enable --now"},
	{"watcher", func(r *nodeReport) { r.state.Standing = routing.Standing{} }, Warn, "has not run since",
		"systemctl enable --now"},
	{"watcher", func(r *nodeReport) { r.state.Standing.Good, r.state.Standing.Faults = false, []string{"a", "b"} },
		Fail, "read 20s ago: a, and 1 more", "journalctl"},
	{"watcher", func(r *nodeReport) { r.state.Repairs = routing.Repairs{"iptables": {"nftables": 3}} }, OK,
		"put back 3 times", ""},

	{"guard", func(r *nodeReport) { r.node.Guard = []string{"ip rule: a"} }, Fail, "missing ip rule: a", installRules},
	{"guard", func(r *nodeReport) { r.node.Bypass = []string{"ip rule: pref 0 from all lookup 7"} }, Fail,
		"does not hold for what comes before it: ip rule: pref 0 from all lookup 7", "preference of 1 or more"},
	{"guard", func(r *nodeReport) { r.plan.Guard = nil }, Warn, "169.254.169.254:80 is not guarded", "routing.guard"},

	{"uplinks", func(r *nodeReport) { r.node.Uplinks = nil }, Warn, "none was found", "routing.uplinks"},
	{"uplinks", func(r *nodeReport) { r.node.Remarks = []string{"bridge br0 has both"} }, Warn, "bridge br0 has both",
		"routing.uplinks"},
	{"uplinks", func(r *nodeReport) { r.plan.ExcludeInterfaces = []string{"docker0"} }, OK, "left alone: docker0", ""},

	{"network", func(r *nodeReport) { r.node.Facts.Cilium, r.node.Facts.CiliumHost = true, &yes }, Fail,
		"mode iptables does not fit: Cilium routes", "bpf.hostLegacyRouting=true of Cilium"},
	{"network", func(r *nodeReport) {
		r.node.Facts.Cilium, r.node.Facts.CiliumHost, r.state.Mode, r.plan.Mode = true, &yes, routing.ModeLoopback,
			routing.ModeLoopback
	}, Fail, "wants routing.link", "routing.link: gme0"},
	{"network", func(r *nodeReport) {
		r.node.Facts.Cilium, r.node.Facts.CiliumHost, r.state.Mode, r.plan.Mode, r.plan.Link = true, &yes,
			routing.ModeLoopback, routing.ModeLoopback, "gme0"
	}, OK, "Cilium routes", ""},
	{"network", func(r *nodeReport) { r.node.Facts.Cilium = true }, Warn, "cannot be told", "hostLegacyRouting"},
	{"network", func(r *nodeReport) { r.node.Facts.CalicoBPF = true }, Warn, "Calico's eBPF", "bpfExcludeCIDRsFromNAT"},
	{"network", func(r *nodeReport) { r.node.Facts.GKE = true }, Fail, "node of GKE", "remove the package"},
	{"network", func(r *nodeReport) { r.cloud = answered{ours: true, server: "GKE Metadata Server"}; r.status = nil },
		Fail, "node of GKE", "remove the package"},
	{"network", func(r *nodeReport) { r.node.Facts.OpenShift = true }, Fail, "OpenShift", "none"},
	{"network", func(r *nodeReport) { r.node.Facts.Denied = true }, Fail, "denies",
		"routing.mode: loopback, and for the listener to follow: systemctl daemon-reload"},
	{"network", func(r *nodeReport) {
		r.node.Facts.Bridged, r.status.Attestation = true, status.Attestation{Mode: "source-ip"}
	}, Warn, "speak with another's address", "SECURITY.md"},
	{"network", func(r *nodeReport) {
		r.config.Routing.Mode, r.node.Facts.Denied = routing.ModeAuto, true
	}, Fail, "denies", ""},
	{"network", func(r *nodeReport) { r.plan.Closed = true }, OK, "mode iptables would fit", ""},
	{"network", func(r *nodeReport) { r.state.Mode = routing.ModeLoopback }, OK, "mode loopback; iptables would do", ""},

	{"cloud", func(r *nodeReport) {
		r.cloud = answered{status: 401, server: "EC2ws"}
		r.node.Guard = []string{"ip rule: a"}
	}, Fail, "AWS's metadata server answers, and the guard is not complete", installRules},
	{"cloud", func(r *nodeReport) { r.cloud = answered{status: 200, ours: true}; r.status = nil }, Warn, "GKE's own",
		"GKE"},
	{"cloud", func(r *nodeReport) { r.cloud = answered{status: 400, server: "nginx"} }, OK,
		`calls itself "nginx" (status 400) answers this node's own processes; pods are kept`, ""},

	{"ipv6", func(r *nodeReport) { r.plan.Guard = r.plan.Guard[:1] }, Warn,
		"does not close [fd00:c1::a9fe:a9fe]:80, [fd00:ec2::254]:80, [fd20:ce::254]:80", "[fd00:ec2::254]:80"},
	{"ipv6", func(r *nodeReport) { r.plan.Guard = r.plan.Guard[:3] }, Warn, "does not close [fd20:ce::254]:80, ",
		"[fd20:ce::254]:80 to routing.guard"},
	{"ipv6", func(r *nodeReport) { r.node.IPv6 = false }, OK, "has none", ""},
	{"ipv6", func(r *nodeReport) { dualStack(r); r.node.IPv6 = false }, Warn,
		"has none, so requests by IPv6 are not redirected to [fd20:ce::252]:988", "remove listen6"},
	{"ipv6", func(r *nodeReport) { dualStack(r) }, OK, "requests to [fd20:ce::254]:80 go to [fd20:ce::252]:988, which " +
		"systemd (process 1) holds", ""},
	{"ipv6", func(r *nodeReport) { dualStack(r); r.state.IPv6 = "ip6tables: no nat" }, Warn,
		"not redirected to [fd20:ce::252]:988: ip6tables: no nat", "routing install"},
	{"ipv6", func(r *nodeReport) { dualStack(r); r.node.Holder6 = routing.ListenedBy{} }, Fail,
		"nobody listens on [fd20:ce::252]:988", "daemon-reload"},
	{"ipv6", func(r *nodeReport) {
		dualStack(r)
		r.node.Holder6 = routing.ListenedBy{At: r.plan.Listen6, PID: "7", Exe: "/x/lustre"}
	}, Fail, "lustre (process 7) listens on", "choose another listen6"},
	{"ipv6", func(r *nodeReport) {}, OK, "requests are IPv4; the guard closes [fd00:c1::a9fe:a9fe]:80, " +
		"[fd00:ec2::254]:80, [fd20:ce::254]:80", ""},
	{"ipv6", func(r *nodeReport) { r.plan.Mode = routing.ModeEBPF }, OK,
		"mode ebpf serves IPv4 alone; the guard closes", ""},
	{"ipv6", func(r *nodeReport) {
		r.plan.Mode, r.config.Listen6 = routing.ModeEBPF, netip.MustParseAddrPort("[fd20:ce::252]:988")
	}, Warn, "mode ebpf serves IPv4 alone, so listen6 is not in force; the guard closes",
		"routing.mode to iptables or nftables"},
	{"ipv6", observing, Skip, "guards nothing", ""},
	{"rules", func(r *nodeReport) { dualStack(r); r.state.Listen6 = "" }, Fail,
		`listen6 is "[fd20:ce::252]:988", and they were put up for ""`, installRules},

	{"cgroups", func(r *nodeReport) { r.node.CgroupV2 = "" }, Warn, "no cgroup v2", "unified_cgroup_hierarchy"},
	{"cgroups", func(r *nodeReport) { r.node.CgroupV2, r.config.Routing.InterceptHostPods = "", "on" }, Fail,
		"not redirected", "interceptHostPods: off"},
	{"cgroups", func(r *nodeReport) { r.node.HostSlices, r.config.Routing.InterceptHostPods = nil, "on" }, Fail,
		"none of the host's own slices", "off"},

	{"policies", func(r *nodeReport) { r.node.Policies, r.trial.ours = []string{"inet foreign late"}, false }, Warn,
		"inet foreign late at hook input", "169.254.169.252:988"},
	{"policies", func(r *nodeReport) { r.node.Policies, r.node.Local = []string{"ip filter FORWARD"}, false }, OK,
		"ip filter FORWARD at hook forward drop by their policy, and let", ""},
	{"policies", func(r *nodeReport) { r.node.Policies = nil }, Skip, "as root", ""},

	{"connection", func(r *nodeReport) {
		r.trial.answered, r.trial.dropped = answered{err: context.DeadlineExceeded},
			[]string{"nft chain inet foreign late (policy drop)"}
	}, Fail, "dropped by nft chain inet foreign late (policy drop)", "accept what pods send to 169.254.169.252:988"},
	{"connection", func(r *nodeReport) { r.trial.answered = answered{err: context.DeadlineExceeded} }, Fail,
		"no answer, and no chain was seen to drop it", "rules"},
	{"connection", func(r *nodeReport) {
		r.trial.answered, r.trial.traceErr = answered{err: errors.New("odd")}, errors.New("no tracing")
	}, Fail, "odd; who drops it could not be seen: no tracing", "rules"},
	{"connection", func(r *nodeReport) { r.trial.answered = answered{err: &net.OpError{Err: unix.ECONNREFUSED}} }, Fail,
		"refused, by no chain", "listener"},
	{"connection", func(r *nodeReport) { r.trial.answered = answered{status: 200, server: "EC2ws"} }, Fail,
		"AWS's metadata server answered in the emulator's place", installRules},
	{"connection", func(r *nodeReport) {
		r.trial.answered, r.state.Desired = answered{status: 200}, routing.Removed
	}, Fail, "without a name (status 200) answered", installRules},
	{"connection", func(r *nodeReport) { r.trial = trial{impossible: fault.ErrPermission}; r.root = false }, Skip,
		"as root", ""},
	{"connection", func(r *nodeReport) { r.trial = trial{impossible: errors.New("file exists")} }, Warn, "file exists",
		"another doctor"},
	{"connection", func(r *nodeReport) { r.plan.Mode = routing.ModeNone }, OK,
		"at 169.254.169.252:988 as GCE_METADATA_HOST says: answered", ""},
	{"connection", func(r *nodeReport) { r.podTrial = trial{impossible: probe.ErrNoPod} }, OK,
		"rules for pods' own addresses and interfaces were not met: no process runs", ""},
	{"connection", func(r *nodeReport) { r.podTrial.answered = answered{err: context.DeadlineExceeded} }, Fail,
		"from pod ns/p, 10.244.0.2: no answer, while from a throw-away namespace", "names pods' addresses"},
	{"connection", func(r *nodeReport) {
		r.podTrial.answered, r.node.Untrack = answered{err: context.DeadlineExceeded}, []string{"nft chain inet net raw"}
	}, Fail, "from pod ns/p, 10.244.0.2: no answer: nft chain inet net raw takes packets out of conntrack", "nftables"},
	{"connection", func(r *nodeReport) { r.podTrial.answered = answered{status: 200, server: "EC2ws"} }, Fail,
		"from pod ns/p, 10.244.0.2: AWS's metadata server answered", installRules},
	{"connection", func(r *nodeReport) { r.plan.Closed = true }, Skip, "without a configuration", ""},
	{"connection", func(r *nodeReport) {
		r.state.Mode, r.trial = routing.ModeEBPF, trial{answered: answered{err: unix.ETIMEDOUT}}
	}, Skip, "ebpf", ""},

	{"evidence", func(r *nodeReport) {}, OK, "found doctor's own socket from 198.18.169.254 by interface gme-doctor", ""},
	{"evidence", dualStack, OK, "gme-doctor and from 2001:2::a9fe:a9fe by", ""},
	{"evidence", func(r *nodeReport) { r.trial.attested = attested{status: 200, reason: "my-project"} }, OK,
		"found doctor's own socket", ""},
	{"evidence", func(r *nodeReport) { r.trial.attested = attested{status: 503, reason: "no socket"} }, Fail,
		"refuses pods: 503 no socket", "restart gke-metadata-emulator-attest"},
	{"evidence", func(r *nodeReport) { r.trial.attested = attested{status: 403, reason: "sockets of two"} }, Fail,
		"refuses pods: 403 sockets of two", "iptables-save"},
	{"evidence", func(r *nodeReport) { dualStack(r); r.trial6.attested = attested{status: 503, reason: "no socket"} },
		Fail,
		"from 2001:2::a9fe:a9fe", "iptables-save"},
	{"evidence", func(r *nodeReport) { r.trial.attested = attested{err: errors.New("no cat")} }, Warn, "no cat", "again"},
	{"evidence", func(r *nodeReport) { r.trial = trial{impossible: errors.New("x")} }, Skip, "see connection", ""},
	{"evidence", func(r *nodeReport) { r.status.Attestation = status.Attestation{Mode: "source-ip"} }, Skip,
		"source-ip", ""},
	{"evidence", func(r *nodeReport) { r.status, r.statusErr = nil, status.ErrNotRunning }, Skip, "see service", ""},

	{"connection6", func(r *nodeReport) {}, "", "", ""},
	{"connection6", dualStack, OK, "from a throw-away namespace, 2001:2::a9fe:a9fe by interface gme-doctor: answered", ""},
	{"connection6", func(r *nodeReport) { dualStack(r); r.trial = trial{impossible: errors.New("x")} }, OK, "answered",
		""},
	{"connection6", func(r *nodeReport) {
		dualStack(r)
		r.trial6.answered, r.trial6.dropped = answered{err: context.DeadlineExceeded},
			[]string{"nft chain ip6 foreign late (policy drop)"}
	}, Fail, "2001:2::a9fe:a9fe by interface gme-doctor: dropped by nft chain ip6 foreign late (policy drop)",
		"accept what pods send to [fd20:ce::252]:988"},
	{"connection6", func(r *nodeReport) {
		dualStack(r)
		r.trial6.answered = answered{status: 200, server: "Metadata Server for VM"}
	}, Fail, "Google Compute Engine's metadata server answered in the emulator's place", installRules},
	{"connection6", func(r *nodeReport) { dualStack(r); r.trial6 = trial{impossible: errors.New("no IPv6 here")} },
		Warn, "no IPv6 here", "default.disable_ipv6"},
	{"connection6", func(r *nodeReport) {
		dualStack(r)
		r.trial = trial{impossible: fault.ErrPermission}
		r.trial6, r.root = r.trial, false
	}, Skip, "as root", ""},
	{"connection6", func(r *nodeReport) { dualStack(r); r.node.IPv6 = false }, Skip,
		"not redirected: this node has no IPv6",
		""},
	{"connection6", func(r *nodeReport) { dualStack(r); r.state.IPv6 = "ip6tables: no nat" }, Skip,
		"not redirected: ip6tables: no nat", ""},
	{"connection", func(r *nodeReport) { dualStack(r); r.trial6.answered = answered{err: context.DeadlineExceeded} }, OK,
		"answered", ""},
	{"policies", func(r *nodeReport) {
		dualStack(r)
		r.node.Policies, r.trial6.ours = []string{"ip6 foreign late"}, false
	},
		Warn, "ip6 foreign late", "accept"},

	{"attestation", func(r *nodeReport) {}, OK, "mode kernel, by cgroup, and gke-metadata-emulator-attest.service " +
		"is connected; pods are known: 1 by cgroup, 1 by nothing (ns/h: static, without a ServiceAccount)", ""},
	{"attestation", func(r *nodeReport) {
		r.status.Cluster.Pods[0].UID = "u"
		r.status.Attestation.Kernel.Conflicts = []attest.Conflict{{Address: netip.MustParseAddr("10.0.0.7"),
			Between: [2]string{"u", "network namespace 7 of /x"}, Refused: 3}}
	}, Warn, "ns/p and network namespace 7 of /x have sockets of 10.0.0.7, and 3 connections were refused for it; pods",
		"remove 10.0.0.7 from the one that does not own it"},
	{"attestation", func(r *nodeReport) { r.status.Cluster.Pods = nil }, OK, "pods are known: none", ""},
	{"attestation", func(r *nodeReport) { r.status = nil }, Skip, "does not answer: the service is not running", ""},
	{"attestation", func(r *nodeReport) {
		r.status.Cluster, r.status.Reason = nil, "config.yaml: bad"
	}, Skip, "does not serve: config.yaml: bad", ""},
	{"attestation", func(r *nodeReport) {
		r.status.Attestation = status.Attestation{Mode: "source-ip"}
		r.status.Cluster.Pods[0].Evidence = "source-ip"
	}, Warn, "mode source-ip: an address says who asks, which a dead pod shares with the next owner; pods are " +
		"known: 1 by nothing (ns/h: static, without a ServiceAccount), 1 by source-ip (ns/p: attestation.mode is " +
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
	}, Warn, "RuntimeClass kata-qemu, my-gvisor looks like a sandbox with a network of its own, whose pods are " +
		"refused then: ns/p, and 1 more; pods", "attestation.byAddress: [kata-qemu, my-gvisor]"},
	{"attestation", func(r *nodeReport) {
		r.status.Attestation.Kernel.Evidence, r.status.Attestation.Kernel.Lacks = "netns", []string{"cgroup v2: x"}
		r.status.Cluster.Pods = []kube.PodStatus{{Namespace: "ns", Name: "p", ServiceAccount: "a", Evidence: "netns"},
			{Namespace: "ns", Name: "h", ServiceAccount: "a", HostNetwork: true}}
	}, Warn, "mode kernel: lacking: cgroup v2: x; pods are known: 1 by netns, 1 by nothing (ns/h: on the host network",
		"cgroup v2 and Linux 5.9"},
	{"attestation", func(r *nodeReport) {
		r.status.Attestation.Kernel = &attest.KernelStatus{Hierarchy: "cgroup2", Problem: "connection refused"}
	}, Fail, "mode kernel, but pods that start now are refused, since gke-metadata-emulator-attest.service is away: " +
		"connection refused", "systemctl restart gke-metadata-emulator-attest"},
	{"attestation", func(r *nodeReport) { r.status.Attestation.Kernel.Problem = "no such file" }, Warn,
		"no such file; pods", "journalctl"},
	{"attestation", func(r *nodeReport) {
		r.status.Attestation.Kernel.Lacks = []string{"cgroup /x cannot be watched"}
	}, Warn, "lacking: cgroup /x cannot be watched; pods", "raise the limit"},
	{"attestation", func(r *nodeReport) {
		r.status.Attestation.Kernel = &attest.KernelStatus{Lacks: []string{"no tcp_diag"}}
	}, Fail, "the kernel cannot be asked: no tcp_diag", "journalctl -u gke-metadata-emulator"},
}

// sickClusters are those on which something of the service, the cluster or Google is wrong.
var sickClusters = []sickNode{
	{"passthrough", func(r *nodeReport) {
		r.status.SkippedHostPods = []status.SkippedHostPod{{ServiceAccount: "kube-system/aws-node", Requests: 7}}
	}, OK, "no server to let them", ""},
	{"passthrough", func(r *nodeReport) {
		r.cloud.err, r.status.SkippedHostPods = nil,
			[]status.SkippedHostPod{{ServiceAccount: "kube-system/aws-node", Requests: 7},
				{ServiceAccount: "kube-system/ebs", Requests: 1}}
	}, Warn, "not let through: kube-system/aws-node (7), kube-system/ebs (1)", "name it in passthrough, or set " +
		"routing.interceptHostPods to off"},
	{"passthrough", func(r *nodeReport) { r.config.Passthrough = []string{"a/b"} }, OK,
		"redirected only where there is no server", ""},
	{"passthrough", func(r *nodeReport) {
		r.config.Passthrough, r.config.Routing.InterceptHostPods, r.status.Attestation.Kernel.Evidence = []string{"a/b"},
			"on", attest.ByNamespace
	}, Fail, "the kernel does not tell", "cgroup v2"},
	{"passthrough", func(r *nodeReport) {
		r.config.Passthrough, r.config.Routing.InterceptHostPods = []string{"a/b"}, "on"
	}, OK, "from the host network: 1", ""},
	{"passthrough", func(r *nodeReport) { r.status = nil }, Skip, "does not serve", ""},

	{"traffic", func(r *nodeReport) { r.node.Redirected, r.status.Requests = new(uint64), 0 }, Warn,
		"of the pods that run here (1) no connection was ever redirected", "network"},
	{"traffic", func(r *nodeReport) { r.node.Redirected, r.status = new(uint64), nil }, Warn,
		"run here (1) no connection", "network"},
	{"traffic", func(r *nodeReport) { r.status.Requests = 0 }, Warn,
		"run here (1) none has asked for anything since the service started 1h0m0s ago", "network"},
	{"traffic", func(r *nodeReport) { r.status = nil }, OK, "7 connections were redirected since", ""},
	{"traffic", func(r *nodeReport) { r.status.Requests, r.status.Cluster.Pods = 0, nil }, OK, "no pod runs here", ""},
	{"traffic", func(r *nodeReport) { r.node.Redirected, r.status, r.root = nil, nil, false }, Skip, "as root", ""},
	{"traffic", func(r *nodeReport) { r.node.Redirected, r.status, r.state.Mode = nil, nil, routing.ModeEBPF }, Skip,
		"mode ebpf counts no", ""},
	{"traffic", func(r *nodeReport) { r.state.Desired = routing.Removed }, Skip, "nothing leads to the service", ""},

	{"traffic6", func(r *nodeReport) {}, "", "", ""},
	{"traffic6", dualStack, OK, "2 requests by IPv6 since the service started 1h0m0s ago", ""},
	{"traffic6", func(r *nodeReport) { dualStack(r); r.status.Requests6 = 0 }, OK,
		"no pod that runs here has IPv6 alone", ""},
	{"traffic6", ipv6Alone, Warn, "with IPv6 alone (1) no connection was ever redirected", "netfilter"},
	{"traffic6", func(r *nodeReport) { ipv6Alone(r); *r.node.Redirected6 = 3 }, Warn,
		"with IPv6 alone (1) none has asked for anything by IPv6 since the service started 1h0m0s ago", "netfilter"},
	{"traffic6", func(r *nodeReport) { ipv6Alone(r); r.node.Redirected6 = nil }, Warn,
		"none has asked for anything by IPv6", "netfilter"},
	{"traffic6", func(r *nodeReport) { dualStack(r); *r.node.Redirected6, r.status = 4, nil }, OK,
		"4 connections by IPv6 were redirected", ""},
	{"traffic6", func(r *nodeReport) { dualStack(r); r.node.Redirected6, r.status, r.root = nil, nil, false }, Skip,
		"as root", ""},
	{"traffic6", func(r *nodeReport) { dualStack(r); r.node.Redirected6, r.status = nil, nil }, Skip, "see service", ""},
	{"traffic6", func(r *nodeReport) { dualStack(r); r.node.IPv6 = false }, Skip, "this node has no IPv6", ""},
	{"traffic6", func(r *nodeReport) { dualStack(r); r.state.Desired = routing.Removed }, Skip, "nothing leads", ""},
	{"traffic", func(r *nodeReport) { ipv6Alone(r) }, OK, "3 requests", ""},

	{"dns", func(r *nodeReport) { answering(r) }, OK, "this node answers its pods", ""},
	{"dns", func(r *nodeReport) { answering(r); r.node.Queries = false }, Fail, "nobody listens", "restart"},
	{"dns", func(r *nodeReport) { answering(r); r.state.DNSRefused = "no match of BPF" }, Warn, "no match of BPF",
		"routing.mode"},
	{"dns", func(r *nodeReport) { answering(r); r.plan.Mode = routing.ModeEBPF }, Warn, "mode ebpf does not see",
		"hostAliases"},
	{"rules", func(r *nodeReport) { answering(r); r.state.DNS = false }, Fail, "dns is answer", "routing install"},
	{"dns", func(r *nodeReport) { r.names, r.namesErr = nil, &net.DNSError{IsNotFound: true} }, Warn, "not known",
		"set dns to answer"},
	{"dns", func(r *nodeReport) { r.names, r.namesErr = nil, &net.DNSError{IsNotFound: true} }, Warn,
		"not known to this node's DNS", "cluster's DNS"},
	{"dns", func(r *nodeReport) { r.names, r.namesErr = nil, &net.DNSError{IsTimeout: true} }, Warn, "not to be had",
		"cluster's DNS"},
	{"dns", func(r *nodeReport) { r.names = []netip.Addr{netip.MustParseAddr("192.0.2.1")} }, Warn, "is 192.0.2.1",
		"cluster's DNS"},

	{"credential", func(r *nodeReport) { r.status.Cluster.NodeNameProblem = "nodeName is a" }, Fail, "nodeName is a",
		"nodeName"},
	{"credential", func(r *nodeReport) {
		r.status.Cluster.Watching, r.status.Cluster.Problem = false,
			"permission denied"
	}, Fail, "the service says: permission denied; doctor itself", "gke-metadata-emulator-credential"},
	{"credential", func(r *nodeReport) { r.cluster.Reach = &kube.AwayError{Err: errors.New("no answer in 10 s")} },
		Fail, "does not answer doctor: no answer in 10 s", "is the API server up"},
	{"credential", func(r *nodeReport) { r.status.Cluster.Watching = false }, Warn,
		"does not watch this node's pods now", "journalctl"},
	{"credential", func(r *nodeReport) { r.status, r.cluster.Reach = nil, &kube.AwayError{Err: errors.New("refused")} },
		Fail, "client certificate of /etc/kubernetes/kubelet.conf: refused", "still valid"},
	{"credential", func(r *nodeReport) { r.status, r.cluster.Reach = nil, kube.ErrNotConfigured }, Fail,
		"no kubeconfig", "kubelet writes it"},
	{"credential", func(r *nodeReport) { r.status, r.cluster.Reach, r.root = nil, kube.ErrNotConfigured, false }, Skip,
		"as root", ""},
	{"credential", func(r *nodeReport) { r.status, r.cluster.Mismatch = nil, "nodeName is b" }, Fail, "nodeName is b",
		"nodeName"},
	{"credential", func(r *nodeReport) { r.status = nil }, OK, "answers to system:node:n1, the client certificate of",
		""},

	{"pods", func(r *nodeReport) {
		r.cluster.List = &kube.ForbiddenError{Verb: "list", Resource: "pods", Message: "no"}
	}, Fail, "missing grant: list pods: no", "rbac"},
	{"pods", func(r *nodeReport) { r.cluster.Watch = errors.New("cut") }, Fail, "cut", "watch"},
	{"pods", func(r *nodeReport) { r.cluster.Reach = kube.ErrNotConfigured }, Skip, "see credential", ""},
	{"pods", func(r *nodeReport) { r.status.Cluster.Pods[0].AccountError = "bad annotation" }, Warn,
		"pod ns/p is refused: bad annotation", "ServiceAccount"},

	{"serviceaccounts", func(r *nodeReport) { r.cluster.Get = forbidden }, Fail,
		"missing grant: get serviceaccounts: no", "apply rbac.yaml"},
	{"serviceaccounts", func(r *nodeReport) { r.cluster.Get = &kube.AnnotationError{Key: "k", Reason: "r"} }, Warn,
		"annotation k: r", "correct the annotation"},
	{"serviceaccounts", func(r *nodeReport) { r.cluster.Get = kube.ErrNotFound }, Fail, "no such ServiceAccount",
		"exist"},
	{"serviceaccounts", func(r *nodeReport) { r.cluster.Pod = "" }, Skip, "no pod runs", ""},
	{"serviceaccounts", func(r *nodeReport) { r.cluster.List = errors.New("x") }, Skip, "see pods", ""},

	{"tokenrequest", func(r *nodeReport) {
		r.cluster.Mint = &kube.ForbiddenError{User: "system:serviceaccount:a:b", Verb: "create",
			Resource: "serviceaccounts/token", Message: "no"}
	}, Fail, "create serviceaccounts/token", "apply rbac-dedicated.yaml"},
	{"tokenrequest", func(r *nodeReport) { r.cluster.Mint = kube.ErrNoPod }, Skip, "went away", ""},
	{"tokenrequest", func(r *nodeReport) { r.config.TokenAudience = "" }, Skip, "no audience", ""},

	{"sts", func(r *nodeReport) { r.sts.Err = errors.New("no such host") }, Fail, "no such host", "HTTPS_PROXY"},
	{"sts", func(r *nodeReport) { r.sts.Err = x509.UnknownAuthorityError{} }, Fail, "unknown authority", "google.caFile"},
	{"sts", func(r *nodeReport) { r.sts.Err = x509.CertificateInvalidError{Reason: x509.Expired} }, Fail, "expired",
		"clock"},
	{"sts", func(r *nodeReport) { r.sts.Proxy = "http://proxy:3128" }, OK, "by proxy http://proxy:3128", ""},
	{"sts", func(r *nodeReport) {
		r.sts.Err, r.status.Proxy = errors.New("no such host"), "http://proxy:3128"
	}, Warn, "the service goes there by proxy http://proxy:3128; doctor itself fails: ", "HTTPS_PROXY of the " +
		"service's unit"},
	{"sts", func(r *nodeReport) {
		r.sts.Err, r.sts.Proxy, r.status.Proxy = errors.New("no such host"), "http://proxy:3128", "http://proxy:3128"
	}, Fail, "no such host", "HTTPS_PROXY"},
	{"exchange", func(r *nodeReport) {
		r.exchange.err, r.sts.Proxy = token.ErrUnavailable, "http://proxy:3128"
	}, Warn, "the service goes there without a proxy", "HTTPS_PROXY"},
	{"iam", func(r *nodeReport) { r.iam = token.Reached{Err: errors.New("google.caFile: no such file")} }, Fail,
		"google.caFile", ""},

	{"exchange", func(r *nodeReport) { r.exchange = nil }, Skip, "see tokenrequest", ""},
	{"exchange", func(r *nodeReport) {
		r.exchange.err = &token.GoogleError{Step: "STS", Status: 400, Message: "bad audience"}
	}, Fail, "bad audience", "providers describe"},
	{"exchange", func(r *nodeReport) {
		r.exchange.err = &token.GoogleError{Step: "IAM", Status: 403, Message: "no binding", Hint: "gcloud this."}
	}, Warn, "no binding Hint: gcloud this.", "one ServiceAccount"},
	{"exchange", func(r *nodeReport) { r.exchange.err = &token.GoogleError{Step: "STS", Status: 503} }, Fail, "503",
		"see sts"},
	{"exchange", func(r *nodeReport) { r.exchange.email = "" }, OK, "STS takes the token of ns/a", ""},

	{"clock", func(r *nodeReport) { r.cluster.Date, r.sts.Date = r.now.Add(5*time.Minute), r.now.Add(5*time.Minute) },
		Fail, "5m0s off", "chrony"},
	{"clock", func(r *nodeReport) { r.cluster.Date = r.now.Add(-5 * time.Minute) }, Fail,
		"the API server's clock and STS's are 5m0s apart", "NTP"},
	{"clock", func(r *nodeReport) { r.sts.Date = r.now.Add(-20 * time.Second) }, Warn, "20s off from STS's", "chrony"},
	{"clock", func(r *nodeReport) { r.sts.Date, r.cluster.Date = time.Time{}, time.Time{} }, Skip, "what time it is", ""},

	{"tokens", func(r *nodeReport) { r.status.Tokens[0].LastError = "503" }, Warn,
		"1 of 1 could not be minted or refreshed the last time, such as that of ns/a: 503", "status"},
	{"tokens", func(r *nodeReport) { r.status = nil }, Skip, "see service", ""},
}
