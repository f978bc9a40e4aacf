// Package metadata answers one question: what does GKE's metadata server say at this path, for this
// caller?
//
// It is the engine only. The tree is a literal in package server (tree.go), whose leaves are
// closures. New checks and indexes the tree. Find needs the path only, so the server knows the
// place, and whether it may be answered without knowing the caller, before it attests anybody.
// Match.Answer then evaluates the place for a caller. The package does no I/O, and of HTTP it uses
// url.Values only.
package metadata

import (
	"context"
	"errors"
	"net/url"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// ErrNotFound: for this caller there is nothing at the path. A leaf may return it too.
var ErrNotFound = errors.New("not found")

// The content types of the contract. They have no charset, since clients compare them as strings
// (I-01, content types).
const (
	Text = "application/text"
	JSON = "application/json"
)

// Query holds the caller and the parameters of a request. Values is nil when there are none; see
// ParseQuery.
type Query struct {
	Caller workload.Caller
	Values url.Values
}

// Get is a leaf. It returns one of
//
//	string       text without a newline (E-06, no newline)
//	int64        digits; a number in JSON, exact also above 2^53 (E-10, instance id)
//	json.Number  the same, for digits that are stored as a string (E-07, project number)
//	[]string     one per line, each with a newline (E-27 and E-28, lists); an array in JSON
//	Raw          bytes in their final form (token, identity)
//	else         its JSON, also as text
//
// or an error, which the server gets unchanged. ErrNotFound omits the leaf from recursive answers.
// Listings still name the leaf, since they evaluate nothing, so leave unset configuration out of
// the tree.
type Get func(context.Context, Query) (any, error)

// Raw is an answer in its final form. alt= and recursive= do not apply to it (T-04, ignored
// parameters), and no recursive answer holds it.
type Raw struct {
	Body        []byte
	ContentType string
	Issued      any // the Answer's
}

// Value returns a leaf with the same value for every caller.
func Value(v any) Get { return func(context.Context, Query) (any, error) { return v, nil } }

// Node is a place in the tree: a leaf if it has a Get, else a directory of its Kids, in any order.
//
// With Per it is a directory whose entries depend on the caller. Per returns their names in the
// order of the listing (E-18, order of accounts), and each entry has the Kids, which are leaves.
// The names may hold slashes (E-25, principal as email). A leaf does not learn the name that was
// requested: all names are of the same caller.
type Node struct {
	Name string // one path segment; "" for the root
	Kids []Node
	Per  func(context.Context, Query) ([]string, error)
	Each string // with Per: a name that every caller has ("default") and that needs no call of Per; or ""
	Get  Get

	// Open places are answered without knowing the caller (E-02, open paths). Their Query has no
	// Caller, and recursive= does not apply.
	Open     bool
	Secret   bool // a leaf that recursive answers do not evaluate (E-05 and E-20, recursive answers)
	Verbatim bool // a directory: recursive answers keep the names below it (H-10, recursive answers)
}
