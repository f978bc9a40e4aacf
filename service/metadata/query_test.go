package metadata

import (
	"errors"
	"net/url"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestParseQuery_I05(t *testing.T) {
	for raw, want := range map[string]url.Values{
		"":                           nil,
		"&&":                         nil,
		"audience=https://a/b?c=d":   {"audience": {"https://a/b?c=d"}},
		"audience=a;b:c&format=full": {"audience": {"a;b:c"}, "format": {"full"}},
		"audience=100%":              {"audience": {"100%"}},
		"a=%41+b&a=%zz":              {"a": {"A b", "%zz"}},
		"scopes=x%2Cy&scopes=z":      {"scopes": {"x,y", "z"}}, // T-03
		"flag":                       {"flag": {""}},
		"=v":                         {"": {"v"}},
	} {
		if got := ParseQuery(raw); !reflect.DeepEqual(got, want) {
			t.Errorf("%q: got %v, want %v", raw, got, want)
		}
	}
}

func TestBadAlt_H11(t *testing.T) {
	tree := newTree(t, sample())
	for _, target := range []string{"/?alt=xml", v1 + "instance/id?alt=xml", v1 + "?recursive=true&alt=xml"} {
		_, _, err := ask(t, tree, linked, target)
		if !errors.Is(err, ErrBadQuery) || err.Error() != `alt="xml": want json or text` {
			t.Errorf("%s: got %v", target, err)
		}
	}
	if _, _, err := ask(t, tree, linked, "/?alt="+strings.Repeat("x", 5000)); len(err.Error()) > 80 {
		t.Errorf("the answer repeats %d bytes of the question", len(err.Error()))
	}
}

func TestParseWait_H12(t *testing.T) {
	for raw, want := range map[string]Wait{
		"":                          {},
		"last_etag=a&timeout_sec=x": {},
		"wait_for_change=no":        {},
		"wait_for_change=true":      {ForChange: true},
		"wait_for_change=True&last_etag=0a&timeout_sec=60": {ForChange: true, LastETag: "0a", Timeout: time.Minute},
		"wait_for_change=true&timeout_sec=0":               {ForChange: true},
		"wait_for_change=true&timeout_sec=4294967295":      {ForChange: true, Timeout: 4294967295 * time.Second},
	} {
		if got, err := ParseWait(ParseQuery(raw)); err != nil || got != want {
			t.Errorf("%q: got %+v, %v, want %+v", raw, got, err, want)
		}
	}
	for _, bad := range []string{"x", "-1", "1.5", "4294967296", "1s", "%2B1"} {
		_, err := ParseWait(ParseQuery("wait_for_change=true&timeout_sec=" + bad))
		if !errors.Is(err, ErrBadQuery) || !strings.HasPrefix(err.Error(), "timeout_sec=") {
			t.Errorf("timeout_sec=%s: got %v", bad, err)
		}
	}
	for _, c := range []struct {
		wait Wait
		over bool
	}{
		{Wait{}, true},
		{Wait{ForChange: true}, true},
		{Wait{ForChange: true, LastETag: "0"}, true}, // Go's Subscribe starts with it
		{Wait{ForChange: true, LastETag: "now"}, false},
	} {
		if got := c.wait.Over("now"); got != c.over {
			t.Errorf("%+v: over is %t", c.wait, got)
		}
	}
}
