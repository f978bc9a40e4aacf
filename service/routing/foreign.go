package routing

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// ListenedBy is who gets connections to an address.
type ListenedBy struct {
	At  netip.AddrPort // the address that it listens on; the zero AddrPort: nobody listens
	PID string         // "" = a process of another namespace, or of another user where we are not root
	Exe string         // the program; "systemd" for process 1
	Own bool           // systemd in the emulator's name, or the emulator itself
}

// String names the program.
func (l ListenedBy) String() string {
	if l.PID == "" {
		return "a process that cannot be seen from here"
	}
	return fmt.Sprintf("%s (process %s)", filepath.Base(l.Exe), l.PID)
}

// Listener finds out who gets connections to l in this network namespace.
func Listener(l netip.AddrPort) ListenedBy {
	inode, at := listener(l)
	if inode == "" {
		return ListenedBy{}
	}
	by := ListenedBy{At: at}
	by.PID, by.Exe = owner(inode)
	self, err := os.Readlink("/proc/self/exe")
	// An upgrade may have replaced the file of a program that still runs.
	by.Own = by.PID == "1" || err == nil && strings.TrimSuffix(by.Exe, " (deleted)") == strings.TrimSuffix(self, " (deleted)")
	return by
}

// foreignListener returns an error when another program listens where the emulator wants to: GKE's own metadata server, or
// whatever has 0.0.0.0:988 (Lustre's port: R-19). systemd listens in the emulator's name, and the emulator itself may.
func foreignListener(l netip.AddrPort) error {
	by := Listener(l)
	switch {
	case !by.At.IsValid() || by.Own:
		return nil
	case by.PID == "":
		return fmt.Errorf("%s %w: a process of another namespace listens on %s; choose another listen address or stop it", l, ErrForeign, by.At)
	}
	if l == metadataServer { // mode loopback
		return fmt.Errorf("%s %w: %s listens on %s; stop it, or have it listen on an address of its own", l, ErrForeign, by, by.At)
	}
	return fmt.Errorf("%s %w: %s listens on %s; this may be GKE's own metadata server; choose another listen address or stop it",
		l, ErrForeign, by, by.At)
}

// listener finds the socket that gets connections to l in this network namespace, by its inode.
func listener(l netip.AddrPort) (inode string, at netip.AddrPort) {
	for _, table := range []string{"tcp", "tcp6"} {
		f, err := os.Open("/proc/thread-self/net/" + table)
		if err != nil {
			continue
		}
		defer f.Close()
		lines := bufio.NewScanner(f)
		lines.Scan() // the heading
		for lines.Scan() {
			fields := strings.Fields(lines.Text())
			if len(fields) < 10 || fields[3] != "0A" {
				break // listeners come first
			}
			a, err := parseProc(fields[1])
			if err == nil && a.Port() == l.Port() && (a.Addr() == l.Addr() || a.Addr().IsUnspecified()) {
				return fields[9], a
			}
		}
	}
	return "", netip.AddrPort{}
}

// parseProc reads an address of /proc/net/tcp: 32-bit words in the machine's order, in hexadecimal.
func parseProc(text string) (netip.AddrPort, error) {
	host, port, ok := strings.Cut(text, ":")
	a, err := hex.DecodeString(host)
	p, err2 := hex.DecodeString(port)
	if !ok || err != nil || err2 != nil || len(p) != 2 || len(a)%4 != 0 {
		return netip.AddrPort{}, fmt.Errorf("socket address %q", text)
	}
	for i := 0; i < len(a); i += 4 {
		binary.BigEndian.PutUint32(a[i:], binary.NativeEndian.Uint32(a[i:]))
	}
	addr, ok := netip.AddrFromSlice(a)
	if !ok {
		return netip.AddrPort{}, errors.New("socket address " + text)
	}
	return netip.AddrPortFrom(addr.Unmap(), binary.BigEndian.Uint16(p)), nil
}

// owner finds a process that holds the socket, systemd before others. It is asked only when somebody listens.
func owner(inode string) (pid, exe string) {
	holds := func(process string) bool {
		descriptors, _ := filepath.Glob("/proc/" + process + "/fd/*")
		return slices.ContainsFunc(descriptors, func(d string) bool {
			link, err := os.Readlink(d)
			return err == nil && link == "socket:["+inode+"]"
		})
	}
	if holds("1") {
		return "1", "systemd"
	}
	processes, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range append([]string{"/proc/self"}, processes...) {
		if p = filepath.Base(p); holds(p) {
			exe, _ = os.Readlink("/proc/" + p + "/exe")
			return p, exe
		}
	}
	return "", ""
}
