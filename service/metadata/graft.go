package metadata

import (
	"fmt"
	"slices"
	"strings"
)

// Graft returns the tree with one more leaf at the path, which has no slash at either end and counts from the root that
// is given; directories that are missing on the way are made (E-13, U-17). The given tree stays as it is. What is there
// already is never replaced or hidden: that is an error, which names the place.
func Graft(root Node, path string, leaf Get) (Node, error) {
	n, err := graft(root, "", path, leaf)
	if err != nil {
		return Node{}, fmt.Errorf("%q: %w", path, err)
	}
	return n, nil
}

// graft hangs what is left of the path below n, which stands at "at".
func graft(n Node, at, rest string, leaf Get) (Node, error) {
	switch {
	case n.Get != nil:
		return n, fmt.Errorf("%s is a value, so nothing can be below it: remove one of the two", at)
	case n.Per != nil:
		return n, fmt.Errorf("what is below %s depends on who asks, and cannot be added to", at)
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
		return n, fmt.Errorf("%s has a value already: remove the second one", at)
	case !deeper:
		return n, fmt.Errorf("%s is a directory, so it cannot be a value: name what is to be below it", at)
	}
	var err error
	n.Kids[i], err = graft(n.Kids[i], at, below, leaf)
	return n, err
}
