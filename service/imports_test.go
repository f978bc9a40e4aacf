package service

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"path"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/gke-metadata-emulator/gke-metadata-emulator/"

// importRules says who alone may import what, and why. The stand-ins and cmd/demo are not shipped: they import what they need.
var importRules = []struct {
	imported string   // a prefix of import paths
	by       []string // packages, relative to the module
	why      string
}{
	{"k8s.io/", []string{"service/kube"}, "Kubernetes' libraries are large and change often: one package knows them"},
	{"github.com/cilium/ebpf", []string{"service/routing"}, "one package changes the node"},
	{"github.com/google/nftables", []string{"service/routing"}, "one package changes the node"},
	{"os/exec", []string{"service/routing", "packaging/gen"}, "the serving process starts no other: it has no right to, once it runs in its sandbox"},
	{"github.com/vishvananda/netlink", []string{"service/routing"}, "what the kernel is told; attest asks it on the path of every connection, and its own questions are 60 times as fast (A-02)"},
	{"github.com/vishvananda/netns", []string{"service/routing"}, "a thread that changes its network namespace is one package's care: doctor's throw-away one is the only reason to"},
	{"github.com/spf13/", []string{"cmd/gke-metadata-emulator"}, "flags in, Config out: nothing below main knows how it was asked"},
	{"github.com/coreos/go-systemd", []string{"service"}, "the life of the service is told in one place"},
	{"github.com/prometheus/client_golang/prometheus/promhttp", []string{"service"}, "one package serves"},
	{"net/http", []string{"service", "service/doctor", "service/kube", "service/status", "service/token"}, "metadata, attest, routing and config answer questions, and speak no HTTP"},
	{"go.yaml.in/", []string{"service/config"}, "one package reads the operator's YAML"},
}

// six are the packages that never import each other.
var six = []string{"service/attest", "service/config", "service/kube", "service/metadata", "service/routing", "service/token", "service/workload"}

// layers says which of our own packages each may import.
var layers = map[string][]string{
	"cmd/gke-metadata-emulator": {"service", "service/config", "service/doctor", "service/routing", "service/status"},
	"packaging":                 nil,
	"packaging/gen":             nil, // not shipped
	"service":                   append([]string{"service/status"}, six...),
	"service/doctor":            append([]string{"service/status"}, six...),
	"service/status":            six,
	"service/attest":            {"service/workload"},
	"service/config":            {"service/workload"},
	"service/kube":              {"service/workload"},
	"service/metadata":          {"service/workload"},
	"service/routing":           {"service/workload"},
	"service/token":             {"service/workload"},
	"service/workload":          nil,
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
					t.Errorf("%s imports %s: only cmd → service → {attest, kube, token, metadata, routing, config} → workload", name, own)
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
