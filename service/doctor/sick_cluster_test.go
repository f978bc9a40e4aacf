package doctor

import (
	"crypto/x509"
	"errors"
	"net"
	"net/netip"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/status"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token"
)

// sickClusters are those on which something of the service, the cluster or Google is wrong.
var sickClusters = []sickNode{
	{"passthrough", func(r *nodeReport) {
		r.status.SkippedHostPods = []status.SkippedHostPod{{ServiceAccount: "kube-system/aws-node", Requests: 7}}
	}, OK, "no cloud's metadata server", ""},
	{"passthrough", func(r *nodeReport) {
		r.cloud.err, r.status.SkippedHostPods = nil,
			[]status.SkippedHostPod{{ServiceAccount: "kube-system/aws-node", Requests: 7},
				{ServiceAccount: "kube-system/ebs", Requests: 1}}
	}, Warn, "were refused the cloud's own metadata: kube-system/aws-node (7), kube-system/ebs (1)",
		"name it in passthrough, or set " +
			"routing.interceptHostPods to off"},
	{"passthrough", func(r *nodeReport) { r.config.Passthrough = []string{"a/b"} }, OK,
		"interceptHostPods is not on", ""},
	{"passthrough", func(r *nodeReport) {
		r.config.Passthrough, r.config.Routing.InterceptHostPods, r.status.Attestation.Kernel.Evidence = []string{"a/b"},
			"on", attest.ByNamespace
	}, Fail, "cannot be identified", "cgroup v2"},
	{"passthrough", func(r *nodeReport) {
		r.config.Passthrough, r.config.Routing.InterceptHostPods = []string{"a/b"}, "on"
	}, OK, "from the host network: 1", ""},
	{"passthrough", func(r *nodeReport) { r.status = nil }, Skip, "does not serve", ""},

	{"traffic", func(r *nodeReport) { r.node.Redirected, r.status.Requests = new(uint64), 0 }, Warn,
		"no connection was ever redirected, with 1 pod on this node", "network"},
	{"traffic", func(r *nodeReport) { r.node.Redirected, r.status = new(uint64), nil }, Warn,
		"with 1 pod on this node", "network"},
	{"traffic", func(r *nodeReport) { r.status.Requests = 0 }, Warn,
		"no request since the service started 1h0m0s ago, with 1 pod on this node", "network"},
	{"traffic", func(r *nodeReport) { r.status = nil }, OK, "7 connections were redirected since", ""},
	{"traffic", func(r *nodeReport) { r.status.Requests, r.status.Cluster.Pods = 0, nil }, OK, "no pod runs on this node",
		""},
	{"traffic", func(r *nodeReport) { r.node.Redirected, r.status, r.root = nil, nil, false }, Skip, "as root", ""},
	{"traffic", func(r *nodeReport) { r.node.Redirected, r.status, r.state.Mode = nil, nil, routing.ModeEBPF }, Skip,
		"mode ebpf counts no", ""},
	{"traffic", func(r *nodeReport) { r.state.Desired = routing.Removed }, Skip, "no rules redirect pods", ""},

	{"traffic6", func(r *nodeReport) {}, "", "", ""},
	{"traffic6", dualStack, OK, "2 requests by IPv6 since the service started 1h0m0s ago", ""},
	{"traffic6", func(r *nodeReport) { dualStack(r); r.status.Requests6 = 0 }, OK,
		"no pod of this node has only IPv6", ""},
	{"traffic6", ipv6Alone, Warn, "no connection by IPv6 was ever redirected, with 1 pod on this node that has only IPv6",
		"netfilter"},
	{"traffic6", func(r *nodeReport) { ipv6Alone(r); *r.node.Redirected6 = 3 }, Warn,
		"no request by IPv6 since the service started 1h0m0s ago, with 1 pod on this node that has only IPv6", "netfilter"},
	{"traffic6", func(r *nodeReport) { ipv6Alone(r); r.node.Redirected6 = nil }, Warn,
		"no request by IPv6", "netfilter"},
	{"traffic6", func(r *nodeReport) { dualStack(r); *r.node.Redirected6, r.status = 4, nil }, OK,
		"4 connections by IPv6 were redirected", ""},
	{"traffic6", func(r *nodeReport) { dualStack(r); r.node.Redirected6, r.status, r.root = nil, nil, false }, Skip,
		"as root", ""},
	{"traffic6", func(r *nodeReport) { dualStack(r); r.node.Redirected6, r.status = nil, nil }, Skip, "see check service",
		""},
	{"traffic6", func(r *nodeReport) { dualStack(r); r.node.IPv6 = false }, Skip, "this node has no IPv6", ""},
	{"traffic6", func(r *nodeReport) { dualStack(r); r.state.Desired = routing.Removed }, Skip, "no rules redirect pods",
		""},
	{"traffic", func(r *nodeReport) { ipv6Alone(r) }, OK, "3 requests", ""},

	{"dns", func(r *nodeReport) { answering(r) }, OK, "this node answers its pods", ""},
	{"dns", func(r *nodeReport) { answering(r); r.node.Queries = routing.ListenedBy{} }, Fail,
		"redirected to UDP 169.254.169.252:988, where no process listens", "restart"},
	{"dns", func(r *nodeReport) { answering(r); r.node.Queries.PID, r.node.Queries.Own = "", false }, OK,
		"this node answers its pods", ""}, // not root
	{"dns", func(r *nodeReport) {
		answering(r)
		r.state.DNSRefused = "UDP is held" // as of the last install
		r.node.Queries = routing.ListenedBy{At: netip.MustParseAddrPort("0.0.0.0:988"), PID: "7", Exe: "/x/lustre"}
	}, Fail, "UDP 169.254.169.252:988, where queries are redirected, is held by lustre (process 7) at 0.0.0.0:988",
		"stop it or change listen"},
	{"dns", func(r *nodeReport) { answering(r); r.node.Queries.PID, r.node.Queries.Own = "7", false }, Fail,
		"is held by systemd (process 7) at 169.254.169.252:988", "stop it"},
	{"dns", func(r *nodeReport) { dualStack(r); answering(r) }, Fail,
		"redirected to UDP [fd20:ce::252]:988, where no process listens", "restart"},
	{"dns", func(r *nodeReport) {
		dualStack(r)
		answering(r)
		r.node.Queries6 = routing.ListenedBy{At: netip.MustParseAddrPort("[::]:988"), PID: "7", Exe: "/x/named"}
	}, Fail, "UDP [fd20:ce::252]:988, where queries are redirected, is held by named (process 7) at [::]:988", "stop it"},
	{"dns", func(r *nodeReport) { answering(r); r.state.DNSRefused = "no match of BPF" }, Warn, "no match of BPF",
		"routing.mode"},
	{"dns", func(r *nodeReport) { answering(r); r.plan.Mode = routing.ModeEBPF }, Warn, "mode ebpf does not see",
		"hostAliases"},
	{"rules", func(r *nodeReport) { answering(r); r.state.DNS = false }, Fail, "dns is answer", "routing install"},
	{"dns", func(r *nodeReport) { r.names, r.namesErr = nil, &net.DNSError{IsNotFound: true} }, Warn,
		"the name does not exist", "set dns to answer"},
	{"dns", func(r *nodeReport) { r.names, r.namesErr = nil, &net.DNSError{IsNotFound: true} }, Warn,
		"does not resolve on this node: the name does not exist", "cluster's DNS"},
	{"dns", func(r *nodeReport) { r.names, r.namesErr = nil, &net.DNSError{Err: "i/o timeout", IsTimeout: true} }, Warn,
		"does not resolve on this node: i/o timeout",
		"cluster's DNS"},
	{"dns", func(r *nodeReport) { r.names = []netip.Addr{netip.MustParseAddr("192.0.2.1")} }, Warn,
		"resolves to 192.0.2.1",
		"cluster's DNS"},

	{"credential", func(r *nodeReport) { r.status.Cluster.NodeNameProblem = "nodeName is a" }, Fail, "nodeName is a",
		"nodeName"},
	{"credential", func(r *nodeReport) {
		r.status.Cluster.Watching, r.status.Cluster.Problem = false,
			"permission denied"
	}, Fail, "permission denied; doctor as root reaches", "gke-metadata-emulator-credential"},
	{"credential", func(r *nodeReport) { r.cluster.Reach = &kube.AwayError{Err: errors.New("no answer in 10 s")} },
		Fail, "does not answer doctor: no answer in 10 s", "check that the API server runs"},
	{"credential", func(r *nodeReport) { r.status.Cluster.Watching = false }, Warn,
		"does not watch this node's pods now", "journalctl"},
	{"credential", func(r *nodeReport) { r.status, r.cluster.Reach = nil, &kube.AwayError{Err: errors.New("refused")} },
		Fail, "client certificate of /etc/kubernetes/kubelet.conf: refused", "credential is valid"},
	{"credential", func(r *nodeReport) { r.status, r.cluster.Reach = nil, kube.ErrNotConfigured }, Fail,
		"no usable kubeconfig", "kubelet has joined"},
	{"credential", func(r *nodeReport) { r.status, r.cluster.Reach, r.root = nil, kube.ErrNotConfigured, false }, Skip,
		"as root", ""},
	{"credential", func(r *nodeReport) { r.status, r.cluster.Mismatch = nil, "nodeName is b" }, Fail, "nodeName is b",
		"nodeName"},
	{"credential", func(r *nodeReport) { r.status = nil }, OK, "answers to system:node:n1, with the client certificate of",
		""},

	{"pods", func(r *nodeReport) {
		r.cluster.List = &kube.ForbiddenError{Verb: "list", Resource: "pods", Message: "no"}
	}, Fail, "missing grant: list pods: no", "rbac"},
	{"pods", func(r *nodeReport) { r.cluster.Watch = errors.New("cut") }, Fail, "cut", "watch"},
	{"pods", func(r *nodeReport) { r.cluster.Reach = kube.ErrNotConfigured }, Skip, "see check credential", ""},
	{"pods", func(r *nodeReport) { r.status.Cluster.Pods[0].AccountError = "bad annotation" }, Warn,
		"pod ns/p is refused: bad annotation", "ServiceAccount"},

	{"serviceaccounts", func(r *nodeReport) { r.cluster.Get = forbidden }, Fail,
		"missing grant: get serviceaccounts: no", "apply rbac.yaml"},
	{"serviceaccounts", func(r *nodeReport) { r.cluster.Get = &kube.AnnotationError{Key: "k", Reason: "r"} }, Warn,
		"annotation k: r", "correct the annotation"},
	{"serviceaccounts", func(r *nodeReport) { r.cluster.Get = kube.ErrNotFound }, Fail, "no such ServiceAccount",
		"create the ServiceAccount"},
	{"serviceaccounts", func(r *nodeReport) { r.cluster.Pod = "" }, Skip, "no pod with a ServiceAccount", ""},
	{"serviceaccounts", func(r *nodeReport) { r.cluster.List = errors.New("x") }, Skip, "see check pods", ""},

	{"tokenrequest", func(r *nodeReport) {
		r.cluster.Mint = &kube.ForbiddenError{User: "system:serviceaccount:a:b", Verb: "create",
			Resource: "serviceaccounts/token", Message: "no"}
	}, Fail, "create serviceaccounts/token", "apply rbac-dedicated.yaml"},
	{"tokenrequest", func(r *nodeReport) { r.cluster.Mint = kube.ErrNoPod }, Skip, "was deleted", ""},
	{"tokenrequest", func(r *nodeReport) { r.config.TokenAudience = "" }, Skip, "no audience", ""},

	{"sts", func(r *nodeReport) { r.sts.Err = errors.New("no such host") }, Fail, "no such host", "HTTPS_PROXY"},
	{"sts", func(r *nodeReport) { r.sts.Err = x509.UnknownAuthorityError{} }, Fail, "unknown authority", "google.caFile"},
	{"sts", func(r *nodeReport) { r.sts.Err = x509.CertificateInvalidError{Reason: x509.Expired} }, Fail, "expired",
		"clock"},
	{"sts", func(r *nodeReport) { r.sts.Proxy = "http://proxy:3128" }, OK, "by proxy http://proxy:3128", ""},
	{"sts", func(r *nodeReport) {
		r.sts.Err, r.status.Proxy = errors.New("no such host"), "http://proxy:3128"
	}, Warn, "the service connects by proxy http://proxy:3128; doctor's own connection fails: ", "HTTPS_PROXY of the " +
		"service's unit"},
	{"sts", func(r *nodeReport) {
		r.sts.Err, r.sts.Proxy, r.status.Proxy = errors.New("no such host"), "http://proxy:3128", "http://proxy:3128"
	}, Fail, "no such host", "HTTPS_PROXY"},
	{"exchange", func(r *nodeReport) {
		r.exchange.err, r.sts.Proxy = token.ErrUnavailable, "http://proxy:3128"
	}, Warn, "the service connects without a proxy", "HTTPS_PROXY"},
	{"iam", func(r *nodeReport) { r.iam = token.Reached{Err: errors.New("google.caFile: no such file")} }, Fail,
		"google.caFile", ""},

	{"exchange", func(r *nodeReport) { r.exchange = nil }, Skip, "see check tokenrequest", ""},
	{"exchange", func(r *nodeReport) {
		r.exchange.err = &token.GoogleError{Step: "STS", Status: 400, Message: "bad audience"}
	}, Fail, "bad audience", "providers describe"},
	{"exchange", func(r *nodeReport) {
		r.exchange.err = &token.GoogleError{Step: "IAM", Status: 403, Message: "no binding", Hint: "gcloud this."}
	}, Warn, "no binding Hint: gcloud this.", "one ServiceAccount"},
	{"exchange", func(r *nodeReport) { r.exchange.err = &token.GoogleError{Step: "STS", Status: 503} }, Fail, "503",
		"see checks sts"},
	{"exchange", func(r *nodeReport) { r.exchange.email = "" }, OK, "STS accepts the token of ns/a", ""},

	{"clock", func(r *nodeReport) { r.cluster.Date, r.sts.Date = r.now.Add(5*time.Minute), r.now.Add(5*time.Minute) },
		Fail, "5m0s off", "chrony"},
	{"clock", func(r *nodeReport) { r.cluster.Date = r.now.Add(-5 * time.Minute) }, Fail,
		"the clocks of the API server and STS are 5m0s apart", "NTP"},
	{"clock", func(r *nodeReport) { r.sts.Date = r.now.Add(-20 * time.Second) }, Warn, "20s off that of STS", "chrony"},
	{"clock", func(r *nodeReport) { r.sts.Date, r.cluster.Date = time.Time{}, time.Time{} }, Skip, "sent its time", ""},

	{"tokens", func(r *nodeReport) { r.status.Tokens[0].LastError = "503" }, Warn,
		"1 of 1 tokens could not be minted or refreshed at the last attempt, such as that of ns/a: 503", "status"},
	{"tokens", func(r *nodeReport) { r.status = nil }, Skip, "see check service", ""},
}
