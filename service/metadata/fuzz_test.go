package metadata

import (
	"bytes"
	"errors"
	"net/url"
	"reflect"
	"strings"
	"testing"
)

// FuzzPath (H-18): no path and no query makes the engine panic, leads out of the tree, or gets a
// credential from anywhere but the place that is named after it.
func FuzzPath(f *testing.F) {
	tree := newTree(f, sample())
	f.Fuzz(func(t *testing.T, path, query string) {
		m := tree.Find(path)
		if !strings.HasPrefix(m.Path, "/") {
			t.Fatalf("%q: the path %q is not rooted", path, m.Path)
		}
		for segment := range strings.SplitSeq(strings.Trim(m.Path, "/"), "/") {
			if segment == "." || segment == ".." || segment == "" && m.Path != "/" {
				t.Fatalf("%q: the path %q is not clean", path, m.Path)
			}
		}
		if again := tree.Find(m.Path); again.Path != m.Path || again.Node != m.Node {
			t.Fatalf("%q leads to %s %q, and that to %s %q", path, m.Node, m.Path, again.Node, again.Path)
		}
		if m.Open != (m.Path == "/") {
			t.Fatalf("%q: %q is open: %t", path, m.Path, m.Open)
		}
		a, err := m.Answer(t.Context(), Query{Caller: unlinked, Values: ParseQuery(query)})
		if err != nil {
			if !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrBadQuery) {
				t.Fatalf("%q: %v", path, err)
			}
			return
		}
		if a.Redirect != "" {
			if a.Redirect != m.Path+"/" || strings.HasPrefix(a.Redirect, "//") {
				t.Fatalf("%q: redirected to %q", path, a.Redirect)
			}
			return
		}
		if bytes.Contains(a.Body, []byte(secret)) && !strings.HasSuffix(m.Path, "/token") &&
			!strings.HasSuffix(m.Path, "/identity") {
			t.Fatalf("%q, %q: %s holds a credential", path, query, m.Path)
		}
	})
}

// FuzzQuery (I-05): what url.ParseQuery can read is read as it reads it; the rest is never an
// error.
func FuzzQuery(f *testing.F) {
	f.Fuzz(func(t *testing.T, raw string) {
		got := ParseQuery(raw)
		if want, err := url.ParseQuery(raw); err == nil && len(got)+len(want) > 0 && !reflect.DeepEqual(got, want) {
			t.Fatalf("%q: got %v, want %v", raw, got, want)
		}
		if w, err := ParseWait(got); err != nil && !errors.Is(err, ErrBadQuery) || w.Timeout < 0 {
			t.Fatalf("%q: %+v, %v", raw, w, err)
		}
		if _, err := parseForm(got); err != nil && !errors.Is(err, ErrBadQuery) {
			t.Fatalf("%q: %v", raw, err)
		}
	})
}
