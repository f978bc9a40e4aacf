package server

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/metadata"
	mint "github.com/gke-metadata-emulator/gke-metadata-emulator/service/token"
)

// Docs: docs/metrics.md has the values of the label reason, and no others.
func TestDocsReasons(t *testing.T) {
	row := regexp.MustCompile("(?m)^\\| `reason` \\|(.*)$").FindStringSubmatch(page(t, "metrics.md"))
	if row == nil {
		t.Fatal("docs/metrics.md does not have the label reason")
	}
	var listed []string
	for _, m := range regexp.MustCompile("`([a-z-]+)`").FindAllStringSubmatch(row[1], -1) {
		listed = append(listed, m[1])
	}
	slices.Sort(listed)
	all := everyReason()
	slices.Sort(all)
	if all = slices.Compact(all); !slices.Equal(listed, all) {
		t.Errorf("docs/metrics.md has the reasons\n%q\nand the code\n%q", listed, all)
	}
}

// said is a refusal as a pod and Prometheus see it.
type said struct {
	status      int
	text, label string
}

// samples are errors that the table refusals has no text for: each brings its own.
var samples = []error{
	metadata.BadQuery("alt=%.32q: want json or text", "xml"),
	metadata.BadQuery("timeout_sec=%.32q: want a whole number of seconds, 0 or more", "x"),
	errNoAudience, errNotLinked,
	&kube.AnnotationError{Key: "iam.gke.io/gcp-service-account", Reason: "not an email"},
	&kube.ForbiddenError{Verb: "create", Resource: "serviceaccounts/token"},
	kube.ErrNotConfigured, &kube.AwayError{Since: time.Now(), Err: errors.New("x")}, kube.ErrNotFound,
	&mint.LimitError{Limit: "keysPerPod", Value: 64},
	mint.ErrUnavailable,
	&mint.GoogleError{Step: "IAM", Status: 400}, &mint.GoogleError{Step: "IAM", Status: 403},
	&mint.GoogleError{Step: "IAM", Status: 404}, &mint.GoogleError{Step: "STS", Status: 400},
}

// Docs: docs/troubleshooting.md has a row for the text of each refusal, with its status and its
// label. TestDocsQuoteTheCode in package doctor goes the other way.
func TestDocsRefusals(t *testing.T) {
	var all []said
	for i, row := range refusals {
		if row.refusal.Text != "" {
			all = append(all, said{row.refusal.Status, row.refusal.Text, row.label})
			continue
		}
		if !slices.ContainsFunc(samples, func(err error) bool {
			return i == slices.IndexFunc(refusals, func(r refusalRow) bool { return r.when(err) })
		}) {
			t.Errorf("row %d of refusals (%s) has no text, and no sample: add one here", i, row.label)
		}
	}
	for _, err := range samples {
		r := refusalOf(err)
		all = append(all, said{r.Status, r.Text, r.Label})
	}
	for _, r := range headerRules {
		all = append(all, said{r.Status, r.Text, reasonRequest})
	}
	all = append(all, written(t, map[string]string{"passthrough.go": reasonPassthrough, "connections.go": reasonLimit,
		"server.go": reasonUnconfigured})...)
	if len(all) < 45 {
		t.Errorf("only %d refusals found: is this test looking where it should?", len(all))
	}
	rows := guide(t)
	for _, s := range all {
		if !slices.ContainsFunc(rows, func(r guideRow) bool { return r.has(s) }) {
			t.Errorf("docs/troubleshooting.md has no row for %d %q with reason `%s`", s.status, s.text, s.label)
		}
	}
}

// written are the refusals that are written outside the two tables, by the source. labels are those
// of each file's.
func written(t *testing.T, labels map[string]string) (all []said) {
	t.Helper()
	statuses := map[string]int{}
	for code := 400; code < 600; code++ {
		statuses["Status"+strings.ReplaceAll(http.StatusText(code), " ", "")] = code
	}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") || name == "refusal.go" || name == "headers.go" {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			lit, is := n.(*ast.CompositeLit)
			if !is || fmt.Sprint(lit.Type) != "refusal" {
				return true
			}
			s := said{label: labels[name]}
			for _, e := range lit.Elts {
				switch kv := e.(*ast.KeyValueExpr); fmt.Sprint(kv.Key) {
				case "Status":
					s.status = statuses[kv.Value.(*ast.SelectorExpr).Sel.Name]
				case "Text":
					s.text = textOf(kv.Value)
				}
			}
			if all = append(all, s); s.label == "" || s.status == 0 || s.text == "" {
				t.Errorf("%s has a refusal that this test cannot read: %+v", name, s)
			}
			return true
		})
	}
	return all
}

// textOf is what is constant in a text.
func textOf(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.BasicLit:
		text, _ := strconv.Unquote(e.Value)
		return text
	case *ast.BinaryExpr:
		return textOf(e.X) + textOf(e.Y)
	case *ast.CallExpr:
		switch e.Fun.(*ast.SelectorExpr).Sel.Name {
		case "Sprintf":
			return textOf(e.Args[0])
		case "NotConfigured":
			return "not configured: "
		}
	}
	return ""
}

// guideRow is a row of the table of docs/troubleshooting.md.
type guideRow struct{ statuses, texts, labels []string }

// has reports whether the row is the refusal's. … stands for what differs from case to case.
func (r guideRow) has(s said) bool {
	return slices.Contains(r.statuses, strconv.Itoa(s.status)) && slices.Contains(r.labels, s.label) &&
		slices.ContainsFunc(r.texts, func(text string) bool {
			rest, found := s.text, true
			for part := range strings.SplitSeq(text, "…") {
				if _, rest, found = strings.Cut(rest, part); !found {
					return false
				}
			}
			return true
		})
}

func guide(t *testing.T) (rows []guideRow) {
	t.Helper()
	_, table, _ := strings.Cut(page(t, "troubleshooting.md"), "\n## A pod is refused")
	quoted := regexp.MustCompile("`([^`]+)`")
	for _, m := range regexp.MustCompile(`(?m)^\| ([45]\d\d[^|]*)\|([^|]*)\|`).FindAllStringSubmatch(table, -1) {
		status, _, _ := strings.Cut(m[1], "`")
		r := guideRow{statuses: regexp.MustCompile(`\d{3}`).FindAllString(status, -1)}
		for _, q := range quoted.FindAllStringSubmatch(m[1], -1) {
			r.texts = append(r.texts, q[1])
		}
		for _, q := range quoted.FindAllStringSubmatch(m[2], -1) {
			r.labels = append(r.labels, q[1])
		}
		rows = append(rows, r)
	}
	return rows
}

func page(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile("../../docs/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
