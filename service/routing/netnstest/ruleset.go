package netnstest

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"strings"
	"time"
)

// dumps is what Ruleset looks at: everything that routing could leave a trace in.
var dumps = []struct {
	command   string
	canonical func(string) string
}{
	{"iptables-nft-save", CanonicalIPTables}, {"ip6tables-nft-save", CanonicalIPTables},
	{"iptables-legacy-save", CanonicalIPTables}, {"ip6tables-legacy-save", CanonicalIPTables},
	{"nft list ruleset", canonicalNFT},
	{"ip -4 rule show", steady}, {"ip -6 rule show", steady},
	{"ip -4 route show table all", steady}, {"ip -6 route show table all", steady},
	{"ip -o address show", steady},
}

// Ruleset writes down the node's firewall (both iptables backends, nftables, both families), policy
// rules, routes and addresses as text that is equal before and after something that left no trace
// . Tools that the machine lacks are left out.
func (n *Node) Ruleset() (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var b strings.Builder
	for _, d := range dumps {
		args := strings.Fields(d.command)
		if _, err := exec.LookPath(args[0]); err != nil {
			continue
		}
		cmd := n.Command(ctx, args[0], args[1:]...)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			return "", fmt.Errorf("%s in %s: %w: %s", d.command, n.Name, err, strings.TrimSpace(stderr.String()))
		}
		fmt.Fprintf(&b, "## %s\n%s", d.command, d.canonical(string(out)))
	}
	return b.String(), nil
}

var saveCounters = regexp.MustCompile(`\[\d+:\d+\] ?`)

// CanonicalIPTables is iptables-save's text without comments, counters, base chains that are empty
// and accept, and tables that are empty after that: what "as before" means for it.
func CanonicalIPTables(save string) string {
	var b strings.Builder
	var table string
	var chains, rules []string
	for line := range strings.Lines(save) {
		line = strings.TrimSpace(saveCounters.ReplaceAllString(line, ""))
		switch {
		case line == "" || line[0] == '#':
		case line[0] == '*':
			table, chains, rules = line, nil, nil
		case line[0] == ':':
			chains = append(chains, line)
		case line == "COMMIT":
			var keep []string
			for _, c := range chains {
				name, policy, _ := strings.Cut(c[1:], " ")
				used := func(rule string) bool { return strings.HasPrefix(rule, "-A "+name+" ") }
				if policy != "ACCEPT" || anyOf(rules, used) {
					keep = append(keep, c)
				}
			}
			if keep = append(keep, rules...); len(keep) > 0 {
				fmt.Fprintf(&b, "%s\n%s\nCOMMIT\n", table, strings.Join(keep, "\n"))
			}
		default:
			rules = append(rules, line)
		}
	}
	return b.String()
}

func anyOf(lines []string, is func(string) bool) bool {
	for _, l := range lines {
		if is(l) {
			return true
		}
	}
	return false
}

var (
	nftNoise = regexp.MustCompile(`(?m)^\s*#.*\n`)
	nftCount = regexp.MustCompile(`counter packets \d+ bytes \d+`)
	nftChain = regexp.MustCompile(`(?m)^\tchain \S+ \{\n\t\ttype .* policy accept;\n\t\}\n`)
	nftTable = regexp.MustCompile(`(?m)^table .*\{\n+\}\n`)
	nftBlank = regexp.MustCompile(`\n{2,}`)
)

// canonicalNFT does for `nft list ruleset` what CanonicalIPTables does for iptables-save.
func canonicalNFT(s string) string {
	s = nftNoise.ReplaceAllString(s, "")
	s = nftCount.ReplaceAllString(s, "counter")
	s = nftChain.ReplaceAllString(s, "")
	s = nftBlank.ReplaceAllString(s, "\n")
	return nftTable.ReplaceAllString(s, "")
}

var (
	volatile = regexp.MustCompile(` (linkdown|tentative|dadfailed)\b| expires \d+sec| cache\b`)
	derived  = regexp.MustCompile(`(?m)^(local|anycast|multicast) \S*:.* proto kernel .*\n`)
)

// steady drops from ip(8)'s text what changes by itself, and the IPv6 routes that the kernel
// derives, a little later, from addresses.
func steady(s string) string {
	return derived.ReplaceAllString(volatile.ReplaceAllString(s, ""), "")
}
