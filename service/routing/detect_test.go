package routing

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"
)

// Each file of testdata/nodes is a node: what Detect says of it, what iptables and nft say of
// themselves, who has port 80, what the kernel has, and files.
func TestDetect(t *testing.T) {
	nodes, err := filepath.Glob("testdata/nodes/*.txtar")
	if err != nil || len(nodes) == 0 {
		t.Fatal(nodes, err)
	}
	picked := map[string]bool{}
	for _, file := range nodes {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			node, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			root := t.TempDir()
			if err := txtar.Write(node, root); err != nil {
				t.Fatal(err)
			}
			line := append(strings.Split(string(node.Comment), "\n"), "", "", "", "", "")
			s := surveyor{root: root, nfTables: func() bool { return line[4] == "nf_tables" },
				version: func(command string) string { return map[string]string{"iptables": line[1], "nft": line[2]}[command] },
				listens: func(netip.AddrPort) string { return line[3] }}
			mode, reason := Detect(s.facts())
			picked[mode] = true
			wantMode, wantReason, _ := strings.Cut(line[0], ": ")
			if mode != wantMode || !strings.Contains(reason, wantReason) {
				t.Errorf("%s: %s\nwant %s: … %s …\nof %+v", mode, reason, wantMode, wantReason, s.facts())
			}
		})
	}
	for _, mode := range []string{ModeIPTables, ModeNFTables, ModeLoopback, ModeEBPF, ModeNone} {
		if !picked[mode] {
			t.Errorf("no node of testdata/nodes gets mode %s", mode)
		}
	}
}

// What answers at 169.254.169.254 counts too where somebody asked; the emulator itself is no reason
// to give way to it.
func TestDetectByTheServer(t *testing.T) {
	f := Facts{IPTables: "1.8.9", Backend: "nf_tables"}
	for server, want := range map[string]string{"GKE Metadata Server": ModeNone, "Metadata Server for VM": ModeIPTables,
		"EC2ws": ModeIPTables, "": ModeIPTables} {
		f.Server = server
		if mode, reason := Detect(f); mode != want {
			t.Errorf("%q: %s (%s), want %s", server, mode, reason, want)
		}
	}
}

// The facts of the machine that runs the tests can be read without any privilege.
func TestReadFacts(t *testing.T) {
	f := ReadFacts(t.Context())
	if release, err := os.ReadFile("/proc/sys/kernel/osrelease"); err != nil ||
		f.Kernel != strings.TrimSpace(string(release)) {
		t.Errorf("kernel %q, want %q (%v)", f.Kernel, release, err)
	}
	if mode, reason := Detect(f); mode == "" || reason == "" {
		t.Errorf("%q, %q", mode, reason)
	}
}

// A configuration that is not JSON is passed over, as runtimes do; a version that is none is no
// reason to fail.
func TestFactsOfNonsense(t *testing.T) {
	root := t.TempDir()
	if err := os.MkdirAll(filepath.Join(root, "etc/cni/net.d"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"etc/cni/net.d/00-x.conf": "{",
		"etc/cni/net.d/01-y.conf": `{"type":"bridge"}`} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s := surveyor{
		root:     root,
		version:  func(string) string { return "what?" },
		listens:  func(netip.AddrPort) string { return "" },
		nfTables: func() bool { return false },
	}
	if f := s.facts(); !slices.Equal(f.CNI, []string{"bridge"}) || f.IPTables != "" {
		t.Errorf("%+v", f)
	}
}
