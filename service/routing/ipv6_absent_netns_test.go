package routing

import (
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TestIPv6Absent: a node without IPv6, or one that cannot redirect it, has IPv4's rules all the
// requireEqual, says why once, and Check is content.
func TestIPv6Absent(t *testing.T) {
	t.Parallel()
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		b.plan.Listen6 = netip.MustParseAddrPort("[fd20:ce::252]:988")
		b.run("sysctl -qw net.ipv6.conf.all.disable_ipv6=1")
		b.install(b.plan)
		b.requireOK(b.plan)
		b.answers(b.pod, "169.254.169.254:80", emulator)
		if s, err := ReadState(b.plan.RunDir); err != nil || s.IPv6 != noIPv6Here || !s.Standing.Good {
			t.Errorf("%+v, %v", s, err)
		}
		w := b.watch(b.plan, time.Hour)
		b.run("sysctl -qw net.ipv6.conf.all.disable_ipv6=0")
		w.until("IPv6 is served", func() bool {
			s := w.state()
			return s.IPv6 == "" && s.Standing.Good && b.stands(b.plan) && strings.Contains(b.ruleset(), "fd20:ce::252")
		})
		b.run("sysctl -qw net.ipv6.conf.all.disable_ipv6=1")
		w.until(
			"it is not any more",
			func() bool { s := w.state(); return s.IPv6 == noIPv6Here && s.Standing.Good && b.stands(b.plan) },
		)
		b.answers(b.pod, "169.254.169.254:80", emulator)
	})
}

// TestIPv6WithoutTables: a node whose kernel has no NAT of IPv6, or that has no ip6tables, has
// IPv4's rules and the guard.
func TestIPv6WithoutTables(t *testing.T) {
	t.Parallel()
	for name, restore := range map[string]string{
		"no command": "",
		"no nat": "#!/bin/sh\ntext=$(cat)\ncase $text in *'*nat'*) echo 'no nat here' >&2; exit 2;; esac\necho " +
			"\"$text\" | exec ip6tables-nft-restore \"$@\"\n",
	} {
		t.Run(name, func(t *testing.T) {
			b := newTestNode(t, "iptables-nft")
			dir := t.TempDir()
			for _, command := range []string{"iptables-nft", "iptables-nft-restore", "ip6tables-nft"} {
				path, err := exec.LookPath(command)
				if err == nil && (restore != "" || !strings.HasPrefix(command, "ip6")) {
					err = os.Symlink(path, filepath.Join(dir, command))
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			if restore != "" {
				if err := os.WriteFile(filepath.Join(dir, "ip6tables-nft-restore"), []byte(restore), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			before := b.ruleset()
			b.plan.Binary = filepath.Join(dir, "iptables-nft")
			ipv6Node(b)
			b.install(b.plan)
			b.requireOK(b.plan)
			b.answers(b.pod, "169.254.169.254:80", emulator)
			b.answers(b.pod, "[fd20:ce::254]:80", "") // the guard
			s, err := ReadState(b.plan.RunDir)
			if err != nil || s.IPv6 == "" || !s.Standing.Good {
				t.Errorf("%+v, %v", s, err)
			}
			t.Log(s.IPv6)
			w := b.watch(b.plan, time.Hour)
			if got := w.state(); !got.Standing.Good || got.Installs != s.Installs {
				t.Errorf("the watcher tries again: %+v", got)
			}
			b.run("ip rule del pref 97 prohibit")
			w.until("a repair", func() bool { return b.check(b.plan) == nil && w.state().Standing.Good })
			if got := w.state(); got.IPv6 != s.IPv6 {
				t.Errorf("%q became %q", s.IPv6, got.IPv6)
			}
			w.end()
			b.remove(b.plan)
			b.requireEqual("remove", b.ruleset(), before)
		})
	}
}

// TestRemoveWithoutIPv6: on a kernel that was booted without IPv6 there is no socket of it for the
// legacy backend's tables, and that keeps nobody from removing IPv4's.
func TestRemoveWithoutIPv6(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-legacy")
	b.run("iptables -t nat -N GME-PRE")
	out, err := b.play("remove without IPv6", filepath.Join(b.plan.RunDir, b.plan.Binary), b.self()).CombinedOutput()
	if err != nil {
		t.Errorf("%v: %s", err, out)
	}
	if s := b.ruleset(); strings.Contains(s, "GME-") {
		t.Errorf("left:\n%s", s)
	}
}

// denyIPv6 has this process get no sockets of IPv6, as such a kernel's processes do.
func denyIPv6() error {
	const nr, family = 0, 16 // in struct seccomp_data
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: nr},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_SOCKET, Jf: 3},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: family},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.AF_INET6, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EAFNOSUPPORT)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	_, _, errno := unix.Syscall(
		unix.SYS_SECCOMP,
		unix.SECCOMP_SET_MODE_FILTER,
		unix.SECCOMP_FILTER_FLAG_TSYNC,
		uintptr(unsafe.Pointer(&program)),
	)
	if errno != 0 {
		return errno
	}
	return nil
}
