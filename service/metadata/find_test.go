package metadata

import (
	"context"
	"errors"
	"testing"
)

func TestLabels(t *testing.T) {
	tree := newTree(t, sample())
	for path, want := range map[string]string{
		"/":                          "/",
		"/computeMetadata":           "computeMetadata/",
		v1:                           "computeMetadata/v1/",
		v1 + "instance":              "instance/",
		v1 + "instance/zone":         "instance/zone",
		v1 + "instance/zone/":        "instance/zone",
		v1 + "instance/zone/x":       Unknown,
		accts:                        "instance/service-accounts/",
		accts + "default/token":      "instance/service-accounts/*/token",
		accts + principal + "/token": "instance/service-accounts/*/token",
		// the label is bounded; whether it is there is for Answer to say
		accts + "nobody/token":   "instance/service-accounts/*/token",
		accts + "default/token/": "instance/service-accounts/*/token",
		accts + "nobody":         "instance/service-accounts/*/",
		accts + "nobody/nothing": "instance/service-accounts/*/",
		"/latest/meta-data/":     Unknown,
		"":                       "/",
		"*":                      Unknown,
	} {
		if m := tree.Find(path); m.Node != want {
			t.Errorf("%q: got %q, want %q", path, m.Node, want)
		}
	}
}

func TestClean_H18(t *testing.T) {
	for path, want := range map[string]string{
		"":              "/",
		"/":             "/",
		"//":            "/",
		"/..":           "/",
		"/../../":       "/",
		"a":             "/a",
		"/a":            "/a",
		"/a/":           "/a/",
		"/a//":          "/a/",
		"/a/.":          "/a/",
		"/a/b/..":       "/a/",
		"//a//b":        "/a/b",
		"/a/./b/../c/":  "/a/c/",
		"/../a/../../b": "/b",
		"/a/...":        "/a/...",
	} {
		if got := cleanPath(path); got != want {
			t.Errorf("%q: got %q, want %q", path, got, want)
		}
	}
}

// A request for a clean path is the hot one, and looking it up costs no allocation.
func TestFindAllocatesNothing(t *testing.T) {
	tree := newTree(t, sample())
	for _, path := range []string{"/", accts + "default/token", accts + "default/", accts + email + "/token",
		"/latest/api/token"} {
		if n := testing.AllocsPerRun(100, func() { tree.Find(path) }); n != 0 {
			t.Errorf("%s: %v allocations", path, n)
		}
	}
}

// With the leaf's own work taken out, a token costs one allocation: the ETag.
func TestTokenAllocates(t *testing.T) {
	root := sample()
	accounts := &root.Kids[0].Kids[0].Kids[2].Kids[4]
	names, raw := []string{"default", email}, any(Raw{Body: []byte("x"), ContentType: JSON})
	accounts.Per = func(context.Context, Query) ([]string, error) { return names, nil }
	accounts.Kids[0].Get = func(context.Context, Query) (any, error) { return raw, nil }
	tree, ctx := newTree(t, root), t.Context()
	for _, path := range []string{accts + "default/token", accts + email + "/token"} {
		n := testing.AllocsPerRun(100, func() {
			if _, err := tree.Find(path).Answer(ctx, Query{Caller: linked}); err != nil {
				t.Error(err)
			}
		})
		if n > 1 {
			t.Errorf("%s: %v allocations", path, n)
		}
	}
}

// H-21: what everybody has is there while nobody can say what else the caller has.
func TestNameOfEveryCaller(t *testing.T) {
	away := errors.New("the API server is away")
	tree, err := New(Node{Kids: []Node{{Name: "accounts", Each: "default",
		Per:  func(context.Context, Query) ([]string, error) { return nil, away },
		Kids: []Node{{Name: "scopes", Get: Value("all")}},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]error{
		"/accounts/default/scopes":    nil,
		"//accounts/default/./scopes": nil,
		"/accounts/default/":          nil,
		"/accounts/a@b/scopes":        away,
		"/accounts/":                  away,
	} {
		if _, err := tree.Find(path).Answer(t.Context(), Query{}); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", path, err, want)
		}
	}
	if _, err := New(Node{Kids: []Node{{Name: "a", Each: "default",
		Kids: []Node{{Name: "b", Get: Value("")}}}}}); err == nil {
		t.Error("Each without Per is accepted")
	}
}
