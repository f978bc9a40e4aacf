package routing

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/nft"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/xtables"
)

// TestChainState reads what both backends' commands put there.
func TestChainState(t *testing.T) {
	t.Parallel()
	onBothBackends(t, func(t *testing.T, b *testNode) {
		pre := xtables.OwnChains()[len(xtables.OwnChains())-1]
		const ours, fromNFT = "-m comment --comment gke-metadata-emulator -j GME-PRE", "insert rule ip nat PREROUTING tcp " +
			"dport { 7, 8 } dnat to 10.244.0.77"
		for _, c := range []struct {
			name, put string
			exists    bool
			at        []int
			foreign   string
		}{
			{"nothing", "true", false, nil, ""},
			{"the chain alone", "iptables -t nat -N GME-PRE; iptables -t nat -N GME-PREX; iptables -t nat -A PREROUTING -j " +
				"GME-PREX", true, nil, ""},
			{"behind another's", "iptables -t nat -A PREROUTING " + ours, true, []int{2}, ""},
			{"in front", "iptables -t nat -I PREROUTING " + ours, true, []int{1, 3}, ""},
			{"one with a condition", "iptables -t nat -F PREROUTING; iptables -t nat -A PREROUTING -p tcp " + ours, true,
				[]int{1}, ""},
			{"somebody else's", "iptables -t nat -F PREROUTING; iptables -t nat -A PREROUTING -m comment --comment mine -j " +
				"GME-PRE", true, nil, "GME-PRE of table nat"},
			{"somebody else's without a word", "iptables -t nat -F PREROUTING; iptables -t nat -A PREROUTING -g GME-PRE", true,
				nil, "GME-PRE of table nat"},
			{"a redirection of something else",
				"iptables -t nat -F PREROUTING; iptables -t nat -A PREROUTING -d 192.0.2.1 -p tcp -j DNAT --to-destination " +
					"192.0.2.2", true, nil, ""},
			{"a redirection", "iptables -t nat -A PREROUTING -d 169.254.169.254 -p tcp -j DNAT --to-destination 192.0.2.2",
				true, nil, "169.254.169.254:80"},
		} {
			t.Run(c.name, func(t *testing.T) {
				b.t = t
				b.run(c.put)
				for _, unlisted := range []bool{false, b.plan.Binary == "iptables-nft" && c.exists} {
					at := c.at
					if unlisted { // what iptables cannot list says the same
						b.run("nft '" + fromNFT + "'")
						at = nil
						for _, n := range c.at {
							at = append(at, n+1)
						}
					}
					var s xtables.ChainState
					if err := b.Do(func() error {
						x, err := xtables.Open(b.plan.Binary, xtables.IsLegacy(b.plan.Binary), netobj.IPv4, metadataServer)
						if err != nil {
							return err
						}
						if _, _, err = x.ListRules(t.Context(), "nat", "PREROUTING"); errors.Is(err,
							xtables.ErrIncompatible) != unlisted {
							t.Errorf("a rule of nft's %v: listed: %v", unlisted, err)
						}
						s, err = x.State(t.Context(), pre)
						return err
					}); err != nil {
						t.Fatal(err)
					}
					var positions []int
					for _, j := range s.Jumps {
						positions = append(positions, j.Position)
					}
					foreign := errors.Join(s.Foreign, s.Redirection)
					if s.Exists != c.exists || !slices.Equal(positions, at) || (foreign == nil) != (c.foreign == "") ||
						foreign != nil && (!errors.Is(foreign, fault.ErrForeign) || !strings.Contains(foreign.Error(), c.foreign)) {
						t.Errorf("beside a rule of nft's %v: %+v", unlisted, s)
					}
				}
				if c.exists && b.plan.Binary == "iptables-nft" {
					b.run(
						"nft delete rule ip nat PREROUTING handle $(nft -a list chain ip nat PREROUTING | sed -n 's/.*dport { 7, 8 } " +
							"dnat to 10.244.0.77 # handle //p')",
					)
				}
			})
		}
	})
}

// TestFingerprint: a change of our chains, and of what leads to them, is noticed without a command.
func TestFingerprint(t *testing.T) {
	onBothBackends(t, func(t *testing.T, b *testNode) {
		b.install(b.plan)
		if err := b.Do(func() error {
			m, err := openIPTables(b.plan, "")
			if err != nil {
				return err
			}
			r := b.router(b.plan).(*router)
			s, err := r.look(false)
			if err != nil {
				return err
			}
			if errs := m.check(t.Context(), s); len(errs) > 0 || m.changed() {
				t.Errorf("after a check: %v, changed %v", errs, m.changed())
			}
			for _, change := range []string{
				"iptables -t nat -A GME-PRE -p tcp -j ACCEPT", "iptables -D INPUT 1", "ip6tables -F",
				"iptables -t raw -F; iptables -t raw -X",
			} {
				b.run(change)
				if !m.changed() {
					t.Errorf("%s is not noticed", change)
				}
				if errs := m.check(t.Context(), s); len(errs) == 0 || !m.changed() {
					t.Errorf("%s: checked: %v, changed %v", change, errs, m.changed())
				}
				if err := r.Install(t.Context()); err != nil {
					return err
				}
				if errs := m.check(t.Context(), s); len(errs) > 0 || m.changed() {
					t.Errorf("%s: mended: %v, changed %v", change, errs, m.changed())
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	})
}

// nftMessage builds the message of a rule as the kernel tells it.
func nftMessage(expressions ...*nl.RtAttr) []byte {
	list := nl.NewRtAttr(unix.NFTA_RULE_EXPRESSIONS, nil)
	for _, e := range expressions {
		list.AddChild(e)
	}
	m := []byte{unix.NFPROTO_IPV4, 0, 0, 0}
	m = append(m, nl.NewRtAttr(unix.NFTA_RULE_HANDLE, binary.BigEndian.AppendUint64(nil, 7)).Serialize()...)
	return append(m, list.Serialize()...)
}

func nftExpression(name string, data ...*nl.RtAttr) *nl.RtAttr {
	e := nl.NewRtAttr(unix.NFTA_LIST_ELEM, nil)
	e.AddRtAttr(unix.NFTA_EXPR_NAME, nl.ZeroTerminated(name))
	d := e.AddRtAttr(unix.NFTA_EXPR_DATA, nil)
	for _, a := range data {
		d.AddChild(a)
	}
	return e
}

// FuzzParseNFTRule: no message makes the parser panic, and a plain jump of ours names a chain.
func FuzzParseNFTRule(f *testing.F) {
	verdict := nl.NewRtAttr(unix.NFTA_DATA_VERDICT, nil)
	verdict.AddRtAttr(unix.NFTA_VERDICT_CODE, binary.BigEndian.AppendUint32(nil, 1<<32-3)) // NFT_JUMP
	verdict.AddRtAttr(unix.NFTA_VERDICT_CHAIN, nl.ZeroTerminated("GME-PRE"))
	data := nl.NewRtAttr(unix.NFTA_IMMEDIATE_DATA, nil)
	data.AddChild(verdict)
	ours := nftMessage(
		nftExpression(
			"match",
			nl.NewRtAttr(unix.NFTA_MATCH_NAME, nl.ZeroTerminated("comment")),
			nl.NewRtAttr(unix.NFTA_MATCH_INFO, append([]byte(xtables.Comment), make([]byte, 40)...)),
		),
		nftExpression("counter"),
		nftExpression("immediate", nl.NewRtAttr(unix.NFTA_IMMEDIATE_DREG, make([]byte, 4)), data),
	)
	if r := xtables.ParseNFTRule(ours, []netip.AddrPort{metadataServer}); !r.Ours || r.To != "GME-PRE" || r.Handle != 7 {
		f.Errorf("%+v", r)
	}
	f.Add(ours)
	f.Add(nftMessage(nftExpression("target", nl.NewRtAttr(unix.NFTA_TARGET_NAME, nl.ZeroTerminated("DNAT")))))
	f.Add([]byte{2, 0, 0, 0})
	f.Fuzz(func(t *testing.T, message []byte) { xtables.ParseNFTRule(message, []netip.AddrPort{metadataServer}) })
}

// FuzzParseNFTables: neither a chain's message nor a rule's makes the parsers panic, and a mark is
// no longer than its message.
func FuzzParseNFTables(f *testing.F) {
	hook := nl.NewRtAttr(unix.NFTA_CHAIN_HOOK, nil)
	hook.AddRtAttr(unix.NFTA_HOOK_HOOKNUM, make([]byte, 4))
	hook.AddRtAttr(unix.NFTA_HOOK_PRIORITY, binary.BigEndian.AppendUint32(nil, 1<<32-110))
	chain := slices.Concat([]byte{unix.NFPROTO_IPV4, 0, 0, 0}, hook.Serialize(),
		nl.NewRtAttr(unix.NFTA_CHAIN_POLICY, binary.BigEndian.AppendUint32(nil, 1)).Serialize(),
		nl.NewRtAttr(unix.NFTA_CHAIN_TYPE, nl.ZeroTerminated("nat")).Serialize())
	if got := nft.ParseChain(chain); got != "type nat hook prerouting priority -110; policy accept;" {
		f.Error(got)
	}
	marked := slices.Concat(
		[]byte{unix.NFPROTO_IPV4, 0, 0, 0},
		nl.NewRtAttr(unix.NFTA_RULE_HANDLE, binary.BigEndian.AppendUint64(nil, 7)).Serialize(),
		nl.NewRtAttr(unix.NFTA_RULE_USERDATA, append([]byte{0, 2, 'x', 0, byte(nft.MarkType), 4}, "drop"...)).Serialize(),
	)
	if r := nft.ParseMarked(marked); r.Mark != "drop" || r.Handle != 7 {
		f.Errorf("%+v", r)
	}
	f.Add(chain)
	f.Add(marked)
	f.Fuzz(func(t *testing.T, message []byte) {
		nft.ParseChain(message)
		if r := nft.ParseMarked(message); len(r.Mark) > len(message) {
			t.Errorf("%q", r.Mark)
		}
	})
}
