package routing

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
)

// ListenedBy is who gets connections to an address, or the packets of UDP.
type ListenedBy struct {
	At  netip.AddrPort // the address that it listens on; the zero AddrPort: nobody listens
	PID string         // "" = a process of another namespace, or of another user where we are not root
	Exe string         // the program; "systemd" for process 1
	// the systemd unit of the process; "" = none, or process 1, whose socket may be of any unit
	Unit string
	Own  bool // systemd in the emulator's name, or the emulator itself
}

// String names the program, the process and the unit. It has no argument of the command line, which
// may be a secret.
func (l ListenedBy) String() string {
	if l.PID == "" {
		return "a process that cannot be seen from here"
	}
	unit := ""
	if l.Unit != "" {
		unit = ", " + l.Unit
	}
	return strings.Map(func(r rune) rune { // a file name may hold anything
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, fmt.Sprintf("%s (process %s%s)", filepath.Base(programFile(l.Exe)), l.PID, unit))
}

// programFile is the file name of a program. An upgrade may have replaced the file since its start.
func programFile(exe string) string { return strings.TrimSuffix(exe, " (deleted)") }

// Listener finds out who gets connections to l in this network namespace.
func Listener(l netip.AddrPort) ListenedBy { return holder(unix.IPPROTO_TCP, 1<<netlink.TCP_LISTEN, l) }

// QueryListener is Listener for UDP, to which DNS queries are redirected.
func QueryListener(l netip.AddrPort) ListenedBy { return holder(unix.IPPROTO_UDP, anyState, l) }

// anyState is all of them: of UDP the kernel says TCP_CLOSE, or TCP_ESTABLISHED of a socket that
// has a peer.
const anyState = 1<<32 - 1

// HoldsFrom says whether somebody else has the address, or every address, so that the emulator gets
// nothing there. A process that cannot be seen from here may be systemd.
func (l ListenedBy) HoldsFrom(at netip.AddrPort) bool {
	return l.At.IsValid() && (l.At != at || l.PID != "" && !l.Own)
}

func holder(protocol uint8, states uint32, l netip.AddrPort) ListenedBy {
	inode, at := socketAt(protocol, states, l)
	if inode == "" {
		return ListenedBy{}
	}
	by := ListenedBy{At: at}
	by.PID, by.Exe = owner(inode)
	if by.Own = by.PID == "1"; by.PID != "" && !by.Own {
		cgroups, _ := os.ReadFile("/proc/" + by.PID + "/cgroup")
		by.Unit = unitOf(string(cgroups))
		by.Own = ownCgroup(string(cgroups)) || sameProgram(by.PID)
	}
	return by
}

// sameProgram says whether a process runs the file that this one runs. A path would not tell: it
// names another file in another mount namespace. After an upgrade the file of an earlier process is
// deleted and another one, so that process is known by ownCgroup, or by systemd holding the socket
// too; one that was started by hand counts as foreign and has to be stopped.
func sameProgram(pid string) bool {
	its, err := os.Stat("/proc/" + pid + "/exe") // the file itself, whatever its path, deleted or not
	if err != nil {
		return false
	}
	ours, err := os.Stat("/proc/self/exe")
	return err == nil && os.SameFile(its, ours)
}

// ownCgroup says whether a text of /proc/PID/cgroup is of the service's unit, directly below
// system.slice: a container may make a cgroup of that name below its own.
func ownCgroup(cgroups string) bool {
	return slices.Contains(systemdCgroups(cgroups), "/system.slice/gke-metadata-emulator.service")
}

// foreignListener returns an error when another program listens where the emulator wants to: GKE's
// own metadata server, or whatever has 0.0.0.0:988 (Lustre's port: R-19). systemd listens in the
// emulator's name, and the emulator itself may.
func foreignListener(l netip.AddrPort) error {
	by := Listener(l)
	switch {
	case !by.At.IsValid() || by.Own:
		return nil
	case by.PID == "":
		return fmt.Errorf("%s %w: a process of another namespace listens on %s; choose another listen address or stop it",
			l, fault.ErrForeign, by.At)
	}
	if l == metadataServer { // mode loopback
		return fmt.Errorf("%s %w: %s listens on %s; stop it, or have it listen on an address of its own",
			l, fault.ErrForeign, by, by.At)
	}
	return fmt.Errorf("%s %w: %s listens on %s; this may be GKE's own metadata server; "+
		"choose another listen address or stop it", l, fault.ErrForeign, by, by.At)
}

// socketAt finds the socket in one of the states that gets what is sent to l in this network
// namespace, by its inode: one of the very address before one of all addresses. The kernel is asked
// for these states alone: /proc/net/tcp walks through all connections, 4 ms even where there are
// none.
func socketAt(protocol uint8, states uint32, l netip.AddrPort) (inode string, at netip.AddrPort) {
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		b := make([]byte, 56) // struct inet_diag_req_v2
		b[0], b[1] = family, protocol
		binary.NativeEndian.PutUint32(b[4:], states)
		sockets, _ := netobj.Dump(func() ([][]byte, error) {
			req := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
			req.AddRawData(b)
			return req.Execute(unix.NETLINK_INET_DIAG, 0)
		})
		for _, s := range sockets {
			a, only6, i := parseSocket(s)
			if a == l {
				return i, a
			}
			if !at.IsValid() && holds(a, only6, l) {
				inode, at = i, a
			}
		}
	}
	return inode, at
}

// holds says whether a socket that listens on a keeps others from listening on l. One that listens
// on every IPv6 address does so on every IPv4 address too, unless it is only6.
func holds(a netip.AddrPort, only6 bool, l netip.AddrPort) bool {
	every := a.Addr().IsUnspecified() && (a.Addr().Is4() == l.Addr().Is4() || a.Addr().Is6() && !only6)
	return a.Port() == l.Port() && (a.Addr() == l.Addr() || every)
}

// parseSocket reads the local address, IPV6_V6ONLY and the inode of a struct inet_diag_msg and its
// attributes; the zero AddrPort if it is cut short.
func parseSocket(b []byte) (at netip.AddrPort, only6 bool, inode string) {
	if len(b) < 72 {
		return at, false, ""
	}
	size := 4
	if b[0] == unix.AF_INET6 {
		size = 16
	}
	a, _ := netip.AddrFromSlice(b[8 : 8+size])
	attributes, _ := nl.ParseRouteAttr(b[72:])
	for _, r := range attributes {
		only6 = only6 || r.Attr.Type == netlink.INET_DIAG_SKV6ONLY && len(r.Value) > 0 && r.Value[0] != 0
	}
	return netip.AddrPortFrom(a.Unmap(), binary.BigEndian.Uint16(b[4:])), only6,
		fmt.Sprint(binary.NativeEndian.Uint32(b[68:]))
}

// unitOf finds the systemd unit in a text of /proc/PID/cgroup: the innermost name of a service or a
// scope in the hierarchy of systemd, which is version 2, or beside version 1 either.
func unitOf(cgroups string) (unit string) {
	for _, path := range systemdCgroups(cgroups) {
		for name := range strings.SplitSeq(path, "/") {
			if strings.HasSuffix(name, ".service") || strings.HasSuffix(name, ".scope") {
				unit = name
			}
		}
	}
	return unit
}

// systemdCgroups are the paths in the hierarchies in which systemd may have units.
func systemdCgroups(cgroups string) (paths []string) {
	for line := range strings.Lines(cgroups) {
		path, v2 := strings.CutPrefix(strings.TrimSpace(line), "0::")
		if _, v1, is := strings.Cut(line, ":name=systemd:"); is && !v2 {
			path = strings.TrimSpace(v1)
		} else if !v2 {
			continue
		}
		paths = append(paths, path)
	}
	return paths
}

// owner finds a process that holds the socket, systemd before others. It is asked only when
// somebody listens.
func owner(inode string) (pid, exe string) {
	has := func(process string) bool {
		descriptors, _ := filepath.Glob("/proc/" + process + "/fd/*")
		return slices.ContainsFunc(descriptors, func(d string) bool {
			link, err := os.Readlink(d)
			return err == nil && link == "socket:["+inode+"]"
		})
	}
	if has("1") {
		return "1", "systemd"
	}
	processes, _ := filepath.Glob("/proc/[0-9]*")
	self, _ := os.Readlink("/proc/self") // first, since it is seen even where others are hidden
	for _, p := range append([]string{self}, processes...) {
		if p = filepath.Base(p); has(p) {
			exe, _ = os.Readlink("/proc/" + p + "/exe")
			return p, exe
		}
	}
	return "", ""
}
