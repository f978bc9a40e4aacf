package probe

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/nft"
)

// Trace has nf_tables tell what becomes of one pod's packets, as `nft monitor trace` shows it.
// Whether a packet is traced says a table of ours, in front of all others:
//
//	table ip gke-metadata-emulator-doctor {       (or ip6)
//		chain from-pod { type filter hook prerouting priority -2147483648; iifname "gme-doctor" meta nftrace set 1 }
//		chain to-pod   { type filter hook output priority -2147483648; oifname "gme-doctor" meta nftrace set 1 }
//	}
//
// It belongs to the socket (flags owner): the kernel takes it away with the process. Kernels before
// 5.12 know no owners, and there a process that is killed leaves the table behind, which traces
// nothing, since its interface is gone, and is replaced by the next.
type Trace struct {
	socket *nl.NetlinkSocket
	addr   netip.Addr
	owned  bool
}

const (
	TraceTable = "gke-metadata-emulator-doctor"
	tableOwner = 2 // NFT_TABLE_F_OWNER of linux/netfilter/nf_tables.h
)

func StartTrace(addr netip.Addr, link string) (*Trace, error) {
	s, err := nl.Subscribe(unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTRACE)
	if err != nil {
		return nil, fmt.Errorf("listen to the traces of nf_tables: %w", fault.Permission(err))
	}
	t := &Trace{socket: s, addr: addr, owned: true}
	if err := t.transaction(t.rules(link, tableOwner)); err != nil {
		t.owned = false
		_ = t.transaction(t.remove()) // left behind on a kernel without owners
		err = t.transaction(t.rules(link, 0))
		if err != nil {
			s.Close()
			return nil, fmt.Errorf("have nf_tables trace packets: %w", fault.Permission(err))
		}
	}
	return t, nil
}

func (t *Trace) close() error {
	var err error
	if !t.owned {
		err = t.transaction(t.remove())
	}
	t.socket.Close()
	return err
}

// drops reads what was traced, until nothing comes for as long as quiet, and names who dropped a
// packet, each once.
func (t *Trace) drops(quiet time.Duration) (by []string, err error) {
	wait := unix.NsecToTimeval(quiet.Nanoseconds())
	if err := t.socket.SetReceiveTimeout(&wait); err != nil {
		return nil, err
	}
	ours := map[uint32]bool{} // packets: only the first message of a chain shows what is in it
	for {
		messages, from, err := t.socket.Receive()
		switch {
		case errors.Is(err, unix.EAGAIN):
			return by, nil
		case errors.Is(err, unix.ENOBUFS): // more than we could read; what we need may come yet
			continue
		case err != nil:
			return by, fmt.Errorf("read the traces of nf_tables: %w", err)
		case from.Pid != nl.PidKernel:
			continue
		}
		for _, m := range messages {
			if m.Header.Type != nft.Subsystem|unix.NFT_MSG_TRACE || len(m.Data) < nl.SizeofNfgenmsg {
				continue
			}
			e := parseTrace(m.Data)
			if e.from == t.addr || e.to == t.addr {
				ours[e.packet] = true
			}
			if e.dropped && ours[e.packet] && !slices.Contains(by, e.String()) {
				by = append(by, e.String())
			}
		}
	}
}

// traced is one message: a packet met a rule, or the end of a base chain.
type traced struct {
	packet       uint32
	from, to     netip.Addr // where the message shows the packet
	family       string
	table, chain string
	rule         uint64 // its handle; 0: the chain's policy
	dropped      bool
}

func parseTrace(message []byte) (e traced) {
	e.family = nft.FamilyWord(message)
	e.table = unix.ByteSliceToString(nft.Attribute(message, unix.NFTA_TRACE_TABLE))
	e.chain = unix.ByteSliceToString(nft.Attribute(message, unix.NFTA_TRACE_CHAIN))
	e.packet = nft.Uint32(nft.Attribute(message, unix.NFTA_TRACE_ID))
	if h := nft.Attribute(message, unix.NFTA_TRACE_RULE_HANDLE); len(h) == 8 {
		e.rule = binary.BigEndian.Uint64(h)
	}
	if h := nft.Attribute(message, unix.NFTA_TRACE_NETWORK_HEADER); len(h) >= 20 && h[0]>>4 == 4 {
		e.from, e.to = netip.AddrFrom4([4]byte(h[12:])), netip.AddrFrom4([4]byte(h[16:]))
	} else if len(h) >= 40 && h[0]>>4 == 6 {
		e.from, e.to = netip.AddrFrom16([16]byte(h[8:])), netip.AddrFrom16([16]byte(h[24:]))
	}
	switch nft.Uint32(nft.Attribute(message, unix.NFTA_TRACE_TYPE)) {
	case unix.NFT_TRACETYPE_POLICY:
		p := nft.Attribute(message, unix.NFTA_TRACE_POLICY)
		e.rule, e.dropped = 0, len(p) == 4 && nft.Uint32(p) == 0 // NF_DROP
	case unix.NFT_TRACETYPE_RULE:
		v := nft.Within(nft.Attribute(message, unix.NFTA_TRACE_VERDICT), nftaVerdictCode)
		e.dropped = len(v) == 4 && nft.Uint32(v) == 0
	}
	return e
}

// nftaVerdictCode is NFTA_VERDICT_CODE.
const nftaVerdictCode = 1

// String names the chain as nft(8) takes it, and the rule in nft's words where there is an nft to
// tell them.
func (e traced) String() string {
	chain := fmt.Sprintf("nft chain %s %s %s", e.family, e.table, e.chain)
	if e.rule == 0 {
		return chain + " (policy drop)"
	}
	if text := ruleText(e.family, e.table, e.chain, e.rule); text != "" {
		return fmt.Sprintf("%s (rule: %s)", chain, text)
	}
	return fmt.Sprintf("%s (rule with handle %d)", chain, e.rule)
}

var counted = regexp.MustCompile(` counter packets \d+ bytes \d+`)

func ruleText(family, table, chain string, handle uint64) string {
	out, err := exec.Command("nft", "-a", "list", "chain", family, table, chain).Output()
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(out)) {
		if rule, ok := strings.CutSuffix(strings.TrimSpace(line), fmt.Sprintf(" # handle %d", handle)); ok {
			return counted.ReplaceAllString(rule, "")
		}
	}
	return ""
}

// transaction sends the messages as one, and returns the kernel's first refusal.
func (t *Trace) transaction(messages []*nl.NetlinkRequest) error {
	batch := func(kind int) *nl.NetlinkRequest {
		r := nl.NewNetlinkRequest(kind, 0)
		r.AddData(
			&nl.Nfgenmsg{NfgenFamily: unix.AF_UNSPEC, Version: nl.NFNETLINK_V0, ResId: nl.Swap16(unix.NFNL_SUBSYS_NFTABLES)},
		)
		return r
	}
	waiting := map[uint32]bool{}
	var text []byte
	for _, m := range slices.Concat([]*nl.NetlinkRequest{batch(unix.NFNL_MSG_BATCH_BEGIN)}, messages,
		[]*nl.NetlinkRequest{batch(unix.NFNL_MSG_BATCH_END)}) {
		if m.Flags&unix.NLM_F_ACK != 0 {
			waiting[m.Seq] = true
		}
		text = append(text, m.Serialize()...)
	}
	if err := unix.Sendto(t.socket.GetFd(), text, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	wait := unix.NsecToTimeval((5 * time.Second).Nanoseconds())
	if err := t.socket.SetReceiveTimeout(&wait); err != nil {
		return err
	}
	var refused error
	for len(waiting) > 0 {
		replies, from, err := t.socket.Receive()
		if err != nil {
			return errors.Join(refused, err)
		}
		for _, r := range replies {
			if from.Pid != nl.PidKernel || r.Header.Type != unix.NLMSG_ERROR || len(r.Data) < 4 || !waiting[r.Header.Seq] {
				continue
			}
			delete(waiting, r.Header.Seq)
			if code := int32(binary.NativeEndian.Uint32(r.Data)); code != 0 && refused == nil {
				refused = unix.Errno(-code)
			}
		}
		if refused != nil {
			return refused // the rest is not answered one by one
		}
	}
	return nil
}

func (t *Trace) request(kind, flags int, attrs ...*nl.RtAttr) *nl.NetlinkRequest {
	r := nl.NewNetlinkRequest(nft.Subsystem|kind, unix.NLM_F_ACK|flags)
	r.AddData(&nl.Nfgenmsg{NfgenFamily: uint8(netobj.FamilyOf(t.addr)), Version: nl.NFNETLINK_V0})
	for _, a := range attrs {
		r.AddData(a)
	}
	return r
}

func (t *Trace) remove() []*nl.NetlinkRequest {
	return []*nl.NetlinkRequest{t.request(unix.NFT_MSG_DELTABLE, 0, textAttr(unix.NFTA_TABLE_NAME, TraceTable))}
}

func (t *Trace) rules(link string, flags uint32) (messages []*nl.NetlinkRequest) {
	messages = []*nl.NetlinkRequest{t.request(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE|unix.NLM_F_EXCL,
		textAttr(unix.NFTA_TABLE_NAME, TraceTable), numberAttr(unix.NFTA_TABLE_FLAGS, flags))}
	for _, c := range []struct {
		name       string
		hook, meta uint32
	}{{"from-pod", unix.NF_INET_PRE_ROUTING, unix.NFT_META_IIFNAME},
		{"to-pod", unix.NF_INET_LOCAL_OUT, unix.NFT_META_OIFNAME}} {
		const first = 1 << 31 // the lowest priority: -2147483648
		messages = append(messages,
			t.request(
				unix.NFT_MSG_NEWCHAIN,
				unix.NLM_F_CREATE,
				textAttr(
					unix.NFTA_CHAIN_TABLE,
					TraceTable,
				),
				textAttr(unix.NFTA_CHAIN_NAME, c.name),
				textAttr(unix.NFTA_CHAIN_TYPE, "filter"),
				nested(
					unix.NFTA_CHAIN_HOOK,
					numberAttr(unix.NFTA_HOOK_HOOKNUM, c.hook),
					numberAttr(unix.NFTA_HOOK_PRIORITY, first),
				),
			),
			t.request(unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND,
				textAttr(unix.NFTA_RULE_TABLE, TraceTable), textAttr(unix.NFTA_RULE_CHAIN, c.name),
				nested(
					unix.NFTA_RULE_EXPRESSIONS,
					expression("meta", numberAttr(unix.NFTA_META_KEY, c.meta), numberAttr(unix.NFTA_META_DREG, unix.NFT_REG_1)),
					expression(
						"cmp",
						numberAttr(unix.NFTA_CMP_SREG, unix.NFT_REG_1),
						numberAttr(unix.NFTA_CMP_OP, unix.NFT_CMP_EQ),
						nested(
							unix.NFTA_CMP_DATA,
							nl.NewRtAttr(unix.NFTA_DATA_VALUE, append([]byte(link), make([]byte, unix.IFNAMSIZ-len(link))...)),
						),
					),
					expression("immediate", numberAttr(unix.NFTA_IMMEDIATE_DREG, unix.NFT_REG_1),
						nested(unix.NFTA_IMMEDIATE_DATA, nl.NewRtAttr(unix.NFTA_DATA_VALUE, []byte{1}))),
					expression(
						"meta",
						numberAttr(unix.NFTA_META_KEY, unix.NFT_META_NFTRACE),
						numberAttr(unix.NFTA_META_SREG, unix.NFT_REG_1),
					),
				)))
	}
	return messages
}

func expression(name string, attrs ...*nl.RtAttr) *nl.RtAttr {
	return nested(unix.NFTA_LIST_ELEM, textAttr(unix.NFTA_EXPR_NAME, name), nested(unix.NFTA_EXPR_DATA, attrs...))
}

func nested(kind int, attrs ...*nl.RtAttr) *nl.RtAttr {
	a := nl.NewRtAttr(unix.NLA_F_NESTED|kind, nil)
	for _, child := range attrs {
		a.AddChild(child)
	}
	return a
}

func textAttr(kind int, text string) *nl.RtAttr { return nl.NewRtAttr(kind, nl.ZeroTerminated(text)) }

func numberAttr(kind int, n uint32) *nl.RtAttr { return nl.NewRtAttr(kind, nl.BEUint32Attr(n)) }
