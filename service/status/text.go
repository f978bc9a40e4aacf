package status

import (
	"cmp"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
)

// Text writes the status for a person, and laid out for a terminal where w is one.
func (s Status) Text(w io.Writer, now time.Time) error { return s.text(w, now, lookOf(w)) }

func (s Status) text(w io.Writer, now time.Time, look look) error {
	p := page{look: look}
	s.stateText(&p)
	p.line(plain, "version", "%s, up %s", s.Version, Age(now, s.Started))
	p.line(plain, "listening", "%s%s, %d connections, %d requests so far%s", s.Listen,
		textIf(s.Listen6 != "", " and "+s.Listen6), s.Connections, s.Requests,
		textIf(s.Requests6 > 0, fmt.Sprintf(", %d of them by IPv6", s.Requests6)))
	if s.Unreachable != "" {
		p.line(red, "", "the node's own connections fail, which hostIdentities and pods on the host network need: %s",
			Bounded(s.Unreachable))
	}
	s.attestationText(&p, now)
	s.rulesText(&p, now)
	if s.LastInstall != nil {
		p.line(red, "", "%s", FailureText(s.LastInstall, now))
	}
	for _, u := range s.SkippedHostPods {
		p.line(red, "host pods", "ServiceAccount %s: %d requests for the cloud's own metadata were refused: %s",
			u.ServiceAccount, u.Requests, SkippedRemedy)
	}
	var pods []kube.PodStatus
	if c := s.Cluster; c != nil {
		s.clusterText(&p, now)
		if s.Proxy != "" {
			p.line(plain, "google", "by proxy %s", s.Proxy)
		}
		p.table("PODS", podRows(c.Pods), "NAMESPACE", "POD", "ADDRESSES", "EVIDENCE", "SERVICEACCOUNT",
			"GOOGLE SERVICE ACCOUNT")
		if hosts := s.Attestation.HostIdentities; len(hosts) > 0 {
			var rows []row
			for _, h := range hosts {
				rows = append(rows, row{h.AccountError, []string{h.Unit + h.Cgroup, h.ServiceAccount, h.GoogleEmail}})
			}
			p.table("HOST IDENTITIES", rows, "PROCESSES OF", "SERVICEACCOUNT", "GOOGLE SERVICE ACCOUNT")
		}
		s.tokensText(&p, now)
		pods = c.Pods
		for _, g := range c.MissingGrants { // the manifest is to be pasted, so its lines stay as they are
			p.WriteString("\n")
			p.line(red, "MISSING GRANT:", "%s %s: %s", g.Verb, g.Resource, g.Message)
			p.WriteString(g.Manifest)
		}
	}
	if r := s.Routing; r != nil && r.Mode == routing.ModeObserve && r.Desired == routing.Installed {
		observedText(&p, r.Observed, pods)
	}
	_, err := io.WriteString(w, p.String())
	return err
}

func (s Status) stateText(p *page) {
	switch {
	case s.State == "serving" && s.Reason == "":
		p.line(green, "state", "serving")
	case s.State == "serving":
		p.line(red, "state", "serving, not ready: %s", OneLine(s.Reason))
	default:
		p.line(red, "state", "%s", OneLine(cmp.Or(s.Reason, s.State)))
	}
	if s.ConfigFile != "" {
		p.line(red, "", "%s", OneLine(s.ConfigFile))
	}
}

func podRows(pods []kube.PodStatus) (rows []row) {
	for _, p := range pods {
		rows = append(rows, row{p.AccountError, []string{p.Namespace, p.Name + textIf(p.Terminating, " (terminating)"),
			strings.Trim(fmt.Sprint(p.Addresses), "[]") + textIf(p.HostNetwork, "host network"), cmp.Or(p.Evidence, "none"),
			cmp.Or(p.ServiceAccount, "(static pod)"), p.GoogleEmail}})
	}
	return rows
}

func (s Status) tokensText(p *page, now time.Time) {
	var rows []row
	for _, t := range s.Tokens {
		as, what := t.GoogleServiceAccount, t.Scopes
		switch {
		case t.Federated:
			as = "itself (intermediate)"
		case as == "":
			as = "itself"
		}
		if t.Audience != "" {
			what = "audience " + t.Audience
		}
		rows = append(rows, row{Bounded(t.LastError), []string{t.ServiceAccount, as,
			strings.ReplaceAll(what, "https://www.googleapis.com/auth/", ""), Age(now, t.Minted), Age(t.Expires, now)}})
	}
	p.table("TOKENS", rows, "SERVICEACCOUNT", "AS", "FOR", "AGE", "LEFT")
}

// FailureText says on one line why installs fail.
func FailureText(f *routing.Failure, now time.Time) string {
	return fmt.Sprintf("routing install failed %d times in a row, last %s ago: %s", f.Times, Age(now, f.Last),
		OneLine(f.Error))
}

func (s Status) rulesText(p *page, now time.Time) {
	r := s.Routing
	switch {
	case r == nil:
		p.line(red, "rules", "unknown: %s", s.RoutingErr)
		return
	case r.Desired == "":
		p.line(red, "rules", "never installed: gke-metadata-emulator routing install")
		return
	case r.Desired == routing.Removed:
		p.line(red, "rules", "removed %s ago", Age(now, r.Since))
	case r.Closed:
		p.line(red, "rules", "%s, installed %s ago: there was no valid configuration",
			cmp.Or(textIf(r.Listen != "", "redirected to "+r.Listen), textIf(r.Mode == routing.ModeObserve,
				"mode observe: nothing is redirected or counted"), "only the guard"), Age(now, r.Since))
	case r.Mode == routing.ModeObserve:
		p.line(plain, "rules", "mode observe, installed %s ago: connections are counted and not redirected", Age(now,
			r.Since))
	default:
		done := "installed"
		if s.LastInstall != nil {
			done = "NOT installed (the last install failed), wanted since"
		}
		p.line(plain, "rules", "mode %s to %s%s, %s %s ago", r.Mode, r.Listen,
			textIf(r.Listen6 != "" && r.IPv6 == "", " and "+r.Listen6), done, Age(now, r.Since))
		if r.Reason != "" {
			p.line(plain, "", "auto: %s", r.Reason)
		}
		if r.IPv6 != "" {
			p.line(red, "", "IPv6 is not redirected to %s: %s", r.Listen6, r.IPv6)
		}
		switch {
		case r.DNSRefused != "":
			p.line(red, "", "DNS queries for metadata.google.internal are not answered: %s", r.DNSRefused)
		case r.DNS:
			p.line(plain, "", "DNS queries for metadata.google.internal are answered")
		}
	}
	verdict, color := "complete", plain
	if r.Desired == routing.Removed {
		verdict = "none is left"
	}
	if !r.Standing.Good {
		verdict, color = "NOT as desired", red
	}
	p.line(color, "", "checked %s ago: %s", Age(now, r.Standing.Time), verdict)
	for _, f := range r.Standing.Faults {
		p.line(color, "", "%s", f)
	}
	if r.HostNetwork != "" && r.Desired == routing.Installed && !r.Closed && r.Mode != routing.ModeObserve {
		p.line(plain, "host pods", "%s", r.HostNetwork)
	}
}

func (s Status) attestationText(p *page, now time.Time) {
	k := s.Attestation.Kernel
	switch {
	case s.Attestation.Mode == "":
		return
	case k == nil:
		p.line(plain, "attestation", "by source address only, which a dead pod shares with the address's next owner")
		return
	case k.Helper:
		p.line(plain, "attestation", "by the kernel: %d cgroups and %d network namespaces are known", k.Cgroups, k.Namespaces)
	default:
		p.line(red, "attestation", "by the kernel, but gke-metadata-emulator-attest.service is not connected%s: new pods "+
			"are "+
			"refused", textIf(!k.Since.IsZero(), " for "+Age(now, k.Since)))
		p.line(red, "", "%s", k.Problem)
	}
	for _, lack := range k.Lacks {
		p.line(red, "", "limited: %s", lack)
	}
	for _, c := range k.Conflicts {
		p.line(red, "conflict", "%s: %s and %s have sockets with this address: %d connections refused, the last %s ago: "+
			"remove the address from the one that does not own it",
			c.Address, s.PodName(c.Between[0]), s.PodName(c.Between[1]), c.Refused, Age(now, c.LastSeen))
	}
}

// PodName names the pod of a UID; it returns anything else as it is.
func (s Status) PodName(uid string) string {
	if s.Cluster != nil {
		for _, p := range s.Cluster.Pods {
			if p.UID == uid && uid != "" {
				return p.Namespace + "/" + p.Name
			}
		}
	}
	return uid
}

// WriteObserved writes who would get our answers, as a table (U-36).
func WriteObserved(w io.Writer, all []routing.Observation) error {
	p := page{look: lookOf(w)}
	observedText(&p, all, nil)
	_, err := io.WriteString(w, strings.TrimPrefix(p.String(), "\n"))
	return err
}

// observedText names the pods that it knows. A runtime may write a UID with underscores.
func observedText(p *page, all []routing.Observation, pods []kube.PodStatus) {
	var rows []row
	for _, o := range all {
		network, who := "pod", cmp.Or(o.Cgroup, "a cgroup that was removed")
		if o.HostNetwork {
			network = "host"
		}
		for _, p := range pods {
			if p.UID != "" && strings.Contains(strings.ReplaceAll(o.Cgroup, "_", "-"), p.UID) {
				who = p.Namespace + "/" + p.Name
			}
		}
		rows = append(rows, row{"", []string{fmt.Sprint(o.Connects), network, who}})
	}
	p.table("OBSERVED", rows, "CONNECTS", "NETWORK", "POD OR CGROUP")
}

func (s Status) clusterText(p *page, now time.Time) {
	c := s.Cluster
	switch {
	case c.Watching:
		p.line(plain, "kubernetes", "%s as %s, watching", c.Server,
			cmp.Or(c.User, "(identity unknown: the API server has no SelfSubjectReview)"))
	case c.Problem != "" && (c.Problem == s.Reason || // they may be of two attempts
		strings.HasPrefix(c.Problem, kube.Unavailable) && strings.HasPrefix(s.Reason, kube.Unavailable)):
		p.line(plain, "kubernetes", "%snot watching: see state", textIf(c.Server != "", c.Server+", "))
	case c.Problem != "":
		p.line(red, "kubernetes", "%s", c.Problem)
	default:
		p.line(plain, "kubernetes", "%s, reopening the watch", c.Server)
	}
	if c.Kubeconfig != "" {
		p.line(plain, "kubeconfig", "%s", c.Kubeconfig)
	}
	if c.Credential != "" {
		p.line(plain, "credential", "%s", c.Credential)
	}
	if c.NodeName != "" {
		p.line(plain, "node", "%s", c.NodeName)
	}
	if c.NodeNameProblem != "" {
		p.line(red, "", "%s", c.NodeNameProblem)
	}
	if c.LastError != "" && c.LastErrorAt != nil && c.Problem == "" {
		p.line(plain, "last error", "%s ago: %s", Age(now, *c.LastErrorAt), c.LastError)
	}
}

// textIf returns the text where on is true, else "".
func textIf(on bool, text string) string {
	if on {
		return text
	}
	return ""
}

// Age is a duration between two times for the eye; "-" where one of them never was.
func Age(later, earlier time.Time) string {
	if later.IsZero() || earlier.IsZero() {
		return "-"
	}
	return later.Sub(earlier).Round(time.Second).String()
}

// OneLine puts the lines of a text into one, which is printable.
func OneLine(s string) string {
	return printable(strings.ReplaceAll(strings.TrimSpace(s), "\n", "; "))
}

// Bounded cuts a text that somebody else wrote to 256 bytes, and makes it printable.
func Bounded(s string) string {
	const most = 256
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return printable(s)
}

// printable replaces what is no graphic character, and bytes that are no UTF-8: a terminal may obey
// them, and show something else than the text.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return utf8.RuneError
	}, s)
}
