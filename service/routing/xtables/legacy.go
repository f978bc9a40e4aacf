package xtables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
)

// soGetInfo is IPT_SO_GET_INFO of linux/netfilter_ipv4/ip_tables.h, and IP6T_SO_GET_INFO.
const soGetInfo = 64

// tableInfo is struct ipt_getinfo, and ip6t_getinfo.
type tableInfo struct {
	Name                 [32]byte
	Hooks                uint32
	HookEntry, Underflow [5]uint32
	Entries, Size        uint32
}

// LegacyTable says whether the legacy backend has the table in this network namespace. Listing a
// table would make it.
func LegacyTable(table string, family netobj.Family) (bool, error) {
	names := "/proc/thread-self/net/ip_tables_names"
	if family == netobj.IPv6 {
		names = "/proc/thread-self/net/ip6_tables_names"
	}
	b, err := os.ReadFile(names)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil // the kernel has no such tables
	}
	return err == nil && slices.Contains(strings.Fields(string(b)), table), fault.Permission(err)
}

// legacyCount asks, by the getsockopt(2) that iptables itself uses, how many rules a table has and
// where its base chains begin. It takes 1 µs, whatever stands in the table. A table that is not
// there has no count.
func legacyCount(table string, family netobj.Family) (string, error) {
	level := unix.SOL_IP
	if family == netobj.IPv6 {
		level = unix.SOL_IPV6
	}
	// Raw, as iptables does, which is why it needs CAP_NET_RAW.
	socket, err := unix.Socket(int(family), unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		return "", nil // a kernel without IPv6 has no such tables either
	}
	if err != nil {
		return "", fault.Permission(err)
	}
	defer func() { _ = unix.Close(socket) }()
	if exists, err := LegacyTable(table, family); err != nil || !exists {
		return "", err
	}
	var info tableInfo
	buf := make([]byte, binary.Size(info))
	copy(buf, table)
	size := uint32(len(buf))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(socket), uintptr(level), soGetInfo,
		uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return "", fmt.Errorf("ask for table %s: %w", table, fault.Permission(errno))
	}
	if _, err := binary.Decode(buf, binary.NativeEndian, &info); err != nil {
		return "", err
	}
	return fmt.Sprint(info.HookEntry, info.Underflow, info.Entries, info.Size), nil
}
