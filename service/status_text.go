package service

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
)

// Text writes the status for a person.
func (s Status) Text(w io.Writer, now time.Time) error {
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-11s "+format+"\n", append([]any{name}, args...)...)
	}

	line("state", "%s", s.State)
	if s.Reason != "" {
		line("", "%s", s.Reason)
	}
	line("version", "%s, up %s", s.Version, age(now, s.Started))
	line("listening", "%s, %d connections, %d requests so far", s.Listen, s.Connections, s.Requests)
	line("evidence", "%s: an address tells no dead pod from the next owner of its address", s.Evidence)
	s.rulesText(line, now)
	if c := s.Cluster; c != nil {
		s.clusterText(line, now)
		if s.Proxy != "" {
			line("google", "by proxy %s", s.Proxy)
		}
		table(&b, "PODS", "NAMESPACE\tPOD\tADDRESSES\tSERVICEACCOUNT\tGOOGLE SERVICE ACCOUNT\t", len(c.Pods), func(w io.Writer) {
			for _, p := range c.Pods {
				fmt.Fprintf(w, "%s\t%s%s\t%s\t%s\t%s\t\n", p.Namespace, p.Name, mark(p.Terminating, " (terminating)"),
					strings.Trim(fmt.Sprint(p.Addresses), "[]")+mark(p.HostNetwork, "host network: not served"), p.ServiceAccount, p.GoogleEmail+mark(p.AccountError != "", "error: "+p.AccountError))
			}
		})
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
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t\n", t.ServiceAccount, as, strings.ReplaceAll(what, "https://www.googleapis.com/auth/", ""), age(now, t.Minted), age(t.Expires, now), bounded(t.LastError))
			}
		})
		for _, g := range c.MissingGrants {
			fmt.Fprintf(&b, "\nMISSING GRANT: %s %s: %s\n%s", g.Verb, g.Resource, g.Message, g.Manifest)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
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
		line("rules", "removed %s ago", age(now, r.Since))
	case r.Closed:
		line("rules", "the closed guard alone, since the configuration was broken")
	default:
		line("rules", "mode %s to %s, installed %s ago", r.Mode, r.Listen, age(now, r.Since))
		if r.Reason != "" {
			line("", "auto: %s", r.Reason)
		}
	}
	verdict := "all stand"
	if r.Desired == routing.Removed {
		verdict = "nothing of ours stands"
	}
	if !r.Standing.Good {
		verdict = "NOT as they should be"
	}
	line("", "read back %s ago: %s", age(now, r.Standing.Time), verdict)
	for _, f := range r.Standing.Faults {
		line("", "%s", f)
	}
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
	if c.NodeName != "" {
		line("node", "%s", c.NodeName)
	}
	if c.NodeNameProblem != "" {
		line("", "%s", c.NodeNameProblem)
	}
	if c.LastError != "" && c.LastErrorAt != nil {
		line("last error", "%s ago: %s", age(now, *c.LastErrorAt), c.LastError)
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

func mark(on bool, text string) string {
	if on {
		return text
	}
	return ""
}

// age is a duration between two times for the eye; "-" where one of them never was.
func age(later, earlier time.Time) string {
	if later.IsZero() || earlier.IsZero() {
		return "-"
	}
	return later.Sub(earlier).Round(time.Second).String()
}
