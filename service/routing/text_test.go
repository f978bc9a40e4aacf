package routing

import (
	"net/netip"
	"regexp"
	"strings"
	"testing"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/nft"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/xtables"
)

// Lines that iptables-restore and nft may get, whatever an operator writes.
var (
	restoreLine = regexp.MustCompile(
		`^(\*(filter|raw|nat)|COMMIT|:GME-[-A-Z]+ - \[0:0\]|-A GME-[-A-Z]+ [-!a-zA-Z0-9./:,_@+\[\] ]+|-I ` +
			`(FORWARD|INPUT|PREROUTING|OUTPUT) 1 -m comment --comment gke-metadata-emulator -j GME-[-A-Z]+)$`,
	)
	nftLine = regexp.MustCompile(
		`^((add|delete) table ip6? gke-metadata-emulator|table ip6? gke-metadata-emulator \{|\tchain [-a-z]+ ` +
			`\{|\t\}|\}|\t\ttype [a-z]+ hook [a-z]+ priority -?[0-9]+; policy accept;|\t\t(iifname (!= ` +
			`)?"[-a-zA-Z0-9_.:@]*\*?" )?[a-z0-9:.\[\] ]+( tcp flags & rst == 0 ct status snat drop)?)$`,
	)
)

// FuzzRuleText: a Plan that is not refused becomes rules and nothing else, in every mode.
func FuzzRuleText(f *testing.F) {
	f.Add("eth0", "docker0", "169.254.169.252:988", "[fd00:ec2::254]:80")
	f.Add("wan+", "a b", "10.0.0.5:18080", "168.63.129.16:32526")
	f.Add("e\nth0", `x" accept`, "0.0.0.0:80", "169.254.169.254:80")
	f.Add("+", "a;b", "[fe80::1%eth0]:80", "[::ffff:1.2.3.4]:80")
	f.Fuzz(func(t *testing.T, uplink, spare, listen, guard string) {
		at, err := netip.ParseAddrPort(listen)
		if err != nil {
			return
		}
		guarded, err := netip.ParseAddrPort(guard)
		if err != nil {
			return
		}
		for _, mode := range modes {
			p := Plan{
				Mode:              mode,
				Listen:            at,
				Uplinks:           []string{uplink},
				ExcludeInterfaces: []string{spare},
				Guard:             []netip.AddrPort{guarded},
			}
			if mode == ModeLoopback {
				p.Listen = metadataServer
			}
			if p, err = p.checked(); err != nil {
				continue
			}
			s := nodeFacts{uplinks: p.Uplinks, reachesIPv6: true}
			if p.dnats() {
				s.listen6 = netip.MustParseAddrPort("[fd20:ce::252]:988")
			}
			for _, family := range netobj.Families {
				for line := range strings.Lines(xtables.RestoreText(chainsFor(p, s, family), nil)) {
					if p.redirects() && !restoreLine.MatchString(strings.TrimSuffix(line, "\n")) {
						t.Errorf("%q", line)
					}
				}
				chains, err := nftChainsFor(p, s, family)
				if err != nil {
					t.Fatal(err)
				}
				for line := range strings.Lines(nft.Text(chains, "ip")) {
					if !nftLine.MatchString(strings.TrimSuffix(line, "\n")) {
						t.Errorf("%q", line)
					}
				}
			}
		}
	})
}

// FuzzJumps: whatever a list of rules says, a jump of ours has our comment and stands where it is
// said to.
func FuzzJumps(f *testing.F) {
	f.Add("-m comment --comment gke-metadata-emulator -j GME-PRE\n-j KUBE-SERVICES")
	f.Add("-g GME-PRE\n-m comment --comment mine -j GME-PRE\n-j")
	f.Fuzz(func(t *testing.T, text string) {
		base := lines(text)
		ours, foreign := xtables.Jumps(base, "GME-PRE")
		for _, j := range ours {
			if base[j.Position-1] != j.Rule || !strings.Contains(j.Rule, xtables.Comment) || j.Rule == foreign {
				t.Errorf("%+v", j)
			}
		}
		(&xtables.Tables{Servers: []netip.AddrPort{metadataServer}}).Redirection(base)
	})
}

// TestMakes: what config check is told of listen addresses is what install does.
func TestMakes(t *testing.T) {
	for _, tt := range []struct {
		mode, listen string
		want         bool
	}{
		{ModeIPTables, "169.254.169.252", true},
		{ModeNone, "169.254.169.252", true},
		{ModeIPTables, "fd20:ce::252", true},
		{ModeIPTables, "169.254.169.254", false}, // the metadata server's own
		{ModeLoopback, "169.254.169.254", true},
		{ModeIPTables, "192.0.2.1", false},
		{ModeIPTables, "fd00::1", false},
	} {
		if got := (Plan{Mode: tt.mode}).Makes(netip.MustParseAddr(tt.listen)); got != tt.want {
			t.Errorf("mode %s makes %s: %t", tt.mode, tt.listen, got)
		}
	}
}
