package status

import (
	"cmp"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
)

// Text writes the status for a person.
func (s Status) Text(w io.Writer, now time.Time) error {
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-12s "+format+"\n", append([]any{name}, args...)...)
	}

	line("state", "%s", s.State)
	if s.Reason != "" {
		line("", "%s", s.Reason)
	}
	if s.ConfigFile != "" {
		line("", "the configuration on disk does not load, and a restart would refuse pods; what was read before is in "+
			"force: %s", OneLine(s.ConfigFile))
	}
	line("version", "%s, up %s", s.Version, Age(now, s.Started))
	line("listening", "%s%s, %d connections, %d requests so far%s", s.Listen, textIf(s.Listen6 != "", " and "+s.Listen6),
		s.Connections, s.Requests,
		textIf(s.Requests6 > 0, fmt.Sprintf(", %d of them by IPv6", s.Requests6)))
	if s.Unreachable != "" {
		line("", "connections of the node itself fail, as hostIdentities and pods on the host network need them: %s",
			Bounded(s.Unreachable))
	}
	s.attestationText(line, now)
	s.rulesText(line, now)
	if s.LastInstall != nil {
		line("", "%s", FailureText(s.LastInstall, now))
	}
	for _, u := range s.SkippedHostPods {
		line("host pods", "ServiceAccount %s asked %d times for the cloud's own metadata, and is not let through: %s",
			u.ServiceAccount, u.Requests, SkippedRemedy)
	}
	var pods []kube.PodStatus
	if c := s.Cluster; c != nil {
		s.clusterText(line, now)
		if s.Proxy != "" {
			line("google", "by proxy %s", s.Proxy)
		}
		table(&b, "PODS", "NAMESPACE\tPOD\tADDRESSES\tKNOWN BY\tSERVICEACCOUNT\tGOOGLE SERVICE ACCOUNT\t", len(c.Pods),
			func(w io.Writer) {
				for _, p := range c.Pods {
					fmt.Fprintf(w, "%s\t%s%s\t%s\t%s\t%s\t%s\t\n", p.Namespace, p.Name, textIf(p.Terminating, " (terminating)"),
						strings.Trim(fmt.Sprint(p.Addresses), "[]")+textIf(p.HostNetwork, "host network"), cmp.Or(p.Evidence, "nothing"),
						cmp.Or(p.ServiceAccount, "(static pod)"), accountText(p.AccountStatus))
				}
			})
		if hosts := s.Attestation.HostIdentities; len(hosts) > 0 {
			table(&b, "HOST IDENTITIES", "PROCESSES OF\tSERVICEACCOUNT\tGOOGLE SERVICE ACCOUNT\t", len(hosts),
				func(w io.Writer) {
					for _, h := range hosts {
						fmt.Fprintf(w, "%s\t%s\t%s\t\n", h.Unit+h.Cgroup, h.ServiceAccount, accountText(h.AccountStatus))
					}
				})
		}
		table(&b, "TOKENS", "SERVICEACCOUNT\tAS\tFOR\tAGE\tLEFT\tLAST ERROR\t", len(s.Tokens), func(w io.Writer) {
			for _, t := range s.Tokens {
				as, what := t.GoogleServiceAccount, t.Scopes
				switch {
				case t.Federated:
					as = "itself (federated)"
				case as == "":
					as = "itself"
				}
				if t.Audience != "" {
					what = "audience " + t.Audience
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t\n", t.ServiceAccount, as,
					strings.ReplaceAll(what, "https://www.googleapis.com/auth/", ""), Age(now, t.Minted), Age(t.Expires, now),
					Bounded(t.LastError))
			}
		})
		pods = c.Pods
		for _, g := range c.MissingGrants {
			fmt.Fprintf(&b, "\nMISSING GRANT: %s %s: %s\n%s", g.Verb, g.Resource, g.Message, g.Manifest)
		}
	}
	if r := s.Routing; r != nil && r.Mode == routing.ModeObserve && r.Desired == routing.Installed {
		observedText(&b, r.Observed, pods)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// FailureText says on one line why installs fail.
func FailureText(f *routing.Failure, now time.Time) string {
	return fmt.Sprintf("routing install failed %d times in a row, last %s ago: %s", f.Times, Age(now, f.Last),
		OneLine(f.Error))
}

func (s Status) rulesText(line func(string, string, ...any), now time.Time) {
	r := s.Routing
	switch {
	case r == nil:
		line("rules", "not known: %s", s.RoutingErr)
		return
	case r.Desired == "":
		line("rules", "never installed: run `gke-metadata-emulator routing install`")
		return
	case r.Desired == routing.Removed:
		line("rules", "removed %s ago", Age(now, r.Since))
	case r.Closed:
		line("rules", "the closed guard alone, since the configuration was broken")
	case r.Mode == routing.ModeObserve:
		line("rules", "mode observe: nothing is redirected, those who would be are counted, installed %s ago",
			Age(now, r.Since))
	default:
		done := "installed"
		if s.LastInstall != nil {
			done = "NOT installed (the last install failed), wanted since"
		}
		line("rules", "mode %s to %s%s, %s %s ago", r.Mode, r.Listen,
			textIf(r.Listen6 != "" && r.IPv6 == "", " and "+r.Listen6), done, Age(now, r.Since))
		if r.Reason != "" {
			line("", "auto: %s", r.Reason)
		}
		if r.IPv6 != "" {
			line("", "IPv6 is not redirected to %s: %s", r.Listen6, r.IPv6)
		}
		switch {
		case r.DNSRefused != "":
			line("", "DNS queries for metadata.google.internal are not answered: %s", r.DNSRefused)
		case r.DNS:
			line("", "DNS queries for metadata.google.internal are answered")
		}
	}
	verdict := "all stand"
	if r.Desired == routing.Removed {
		verdict = "nothing of ours stands"
	}
	if !r.Standing.Good {
		verdict = "NOT as they should be"
	}
	line("", "read back %s ago: %s", Age(now, r.Standing.Time), verdict)
	for _, f := range r.Standing.Faults {
		line("", "%s", f)
	}
	if r.HostNetwork != "" && r.Desired == routing.Installed && !r.Closed && r.Mode != routing.ModeObserve {
		line("host pods", "%s", r.HostNetwork)
	}
}

func (s Status) attestationText(line func(string, string, ...any), now time.Time) {
	k := s.Attestation.Kernel
	switch {
	case s.Attestation.Mode == "":
		return
	case k == nil:
		line("attestation", "by address alone, which a dead pod shares with the next owner")
		return
	case k.Helper:
		line("attestation", "by the kernel: %d cgroups and %d network namespaces are known", k.Cgroups, k.Namespaces)
	default:
		line("attestation", "by the kernel, but gke-metadata-emulator-attest.service is away%s: pods whose network "+
			"namespace is not known are refused", textIf(!k.Since.IsZero(), " for "+Age(now, k.Since)))
		line("", "%s", k.Problem)
	}
	for _, lack := range k.Lacks {
		line("", "lacking: %s", lack)
	}
	for _, c := range k.Conflicts {
		line("conflict", "%s: %s and %s have sockets of this address; %d connections refused, the last %s ago: remove "+
			"it from the one that does not own it",
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

func accountText(a kube.AccountStatus) string {
	return a.GoogleEmail + textIf(a.AccountError != "", "error: "+a.AccountError)
}

// WriteObserved writes who would get our answers, as a table (U-36).
func WriteObserved(w io.Writer, all []routing.Observation) error {
	var b strings.Builder
	observedText(&b, all, nil)
	_, err := io.WriteString(w, strings.TrimPrefix(b.String(), "\n"))
	return err
}

// observedText names the pods that it knows. A runtime may write a UID with underscores.
func observedText(b *strings.Builder, all []routing.Observation, pods []kube.PodStatus) {
	table(b, "OBSERVED", "CONNECTS\tNETWORK\tWHO\t", len(all), func(w io.Writer) {
		for _, o := range all {
			network, who := "pod", o.Cgroup
			if o.HostNetwork {
				network = "host"
			}
			if who == "" {
				who = "a cgroup that is gone"
			}
			for _, p := range pods {
				if p.UID != "" && strings.Contains(strings.ReplaceAll(o.Cgroup, "_", "-"), p.UID) {
					who = p.Namespace + "/" + p.Name
				}
			}
			_, _ = fmt.Fprintf(w, "%d\t%s\t%s\t\n", o.Connects, network, who)
		}
	})
}

func (s Status) clusterText(line func(string, string, ...any), now time.Time) {
	c := s.Cluster
	switch {
	case c.Watching:
		line("kubernetes", "%s as %s, watching", c.Server, c.User)
	case c.Problem != "":
		line("kubernetes", "%s", c.Problem)
	default:
		line("kubernetes", "%s, out of touch", c.Server)
	}
	if c.Kubeconfig != "" {
		line("kubeconfig", "%s", c.Kubeconfig)
	}
	if c.Credential != "" {
		line("credential", "%s", c.Credential)
	}
	if c.NodeName != "" {
		line("node", "%s", c.NodeName)
	}
	if c.NodeNameProblem != "" {
		line("", "%s", c.NodeNameProblem)
	}
	if c.LastError != "" && c.LastErrorAt != nil {
		line("last error", "%s ago: %s", Age(now, *c.LastErrorAt), c.LastError)
	}
}

// table writes rows below a head, and says "none" where there are none.
func table(b *strings.Builder, title, head string, n int, rows func(io.Writer)) {
	fmt.Fprintf(b, "\n%s: %d\n", title, n)
	if n == 0 {
		return
	}
	var aligned strings.Builder
	w := tabwriter.NewWriter(&aligned, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(w, head)
	rows(w)
	_ = w.Flush() // into memory
	for line := range strings.Lines(aligned.String()) {
		b.WriteString(strings.TrimRight(line, " \n") + "\n")
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

// OneLine puts the lines of a text into one.
func OneLine(s string) string { return strings.ReplaceAll(strings.TrimSpace(s), "\n", "; ") }

// Bounded cuts a text that somebody else wrote to 256 bytes.
func Bounded(s string) string {
	const most = 256
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}
