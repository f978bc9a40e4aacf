package service

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/watch"
)

const metricsPage = "../docs/metrics.md"

var describedMetric = regexp.MustCompile(`^Desc\{fqName: "([^"]*)", help: ("(?:[^"\\]|\\.)*")` +
	`(?:, unit: "[^"]*")?, constLabels: \{([^}]*)\}, variableLabels: \{([^}]*)\}\}$`)

// Docs: docs/metrics.md has each metric that the registries know, with its labels and its help.
func TestDocsMetrics(t *testing.T) {
	rows := metricRows(t)
	for name, file := range metricNames(t) {
		if rows[name] == "" {
			t.Errorf("%s names %s, which is in none of the registries that are asked here", file, name)
		}
	}
	var table bytes.Buffer
	table.WriteString("| Metric | Type | Labels | Meaning |\n|---|---|---|---|\n")
	for _, name := range slices.Sorted(maps.Keys(rows)) {
		table.WriteString(rows[name])
	}
	page, err := os.ReadFile(metricsPage)
	if err != nil {
		t.Fatal(err)
	}
	between(t, metricsPage, string(page), table.String())
	for _, r := range rows { // each label is explained below the table
		for label := range strings.SplitSeq(strings.Split(r, "|")[3], ",") {
			if label = strings.TrimSpace(label); label != "" && !strings.Contains(string(page), "\n| "+label+" |") {
				t.Errorf("%s does not say which values %s has", metricsPage, label)
			}
		}
	}
}

// Docs: the values of labels that are lists in code.
func TestDocsLabels(t *testing.T) {
	page, err := os.ReadFile(metricsPage)
	if err != nil {
		t.Fatal(err)
	}
	for label, values := range map[string][]string{"cause": watch.Names, "layer": fault.All} {
		_, row, found := strings.Cut(string(page), "\n| `"+label+"` |")
		row, _, _ = strings.Cut(row, "\n")
		if !found {
			t.Errorf("%s has no row for label %s", metricsPage, label)
		}
		for _, v := range values {
			if !strings.Contains(row, "`"+v+"`") {
				t.Errorf("%s: label %s has no value %s", metricsPage, label, v)
			}
		}
	}
}

// Docs: each metric that a document, an alert, the dashboard or a test of a booted machine names is
// in a registry.
func TestDocsMetricNames(t *testing.T) {
	rows := metricRows(t)
	named := regexp.MustCompile("gke_metadata_emulator_[a-z0-9_]+|`[a-z0-9_]+_total`")
	of := regexp.MustCompile("_(bucket|sum|count)$") // of a histogram
	for _, pattern := range []string{"../README.md", "../docs/*.md", "../packaging/monitoring/*", "../packaging/bed/*",
		"../packaging/bed/parts/*"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %v, %v", pattern, files, err)
		}
		found := 0
		for _, file := range files {
			text, err := os.ReadFile(file)
			if errors.Is(err, syscall.EISDIR) {
				continue
			} else if err != nil {
				t.Fatal(err)
			}
			for _, m := range named.FindAllString(string(text), -1) {
				found++
				name := "gke_metadata_emulator_" + strings.TrimPrefix(strings.Trim(m, "`"), "gke_metadata_emulator_")
				if rows[name] == "" && rows[of.ReplaceAllString(name, "")] == "" {
					t.Errorf("%s names %s, which no registry has", file, m)
				}
			}
		}
		if found == 0 && pattern != "../packaging/bed/*" {
			t.Errorf("%s name no metric: is this test looking where it should?", pattern)
		}
	}
}

// metricRows are the rows of the table in docs/metrics.md, by the metric's name: all that the
// registries know.
func metricRows(t *testing.T) map[string]string {
	t.Helper()
	b := newTestNode(t)
	b.ready(t)
	const path = "/computeMetadata/v1/instance/service-accounts/default/token"
	b.ask(t, linked, http.MethodGet, path, "Metadata-Flavor: Google")
	kernel := prometheus.NewRegistry()
	attest.NewKernel(attest.KernelOptions{Registerer: kernel, Log: logrus.New()})
	registries := []*prometheus.Registry{b.registry, b.active().gauges, kernel}

	types := map[string]string{}
	rows := map[string]string{}
	for _, r := range registries {
		families, err := r.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			types[f.GetName()] = strings.ToLower(f.GetType().String())
		}
		described := make(chan *prometheus.Desc)
		go func() { r.Describe(described); close(described) }()
		for d := range described {
			m := describedMetric.FindStringSubmatch(d.String())
			if m == nil {
				t.Fatalf("what is %s?", d)
			}
			if strings.HasPrefix(m[1], "go_") || strings.HasPrefix(m[1], "process_") {
				continue // Prometheus' own
			}
			labels := strings.Split(m[4], ",")
			for constant := range strings.SplitSeq(m[3], ",") {
				name, _, _ := strings.Cut(constant, "=")
				labels = append(labels, name)
			}
			labels = slices.DeleteFunc(labels, func(l string) bool { return l == "" })
			for i, l := range labels {
				labels[i] = "`" + l + "`"
			}
			kind := types[m[1]]
			if kind == "" && strings.HasSuffix(m[1], "_total") {
				kind = "counter"
			}
			help := strings.Trim(m[2], `"`)
			rows[m[1]] = fmt.Sprintf("| `%s` | %s | %s | %s |\n", m[1], kindOr(kind), strings.Join(labels, ", "), help)
		}
	}
	return rows
}

// metricNames returns the names of metrics in the code, each with the file.
func metricNames(t *testing.T) map[string]string {
	t.Helper()
	names := map[string]string{}
	literal := regexp.MustCompile(`"(gke_metadata_emulator_[a-z0-9_]*[a-z0-9])"`)
	for _, pattern := range []string{"*.go", "*/*.go"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			text, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range literal.FindAllStringSubmatch(string(text), -1) {
				if !strings.HasSuffix(f, "_test.go") {
					names[m[1]] = f
				}
			}
		}
	}
	if len(names) < 15 {
		t.Fatalf("only %d metrics found in the code: does the pattern still fit?", len(names))
	}
	return names
}

// kindOr is for what exists only now and then.
func kindOr(kind string) string {
	if kind == "" {
		return "gauge"
	}
	return kind
}

// between holds the part of a page between its marks to be what the code makes. `make golden`
// writes it anew.
func between(t *testing.T, file, page, made string) {
	t.Helper()
	const begin, end = "<!-- Generated by \"make golden\": begin -->\n", "<!-- Generated: end -->\n"
	before, rest, found := strings.Cut(page, begin)
	there, after, closed := strings.Cut(rest, end)
	if !found || !closed {
		t.Fatalf("%s has no %q and %q", file, begin, end)
	}
	if there == made {
		return
	}
	if os.Getenv("UPDATE_GOLDEN") == "" {
		t.Fatalf("%s is stale: make golden writes it anew", file)
	}
	if err := os.WriteFile(file, []byte(before+begin+made+end+after), 0o644); err != nil {
		t.Fatal(err)
	}
}
