package metadata

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

// base is left out of labels, as the contract does when it names paths.
const base = "computeMetadata/v1/"

// Tree is a checked and indexed Node. It is immutable and may be used concurrently.
type Tree struct {
	root  *node
	usual map[string]Match // the clean paths whose names every caller has
}

// node is a Node prepared for requests, which build, sort and hash nothing again.
type node struct {
	Node
	key    string           // its name in recursive JSON
	label  string           // its path without base, with * for dynamic names and a slash after directories
	kids   []*node          // as listed
	byName map[string]*node // the same kids
	each   *node            // with Per: the directory below each name
	list   bool             // entries 0, 1, 2…: an array in recursive JSON, such as GCE's disks
	index  Answer           // a directory's listing as text, without Per
}

// New checks and indexes a tree. An error is a mistake in the tree, and names the place.
func New(root Node) (*Tree, error) {
	if root.Name != "" {
		return nil, fmt.Errorf("metadata: the root has the name %q: leave it empty", root.Name)
	}
	n, err := compile(root, "", false)
	if err != nil {
		return nil, fmt.Errorf("metadata: %w", err)
	}
	t := &Tree{n, map[string]Match{}}
	t.index(n, "/")
	return t, nil
}

// index stores the Match of n and of everything below it. at ends in a slash where n is a
// directory.
func (t *Tree) index(n *node, at string) {
	t.usual[at] = t.walk(at)
	if n.Get != nil {
		return
	}
	if at != "/" {
		t.usual[strings.TrimSuffix(at, "/")] = t.walk(strings.TrimSuffix(at, "/"))
	}
	for _, k := range n.kids {
		if k.Get == nil {
			t.index(k, at+k.Name+"/")
		} else {
			t.index(k, at+k.Name)
		}
	}
	if n.Each != "" {
		t.index(n.each, at+n.Each+"/")
		for p, m := range t.usual {
			if m.dyn == n { // the name is every caller's, so Per is not needed
				m.dyn = nil
				t.usual[p] = m
			}
		}
	}
}

// compile makes the node for path, which ends in a slash where it is a directory.
func compile(from Node, path string, verbatim bool) (*node, error) {
	n := &node{Node: from, key: from.Name, label: strings.TrimPrefix(path, base)}
	if n.label == "" {
		n.label = cmp.Or(path, "/") // the root, and base itself
	}
	if !verbatim {
		n.key = camelCase(from.Name)
	}
	verbatim = verbatim || from.Verbatim

	switch {
	case from.Get != nil && (from.Per != nil || len(from.Kids) > 0):
		return nil, fmt.Errorf("%s is a value and a directory: set either Get or Kids", n.label)
	case from.Get != nil:
		return n, nil
	case from.Secret:
		return nil, fmt.Errorf("%s is a directory and cannot be Secret: mark the values below it", n.label)
	case from.Each != "" && from.Per == nil:
		return nil, fmt.Errorf("%s has Each without Per", n.label)
	case from.Per != nil && from.Open:
		return nil, fmt.Errorf("%s is Open, but Per needs the caller", n.label)
	case from.Per != nil:
		for _, kid := range from.Kids {
			if kid.Get == nil {
				return nil, fmt.Errorf("%s*/%s is a directory: only values may be below a dynamic name, which may hold slashes "+
					"itself", n.label, kid.Name)
			}
		}
		var err error
		n.each, err = compile(Node{Kids: from.Kids}, path+"*/", verbatim)
		return n, err
	}

	n.byName = make(map[string]*node, len(from.Kids))
	keys := make(map[string]string, len(from.Kids))
	for _, kid := range from.Kids {
		if err := checkName(kid.Name); err != nil {
			return nil, fmt.Errorf("below %s: %w", n.label, err)
		}
		at := path + kid.Name
		if kid.Get == nil {
			at += "/"
		}
		k, err := compile(kid, at, verbatim)
		if err != nil {
			return nil, err
		}
		if other, twice := keys[k.key]; twice {
			return nil, fmt.Errorf("below %s: %q and %q are both %q in recursive answers", n.label, other, kid.Name, k.key)
		}
		keys[k.key] = kid.Name
		n.byName[kid.Name] = k
		n.kids = append(n.kids, k)
	}
	n.list = !verbatim && numbered(n.byName)
	slices.SortFunc(n.kids, func(a, b *node) int {
		if n.list { // 2 before 10
			return cmp.Or(cmp.Compare(len(a.Name), len(b.Name)), cmp.Compare(a.Name, b.Name))
		}
		return cmp.Compare(a.Name, b.Name)
	})
	n.index = answer(lines(n.entries()), Text)
	return n, nil
}

// checkName refuses names that no cleaned path can hold, or that would break a listing.
func checkName(name string) error {
	switch {
	case name == "" || name == "." || name == "..":
		return fmt.Errorf("%q is not a name", name)
	case strings.ContainsRune(name, '/'):
		return fmt.Errorf("the name %q holds a slash: use a directory", name)
	case strings.ContainsFunc(name, func(r rune) bool { return unicode.IsControl(r) || unicode.IsSpace(r) }):
		return fmt.Errorf("the name %q holds a space or a control character", name)
	}
	return nil
}

// numbered reports whether the names are 0 to n-1.
func numbered(names map[string]*node) bool {
	for i := range len(names) {
		if names[strconv.Itoa(i)] == nil {
			return false
		}
	}
	return len(names) > 0
}

// camelCase turns service-accounts into serviceAccounts (H-10).
func camelCase(name string) string {
	words := strings.Split(name, "-")
	for i, w := range words[1:] {
		if w != "" {
			words[i+1] = strings.ToUpper(w[:1]) + w[1:]
		}
	}
	return strings.Join(words, "")
}

// entries returns the names of a directory without Per, as in its listing (E-14, slash after
// directories).
func (n *node) entries() []string {
	names := make([]string, len(n.kids))
	for i, k := range n.kids {
		names[i] = k.Name
		if k.Get == nil {
			names[i] += "/"
		}
	}
	return names
}
