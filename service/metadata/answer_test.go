package metadata

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

const (
	v1     = "/computeMetadata/v1/"
	accts  = v1 + "instance/service-accounts/"
	scopes = "https://www.googleapis.com/auth/cloud-platform\nhttps://www.googleapis.com/auth/userinfo.email\n"
)

func TestAnswer(t *testing.T) {
	tree := newTree(t, sample())
	for _, c := range []struct {
		ids, target string
		body, ctype string
	}{
		{"E-01", "/", "computeMetadata/\n", Text},
		{"E-03", "/computeMetadata/", "v1/\n", Text},
		{"E-04", v1, "instance/\nproject/\nuniverse/\n", Text},
		{"E-06", v1 + "project/project-id", "my-project", Text},
		{"E-07", v1 + "project/numeric-project-id", "123456789012", Text},
		{"E-09", v1 + "instance/hostname", "node-1.example", Text},
		{"E-10", v1 + "instance/id", "9007199254740993", Text},
		{"E-11", v1 + "instance/zone", "projects/123456789012/zones/europe-west4-a", Text},
		{"E-14", v1 + "instance/", "attributes/\nhostname\nid\nservice-accounts/\nzone\n", Text},
		{"E-15", v1 + "instance/attributes/", "cluster-location\ncluster-name\ncluster-uid\n", Text},
		{"E-16", v1 + "instance/attributes/cluster-name", "prod <&>", Text},
		{"E-18", accts, "default/\n" + email + "/\n", Text},
		{"E-19", accts + "default/", "aliases\nemail\nidentity\nscopes\ntoken\n", Text},
		{"E-20 E-05", accts + "default/?recursive=true", `{"aliases":["default"],"email":"` + email +
			`","scopes":["https://www.googleapis.com/auth/cloud-platform","https://www.googleapis.com/auth/userinfo.email"]}`,
			JSON},
		{"E-22", accts + email + "/email", email, Text},
		{"E-22", accts + strings.ReplaceAll(email, "@", "%40") + "/email", email, Text},
		{"E-23", accts + "default/email", email, Text},
		{"E-27", accts + "default/aliases", "default\n", Text},
		{"E-28", accts + "default/scopes", scopes, Text},
		{"E-29 H-11", accts + "default/scopes?alt=json",
			`["https://www.googleapis.com/auth/cloud-platform","https://www.googleapis.com/auth/userinfo.email"]`, JSON},
		{"E-30", v1 + "universe/universe-domain", "googleapis.com", Text},
		{"T-01", accts + "default/token", `{"access_token":"` + secret +
			` of ns/p1","expires_in":3599,"token_type":"Bearer"}`, JSON},
		{"T-04", accts + "default/token?recursive=true&alt=xml&transport=alts",
			`{"access_token":"` + secret + ` of ns/p1","expires_in":3599,"token_type":"Bearer"}`, JSON},
		{"I-01 I-05", accts + "default/identity?audience=https://a;b:c", secret + ".https://a;b:c", Text},
		{"H-10", v1 + "project/?recursive=TRUE", `{"numericProjectId":123456789012,"projectId":"my-project"}`, JSON},
		{"H-10", v1 + "project/?recursive=yes", "numeric-project-id\nproject-id\n", Text},
		{"H-10", v1 + "instance/attributes/?recursive=true",
			`{"cluster-location":"europe-west4","cluster-name":"prod <&>","cluster-uid":"0a1b"}`, JSON},
		{"H-11", v1 + "project/project-id?alt=json", `"my-project"`, JSON},
		{"H-11", v1 + "instance/id?alt=JSON", "9007199254740993", JSON},
		{"H-11", v1 + "instance/id?alt=text", "9007199254740993", Text},
		{"H-11", v1 + "instance/id?recursive=true", "9007199254740993", JSON},
		{"H-11", v1 + "instance/id?recursive=true&alt=text", "9007199254740993", Text},
		{"H-11", v1 + "project/?alt=json", `["numeric-project-id","project-id"]`, JSON},
		{"H-11", accts + "?alt=json", `["default/","` + email + `/"]`, JSON},
		{"H-11", v1 + "project/?recursive=true&alt=text", "numeric-project-id 123456789012\nproject-id my-project\n", Text},
		{"H-18", "/computeMetadata//v1/./instance/../project/project-id", "my-project", Text},
		{"H-18", "/../../computeMetadata%2Fv1%2fproject/project-id", "my-project", Text},
		{"H-18", "//computeMetadata//v1//project//", "numeric-project-id\nproject-id\n", Text},
		{"H-18", v1 + "project/.", "numeric-project-id\nproject-id\n", Text},
		{"H-18", v1 + "project/project-id/..", "numeric-project-id\nproject-id\n", Text},
	} {
		t.Run(c.ids+" "+c.target, func(t *testing.T) {
			_, a, err := ask(t, tree, linked, c.target)
			if err != nil {
				t.Fatal(err)
			}
			if string(a.Body) != c.body || a.ContentType != c.ctype || a.Redirect != "" {
				t.Errorf("got %q %q %q,\nwant %q %q", a.ContentType, a.Body, a.Redirect, c.ctype, c.body)
			}
		})
	}
}

func TestNotFound(t *testing.T) {
	tree := newTree(t, sample())
	for _, c := range []struct{ ids, target string }{
		{"E-08", v1 + "project/attributes/"},
		{"E-12", v1 + "instance/name"},
		{"E-13", v1 + "instance/machine-type"},
		{"E-13", v1 + "instance/disks/"},
		{"E-17", v1 + "instance/attributes/kube-env"},
		{"E-22", accts + "other@my-project.iam.gserviceaccount.com/token"},
		{"E-22", accts + "other@my-project.iam.gserviceaccount.com/"},
		{"E-22", accts + "other@my-project.iam.gserviceaccount.com"}, // not even the redirect of H-08
		{"E-22", accts + "Default/token"},
		{"E-22", accts + "def/token"},
		{"E-26", accts + principal + "/token"}, // somebody else's
		{"E-31", v1 + "universe/universe_domain"},
		{"E-32", v1 + "instance/platform-security/auto-mtls-configuration"},
		{"E-32", "/0.1/meta-data/"},
		{"E-32", "/computeMetadata/v1beta1/instance/id"},
		{"E-34", "/latest/meta-data/"},
		{"E-34", "/latest/api/token"},
		{"E-34", "/metadata/instance"},
		{"H-09", v1 + "instance/id/"},
		{"H-09", accts + "default/token/"},
		{"H-09", accts + "default/token/."},
		{"H-09", v1 + "instance/id/x"},
		{"H-18", "*"},
		{"H-18", v1 + "instance/id%00"},
		{"H-18", accts + "token"},
		{"H-18", accts + "default/token/token"},
	} {
		t.Run(c.ids+" "+c.target, func(t *testing.T) {
			if _, a, err := ask(t, tree, linked, c.target); !errors.Is(err, ErrNotFound) {
				t.Errorf("got %+v, %v, want ErrNotFound", a, err)
			}
		})
	}
}

func TestRedirect_H08(t *testing.T) {
	tree := newTree(t, sample())
	for target, want := range map[string]string{
		"/computeMetadata":                            "/computeMetadata/",
		"/computeMetadata/v1":                         v1,
		v1 + "instance?recursive=true":                v1 + "instance/",
		v1 + "instance/service-accounts":              accts,
		accts + "default?recursive=true":              accts + "default/",
		accts + strings.ReplaceAll(email, "@", "%40"): accts + email + "/",
		// never //host, which would send the client elsewhere
		"//" + v1 + "/instance":                          v1 + "instance/",
		v1 + "project/project-id/../../instance?alt=xml": v1 + "instance/",
	} {
		_, a, err := ask(t, tree, linked, target)
		if err != nil || a.Redirect != want || a.Body != nil || a.ETag != "" {
			t.Errorf("%s: got %+v, %v, want a redirect to %s", target, a, err, want)
		}
	}
}

func TestPrincipalAsEmail_E25_E26(t *testing.T) {
	tree := newTree(t, sample())
	escaped := strings.NewReplacer("/", "%2F", ":", "%3A").Replace(principal)
	for target, want := range map[string]string{
		accts:                        "default/\n" + principal + "/\n",
		accts + "default/email":      principal,
		accts + principal + "/email": principal,
		accts + escaped + "/email":   principal,
		accts + principal + "/":      "aliases\nemail\nidentity\nscopes\ntoken\n",
		accts + principal + "/token": `{"access_token":"` + secret +
			` of ns/p2","expires_in":3599,"token_type":"Bearer"}`,
		accts + escaped + "/?recursive=true": `{"aliases":["default"],"email":"` + principal +
			`","scopes":["https://www.googleapis.com/auth/cloud-platform","https://www.googleapis.com/auth/userinfo.email"]}`,
		accts + "?recursive=true&alt=json&x=%": `{"default":` + acct(principal) + `,"` + principal + `":` + acct(principal) +
			`}`,
	} {
		_, a, err := ask(t, tree, unlinked, target)
		if err != nil || string(a.Body) != want {
			t.Errorf("%s:\ngot  %q %v,\nwant %q", target, a.Body, err, want)
		}
	}
	// The Location holds the cleaned name, and is good for another request.
	_, a, err := ask(t, tree, unlinked, accts+principal)
	want := accts + strings.Replace(principal, "//", "/", 1) + "/"
	if err != nil || a.Redirect != want {
		t.Fatalf("got %q, %v, want %q", a.Redirect, err, want)
	}
	if _, a, err = ask(t, tree, unlinked, a.Redirect); err != nil || len(a.Body) == 0 {
		t.Errorf("after the redirect: %+v, %v", a, err)
	}
}

func acct(email string) string {
	return `{"aliases":["default"],"email":"` + email +
		`","scopes":["https://www.googleapis.com/auth/cloud-platform","https://www.googleapis.com/auth/userinfo.email"]}`
}

// The whole tree, as a person would write it down.
func TestGolden_E05_E21_H11(t *testing.T) {
	tree := newTree(t, sample())
	golden := func(name string) []byte {
		b, err := os.ReadFile("testdata/" + name)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, golden("recursive.json")); err != nil {
		t.Fatal(err)
	}
	for target, want := range map[string]string{
		v1 + "?recursive=true":          compact.String(),
		v1 + "?recursive=true&alt=text": string(golden("recursive.txt")),
	} {
		_, a, err := ask(t, tree, linked, target)
		if err != nil {
			t.Fatal(err)
		}
		if string(a.Body) != want {
			t.Errorf("%s: got\n%s\nwant\n%s", target, a.Body, want)
		}
		if bytes.Contains(a.Body, []byte(secret)) {
			t.Errorf("%s holds a credential", target)
		}
	}
}

// E-02: "/" is answered to anybody, so it must not be a way to what is below it.
func TestOpen_E02(t *testing.T) {
	tree := newTree(t, sample())
	for _, target := range []string{"/", "", "/..", "//", "/?recursive=true",
		"/computeMetadata/..?recursive=true&alt=text"} {
		m, a, err := ask(t, tree, workload.Caller{}, target)
		if err != nil || !m.Open || string(a.Body) != "computeMetadata/\n" || a.ContentType != Text {
			t.Errorf("%q: open %t, %q, %v", target, m.Open, a.Body, err)
		}
	}
	for _, target := range []string{"/computeMetadata", v1, accts + "default/token", "/nowhere"} {
		if m, _, _ := ask(t, tree, linked, target); m.Open {
			t.Errorf("%q is open", target)
		}
	}
}

func TestETag_H07_H12(t *testing.T) {
	tree := newTree(t, sample())
	tag := func(who workload.Caller, target string) string {
		_, a, err := ask(t, tree, who, target)
		if err != nil {
			t.Fatal(err)
		}
		if len(a.ETag) != 16 || strings.Trim(a.ETag, "0123456789abcdef") != "" {
			t.Errorf("%s: %q is not 16 hex digits", target, a.ETag)
		}
		return a.ETag
	}
	for _, target := range []string{"/", v1, v1 + "?recursive=true", v1 + "instance/id", accts + "default/token", accts} {
		if a, b := tag(linked, target), tag(linked, target); a != b {
			t.Errorf("%s: %s, then %s", target, a, b)
		}
	}
	if tag(linked, v1+"?recursive=true") == tag(unlinked, v1+"?recursive=true") {
		t.Error("what differs has one ETag")
	}
	// Clients that wait over an upgrade would all be woken by another hash. Published test vector of
	// XXH64.
	if a := answer([]byte("abc"), Text); a.ETag != "44bc2cf5ad770999" {
		t.Errorf("the ETag of abc is %s", a.ETag)
	}
}
