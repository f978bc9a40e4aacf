package metadata

import (
	"context"
	"encoding/json"
	"errors"
	"testing"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// What a leaf says of itself, and of what is missing, reaches the server unchanged (T-07, U-18).
func TestErrorsPassThrough(t *testing.T) {
	refused := errors.New("Unable to generate access token; IAM returned 403 Forbidden: no")
	fail := func(err error) Get { return func(context.Context, Query) (any, error) { return nil, err } }
	tree := newTree(t, Node{Kids: []Node{
		{Name: "d", Kids: []Node{{Name: "refused", Get: fail(refused)}, {Name: "v", Get: Value("x")}}},
		{Name: "per", Per: func(context.Context, Query) ([]string, error) { return nil, refused },
			Kids: []Node{{Name: "v", Get: Value("x")}}},
	}})
	for _, target := range []string{"/d/refused", "/d/?recursive=true", "/?recursive=true&alt=text", "/per/", "/per/a/",
		"/per/a", "/per/a/v", "/per/?alt=json"} {
		if _, a, err := ask(t, tree, linked, target); !errors.Is(err, refused) || err.Error() != refused.Error() ||
			a.Body != nil {
			t.Errorf("%s: got %+v, %v", target, a, err)
		}
	}

	tree = newTree(t, sample())
	_, _, err := ask(t, tree, linked, accts+"default/identity")
	if !errors.Is(err, ErrBadQuery) || err.Error() != "non-empty audience parameter required" {
		t.Errorf("I-02: got %v", err)
	}
	if _, _, err := ask(t, tree, workload.Caller{}, accts+"default/email"); !errors.Is(err, errNobody) {
		t.Errorf("nobody: got %v", err)
	}
}

func TestValues(t *testing.T) {
	for _, c := range []struct {
		name       string
		value      any
		text, json string
	}{
		{"empty", "", "", `""`},
		{"lines", "a\nb", "a\nb", `"a\nb"`},
		{"HTML", "<&>", "<&>", `"<&>"`},
		{"largest", int64(9223372036854775807), "9223372036854775807", "9223372036854775807"},
		{"beyond int64", json.Number("18446744073709551615"), "18446744073709551615", "18446744073709551615"},
		{"none of a list", []string(nil), "", "[]"},
		{"list", []string{"a", "b"}, "a\nb\n", `["a","b"]`},
		{"anything else", map[string]bool{"a": true}, `{"a":true}`, `{"a":true}`},
		{"nothing", nil, "null", "null"},
	} {
		t.Run(c.name, func(t *testing.T) {
			tree := newTree(t, Node{Kids: []Node{{Name: "v", Get: Value(c.value)}}})
			for target, want := range map[string]string{"/v": c.text, "/v?alt=json": c.json,
				"/?recursive=true": `{"v":` + c.json + "}"} {
				if _, a, err := ask(t, tree, linked, target); err != nil || string(a.Body) != want {
					t.Errorf("%s: got %q, %v, want %q", target, a.Body, err, want)
				}
			}
		})
	}
	tree := newTree(t, Node{Kids: []Node{{Name: "d", Kids: []Node{{Name: "v", Get: Value(json.Number("1,5"))}}}}})
	for _, target := range []string{"/d/v?alt=json", "/?recursive=true"} {
		if _, a, err := ask(t, tree, linked, target); err == nil {
			t.Errorf("%s: %q is no number", target, a.Body)
		}
	}
}

func TestRecursiveLeavesOut(t *testing.T) {
	minted := false
	tree := newTree(t, Node{Kids: []Node{
		{Name: "gone", Get: func(context.Context, Query) (any, error) { return nil, ErrNotFound }},
		{Name: "here", Get: Value("x")},
		{Name: "raw", Get: Value(Raw{Body: []byte(secret), ContentType: Text})}, // somebody forgot Secret
		{Name: "token", Secret: true, Get: func(context.Context, Query) (any, error) { minted = true; return secret, nil }},
		{Name: "empty"},
	}})
	for target, want := range map[string]string{
		"/?recursive=true":          `{"empty":{},"here":"x"}`,
		"/?recursive=true&alt=text": "here x\n",
		"/":                         "empty/\ngone\nhere\nraw\ntoken\n",
		"/empty/":                   "",
	} {
		if _, a, err := ask(t, tree, linked, target); err != nil || string(a.Body) != want {
			t.Errorf("%s: got %q, %v, want %q", target, a.Body, err, want)
		}
	}
	if minted {
		t.Error("E-05: a secret was made for an answer that leaves it out")
	}
}

// GCE's numbered directories are arrays in JSON; programs that assume its tree decode them as such
// (U-17).
func TestNumbered_U17(t *testing.T) {
	dir := Node{Name: "disks"}
	for _, name := range []string{"10", "2", "0", "1", "3", "4", "5", "6", "7", "8", "9"} {
		dir.Kids = append(dir.Kids, Node{Name: name, Get: Value("d" + name)})
	}
	lost := Node{Name: "lost", Kids: []Node{{Name: "0", Get: func(context.Context, Query) (any, error) {
		return nil,
			ErrNotFound
	}}, {Name: "1", Get: Value("b")}}}
	gap := Node{Name: "gap", Kids: []Node{{Name: "0", Get: Value("a")}, {Name: "2", Get: Value("b")}}}
	tree := newTree(t, Node{Kids: []Node{dir, gap, lost, {Name: "attributes", Verbatim: true, Kids: []Node{
		{Name: "0", Kids: []Node{{Name: "kube-env", Get: Value("a")}}},
	}}}})
	for target, want := range map[string]string{
		"/?recursive=true": `{"attributes":{"0":{"kube-env":"a"}},"disks":["d0","d1","d2","d3","d4","d5","d6",` +
			`"d7","d8","d9","d10"],"gap":{"0":"a","2":"b"},"lost":{"1":"b"}}`,
		"/gap/?recursive=true&alt=text": "0 a\n2 b\n",
		"/disks/":                       "0\n1\n2\n3\n4\n5\n6\n7\n8\n9\n10\n",
	} {
		if _, a, err := ask(t, tree, linked, target); err != nil || string(a.Body) != want {
			t.Errorf("%s: got %q, %v, want %q", target, a.Body, err, want)
		}
	}
}

// A pool may be called "default", and emailForUnlinked is the pool's id unless configured (E-24).
func TestNamesOnce_E24(t *testing.T) {
	tree := newTree(t, Node{Kids: []Node{{
		Name: "accts", Per: func(context.Context, Query) ([]string, error) { return []string{"default", "default"}, nil },
		Kids: []Node{{Name: "v", Get: Value("x")}},
	}}})
	for target, want := range map[string]string{"/accts/": "default/\n",
		"/accts/?recursive=true": `{"default":{"v":"x"}}`, "/accts/default/v": "x"} {
		if _, a, err := ask(t, tree, linked, target); err != nil || string(a.Body) != want {
			t.Errorf("%s: got %q, %v, want %q", target, a.Body, err, want)
		}
	}
}
