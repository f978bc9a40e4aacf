package metadata

import (
	"fmt"
	"slices"
	"strings"
)

// Graft returns the tree with one more leaf at the path, and with the missing directories above it
// (E-13, U-17: extra metadata). The path has no slash at either end and starts at root, which is
// not changed. Graft never replaces or hides an existing place: that is an error, which names the
// place.
func Graft(root Node, path string, leaf Get) (Node, error) {
	n, err := graft(root, "", path, leaf)
	if err != nil {
		return Node{}, fmt.Errorf("%q: %w", path, err)
	}
	return n, nil
}

// graft adds the leaf below n. Its path from n is rest, and n's own path is at.
func graft(n Node, at, rest string, leaf Get) (Node, error) {
	switch {
	case n.Get != nil:
		return n, fmt.Errorf("%s is a value and cannot have entries below it: remove one of the two", at)
	case n.Per != nil:
		return n, fmt.Errorf("%s depends on the caller and takes no other entries: remove it", at)
	}
	name, below, deeper := strings.Cut(rest, "/")
	if err := checkName(name); err != nil {
		return n, err
	}
	at = strings.TrimPrefix(at+"/"+name, "/")
	n.Kids = slices.Clone(n.Kids)
	i := slices.IndexFunc(n.Kids, func(k Node) bool { return k.Name == name })
	switch {
	case i < 0 && !deeper:
		n.Kids = append(n.Kids, Node{Name: name, Get: leaf})
		return n, nil
	case i < 0:
		i, n.Kids = len(n.Kids), append(n.Kids, Node{Name: name})
	case !deeper && n.Kids[i].Get != nil:
		return n, fmt.Errorf("%s already has a value: remove one of the two", at)
	case !deeper:
		return n, fmt.Errorf("%s is a directory and cannot be a value: write a path below it", at)
	}
	var err error
	n.Kids[i], err = graft(n.Kids[i], at, below, leaf)
	return n, err
}
