package config

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestPathWarnings(t *testing.T) {
	for text, want := range map[string]string{
		"kubeconfig: kubelet.conf":   `kubeconfig: "kubelet.conf" is relative to the directory of the configuration file`,
		"kubeconfig: ~/.kube/config": `kubeconfig: "~/.kube/config" is not expanded to a home directory`,
	} {
		c := mustLoad(t, minimal+text, nil, nil)
		if len(c.Warnings) != 1 || !strings.HasPrefix(c.Warnings[0], want) {
			t.Errorf("%s: got %q, want one that begins %q", text, c.Warnings, want)
		}
	}
}

func TestNodeWarnings(t *testing.T) {
	there := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(there, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	local := []netip.Addr{netip.MustParseAddr("192.0.2.1")}
	made := []netip.Addr{netip.MustParseAddr("169.254.1.1"), netip.MustParseAddr("169.254.169.254"),
		netip.MustParseAddr("169.254.169.252"), netip.MustParseAddr("fd20:ce::252")}
	for _, tt := range []struct{ text, want string }{
		{"", ""},
		{"kubeconfig: " + there, ""},
		{"kubeconfig: " + there + "x", "kubeconfig: "},
		{"listen: 192.0.2.1:988", ""},
		{"listen: 192.0.2.2:988", "listen: no interface of this node has 192.0.2.2"},
		{"listen: 169.254.1.1:988", ""}, // routing makes it
		{"listen: 169.254.1.2:988", "listen: no interface of this node has 169.254.1.2"},
		{"healthListen: 169.254.1.1:16322", "healthListen: no interface of this node has 169.254.1.1"},
		{"listen: 0.0.0.0:989\nrouting: {mode: none}", ""},
		{"routing: {mode: loopback}", ""},
		{"listen6: '[fd20:ce::252]:988'", ""},
		{"listen6: '[fd00::1]:988'", "listen6: no interface of this node has fd00::1"},
		{"healthListen: 192.0.2.3:16322", "healthListen: no interface of this node has 192.0.2.3"},
	} {
		got := mustLoad(t, minimal+tt.text, nil, nil).NodeWarnings(local,
			func(a netip.Addr) bool { return slices.Contains(made, a) })
		if tt.want == "" && len(got) == 0 {
			continue
		}
		if len(got) != 1 || tt.want == "" || !strings.HasPrefix(got[0], tt.want) {
			t.Errorf("%s: got %q, want one that begins %q", tt.text, got, tt.want)
		}
	}
}
