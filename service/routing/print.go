package routing

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unsafe"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// print is what tells, without running iptables, whether chains are still those that were read: a text for each of ours that stands for
// what is in it and in the chain that jumps to it.
//
// nf_tables: the generation counts every transaction (3 µs to ask); when it has moved, the handles of the rules (0.3 ms) tell whether
// that was about us. A rule never changes under its handle, and no handle of a table is given twice; a table that was deleted and made
// anew has another handle itself.
//
// Legacy tables know no events and no generations. How many rules a table has, and where its base chains begin, costs 1 µs a table to
// ask; a change that leaves all of that as it was (two rules swapped) is found by the slow sweep only.
type print struct {
	generation uint32
	chains     map[string]string // by printKey
}

func printKey(c chain, six bool) string { return fmt.Sprint(c.name, six) }

// same says whether p and now know the chain, and as the same.
func (p print) same(now print, key string) bool {
	text, ok := p.chains[key]
	return ok && text == now.chains[key]
}

// print takes the chains' print; an empty one, which is like no other, if it cannot be had.
func (m *iptables) print() print {
	p := print{chains: map[string]string{}}
	var err error
	if m.legacy {
		err = legacyPrint(m, p.chains)
	} else {
		p.generation, err = nftPrint(m, p.chains)
	}
	if err != nil {
		return print{}
	}
	return p
}

// changed says whether a chain may not be as it was when it was last found to be right.
func (m *iptables) changed() bool {
	var keys []string
	for _, six := range m.families() {
		for _, c := range ownChains(six) {
			keys = append(keys, printKey(c, six))
		}
	}
	if !m.legacy && len(m.good.chains) == len(keys) {
		if g, err := generation(); err == nil && g == m.good.generation {
			return false
		}
	}
	now := m.print()
	if slices.ContainsFunc(keys, func(key string) bool { return !m.good.same(now, key) }) {
		return true
	}
	m.good = now
	return false
}

func (m *iptables) families() []bool {
	if m.six == nil {
		return []bool{false}
	}
	return []bool{false, true}
}

const nftables = unix.NFNL_SUBSYS_NFTABLES << 8

// nftaTableHandle is NFTA_TABLE_HANDLE of linux/netfilter/nf_tables.h.
const nftaTableHandle = 4

// generation counts nf_tables' transactions in this network namespace.
func generation() (uint32, error) {
	replies, err := askNFT(unix.NFT_MSG_GETGEN, 0, unix.NFT_MSG_NEWGEN, unix.AF_UNSPEC)
	if err == nil && len(replies) != 1 {
		err = errors.New("nf_tables tells no generation")
	}
	if err != nil {
		return 0, err
	}
	id := attribute(replies[0], unix.NFTA_GEN_ID)
	if len(id) != 4 {
		return 0, errors.New("nf_tables tells no generation")
	}
	return binary.BigEndian.Uint32(id), nil
}

func nftPrint(m *iptables, chains map[string]string) (uint32, error) {
	g, err := generation()
	if err != nil {
		return 0, err
	}
	for _, six := range m.families() {
		for _, c := range ownChains(six) {
			if chains[printKey(c, six)], err = nftHandles(c, six); err != nil {
				return 0, err
			}
		}
	}
	return g, nil
}

// nftHandles are those of the chain's table, of what jumps to it with all around that, and of what is in it.
func nftHandles(c chain, six bool) (string, error) {
	family := uint8(unix.NFPROTO_IPV4)
	if six {
		family = unix.NFPROTO_IPV6
	}
	var text strings.Builder
	table, err := askNFT(unix.NFT_MSG_GETTABLE, 0, unix.NFT_MSG_NEWTABLE, family, nl.NewRtAttr(unix.NFTA_TABLE_NAME, nl.ZeroTerminated(c.table)))
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return "", err
	}
	for _, t := range table {
		fmt.Fprintf(&text, "%x", attribute(t, nftaTableHandle))
	}
	for _, name := range []string{c.base, c.name} {
		fmt.Fprintf(&text, " %s", name)
		rules, err := askNFT(unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP, unix.NFT_MSG_NEWRULE, family,
			nl.NewRtAttr(unix.NFTA_RULE_TABLE, nl.ZeroTerminated(c.table)), nl.NewRtAttr(unix.NFTA_RULE_CHAIN, nl.ZeroTerminated(name)))
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return "", err
		}
		for _, r := range rules {
			if string(attribute(r, unix.NFTA_RULE_CHAIN)) == name+"\x00" { // old kernels tell all rules of the table
				fmt.Fprintf(&text, " %x", attribute(r, unix.NFTA_RULE_HANDLE))
			}
		}
	}
	return text.String(), nil
}

// askNFT sends one question to nf_tables and returns the answers of the wanted type.
func askNFT(question, flags, answer int, family uint8, attrs ...*nl.RtAttr) ([][]byte, error) {
	return retryDump(func() ([][]byte, error) {
		req := nl.NewNetlinkRequest(nftables|question, flags)
		req.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: nl.NFNETLINK_V0})
		for _, a := range attrs {
			req.AddData(a)
		}
		return req.Execute(unix.NETLINK_NETFILTER, uint16(nftables|answer))
	})
}

// attribute finds one attribute of a netfilter message, nil if it is not there.
func attribute(message []byte, kind uint16) []byte {
	if len(message) < nl.SizeofNfgenmsg {
		return nil
	}
	for rest := message[nl.SizeofNfgenmsg:]; len(rest) >= unix.SizeofNlAttr; {
		size := int(binary.NativeEndian.Uint16(rest))
		if size < unix.SizeofNlAttr || size > len(rest) {
			return nil
		}
		if binary.NativeEndian.Uint16(rest[2:])&nl.NLA_TYPE_MASK == kind {
			return rest[unix.SizeofNlAttr:size]
		}
		rest = rest[min((size+3)&^3, len(rest)):]
	}
	return nil
}

// soGetInfo is IPT_SO_GET_INFO and IP6T_SO_GET_INFO of linux/netfilter_{ipv4,ipv6}/ip{,6}_tables.h.
const soGetInfo = 64

// tableInfo is struct ipt_getinfo, and ip6t_getinfo.
type tableInfo struct {
	Name                 [32]byte
	Hooks                uint32
	HookEntry, Underflow [5]uint32
	Entries, Size        uint32
}

// legacyPrint asks only for tables that are there: asking for another one would make it.
func legacyPrint(m *iptables, chains map[string]string) error {
	for _, six := range m.families() {
		domain, level := unix.AF_INET, unix.SOL_IP
		if six {
			domain, level = unix.AF_INET6, unix.SOL_IPV6
		}
		s, err := unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW) // as iptables does, which is why it needs CAP_NET_RAW
		if err != nil {
			return err
		}
		tables := map[string]string{}
		for _, c := range ownChains(six) {
			if _, asked := tables[c.table]; !asked && legacyTable(c.table, six) {
				if tables[c.table], err = legacyTableInfo(s, level, c.table); err != nil {
					break
				}
			}
			if text, ok := tables[c.table]; ok {
				chains[printKey(c, six)] = text
			}
		}
		_ = unix.Close(s)
		if err != nil {
			return err
		}
	}
	return nil
}

func legacyTableInfo(socket, level int, table string) (string, error) {
	var info tableInfo
	copy(info.Name[:], table)
	size := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(socket), uintptr(level), soGetInfo,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return "", fmt.Errorf("ask for table %s: %w", table, errno)
	}
	return fmt.Sprint(info.HookEntry, info.Underflow, info.Entries, info.Size), nil
}
