package metadata

import (
	"context"
	"path"
	"slices"
	"strings"
)

// Unknown is the label of paths that do not exist.
const Unknown = "unknown"

// Match is the place in the tree that a path leads to.
type Match struct {
	// Path is the cleaned path: rooted, without //, . or .., with a slash at its end if it had one
	// (H-18, cleaned paths).
	Path string
	// Node is the place's label for metrics and logs, such as "instance/service-accounts/*/token", or
	// Unknown. The number of labels is bounded.
	Node string
	Open bool // answered without knowing the caller

	at   *node  // nil: no such place
	dyn  *node  // the directory with Per above it; nil if there is none
	name string // the requested name in dyn
}

// Labels returns the labels of all places in the tree, without Unknown.
func (t *Tree) Labels() []string { return t.root.labels(nil) }

func (n *node) labels(all []string) []string {
	all = append(all, n.label)
	for _, k := range n.kids {
		all = k.labels(all)
	}
	if n.each != nil {
		all = n.each.labels(all)
	}
	return all
}

// Find returns the place of a percent-decoded path. It does not depend on the caller: Answer
// decides whether the account in the path is the caller's.
func (t *Tree) Find(p string) Match {
	p = cleanPath(p)
	if m, ok := t.usual[p]; ok {
		return m
	}
	return t.walk(p)
}

// walk is Find for a clean path, without the index.
func (t *Tree) walk(p string) Match {
	m := Match{Path: p, Node: Unknown}
	n, rest := t.root, strings.Trim(p, "/")
	for rest != "" && n != nil {
		if n.Per != nil {
			m.dyn = n
			m.name, n = n.split(rest)
			break
		}
		var segment string
		segment, rest, _ = strings.Cut(rest, "/")
		n = n.byName[segment]
	}
	if n != nil {
		m.at, m.Node, m.Open = n, n.label, n.Open
	}
	return m
}

// split parses what follows a dynamic directory. A dynamic name may hold slashes (E-26, emails
// as email), and a value's name may not. So a last segment that is a value's name is the value, and
// everything before it is the dynamic name. No account has a value's name: the only names with
// slashes are principals, which end in system:serviceaccount:NS:NAME.
func (n *node) split(rest string) (name string, to *node) {
	if i := strings.LastIndexByte(rest, '/'); i > 0 {
		if leaf := n.each.byName[rest[i+1:]]; leaf != nil {
			return rest[:i], leaf
		}
	}
	return rest, n.each
}

// cleanPath returns the rooted, shortest form of a path. It keeps a slash at the end. A final "."
// or ".." counts as a slash, since both name directories (RFC 3986, 5.2.4). A clean path costs no
// allocation.
func cleanPath(p string) string {
	if p != "" && p[0] == '/' && !strings.Contains(p, "//") && !strings.Contains(p, "/.") {
		return p
	}
	if !strings.HasPrefix(p, "/") {
		p = "/" + p
	}
	last := p[strings.LastIndexByte(p, '/')+1:]
	c := path.Clean(p)
	switch {
	case last != "" && last != "." && last != ".." || c == "/":
		return c
	case len(p) == len(c)+1: // path.Clean removed the slash only
		return p
	}
	return c + "/"
}

// names returns the caller's names in a dynamic directory, each once, since an email could also be
// "default".
func (n *node) names(ctx context.Context, q Query) ([]string, error) {
	all, err := n.Per(ctx, q)
	if err != nil {
		return nil, err
	}
	names := make([]string, 0, len(all))
	for _, name := range all {
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names, nil
}

// has reports whether a cleaned name is the caller's. A name principal://… arrives as principal:/…
// (E-26, emails with slashes; H-18, cleaned paths).
func (n *node) has(ctx context.Context, q Query, name string) (bool, error) {
	all, err := n.Per(ctx, q)
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(all, func(s string) bool { return s == name || path.Clean(s) == name }), nil
}
