package routing

import (
	"encoding/binary"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// advertise has a pod send a router advertisement (RFC 4861, 4.2). CAP_NET_RAW is enough.
func advertise(t *testing.T, pod *netnstest.NS) {
	t.Helper()
	if err := pod.Do(func() error {
		eth0, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMPV6)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_HOPS, 255); err != nil {
			return err
		}
		message := make([]byte, 16)
		message[0], message[4] = 134, 64
		binary.BigEndian.PutUint16(message[6:], 1800)
		to := &unix.SockaddrInet6{ZoneId: uint32(eth0.Index), Addr: [16]byte(net.ParseIP("ff02::1"))}
		return unix.Sendto(fd, message, 0, to)
	}); err != nil {
		t.Fatal(err)
	}
}

// TestAdvertisedRoute: router advertisements of a pod, where the node accepts them, make no uplink
// of the pods' bridge. Pods behind an uplink are not redirected.
func TestAdvertisedRoute(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"iptables-nft", ModeNFTables, ModeLoopback} {
		t.Run(mode, func(t *testing.T) {
			b := modeNode(t, mode)
			b.run("echo 0 > /proc/sys/net/ipv6/conf/all/forwarding; echo 1 > /proc/sys/net/ipv6/conf/cni0/accept_ra")
			b.install(b.plan)
			w := b.watch(b.plan, time.Hour)
			advertise(t, b.pod)
			w.until("the node to accept the advertisement", func() bool {
				return strings.Contains(b.run("ip -6 route show default dev cni0"), "proto ra")
			})
			b.run(addUplink)
			w.until("the watcher to look after that", func() bool { return b.stands(b.plan) })
			w.end()
			b.answers(b.pod, "169.254.169.254:80", emulator)

			b.run("ip link del wan9; ip -4 route del default; ip -6 route del default dev eth0")
			if err := b.Do(func() error {
				devices, err := readDevices()
				if names, _ := uplinks(devices); !slices.Contains(names, "cni0") {
					t.Errorf("the only default route makes no uplink: %v", names)
				}
				return err
			}); err != nil {
				t.Fatal(err)
			}
		})
	}
}
