package metadata

import (
	"bytes"
	"context"
	"testing"
)

// What lookup and answering cost beside the leaf: the one here is made beforehand and allocates
// nothing.
func BenchmarkAnswer(b *testing.B) {
	root := sample()
	body := bytes.Repeat([]byte("x"), 1100)
	names := []string{"default", email}
	per := &root.Kids[0].Kids[0].Kids[2].Kids[4]
	per.Per = func(context.Context, Query) ([]string, error) { return names, nil }
	raw := any(Raw{Body: body, ContentType: JSON})
	per.Kids[0].Get = func(context.Context, Query) (any, error) { return raw, nil }
	tree := newTree(b, root)
	for _, bench := range []struct{ name, path, query string }{
		{"token", accts + "default/token", ""},
		{"token by email", accts + email + "/token", ""},
		{"token with scopes", accts + "default/token", "scopes=https://www.googleapis.com/auth/cloud-platform"},
		{"value", v1 + "project/project-id", ""},
		{"listing", v1 + "instance/", ""},
		{"accounts", accts, ""},
		{"recursive", v1, "recursive=true"},
	} {
		b.Run(bench.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				q := Query{Caller: linked, Values: ParseQuery(bench.query)}
				if _, err := tree.Find(bench.path).Answer(b.Context(), q); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
