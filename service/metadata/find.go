package metadata

import (
	"context"
	"path"
	"slices"
	"strings"
)

// Unknown is the label of paths that lead nowhere.
const Unknown = "unknown"

// Match is the place that a path leads to.
type Match struct {
	Path string // the path after cleaning: rooted, without //, . or .., with a slash at its end if it had one (H-18)
	Node string // the place's label: bounded, fit for metrics and logs ("instance/service-accounts/*/token"), or Unknown
	Open bool   // it may be answered without knowing who asks

	at   *node  // nil: nowhere
	dyn  *node  // the directory with Per on the way, if there is one,
	name string // and which of its names was asked for
}

// Find says what a path, percent-decoded, leads to. It knows nothing of the caller: whether the account that the path
// names is the caller's is for Answer to say.
func (t *Tree) Find(p string) Match {
	p = clean(p)
	if m, ok := t.usual[p]; ok {
		return m
	}
	return t.walk(p)
}

// walk is Find for a clean path, by the tree itself.
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

// split takes what follows a dynamic directory apart. A name may hold any number of slashes (E-26), and a value's none:
// so a last segment that is a value's name is the value, and all before it is the dynamic name. No account can be
// called after a value: the only names with a slash are principals, and those end in system:serviceaccount:NS:NAME.
func (n *node) split(rest string) (name string, to *node) {
	if i := strings.LastIndexByte(rest, '/'); i > 0 {
		if leaf := n.each.byName[rest[i+1:]]; leaf != nil {
			return rest[:i], leaf
		}
	}
	return rest, n.each
}

// clean returns the rooted, shortest form of a path. It keeps a slash at the end, and "." and ".." there count as one,
// since they name directories (RFC 3986, 5.2.4). A path that is clean already costs no allocation.
func clean(p string) string {
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
	case len(p) == len(c)+1: // only the slash was taken off
		return p
	}
	return c + "/"
}

// names are the caller's names in a dynamic directory, each once: an email could be "default" too.
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

// has reports whether a cleaned name is among the caller's: principal://… arrives as principal:/… (E-26, H-18).
func (n *node) has(ctx context.Context, q Query, name string) (bool, error) {
	all, err := n.Per(ctx, q)
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(all, func(s string) bool { return s == name || path.Clean(s) == name }), nil
}
