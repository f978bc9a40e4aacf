package metadata

import (
	"bytes"
	"context"
	"errors"
	"fmt"
)

// branch is a place with everything that recursive=true shows below it, for one caller at one
// moment.
type branch struct {
	name, key string // its name in text and in JSON
	leaf      bool
	value     any      // of a leaf
	kids      []branch // of a directory
	list      bool     // the directory is an array in JSON
}

// collect evaluates everything below a directory except Secret leaves. Any error fails the whole
// answer, since clients would cache a part as the whole. Only a leaf that does not exist for the
// caller is left out.
func (n *node) collect(ctx context.Context, q Query) (branch, error) {
	b := branch{name: n.Name, key: n.key, list: n.list}
	if n.Per != nil {
		names, err := n.names(ctx, q)
		if err != nil || len(names) == 0 {
			return b, err
		}
		// All names are of the same caller and have the same values, so one evaluation is enough.
		each, err := n.each.collect(ctx, q)
		if err != nil {
			return b, err
		}
		for _, name := range names {
			each.name, each.key = name, name
			b.kids = append(b.kids, each)
		}
		return b, nil
	}
	for _, kid := range n.kids {
		if kid.Get == nil {
			below, err := kid.collect(ctx, q)
			if err != nil {
				return b, err
			}
			b.kids = append(b.kids, below)
			continue
		}
		if kid.Secret {
			continue
		}
		v, err := kid.Get(ctx, q)
		if errors.Is(err, ErrNotFound) {
			continue
		}
		if err != nil {
			return b, err
		}
		if _, raw := v.(Raw); raw { // the leaf should be Secret: leave it out
			continue
		}
		b.kids = append(b.kids, branch{name: kid.Name, key: kid.key, leaf: true, value: v})
	}
	// After an ErrNotFound, the following entries of a list would have other indexes.
	b.list = b.list && len(b.kids) == len(n.kids)
	return b, nil
}

// MarshalJSON keeps the order of the listing, which a map does not.
func (b branch) MarshalJSON() ([]byte, error) {
	if b.leaf {
		return encode(b.value)
	}
	brackets := "{}"
	if b.list {
		brackets = "[]"
	}
	var out bytes.Buffer
	out.WriteByte(brackets[0])
	for i, kid := range b.kids {
		if i > 0 {
			out.WriteByte(',')
		}
		if !b.list {
			key, err := encode(kid.key)
			if err != nil {
				return nil, err
			}
			out.Write(append(key, ':'))
		}
		v, err := kid.MarshalJSON()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", kid.name, err)
		}
		out.Write(v)
	}
	out.WriteByte(brackets[1])
	return out.Bytes(), nil
}

// flatten appends a line "path value" for every value below a directory, with the path relative to
// the directory, and for a list of values one line each. A value of several lines is written
// unchanged, as GCE does (H-11, recursive text; seen in published answers).
func (b branch) flatten(to []byte, path string) ([]byte, error) {
	for _, kid := range b.kids {
		at := path + kid.name
		if !kid.leaf {
			var err error
			if to, err = kid.flatten(to, at+"/"); err != nil {
				return nil, err
			}
			continue
		}
		values, several := kid.value.([]string)
		if !several {
			v, err := text(kid.value)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", at, err)
			}
			values = []string{string(v)}
		}
		for _, v := range values {
			to = fmt.Appendf(to, "%s %s\n", at, v)
		}
	}
	return to, nil
}
