package kube

import (
	"errors"
	"net/url"
	"strings"
	"testing"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// K-00, K-01: every form of email and project is taken, and nothing else.
func TestParseAccount(t *testing.T) {
	const e, p, q = AnnotationEmail, AnnotationPrincipal, AnnotationQuota
	long := strings.Repeat("a", 63)
	for _, c := range []struct {
		name, key, value string
		want             workload.Account
		bad              bool
	}{
		{"plain", e, "my-sa@my-project.iam.gserviceaccount.com",
			workload.Account{GoogleEmail: "my-sa@my-project.iam.gserviceaccount.com"}, false},
		{"compute default", e, "123456789012-compute@developer.gserviceaccount.com",
			workload.Account{GoogleEmail: "123456789012-compute@developer.gserviceaccount.com"}, false},
		{"App Engine", e, "my-project@appspot.gserviceaccount.com",
			workload.Account{GoogleEmail: "my-project@appspot.gserviceaccount.com"}, false},
		{"App Engine, domain-scoped", e, "my-project.example.com@appspot.gserviceaccount.com",
			workload.Account{GoogleEmail: "my-project.example.com@appspot.gserviceaccount.com"}, false},
		{"domain-scoped project", e, "sa@proj.example.com.iam.gserviceaccount.com",
			workload.Account{GoogleEmail: "sa@proj.example.com.iam.gserviceaccount.com"}, false},
		{"other universe, prefix (G-09)", e, "sa@proj.eu0.iam.gserviceaccount.com",
			workload.Account{GoogleEmail: "sa@proj.eu0.iam.gserviceaccount.com"}, false},
		{"other universe, domain (G-09)", e, "sa@proj.iam.example-cloud.goog",
			workload.Account{GoogleEmail: "sa@proj.iam.example-cloud.goog"}, false},
		{"service agent", e, "service-123@gcp-sa-pubsub.iam.gserviceaccount.com",
			workload.Account{GoogleEmail: "service-123@gcp-sa-pubsub.iam.gserviceaccount.com"}, false},
		{"absent", "other", "x", workload.Account{}, false},
		{"empty", e, "", workload.Account{}, false},
		{"a method smuggled in", e, "x:signBlob?@p.iam.gserviceaccount.com", workload.Account{}, true},
		{"a path", e, "../../x@p.iam.gserviceaccount.com", workload.Account{}, true},
		{"dots", e, "..@p.iam.gserviceaccount.com", workload.Account{}, true},
		{"escaped", e, "a%2fb@p.iam.gserviceaccount.com", workload.Account{}, true},
		{"two @", e, "a@b@p.iam.gserviceaccount.com", workload.Account{}, true},
		{"newline", e, "sa@p.iam.gserviceaccount.com\n", workload.Account{}, true},
		{"header", e, "sa@p.iam.gserviceaccount.com\r\nX: y", workload.Account{}, true},
		{"space", e, " sa@p.iam.gserviceaccount.com", workload.Account{}, true},
		{"upper case", e, "Sa@p.iam.gserviceaccount.com", workload.Account{}, true},
		{"a person", e, "jo@gmail.com", workload.Account{}, true},
		{"no account", e, "iam.gserviceaccount.com", workload.Account{}, true},
		{"no project", e, "sa@iam.gserviceaccount.com.", workload.Account{}, true},
		{"prefixed", e, "projects/-/serviceAccounts/sa@p.iam.gserviceaccount.com", workload.Account{}, true},
		{"homograph", e, "sа@p.iam.gserviceaccount.com", workload.Account{}, true},
		{"too long", e, long + "." + long + "@p.iam.gserviceaccount.com", workload.Account{}, true},
		{"much too long", e, strings.Repeat("a", 100000), workload.Account{}, true},
		{"principal", p, "true", workload.Account{PrincipalAsEmail: true}, false},
		{"not principal", p, "false", workload.Account{}, false},
		{"principal?", p, "True", workload.Account{}, true},
		{"principal??", p, "1", workload.Account{}, true},
		{"principal, empty", p, "", workload.Account{}, false},
		{"project", q, "my-project", workload.Account{QuotaProject: "my-project"}, false},
		{"project number", q, "123456789012", workload.Account{QuotaProject: "123456789012"}, false},
		{"project of a domain", q, "example.com:proj", workload.Account{QuotaProject: "example.com:proj"}, false},
		{"no quota project", q, "", workload.Account{}, false},
		{"project, header", q, "my-project\r\nX: y", workload.Account{}, true},
		{"project, path", q, "my-project/..", workload.Account{}, true},
		{"project, upper", q, "My-project", workload.Account{}, true},
		{"project, short", q, "abc", workload.Account{}, true},
		{"project, dash", q, "my-project-", workload.Account{}, true},
		{"project, zero", q, "0123", workload.Account{}, true},
		{"project, colon", q, "proj:x:y", workload.Account{}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := ParseAccount(ksa, map[string]string{c.key: c.value})
			if got != c.want || (err != nil) != c.bad {
				t.Fatalf("got %+v, %v", got, err)
			}
			var a *AnnotationError
			if !c.bad {
				return
			}
			if !errors.As(err, &a) || a.ServiceAccount != ksa || a.Key != c.key {
				t.Fatalf("error %#v", err)
			}
			s := err.Error()
			for _, want := range []string{"ns1/ksa", c.key, "kubectl annotate --overwrite serviceaccount -n ns1 ksa"} {
				if !strings.Contains(s, want) {
					t.Errorf("%q does not say %q", s, want)
				}
			}
			if len(s) > 600 || strings.ContainsAny(s, "\r\n") {
				t.Errorf("%d bytes, or more than a line", len(s))
			}
		})
	}
}

// What is accepted means nothing in a URL or a header.
func FuzzParseAccount(f *testing.F) {
	for _, s := range []string{"sa@p.iam.gserviceaccount.com", "123-compute@developer.gserviceaccount.com", "x:signBlob?",
		"../", "example.com:proj", "true"} {
		f.Add(s, s, s)
	}
	f.Fuzz(func(t *testing.T, email, principal, project string) {
		a, err := ParseAccount(ksa, map[string]string{AnnotationEmail: email, AnnotationPrincipal: principal,
			AnnotationQuota: project})
		if err != nil {
			if (a != workload.Account{}) {
				t.Errorf("half an account: %+v", a)
			}
			if s := err.Error(); len(s) > 1000 || strings.ContainsAny(s, "\r\n\x00") {
				t.Errorf("%q", s)
			}
			return
		}
		if e := a.GoogleEmail; e != "" {
			if url.PathEscape(e) != e || strings.Count(e, "@") != 1 || strings.Contains(e, "..") || len(e) > maxEmail {
				t.Errorf("email %q", e)
			}
		}
		if strings.ContainsFunc(a.QuotaProject, func(r rune) bool {
			return !strings.ContainsRune("abcdefghijklmnopqrstuvwxyz0123456789-.:", r)
		}) {
			t.Errorf("project %q", a.QuotaProject)
		}
	})
}
