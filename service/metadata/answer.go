package metadata

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"github.com/cespare/xxhash/v2"
)

// Answer is a response. Its Body is shared between requests and must not be written to.
type Answer struct {
	Body        []byte
	ContentType string // Text, JSON, or a Raw's
	// ETag is 16 hex digits that depend on Body only, so it is the same after a restart and on every
	// node (H-07, ETag; H-12, long polls).
	ETag string

	// Redirect is set, and all else empty, when a directory was requested without its slash (H-08,
	// redirect to the slash). It is the cleaned path, not percent-encoded. The server adds the
	// request's Host and query.
	Redirect string

	// Issued is what the leaf says of the credential in the Body, for whoever keeps an audit trail;
	// nil: the Body holds none. Nothing in this package looks at it.
	Issued any
}

func answer(body []byte, contentType string) Answer {
	// xxhash, since every request hashes its body, which may be a token of a kilobyte.
	const digits = "0123456789abcdef"
	var tag [16]byte
	for i, sum := len(tag)-1, xxhash.Sum64(body); i >= 0; i, sum = i-1, sum>>4 {
		tag[i] = digits[sum&15]
	}
	return Answer{Body: body, ContentType: contentType, ETag: string(tag[:])}
}

// Answer returns what the path holds for the caller: a value, a listing, or with recursive=true
// everything below it. Errors are ErrNotFound, ErrBadQuery, and those of Per and Get, unchanged.
func (m Match) Answer(ctx context.Context, q Query) (Answer, error) {
	if m.at == nil {
		return Answer{}, ErrNotFound
	}
	if m.dyn != nil {
		switch mine, err := m.dyn.has(ctx, q, m.name); {
		case err != nil:
			return Answer{}, err
		case !mine:
			return Answer{}, ErrNotFound
		}
	}
	slash := strings.HasSuffix(m.Path, "/")
	switch {
	case m.at.Get != nil && slash: // H-09, a value has no slash
		return Answer{}, ErrNotFound
	case m.at.Get != nil:
		return m.at.value(ctx, q)
	case !slash:
		return Answer{Redirect: m.Path + "/"}, nil
	}
	return m.at.directory(ctx, q)
}

func (n *node) value(ctx context.Context, q Query) (Answer, error) {
	v, err := n.Get(ctx, q)
	if err != nil {
		return Answer{}, err
	}
	if raw, ok := v.(Raw); ok {
		a := answer(raw.Body, raw.ContentType)
		a.Issued = raw.Issued
		return a, nil
	}
	f, err := parseForm(q.Values)
	if err != nil {
		return Answer{}, err
	}
	if f.json() {
		return n.encode(v)
	}
	b, err := text(v)
	if err != nil {
		return Answer{}, fmt.Errorf("%s: %w", n.label, err)
	}
	return answer(b, Text), nil
}

func (n *node) directory(ctx context.Context, q Query) (Answer, error) {
	f, err := parseForm(q.Values)
	if err != nil {
		return Answer{}, err
	}
	switch {
	case f.recursive && !n.Open: // E-02, open paths: the entries of an Open directory need not be Open
		all, err := n.collect(ctx, q)
		if err != nil {
			return Answer{}, err
		}
		if f.json() {
			return n.encode(all)
		}
		b, err := all.flatten(nil, "")
		if err != nil {
			return Answer{}, err
		}
		return answer(b, Text), nil
	case n.Per == nil && f.alt != altJSON:
		return n.index, nil
	}
	entries := n.entries()
	if n.Per != nil {
		names, err := n.names(ctx, q)
		if err != nil {
			return Answer{}, err
		}
		for _, name := range names {
			entries = append(entries, name+"/")
		}
	}
	if f.alt == altJSON {
		return n.encode(entries)
	}
	return answer(lines(entries), Text), nil
}

func (n *node) encode(v any) (Answer, error) {
	b, err := encode(v)
	if err != nil {
		return Answer{}, fmt.Errorf("%s: %w", n.label, err)
	}
	return answer(b, JSON), nil
}

// encode is json.Marshal without the escapes for <, > and &, which clients do not expect in a URL
// or an email.
func encode(v any) ([]byte, error) {
	if all, ok := v.([]string); ok && all == nil {
		v = []string{} // [] and not null
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// text returns a value in the form that a shell script reads.
func text(v any) ([]byte, error) {
	switch v := v.(type) {
	case string:
		return []byte(v), nil
	case int64:
		return strconv.AppendInt(nil, v, 10), nil
	case json.Number:
		return []byte(v), nil
	case []string:
		return lines(v), nil
	}
	return encode(v)
}

func lines(all []string) []byte {
	var b []byte
	for _, s := range all {
		b = append(append(b, s...), '\n')
	}
	return b
}
