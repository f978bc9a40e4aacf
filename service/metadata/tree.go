package metadata

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

// base is what labels leave out, as the contract does where it names paths.
const base = "computeMetadata/v1/"

// Tree is a Node after it was checked and indexed. It is immutable and may be used by any number of goroutines.
type Tree struct {
	root  *node
	usual map[string]Match // by the paths that clients write: clean, and with a name that every caller has
}

// node is a Node in the form that requests need: nothing is built, sorted or hashed again for them.
type node struct {
	Node
	key    string           // its name in recursive JSON
	label  string           // its path, dynamic names as *, directories with a slash; below base without it
	kids   []*node          // as listed
	byName map[string]*node // the same
	each   *node            // with Per: the directory that every name is
	list   bool             // a directory of 0, 1, 2…: an array in recursive JSON, as GCE's disks and network-interfaces are
	index  Answer           // a directory's listing as text, unless Per makes it
}

// New checks a tree and indexes it. An error is a mistake in the tree, and names the place.
func New(root Node) (*Tree, error) {
	if root.Name != "" {
		return nil, fmt.Errorf("metadata: the root is called %q: leave its name empty", root.Name)
	}
	n, err := compile(root, "", false)
	if err != nil {
		return nil, fmt.Errorf("metadata: %w", err)
	}
	t := &Tree{n, map[string]Match{}}
	t.index(n, "/")
	return t, nil
}

// index notes what the paths of n and of all below it lead to. at ends in a slash where n is a directory.
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
			if m.dyn == n { // nobody has to be asked whether it is the caller's
				m.dyn = nil
				t.usual[p] = m
			}
		}
	}
}

// compile makes a node of what lies at path, which ends in a slash where it is a directory's.
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
		return nil, fmt.Errorf("%s is a value and a directory at once: give it Get, or Kids with or without Per", n.label)
	case from.Get != nil:
		return n, nil
	case from.Secret:
		return nil, fmt.Errorf("%s is a directory, and only values can be Secret: mark those below it", n.label)
	case from.Each != "" && from.Per == nil:
		return nil, fmt.Errorf("%s has a name that every caller has, and no Per", n.label)
	case from.Per != nil && from.Open:
		return nil, fmt.Errorf("%s is Open, but Per needs to know the caller", n.label)
	case from.Per != nil:
		for _, kid := range from.Kids {
			if kid.Get == nil {
				return nil, fmt.Errorf("%s*/%s is a directory: below a dynamic name there can only be values, since the name may hold slashes itself", n.label, kid.Name)
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
		return fmt.Errorf("%q is no name", name)
	case strings.ContainsRune(name, '/'):
		return fmt.Errorf("the name %q holds a slash: nest it", name)
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

// entries are the names of a directory without Per, as its listing shows them (E-14).
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
