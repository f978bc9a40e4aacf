package metadata

import (
	"bytes"
	"context"
	"errors"
	"fmt"
)

// branch is a place and all that recursive=true shows below it, for one caller at one moment.
type branch struct {
	name, key string // in text, in JSON
	leaf      bool
	value     any      // of a leaf
	kids      []branch // of a directory,
	list      bool     // which is an array
}

// collect evaluates everything below a directory but what is Secret. It fails as a whole: half an answer would be
// cached by clients as the whole one. Only a leaf that does not exist for the caller is left out.
func (n *node) collect(ctx context.Context, q Query) (branch, error) {
	b := branch{name: n.Name, key: n.key, list: n.list}
	if n.Per != nil {
		names, err := n.names(ctx, q)
		if err != nil || len(names) == 0 {
			return b, err
		}
		// All names are the caller's own and stand for the same values, which need be had only once.
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
		if _, raw := v.(Raw); raw { // should have been Secret; better unsaid than said in the wrong place
			continue
		}
		b.kids = append(b.kids, branch{name: kid.Name, key: kid.key, leaf: true, value: v})
	}
	// A list that lost a member to ErrNotFound would move the ones behind it to another index.
	b.list = b.list && len(b.kids) == len(n.kids)
	return b, nil
}

// MarshalJSON keeps the order of the listing, which a map would lose.
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

// flatten appends a line "path value" for every value below a directory, the path as seen from there, and for a list of
// values a line each. A value of several lines stands as it is. So does GCE (H-11; seen in published answers).
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
