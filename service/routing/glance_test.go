package routing

import (
	"encoding/binary"
	"slices"
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// TestGlances compares what the kernel tells with what both backends' commands put there.
func TestGlances(t *testing.T) {
	t.Parallel()
	onBothBackends(t, func(t *testing.T, b *bed) {
		pre := ownChains()[len(ownChains())-1]
		look := func() glance {
			t.Helper()
			var g glance
			if err := b.Do(func() error {
				x, err := openXtables(b.plan.Binary, isLegacy(b.plan.Binary), false)
				if err != nil {
					return err
				}
				all, err := x.glances(ownChains())
				g = all[pre.name]
				return err
			}); err != nil {
				t.Fatal(err)
			}
			return g
		}
		positions := func(g glance) (at []int) {
			for _, j := range g.jumps {
				at = append(at, j.position)
			}
			return at
		}
		for _, c := range []struct {
			name, do string
			exists   bool
			at       []int
			odd      bool
		}{
			{"nothing", "true", false, nil, false},
			{"the chain alone", "iptables -t nat -N GME-PRE; iptables -t nat -N GME-PREX; iptables -t nat -A PREROUTING -j GME-PREX", true, nil, false},
			{"behind another's", "iptables -t nat -A PREROUTING -m comment --comment gke-metadata-emulator -j GME-PRE", true, []int{2}, false},
			{"in front", "iptables -t nat -I PREROUTING -m comment --comment gke-metadata-emulator -j GME-PRE", true, []int{1, 3}, false},
			{"one with a condition", "iptables -t nat -F PREROUTING; iptables -t nat -A PREROUTING -p tcp -m comment --comment gke-metadata-emulator -j GME-PRE", true, []int{1}, true},
			{"somebody else's", "iptables -t nat -F PREROUTING; iptables -t nat -A PREROUTING -m comment --comment mine -j GME-PRE", true, nil, true},
			{"somebody else's without a word", "iptables -t nat -F PREROUTING; iptables -t nat -A PREROUTING -j GME-PRE", true, nil, true},
			{"a redirection", "iptables -t nat -F PREROUTING; iptables -t nat -A PREROUTING -d 192.0.2.1 -p tcp -j DNAT --to-destination 192.0.2.2", true, nil, true},
			{"a REDIRECT", "iptables -t nat -F PREROUTING; iptables -t nat -A PREROUTING -p tcp --dport 7 -j REDIRECT --to-ports 8", true, nil, true},
			{"none that matters", "iptables -t nat -F PREROUTING; iptables -t nat -A PREROUTING -p tcp --dport 7 -j ACCEPT", true, nil, false},
		} {
			t.Run(c.name, func(t *testing.T) {
				b.t = t
				b.sh(c.do)
				if g := look(); g.exists != c.exists || !slices.Equal(positions(g), c.at) || g.odd != c.odd {
					t.Errorf("%+v", g)
				}
			})
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
		nftExpression("match", nl.NewRtAttr(unix.NFTA_MATCH_NAME, nl.ZeroTerminated("comment")), nl.NewRtAttr(unix.NFTA_MATCH_INFO, append([]byte(comment), make([]byte, 40)...))),
		nftExpression("counter"),
		nftExpression("immediate", nl.NewRtAttr(unix.NFTA_IMMEDIATE_DREG, make([]byte, 4)), data))
	if r := parseNFTRule(ours); !r.ours || !r.plain || r.to != "GME-PRE" || r.handle != 7 {
		f.Errorf("%+v", r)
	}
	f.Add(ours)
	f.Add(nftMessage(nftExpression("target", nl.NewRtAttr(unix.NFTA_TARGET_NAME, nl.ZeroTerminated("DNAT")))))
	f.Add([]byte{2, 0, 0, 0})
	f.Fuzz(func(t *testing.T, message []byte) { parseNFTRule(message) })
}

// FuzzParseLegacy: no table makes the parser panic or read on for ever.
func FuzzParseLegacy(f *testing.F) {
	entry := func(name string, data []byte) []byte {
		e := make([]byte, 112+xtHeader+len(data))
		binary.NativeEndian.PutUint16(e[88:], 112)
		binary.NativeEndian.PutUint16(e[90:], uint16(len(e)))
		copy(e[112+2:], name)
		copy(e[112+xtHeader:], data)
		return e
	}
	jump := entry("", []byte{0xe0, 1, 0, 0, 0, 0, 0, 0}) // to 480
	accept := entry("", []byte{0xfe, 0xff, 0xff, 0xff, 0, 0, 0, 0})
	name := make([]byte, 32)
	copy(name, "GME-PRE")
	last := make([]byte, 32)
	copy(last, "ERROR")
	table := slices.Concat(jump, accept, entry("ERROR", name), accept, entry("ERROR", last))
	if g, err := parseLegacy(table, tableInfo{Hooks: 1, Underflow: [5]uint32{152}}, false); err != nil || len(g.base["PREROUTING"]) != 1 || g.base["PREROUTING"][0].to != "GME-PRE" {
		f.Errorf("%+v, %v", g, err)
	}
	f.Add(table, false)
	f.Add(table[:150], false)
	f.Add(table, true)
	f.Fuzz(func(t *testing.T, entries []byte, six bool) {
		info := tableInfo{Hooks: 1, Underflow: [5]uint32{152}}
		g, err := parseLegacy(entries, info, six)
		if err == nil && len(g.base["PREROUTING"]) > len(entries)/112 {
			t.Errorf("%d rules in %d bytes", len(g.base["PREROUTING"]), len(entries))
		}
	})
}

// FuzzParseNFTables: neither a chain's message nor a rule's makes the parsers panic, and a mark is no longer than its message.
func FuzzParseNFTables(f *testing.F) {
	hook := nl.NewRtAttr(unix.NFTA_CHAIN_HOOK, nil)
	hook.AddRtAttr(unix.NFTA_HOOK_HOOKNUM, make([]byte, 4))
	hook.AddRtAttr(unix.NFTA_HOOK_PRIORITY, binary.BigEndian.AppendUint32(nil, 1<<32-110))
	chain := slices.Concat([]byte{unix.NFPROTO_IPV4, 0, 0, 0}, hook.Serialize(),
		nl.NewRtAttr(unix.NFTA_CHAIN_POLICY, binary.BigEndian.AppendUint32(nil, 1)).Serialize(),
		nl.NewRtAttr(unix.NFTA_CHAIN_TYPE, nl.ZeroTerminated("nat")).Serialize())
	if got := parseNFTChain(chain); got != "type nat hook prerouting priority -110; policy accept;" {
		f.Error(got)
	}
	marked := slices.Concat([]byte{unix.NFPROTO_IPV4, 0, 0, 0}, nl.NewRtAttr(unix.NFTA_RULE_HANDLE, binary.BigEndian.AppendUint64(nil, 7)).Serialize(),
		nl.NewRtAttr(unix.NFTA_RULE_USERDATA, append([]byte{0, 2, 'x', 0, byte(markType), 4}, "drop"...)).Serialize())
	if r := parseMarked(marked); r.mark != "drop" || r.handle != 7 {
		f.Errorf("%+v", r)
	}
	f.Add(chain)
	f.Add(marked)
	f.Fuzz(func(t *testing.T, message []byte) {
		parseNFTChain(message)
		if r := parseMarked(message); len(r.mark) > len(message) {
			t.Errorf("%q", r.mark)
		}
	})
}
