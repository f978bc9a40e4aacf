package routing

import (
	"net/netip"
	"strings"
	"testing"
)

func TestAuto(t *testing.T) {
	p := Plan{Mode: ModeAuto, Listen: testPlan("", "").Listen, RunDir: t.TempDir()}
	if got := p.fit(Facts{IPTables: "1.8.9", Backend: "nf_tables"}); got.Mode != ModeIPTables ||
		!strings.HasPrefix(got.Reason, "iptables 1.8.9 (nf_tables) sees") {
		t.Errorf("%s: %s", got.Mode, got.Reason)
	}
	if got := p.fit(Facts{IPTables: "1.8.9", GKE: true}); got.Mode != ModeNone || got.Reason == "" {
		t.Errorf("%s: %s", got.Mode, got.Reason)
	}
	if other := (Plan{Mode: ModeIPTables}).ResolveAuto(t.Context()); other.Mode != ModeIPTables || other.Reason != "" {
		t.Errorf("a mode that was asked for: %s: %s", other.Mode, other.Reason)
	}

	// No node gets a mode that New refuses, nor one for which the listener would have to move.
	all := modes
	defer func() { modes = all }()
	for _, c := range []struct {
		modes  []string
		facts  Facts
		mode   string
		reason string // its end
	}{
		{[]string{ModeIPTables}, Facts{NFTables: true}, ModeIPTables, "asks for mode nftables, and this version has none"},
		{[]string{ModeIPTables, ModeNFTables}, Facts{NFTables: true}, ModeNFTables, "the kernel has nf_tables"},
		{[]string{ModeIPTables, ModeLoopback, ModeEBPF}, Facts{Denied: true, CgroupV2: true, BPF: true}, ModeEBPF,
			"eBPF host routing"},
		{[]string{ModeIPTables, ModeLoopback, ModeEBPF}, Facts{Denied: true}, ModeIPTables,
			"asks for routing.mode loopback: name it, for the listener to move to 169.254.169.254:80"},
		{[]string{ModeIPTables, ModeLoopback}, Facts{Denied: true, CgroupV2: true, BPF: true}, ModeIPTables,
			"name it, for the listener to move to 169.254.169.254:80"},
		{[]string{ModeIPTables, ModeLoopback}, Facts{Denied: true, CgroupV2: true, BPF: true, Port80: "nginx"}, ModeIPTables,
			"asks for mode ebpf, and this version has none"},
	} {
		modes = c.modes
		if got := p.fit(c.facts); got.Mode != c.mode || !strings.HasSuffix(got.Reason, c.reason) {
			t.Errorf("%v on %+v: %s: %s", c.modes, c.facts, got.Mode, got.Reason)
		}
	}
	modes = all

	// A mode that serves IPv4 alone says so, and is no Plan that New refuses.
	p.Listen6 = netip.MustParseAddrPort("[fd20:ce::252]:988")
	for mode, facts := range map[string]Facts{ModeNFTables: {NFTables: true},
		ModeEBPF: {Denied: true, CgroupV2: true, BPF: true}} {
		got := p.fit(facts)
		if got.Mode != mode || got.Listen6.IsValid() != got.dnats() ||
			strings.HasSuffix(got.Reason, "listen6 is not") == got.dnats() {
			t.Errorf("%s with listen6 %s: %s", got.Mode, got.Listen6, got.Reason)
		}
		if _, err := New(got); err != nil {
			t.Error(err)
		}
	}
	p.Listen6 = netip.AddrPort{}

	// What was installed is what is checked, whatever would fit now.
	if err := writeState(p.RunDir, State{Desired: Installed, Mode: "other", Reason: "of yesterday"}); err != nil {
		t.Fatal(err)
	}
	if got := p.AsInstalled(t.Context()); got.Mode != "other" || got.Reason != "of yesterday" {
		t.Errorf("%s: %s", got.Mode, got.Reason)
	}
	if err := writeState(p.RunDir, State{Desired: Removed, Mode: "other", Reason: "of yesterday"}); err != nil {
		t.Fatal(err)
	}
	if got := p.AsInstalled(t.Context()); got.Mode == "other" || got.Reason == "of yesterday" {
		t.Errorf("after a removal: %s: %s", got.Mode, got.Reason)
	}
	p.Closed = true
	if got := p.ResolveAuto(t.Context()); got.Mode != ModeAuto {
		t.Errorf("the closed guard looks at the node: %s", got.Mode)
	}

	// The state tells why, also after a repair by a Plan that was made of it.
	r := &router{plan: Plan{Mode: ModeIPTables, Reason: "it fits", RunDir: t.TempDir()}}
	if _, s := r.state(Installed); s.Reason != "it fits" {
		t.Errorf("%+v", s)
	}
}
