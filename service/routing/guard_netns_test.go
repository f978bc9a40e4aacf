package routing

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// TestGuardFragments: the guard alone, without any rule of a firewall, lets nothing through by
// which a pod that makes its own packets gets an answer of the real server: no fragments, in none
// of which the kernel looks for ports when it decides where they go.
func TestGuardFragments(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	b.serve(b.Cloud, "[fd00:ec2::254]:8053", cloud)
	dns, err := b.Cloud.ListenPacket("udp4", "169.254.169.254:53")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for buf := make([]byte, 64); ; {
			_, from, err := dns.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = dns.WriteTo([]byte(cloud), from)
		}
	}()
	packets := []struct {
		name string
		to   string
		make func(from, to netip.AddrPort) [][]byte
	}{
		{"whole", "169.254.169.254:80", whole4},
		{"fragments", "169.254.169.254:80", fragments4},
		{"whole", "[fd00:ec2::254]:80", func(from, to netip.AddrPort) [][]byte { return packet6(from, to) }},
		{
			"options for every hop",
			"[fd00:ec2::254]:80",
			func(from, to netip.AddrPort) [][]byte { return packet6(from, to, unix.IPPROTO_HOPOPTS) },
		},
		{
			"a fragment",
			"[fd00:ec2::254]:80",
			func(from, to netip.AddrPort) [][]byte { return packet6(from, to, unix.IPPROTO_FRAGMENT) },
		},
		{"options in a fragment", "[fd00:ec2::254]:80", func(from, to netip.AddrPort) [][]byte {
			return packet6(from, to, unix.IPPROTO_FRAGMENT, unix.IPPROTO_DSTOPTS)
		}},
		{"more headers than are looked at", "[fd00:ec2::254]:80", func(from, to netip.AddrPort) [][]byte {
			return packet6(from, to, slices.Repeat([]byte{unix.IPPROTO_DSTOPTS}, 20)...)
		}},
	}
	tryAll := func(answered bool, wait time.Duration) {
		t.Helper()
		for _, w := range packets {
			if got := sendSYN(t, b.pod, netip.MustParseAddrPort(w.to), w.make, wait); got != answered {
				t.Errorf("%s to %s: answered: %v, want %v", w.name, w.to, got, answered)
			}
		}
	}
	before := b.ruleset()
	tryAll(true, long)
	for _, p := range []Plan{{Closed: true, RunDir: b.plan.RunDir}, b.plan} {
		b.install(p)
		b.requireOK(p)
		if !p.Closed {
			b.run("nft flush ruleset") // TestOutcomes says what the rules let through
		}
		tryAll(false, short)
		b.answers(b.pod, "169.254.169.254:53", cloud)
		b.answers(b.pod, "[fd00:ec2::254]:8053", cloud)
		if c, err := b.pod.Dial(t.Context(), "udp4", "169.254.169.254:53"); err != nil {
			t.Error(err)
		} else {
			if who, err := talk(c, long); who != cloud {
				t.Errorf("DNS by UDP: %q, %v", who, err)
			}
			_ = c.Close()
		}
	}
	b.remove(b.plan)
	b.requireEqual("remove", sorted(b.ruleset()), sorted(before))
	tryAll(true, long)
}

// sendSYN sends packets that open a connection, and says whether the server answered. Its own
// kernel knows of none, and resets it.
func sendSYN(
	t *testing.T,
	ns *netnstest.NS,
	to netip.AddrPort,
	packets func(from, to netip.AddrPort) [][]byte,
	wait time.Duration,
) (answered bool) {
	t.Helper()
	source, family, headers := ns.Addr, unix.AF_INET, 20
	var sa unix.Sockaddr = &unix.SockaddrInet4{Addr: netnstest.Metadata.As4()}
	if to.Addr().Is6() {
		source, family, headers = ns.Addr6, unix.AF_INET6, 0
		sa = &unix.SockaddrInet6{Addr: to.Addr().As16()}
	}
	if err := ns.Do(func() error {
		in, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		if err != nil {
			return err
		}
		defer unix.Close(in)
		out, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(out)
		synPort++
		for _, p := range packets(netip.AddrPortFrom(source, synPort), to) {
			if err := unix.Sendto(out, p, 0, sa); err != nil {
				return err
			}
		}
		buf := make([]byte, 256)
		for over := time.Now().Add(wait); ; {
			if n, err := unix.Poll([]unix.PollFd{{Fd: int32(in), Events: unix.POLLIN}},
				int(max(0, time.Until(over)).Milliseconds())); err != nil && err != unix.EINTR {
				return err
			} else if n < 1 && !time.Now().Before(over) {
				return nil
			}
			n, _, err := unix.Recvfrom(in, buf, unix.MSG_DONTWAIT)
			if err != nil || n < headers+20 {
				continue
			}
			// SYN and ACK, from the port to ours.
			if tcp := buf[headers:]; tcp[13]&0x12 == 0x12 && binary.BigEndian.Uint16(tcp) == to.Port() &&
				binary.BigEndian.Uint16(tcp[2:]) == synPort {
				answered = true
				return nil
			}
		}
	}); err != nil {
		t.Fatal(err)
	}
	return answered
}

var synPort uint16 = 20000

// syn is a TCP header with SYN.
func syn(from, to netip.AddrPort) []byte {
	b := make([]byte, 20)
	binary.BigEndian.PutUint16(b, from.Port())
	binary.BigEndian.PutUint16(b[2:], to.Port())
	binary.BigEndian.PutUint32(b[4:], 1)
	b[12], b[13] = 5<<4, 2
	binary.BigEndian.PutUint16(b[14:], 1024)
	sum := uint32(unix.IPPROTO_TCP + len(b))
	for _, part := range [][]byte{from.Addr().AsSlice(), to.Addr().AsSlice(), b} {
		for i := 0; i < len(part); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(part[i:]))
		}
	}
	sum = sum&0xffff + sum>>16
	binary.BigEndian.PutUint16(b[16:], ^uint16(sum&0xffff+sum>>16))
	return b
}

func whole4(from, to netip.AddrPort) [][]byte { return [][]byte{ip4(from, to, 0, syn(from, to))} }

// fragments4 has the ports in the first of two.
func fragments4(from, to netip.AddrPort) [][]byte {
	const more = 1 << 13
	b := syn(from, to)
	return [][]byte{ip4(from, to, more, b[:8]), ip4(from, to, 1, b[8:])}
}

// ip4 is a packet whose lengths and checksum the kernel fills in.
func ip4(from, to netip.AddrPort, fragment uint16, data []byte) []byte {
	b := make([]byte, 20, 20+len(data))
	b[0], b[8], b[9] = 0x45, 64, unix.IPPROTO_TCP
	binary.BigEndian.PutUint16(b[4:], from.Port()) // which fragments belong together
	binary.BigEndian.PutUint16(b[6:], fragment)
	copy(b[12:], from.Addr().AsSlice())
	copy(b[16:], to.Addr().AsSlice())
	return append(b, data...)
}

// packet6 has further headers before TCP's. A fragment is the first and the last.
func packet6(from, to netip.AddrPort, headers ...byte) [][]byte {
	b := make([]byte, 40)
	b[0], b[7] = 6<<4, 64
	copy(b[8:], from.Addr().AsSlice())
	copy(b[24:], to.Addr().AsSlice())
	next := 6 // where the kind of the header behind is
	for _, h := range headers {
		b[next] = h
		next = len(b)
		data := make([]byte, 8)
		if h != unix.IPPROTO_FRAGMENT {
			data[2], data[3] = 1, 4 // PadN
		} else {
			binary.BigEndian.PutUint32(data[4:], uint32(from.Port()))
		}
		b = append(b, data...)
	}
	b[next] = unix.IPPROTO_TCP
	b = append(b, syn(from, to)...)
	binary.BigEndian.PutUint16(b[4:], uint16(len(b)-40))
	return [][]byte{b}
}
