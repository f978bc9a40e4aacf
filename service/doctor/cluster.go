package doctor

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/status"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token"
)

// credentialCheck says with what the API server is asked, and whether it answers: the service's
// word where it runs, and doctor's own try.
func credentialCheck(r *nodeReport) Finding {
	const (
		checkNodeName = "correct or remove nodeName"
		checkServer   = "check that the API server runs, that this node reaches it, and that the credential is valid"
	)
	a := r.cluster
	var away *kube.AwayError
	errors.As(a.Reach, &away)
	if r.status != nil && r.status.Cluster != nil {
		c := r.status.Cluster
		switch {
		case c.NodeNameProblem != "":
			return fail(checkNodeName, "%s", c.NodeNameProblem)
		case c.Watching && away != nil: // it may hang, and its connections stay open meanwhile
			return fail(checkServer, "%s: %s does not answer doctor: %v; the service's watch is still open, and known pods are "+
				"served", kube.Unavailable, a.Server, away.Err)
		case c.Watching:
			return good("the service watches this node's pods at %s as %s, with %s", c.Server, identity(c.User), c.Kubeconfig)
		case c.Problem != "" && a.Reach == nil:
			return fail("let the service's user read the credential: systemctl restart gke-metadata-emulator-credential",
				"%s; doctor as root reaches %s with %s", c.Problem, a.Server, a.Kubeconfig)
		case c.Problem != "" && away != nil:
			return fail(checkServer, "%s", c.Problem)
		case c.Problem != "":
			return fail(waitForKubelet, "%s", c.Problem)
		case a.Reach == nil:
			return warn("run doctor again; if this lasts: journalctl -u gke-metadata-emulator",
				"the service does not watch this node's pods now; doctor reaches %s with %s", a.Server, a.Kubeconfig)
		}
	}
	switch {
	case away != nil:
		return fail(checkServer, "%s: %s with %s of %s: %v", kube.Unavailable, a.Server, a.Credential, a.Kubeconfig, away.Err)
	case errors.Is(a.Reach, kube.ErrNotConfigured) && !r.root:
		return skip("%v: %s", a.Reach, asRoot)
	case a.Reach != nil:
		return fail(waitForKubelet, "%v", a.Reach)
	case a.Mismatch != "":
		return fail(checkNodeName, "%s", a.Mismatch)
	}
	return good("%s answers to %s, with the %s of %s", a.Server, identity(a.User), a.Credential, a.Kubeconfig)
}

const waitForKubelet = "wait until kubelet has joined the cluster, or set kubeconfig"

// identity is a user of the API server.
func identity(user string) string { return cmp.Or(user, "an unknown user") }

// untried says why a grant was not tried.
func untried(a kube.Attempt) (Finding, bool) {
	switch {
	case a.Reach != nil:
		return skip("the API server does not answer: see check credential"), true
	case a.List != nil:
		return skip("this node's pods are unknown: see check pods"), true
	case a.Pod == "":
		return skip("no pod with a ServiceAccount runs on this node"), true
	}
	return Finding{}, false
}

// refused is a failure by what the API server said, with the manifest if one mends it.
func refused(err error, remedy string) Finding {
	var f *kube.ForbiddenError
	if !errors.As(err, &f) {
		return fail(remedy, "%v", err)
	}
	m := f.Manifest()
	if m == "" {
		return fail("set nodeName to the node of this credential, or remove it", "%s %s: %s", f.Verb, f.Resource, f.Message)
	}
	name := "rbac.yaml"
	if !strings.Contains(m, "system:nodes") {
		name = "rbac-dedicated.yaml"
	}
	r := fail("apply "+name+" as printed below (also in /usr/share/doc/gke-metadata-emulator)",
		"missing grant: %s %s: %s", f.Verb, f.Resource, f.Message)
	r.Manifest = m
	return r
}

func podsCheck(r *nodeReport) Finding {
	a := r.cluster
	switch {
	case a.Reach != nil:
		return skip("the API server does not answer: see check credential")
	case a.List != nil:
		return refused(a.List, "check that the API server lets this node list its pods")
	case a.Watch != nil:
		return refused(a.Watch, "check that the API server lets this node watch its pods")
	}
	text := fmt.Sprintf("%d on the pod network, %d on the host network", a.Pods, a.HostPods)
	if r.status == nil || r.status.Cluster == nil {
		return good("%s", text)
	}
	for _, q := range r.status.Cluster.Pods {
		if q.AccountError != "" {
			return warn("correct its ServiceAccount", "%s; pod %s/%s is refused: %s", text, q.Namespace, q.Name, q.AccountError)
		}
	}
	return good("%s", text)
}

func serviceAccountsCheck(r *nodeReport) Finding {
	a := r.cluster
	if f, yes := untried(a); yes {
		return f
	}
	var annotation *kube.AnnotationError
	switch {
	case errors.As(a.Get, &annotation):
		return warn("correct the annotation", "%v", a.Get)
	case a.Get != nil:
		return refused(a.Get, "create the ServiceAccount, or correct the pod")
	case a.Account.Linked():
		return good("%s is readable, and linked to %s", a.ServiceAccount, a.Account.GoogleEmail)
	}
	return good("%s is readable, and not linked to a Google service account", a.ServiceAccount)
}

func tokenRequestCheck(r *nodeReport) Finding {
	a := r.cluster
	if f, yes := untried(a); yes {
		return f
	}
	switch {
	case r.config.TokenAudience == "":
		return skip("no valid configuration, so no audience")
	case errors.Is(a.Mint, kube.ErrNoPod):
		return skip("pod %s/%s was deleted during the check", a.ServiceAccount.Namespace, a.Pod)
	case a.Mint != nil:
		return refused(a.Mint, "check that the API server issues tokens")
	}
	return good("the API server issued a token of %s, bound to pod %s, for %s", a.ServiceAccount, a.Pod,
		r.config.TokenAudience)
}

func stsCheck(r *nodeReport) Finding { return r.believeService(reached(r.sts, "google.stsURL")) }

func iamCheck(r *nodeReport) Finding {
	return r.believeService(reached(r.iam, "google.iamCredentialsURL"))
}

// believeService takes a failure to reach Google for doctor's own where the service, which has the
// environment of its unit, goes another way.
func (r *nodeReport) believeService(f Finding) Finding {
	if f.Verdict != Fail || r.status == nil || r.status.State != "serving" || r.status.Proxy == r.sts.Proxy {
		return f
	}
	route := "without a proxy"
	if r.status.Proxy != "" {
		route = "by proxy " + r.status.Proxy
	}
	return warn("run doctor with the HTTPS_PROXY of the service's unit; see check tokens below",
		"the service connects %s; doctor's own connection fails: %s", route, f.Finding)
}

// reached judges whether one of Google's services is there.
func reached(r token.Reached, key string) Finding {
	by := "without a proxy"
	if r.Proxy != "" {
		by = "by proxy " + r.Proxy
	}
	var authority x509.UnknownAuthorityError
	var host x509.HostnameError
	var invalid x509.CertificateInvalidError
	var record tls.RecordHeaderError
	switch {
	case r.Err == nil:
		return good("%s answers, %s", r.URL, by)
	case errors.As(r.Err, &invalid) && invalid.Reason == x509.Expired:
		return fail("set this node's clock: see check clock", "%s: %v", r.URL, r.Err)
	case errors.As(r.Err, &authority), errors.As(r.Err, &host):
		return fail("install ca-certificates; if a proxy intercepts TLS, set google.caFile to its CA", "%s: %v, %s",
			r.URL, r.Err, by)
	case errors.As(r.Err, &record):
		return fail("correct "+key, "%s does not speak TLS: %v", r.URL, r.Err)
	}
	return fail("check routes, firewalls and DNS of this node, or set HTTPS_PROXY in the service's unit",
		"%s: %v, %s", cmp.Or(r.URL, key), r.Err, by)
}

// exchangeCheck is a pod's token taken to Google: only Google knows whether the provider takes this
// cluster's tokens.
func exchangeCheck(r *nodeReport) Finding {
	if r.exchange == nil {
		return skip("no token to exchange: see check tokenrequest")
	}
	sa, provider := r.cluster.ServiceAccount, r.config.WorkloadIdentity.Audience
	var e *token.GoogleError
	switch err := r.exchange.err; {
	case err == nil && r.exchange.email != "":
		return good("STS accepts the token of %s for %s, and IAM issues tokens of %s for it", sa, provider, r.exchange.email)
	case err == nil:
		return good("STS accepts the token of %s for %s", sa, provider)
	case errors.As(err, &e) && e.Step == "STS" && !e.Temporary():
		return fail("compare issuer, keys, allowed audiences and condition of the provider: gcloud iam "+
			"workload-identity-pools providers describe", "%v (audience %s)", err, r.config.TokenAudience)
	case errors.As(err, &e) && e.Step == "IAM" && !e.Temporary():
		return warn("correct this one ServiceAccount; others are not affected", "STS accepts the token of %s for %s; %v", sa,
			provider, err)
	default:
		return r.believeService(fail("see checks sts and iam", "%v", err))
	}
}

const (
	clockWarn = 10 * time.Second
	clockFail = time.Minute // Google takes tokens a little from the future, and certificates not at all
)

// clockCheck compares this node's clock with others'. Kubernetes' tokens say when they begin by the
// API server's clock, and Google reads that by its own.
func clockCheck(r *nodeReport) Finding {
	type clock struct {
		name string
		skew time.Duration // its clock less ours
	}
	var clocks []clock
	for _, c := range []struct {
		name        string
		asked, date time.Time
	}{{"the API server", r.cluster.Asked, r.cluster.Date}, {"STS", r.sts.Asked, r.sts.Date}} {
		if !c.date.IsZero() {
			clocks = append(clocks, clock{c.name, c.date.Sub(c.asked).Truncate(time.Second)})
		}
	}
	if len(clocks) == 0 {
		return skip("neither the API server nor STS sent its time")
	}
	if len(clocks) == 2 { // where both are off by the same, it is this node that is
		if d := clocks[1].skew - clocks[0].skew; d.Abs() > clockFail && clocks[0].skew.Abs() > clockWarn {
			return fail("synchronize the clock of the API server's machine by NTP: Google refuses its tokens",
				"the clocks of %s and %s are %s apart", clocks[0].name, clocks[1].name, d.Abs())
		}
	}
	worst := clocks[0]
	var texts []string
	for _, c := range clocks {
		if c.skew.Abs() > worst.skew.Abs() {
			worst = c
		}
		texts = append(texts, c.name)
	}
	const ntp = "synchronize this node's clock by NTP: chrony or systemd-timesyncd"
	switch {
	case worst.skew.Abs() > clockFail:
		return fail(ntp, "this node's clock is %s off that of %s", worst.skew.Abs(), worst.name)
	case worst.skew.Abs() > clockWarn:
		return warn(ntp, "this node's clock is %s off that of %s", worst.skew.Abs(), worst.name)
	}
	return good("this node's clock is within %s of that of %s", clockWarn, strings.Join(texts, " and "))
}

// tokensCheck is the service's own word on what it minted.
func tokensCheck(r *nodeReport) Finding {
	if r.status == nil {
		return skip("the service does not answer: see check service")
	}
	bad, last := 0, ""
	for _, t := range r.status.Tokens {
		if t.LastError != "" {
			bad++
			last = fmt.Sprintf("%s: %s", t.ServiceAccount, status.Bounded(t.LastError))
		}
	}
	if bad > 0 {
		return warn("gke-metadata-emulator status shows each error", "%d of %d tokens could not be minted or refreshed at "+
			"the last attempt, such as that of %s", bad, len(r.status.Tokens), last)
	}
	return good("cached tokens: %d, each minted without an error", len(r.status.Tokens))
}
