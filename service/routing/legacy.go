package routing

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What is here reads tables of the legacy backend by the two getsockopt(2) that iptables itself uses. It changes nothing.

// IPT_SO_GET_INFO and IPT_SO_GET_ENTRIES of linux/netfilter_{ipv4,ipv6}/ip{,6}_tables.h.
const (
	soGetInfo    = 64
	soGetEntries = soGetInfo + 1
)

// tableInfo is struct ipt_getinfo, and ip6t_getinfo.
type tableInfo struct {
	Name                 [32]byte
	Hooks                uint32
	HookEntry, Underflow [5]uint32
	Entries, Size        uint32
}

// legacyTable says whether the legacy backend has the table in this network namespace. Listing a table would make it.
func legacyTable(table string, six bool) bool {
	names := "/proc/thread-self/net/ip_tables_names"
	if six {
		names = "/proc/thread-self/net/ip6_tables_names"
	}
	b, err := os.ReadFile(names)
	return err == nil && slices.Contains(strings.Fields(string(b)), table)
}

func legacySocket(six bool) (socket, level int, err error) {
	domain, level := unix.AF_INET, unix.SOL_IP
	if six {
		domain, level = unix.AF_INET6, unix.SOL_IPV6
	}
	// Raw, as iptables does, which is why it needs CAP_NET_RAW.
	socket, err = unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	return socket, level, permission(err)
}

func getsockopt(socket, level, option int, buf []byte) error {
	size := uint32(len(buf))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(socket), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func legacyTableInfo(socket, level int, table string) (info tableInfo, err error) {
	copy(info.Name[:], table)
	buf := make([]byte, binary.Size(info))
	copy(buf, table)
	if err := getsockopt(socket, level, soGetInfo, buf); err != nil {
		return info, fmt.Errorf("ask for table %s: %w", table, err)
	}
	_, err = binary.Decode(buf, binary.NativeEndian, &info)
	return info, err
}

// legacyLayout is where linux/netfilter_{ipv4,ipv6}/ip{,6}_tables.h put the fields of an entry.
type legacyLayout struct {
	selectors                         int // how long the part is that selects by addresses, interfaces and protocol, at the beginning
	targetOffset, nextOffset, matches int
}

var legacyLayouts = map[bool]legacyLayout{
	false: {selectors: 84, targetOffset: 88, nextOffset: 90, matches: 112},
	true:  {selectors: 136, targetOffset: 140, nextOffset: 142, matches: 168},
}

const (
	xtHeader     = 32 // struct xt_entry_match and xt_entry_target without data: size, name[29], revision
	entriesStart = 40 // struct ipt_get_entries without entries
)

// legacyHooks are the base chains in the order of a table's hooks.
var legacyHooks = []string{"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"}

// legacyTableGlance is a table of the legacy backend.
type legacyTableGlance struct {
	base   map[string][]ruleGlance
	chains map[string]int // that somebody made, and how many rules each has
}

// glanceLegacy looks at a table of the legacy backend. One that is not there is empty: asking for it would make it.
func glanceLegacy(table string, six bool) (g legacyTableGlance, err error) {
	s, level, err := legacySocket(six)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		return g, nil // a kernel without IPv6 has no such tables either
	}
	if err != nil {
		return g, err
	}
	defer func() { _ = unix.Close(s) }()
	if !legacyTable(table, six) {
		return g, nil
	}
	for range 5 {
		var info tableInfo
		if info, err = legacyTableInfo(s, level, table); err != nil {
			return g, permission(err)
		}
		var entries []byte
		if entries, err = legacyEntries(s, level, table, info.Size); errors.Is(err, unix.EAGAIN) {
			continue // it was changed in between
		}
		if err != nil {
			return g, permission(err)
		}
		return parseLegacy(entries, info, six)
	}
	return g, err
}

func legacyEntries(socket, level int, table string, size uint32) ([]byte, error) {
	buf := make([]byte, entriesStart+int(size))
	copy(buf, table)
	binary.NativeEndian.PutUint32(buf[32:], size)
	if err := getsockopt(socket, level, soGetEntries, buf); err != nil {
		return nil, fmt.Errorf("read table %s: %w", table, err)
	}
	return buf[entriesStart:], nil
}

var errLegacyTable = errors.New("a table of the legacy backend is not to be understood")

// parseLegacy reads the entries of a table: the chains one after the other, those that somebody made each behind an entry that tells its
// name, and one more such entry at the end.
func parseLegacy(entries []byte, info tableInfo, six bool) (g legacyTableGlance, err error) {
	layout := legacyLayouts[six]
	names := map[uint32]string{} // by where the chain's first rule is
	named, in := "", ""          // whose name was told last, and the chain that its rules are of
	g.base, g.chains = map[string][]ruleGlance{}, map[string]int{}
	for at := uint32(0); int(at) < len(entries); {
		e := entries[at:]
		if len(e) < layout.matches {
			return g, errLegacyTable
		}
		target, next := int(binary.NativeEndian.Uint16(e[layout.targetOffset:])), int(binary.NativeEndian.Uint16(e[layout.nextOffset:]))
		if target < layout.matches || next < target+xtHeader || next > len(e) {
			return g, errLegacyTable
		}
		if named != "" {
			names[at], in, named = named, named, ""
			g.chains[in] = -1 // the last of its entries is its end
		}
		name, data := xtName(e[target:]), e[target+xtHeader:next]
		if name == "ERROR" {
			named = unix.ByteSliceToString(data)
		} else if in != "" {
			g.chains[in]++
		} else if base := info.baseChain(at); base != "" {
			r := ruleGlance{redirects: redirecting(name)}
			comments, others := xtComments(e[layout.matches:target])
			r.ours = slices.Contains(comments, comment)
			r.plain = len(comments) == 1 && !others && len(bytes.Trim(e[:layout.selectors], "\x00")) == 0
			if name == "" && len(data) >= 4 { // a verdict, or where to jump to
				r.offset = uint32(max(0, int32(binary.NativeEndian.Uint32(data))))
			}
			g.base[base] = append(g.base[base], r)
		}
		at += uint32(next)
	}
	for _, rules := range g.base {
		for i := range rules {
			rules[i].to = names[rules[i].offset] // 0 is where a base chain begins
		}
	}
	return g, nil
}

// baseChain is the chain to which a rule at the offset belongs, "" if that is none of the base chains or the rule is its policy.
func (info tableInfo) baseChain(at uint32) string {
	for hook, name := range legacyHooks {
		if info.Hooks&(1<<hook) != 0 && at >= info.HookEntry[hook] && at < info.Underflow[hook] {
			return name
		}
	}
	return ""
}

// xtName is the name in the header of a match or target.
func xtName(b []byte) string { return unix.ByteSliceToString(b[2:31]) }

// xtComments are the texts of a rule's comments, and whether it has other matches.
func xtComments(matches []byte) (comments []string, others bool) {
	for len(matches) >= xtHeader {
		size := int(binary.NativeEndian.Uint16(matches))
		if size < xtHeader || size > len(matches) {
			return comments, true
		}
		if xtName(matches) == "comment" {
			comments = append(comments, unix.ByteSliceToString(matches[xtHeader:size]))
		} else {
			others = true
		}
		matches = matches[size:]
	}
	return comments, others
}
