package service

import (
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/gke-metadata-emulator/gke-metadata-emulator/"

// importRules says who alone may import what, and why. The stand-ins and cmd/demo are not shipped:
// they import what they need.
var importRules = []struct {
	imported string   // a prefix of import paths
	by       []string // packages, relative to the module
	why      string
}{
	{"k8s.io/", []string{"service/kube"}, "Kubernetes' libraries are large and change often: one package knows them"},
	{"github.com/cilium/ebpf", []string{"service/routing", "service/routing/bpf"},
		"one package attaches programs; routing reads what mode observe counted"},
	{"github.com/google/nftables", []string{"service/routing", "service/routing/nft"},
		"one package changes nf_tables; routing puts its transactions in order"},
	{"github.com/coreos/go-iptables", []string{"service/routing/xtables"}, "it runs commands"},
	{"os/exec", []string{"service/routing", "service/routing/probe", "service/routing/xtables", "packaging/gen"},
		"the serving process starts no other: it has no right to, once it runs in its sandbox"},
	{"github.com/mdlayher/netlink", []string{"service/routing/netobj"},
		"its decoder checks the bounds of attributes, where that of vishvananda/netlink panics"},
	{"github.com/vishvananda/netlink", []string{"service/routing", "service/routing/netobj", "service/routing/nft",
		"service/routing/probe", "service/routing/watch"},
		"routing changes the node's network; attest asks the kernel on the path of every connection, " +
			"and its own questions are 60 times as fast (A-02)"},
	{"github.com/vishvananda/netns", []string{"service/routing/probe"},
		"a thread that changes its network namespace is one package's care: doctor's throw-away one is the only reason to"},
	{"github.com/spf13/", []string{"cmd/gke-metadata-emulator"},
		"flags in, Config out: nothing below main knows how it was asked"},
	{"github.com/coreos/go-systemd", []string{"service"},
		"the life of the service is written in one place; what systemd says of a unit is handed to doctor as a status.Unit"},
	{"github.com/prometheus/client_golang/prometheus/promhttp", []string{"service/server"}, "one package serves"},
	{"net/http", []string{"service/server", "service/doctor", "service/kube", "service/status", "service/token"},
		"server serves, and the others are clients (TestResponseWriter); " +
			"service, metadata, attest, routing and config speak no HTTP"},
	{"go.yaml.in/", []string{"service/config"}, "one package reads the operator's YAML"},
	{"golang.org/x/net/", []string{"service/dns"},
		"one package reads and writes DNS messages; the rest has the standard library"},
}

// corePackages are the six packages that do the work. They never import each other: each says in
// an interface of its own what it needs of another, and service hands it in. workload has the nouns
// that all of them share.
var corePackages = []string{"service/attest", "service/config", "service/kube", "service/metadata", "service/routing",
	"service/token", "service/workload"}

// layers says which of our own packages each may import.
//
//	cmd → {service, doctor, status}
//	service → {server, status, the six}
//	doctor → {status, routing/probe, the six}
//	server, status → the six
//	the six → workload, messageid
var layers = map[string][]string{
	// Flags become a config.Config and a routing.Plan here, so cmd knows these two of the six.
	// The exit status of its commands depends on whether rules are missing or may not be changed.
	"cmd/gke-metadata-emulator": {"service", "service/config", "service/doctor", "service/routing",
		"service/routing/fault", "service/status"},
	"packaging":     nil,
	"packaging/gen": nil, // not shipped
	// The life of the service puts everything together; doctor is another process, and no part of it.
	"service": append([]string{"service/dns", "service/messageid", "service/server", "service/status"}, corePackages...),
	// dns answers everybody the same, and knows no pod, no configuration and no rule.
	"service/dns": nil,
	// doctor judges a node whose service may be dead, so it asks the service over its socket like
	// anybody else.
	"service/doctor": append([]string{"service/routing/probe", "service/status"}, corePackages...),
	// server answers requests by what it is handed, and knows nothing of reloads, units and the
	// status.
	"service/server": {"service/attest", "service/config", "service/kube", "service/messageid", "service/metadata",
		"service/routing", "service/token", "service/workload"},
	// status shows what the six say of themselves.
	"service/status":   {"service/attest", "service/kube", "service/routing", "service/token"},
	"service/attest":   {"service/messageid", "service/workload"},
	"service/config":   {"service/workload"},
	"service/kube":     {"service/messageid", "service/workload"},
	"service/metadata": {"service/workload"},
	// routing knows the Plan and which rules it makes. The packages below it know no Plan: each knows
	// one interface of the kernel.
	"service/routing": {"service/messageid", "service/routing/bpf", "service/routing/fault",
		"service/routing/netobj", "service/routing/nft", "service/routing/probe", "service/routing/watch",
		"service/routing/xtables", "service/workload"},
	// doctor's connections: they know other people's rules, and none of ours.
	"service/routing/probe": {"service/routing/fault", "service/routing/netobj", "service/routing/nft",
		"service/routing/xtables"},
	"service/routing/nft": {"service/routing/fault", "service/routing/netobj"},
	// iptables-nft keeps its chains in nf_tables, which are read there without a command.
	"service/routing/xtables": {"service/routing/fault", "service/routing/netobj", "service/routing/nft"},
	"service/routing/bpf":     {"service/routing/fault", "service/routing/netobj"},
	// what the kernel says has changed; what is done about it routing knows
	"service/routing/watch": {"service/routing/fault", "service/routing/nft"},
	// the errors that all of them wrap
	"service/routing/fault": nil,
	// objects of the kernel that routing puts up; whose they are routing says.
	"service/routing/netobj": nil,
	"service/token":          {"service/workload"},
	"service/workload":       nil,
	// kinds of log lines, which all that logs share.
	"service/messageid": nil,
}

// Only package server writes answers: no other names a ResponseWriter, so nothing reaches a pod but
// by its write.
func TestResponseWriter(t *testing.T) {
	seen := false
	for name := range layers {
		files, err := filepath.Glob(filepath.Join("..", name, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			ast.Inspect(parsed, func(n ast.Node) bool {
				if s, ok := n.(*ast.SelectorExpr); ok && s.Sel.Name == "ResponseWriter" {
					if seen = seen || name == "service/server"; name != "service/server" {
						t.Errorf("%s names a ResponseWriter: package server alone answers requests", file)
					}
				}
				return true
			})
		}
	}
	if !seen {
		t.Error("no ResponseWriter in package server: is this test looking where it should?")
	}
}

func TestImports(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Imports", module+"...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	seen := map[string]bool{}
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p struct {
			ImportPath string
			Imports    []string
		}
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimPrefix(p.ImportPath, module)
		seen[name] = true
		if standIn(name) {
			continue
		}
		allowed, known := layers[name]
		if !known {
			t.Errorf("%s is in no layer: say in layers what it may import", name)
		}
		for _, i := range p.Imports {
			if own, ok := strings.CutPrefix(i, module); ok {
				if !slices.Contains(allowed, own) {
					t.Errorf("%s imports %s: layers says who may, and why", name, own)
				}
				if standIn(own) {
					t.Errorf("%s imports %s: no stand-in is in the shipped binary", name, own)
				}
			}
			for _, r := range importRules {
				if strings.HasPrefix(i+"/", strings.TrimSuffix(r.imported, "/")+"/") && !slices.Contains(r.by, name) {
					t.Errorf("%s imports %s, which only %s may: %s", name, i, strings.Join(r.by, " and "), r.why)
				}
			}
		}
	}
	for name := range layers {
		if !seen[name] {
			t.Errorf("layers speaks of %s, which is not there", name)
		}
	}
}

func standIn(name string) bool {
	switch path.Base(name) {
	case "kubetest", "googletest", "netnstest", "demo":
		return true
	}
	return false
}
