package routing

import (
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// extraGuard is an address that an operator closes beside the clouds' metadata servers.
var extraGuard = netip.MustParseAddrPort("169.254.170.2:80")

// brokenMode is the Plan of a broken file whose routing.mode is valid, as the commands make it.
func (b *testNode) brokenMode(mode string) Plan {
	p := b.plan
	p.Closed, p.Mode, p.Listen = true, mode, netip.MustParseAddrPort("169.254.169.252:988")
	p.Guard, p.ExcludeInterfaces = append(DefaultGuard(), extraGuard), []string{"docker0"}
	return p
}

// TestUnconfiguredMode: without an earlier Install, a broken file of mode none has its guard and no
// redirection, and one of mode observe has nothing at all.
func TestUnconfiguredMode(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{ModeNone, ModeObserve} {
		for _, by := range []string{"install", "watch"} {
			t.Run(mode+" by "+by, func(t *testing.T) {
				b := newTestNode(t, "iptables-nft")
				before := b.ruleset()
				closed := b.brokenMode(mode)
				if by == "watch" {
					b.watch(closed, time.Hour).until("the first look", func() bool {
						s, err := ReadState(closed.RunDir)
						return err == nil && s.Desired == Installed && !s.Standing.Time.IsZero()
					})
				} else {
					b.install(closed)
					b.install(closed)
				}
				b.requireOK(closed)
				got := only(lines(b.ruleset()), lines(before))
				for _, line := range got {
					if !strings.HasPrefix(line, "9") { // its preferences are 97 and 98
						t.Errorf("beside the guard: %s", line)
					}
				}
				guarded := slices.ContainsFunc(got, func(l string) bool { return strings.Contains(l, extraGuard.Addr().String()) })
				spared := slices.ContainsFunc(got, func(l string) bool { return strings.Contains(l, "iif docker0") })
				if want := mode == ModeNone; guarded != want || spared != want || !want && len(got) > 0 {
					t.Errorf("guarded %v, docker0 spared %v:\n%s", guarded, spared, strings.Join(got, "\n"))
				}
				s, err := ReadState(closed.RunDir)
				if err != nil || !s.Closed || s.Listen != "" || s.Mode != mode || !s.Standing.Good ||
					!slices.Equal(s.ExcludeInterfaces, closed.ExcludeInterfaces) {
					t.Errorf("state: %+v, %v", s, err)
				}
			})
		}
	}
}

// TestBrokenKeepsMode: the rules of the last valid configuration stay where the broken one is of a
// mode that redirects nothing.
func TestBrokenKeepsMode(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	b.install(b.plan)
	whole := b.ruleset()
	for _, mode := range []string{ModeNone, ModeObserve} {
		closed := b.brokenMode(mode)
		b.install(closed)
		b.requireEqual(mode, b.ruleset(), whole)
		b.requireOK(closed)
	}
}

// TestBrokenCannotStand: where the rules of the last valid configuration cannot be installed, its
// guard is put up, and the state says so and why.
func TestBrokenCannotStand(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{ModeEBPF, ModeObserve, ModeNFTables} {
		t.Run(mode, func(t *testing.T) {
			b := newTestNode(t, "iptables-nft")
			before := b.ruleset()
			valid := b.plan
			valid.Mode, valid.Guard = mode, []netip.AddrPort{metadataServer, extraGuard}
			valid.BPFDir = filepath.Join(t.TempDir(), "gme") // no bpffs: nothing can be pinned there
			if mode == ModeNFTables {
				b.run("iptables -t nat -A PREROUTING ! -i eth0 -d 169.254.169.254 -p tcp --dport 80 -j DNAT " +
					"--to-destination 169.254.169.253:988")
				before = b.ruleset()
				if err := writeState(valid.RunDir, State{Desired: Installed, Mode: mode, Listen: valid.Listen.String(),
					HostPods: valid.InterceptHostPods, Guard: valid.Guard, Standing: Standing{Good: true}}); err != nil {
					t.Fatal(err)
				}
			} else if err := b.Do(func() error { return b.router(valid).Install(t.Context()) }); err == nil {
				t.Fatal("installed where nothing can be pinned")
			}
			closed := b.unconfigured()
			closed.BPFDir = valid.BPFDir
			b.install(closed)
			s, err := ReadState(closed.RunDir)
			if err != nil || s.Closed || s.Mode != mode || s.Standing.Good || len(s.Standing.Faults) == 0 {
				t.Errorf("state: %+v, %v", s, err)
			}
			rules := strings.Join(only(lines(b.ruleset()), lines(before)), "\n")
			if got, want := strings.Contains(rules, "prohibit"), mode != ModeObserve; got != want ||
				strings.Contains(rules, extraGuard.Addr().String()) != want || strings.Contains(rules, "fd00:ec2::254") {
				t.Errorf("the guard stands: %v, want %v:\n%s", got, want, rules)
			}
			if err := b.check(closed); err == nil {
				t.Error("nothing is missing")
			}
		})
	}
}
