// Package metadata answers one question: what does GKE's metadata server say at this path, for this caller?
//
// It is the engine alone. The tree is a literal in package service, whose leaves are closures; New checks it and makes
// it fast. Find needs nothing but the path, so the server knows what was asked for (and whether it may be answered
// without knowing who asks) before it attests anybody; Match.Answer then evaluates that one place for that one caller.
// There is no I/O here and nothing of HTTP but url.Values.
package metadata

import (
	"context"
	"errors"
	"net/url"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// ErrNotFound means that for this caller there is nothing at the path. A leaf may return it too.
var ErrNotFound = errors.New("not found")

// The content types of the contract, without a charset: clients compare them as strings (H-05, I-01).
const (
	Text = "application/text"
	JSON = "application/json"
)

// Query is who asks, and with what parameters. Values is nil when there are none; see ParseQuery.
type Query struct {
	Caller workload.Caller
	Values url.Values
}

// Get is a leaf. It returns one of
//
//	string       text without a newline (E-06)
//	int64        digits; a number in JSON, exact also above 2^53 (E-10)
//	json.Number  the same, for what is kept as a string of digits (E-07)
//	[]string     one a line, each ended by a newline (E-27, E-28); an array in JSON
//	Raw          bytes of its own form (token, identity)
//	else         its JSON, as text too
//
// or an error, which reaches the server as it is. ErrNotFound leaves the leaf out of recursive answers; listings name it
// all the same, since they evaluate nothing. So what the configuration leaves unset is better left out of the tree.
type Get func(context.Context, Query) (any, error)

// Raw is an answer that is in its final form: alt= and recursive= do not apply to it (T-04), and no recursive answer holds it.
type Raw struct {
	Body        []byte
	ContentType string
	Issued      any // the Answer's
}

// Value is a leaf that says the same to everybody.
func Value(v any) Get { return func(context.Context, Query) (any, error) { return v, nil } }

// Node is a place in the tree as it is written down: a leaf if it has a Get, else a directory of its Kids, in any order.
//
// With Per it is a directory whose entries depend on the caller: Per returns their names in the order in which they are
// listed (E-18), and each of them has the Kids, which are leaves, below it. The names may hold slashes (E-25). A leaf is
// not told under which name it was reached: all the names that a caller sees are his own.
type Node struct {
	Name string // one path segment; "" for the root
	Kids []Node
	Per  func(context.Context, Query) ([]string, error)
	Each string // with Per: a name that every caller has ("default"), so that Per need not be asked for it; or ""
	Get  Get

	Open     bool // may be answered without knowing who asks (E-02): recursive= does not reach through it, and its Query has no Caller
	Secret   bool // a leaf that is not even evaluated for recursive answers (E-05, E-20)
	Verbatim bool // a directory; recursive answers do not camelCase the names below it (H-10)
}
