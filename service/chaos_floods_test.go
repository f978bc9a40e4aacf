package service

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// This file has the loads of clients that the service knows, and of packets.

var floodRequests atomic.Int64

// floodRequestsFrom has a process ask on many connections for as long as it lives: each asks again
// when it is answered, and opens another connection where the server closes. A path may have a %d
// for the request's number.
func floodRequestsFrom(args []string) (any, error) {
	to, path := args[0], args[2]
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return nil, err
	}
	for range n {
		go func() {
			for {
				c, err := net.Dial("tcp", to)
				if err != nil {
					time.Sleep(10 * time.Millisecond) // the server has no room
					continue
				}
				for r := bufio.NewReader(c); err == nil; {
					request := path
					if number := floodRequests.Add(1); strings.Contains(path, "%d") {
						request = fmt.Sprintf(path, number)
					}
					_, err = fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: metadata\r\nMetadata-Flavor: Google\r\n\r\n", request)
					var res *http.Response
					if err == nil {
						res, err = http.ReadResponse(r, nil)
					}
					if err == nil {
						_, err = io.Copy(io.Discard, res.Body)
						_ = res.Body.Close()
					}
					if err == nil && res.Close {
						err = io.EOF
					}
				}
				_ = c.Close()
			}
		}()
	}
	return nil, nil
}

// flooding starts a pod that floods, or a process of the node where cgroup says so.
func (b *chaosNode) flooding(t *testing.T, cgroup, to string, n int, path string) func() {
	t.Helper()
	name, ns := fmt.Sprint("flood-", b.n), b.node.NS
	if cgroup == "" {
		var err error
		if ns, err = b.node.AddPod(name); err != nil {
			t.Fatal(err)
		}
	}
	p := b.newPod(name, ns)
	if cgroup != "" {
		p.cgroup = cgroup
	} else {
		p.tell()
	}
	if err := p.start(); err != nil {
		t.Fatal(err)
	}
	if cgroup == "" {
		p.served(t, accts+"default/email")
	}
	if a, err := p.ask("flood", fmt.Sprintf("%s %d %s", to, n, path)); err != nil || a.Err != "" {
		t.Fatalf("%+v, %v", a, err)
	}
	return p.die
}

func (b *chaosNode) requestsWithoutEnd(t *testing.T) func() {
	return b.flooding(t, "", chaosPod, 250, accts+"default/token")
}

// unlimited puts a load on a service that does not limit the rate of requests: what the limit is
// for.
func unlimited(load func(*chaosNode, *testing.T) func()) func(*chaosNode, *testing.T) func() {
	return func(b *chaosNode, t *testing.T) func() {
		again := func() { b.kill(b.server); b.serve(t) }
		b.replace(t, "config.yaml", "hostCheck: true", "limits: {requestsPerPod: 1000000}")
		again()
		end := load(b, t)
		return func() {
			end()
			b.replace(t, "config.yaml", "limits: {requestsPerPod: 1000000}", "hostCheck: true")
			again()
		}
	}
}

// waits has a pod wait for changes on as many connections as it may have, while Kubernetes changes
// something every 10 ms.
func (b *chaosNode) waits(t *testing.T) func() {
	now, err := b.asker.ask("fresh", accts+"default/email") // which all unlinked pods have
	if err != nil || now.Header.Get("ETag") == "" {
		t.Fatalf("%+v, %v", now, err)
	}
	end := b.flooding(t, "", chaosPod, 250,
		accts+"default/email?wait_for_change=true&timeout_sec=1&last_etag="+now.Header.Get("ETag"))
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			b.kube.SetServiceAccount("default", "principal", map[string]string{"i": fmt.Sprint(i)})
			select {
			case <-time.After(10 * time.Millisecond): // that is the load
			case <-ctx.Done():
			}
		}
	})
	return func() { stop(); wg.Wait(); end() }
}

func (b *chaosNode) audiences(t *testing.T) func() {
	return b.flooding(t, "", chaosPod, 8, accts+"default/identity?audience=https://%d.example")
}

func (b *chaosNode) metricsFlood(t *testing.T) func() {
	return b.flooding(t, "/system.slice/exporter.service", nodeHealth, 32, "/metrics")
}

// churn has pods come and go while eight network namespaces have the asker's address.
func (b *chaosNode) churn(t *testing.T) func() {
	end := b.namespaces(t, 8)
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var lives atomic.Int64
	for slot := range 2 {
		name := fmt.Sprintf("churn-%d-%d", b.n, slot)
		ns, err := b.node.AddPod(name)
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			for ctx.Err() == nil {
				p := b.newPod(name, ns)
				p.tell()
				if err := p.start(); err != nil {
					t.Error(err)
					return
				}
				if a, err := p.ask("fresh", accts+"default/token"); err == nil && a.Status == 200 &&
					b.subjectOf(t, a.Body) != "default:"+name {
					t.Errorf("%s gets a token of %s", name, b.subjectOf(t, a.Body))
				}
				p.die()
				b.kube.DeletePod("default", name)
				lives.Add(1)
			}
		})
	}
	return func() {
		stop()
		wg.Wait()
		t.Logf("%d pods came and went", lives.Load())
		end()
	}
}

// synFlood sends SYNs with made-up addresses of the node's pod network, as fast as two threads can.
func (b *chaosNode) synFlood(t *testing.T) func() {
	ns := b.attacker(t)
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var sent atomic.Int64
	for thread := range 2 {
		var fd int
		if err := ns.Do(func() (err error) {
			fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		to := netip.MustParseAddrPort(chaosPod)
		wg.Go(func() {
			defer unix.Close(fd)
			a := ns.Addr.As4()
			for i := thread; ctx.Err() == nil; i += 2 {
				from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{a[0], a[1], 7, byte(1 + i%200)}), uint16(1024+i/200%60000))
				_ = unix.Sendto(fd, synPacket(from, to, uint32(i)), 0, &unix.SockaddrInet4{Addr: to.Addr().As4()})
				sent.Add(1)
			}
		})
	}
	b.run(
		fmt.Sprintf(
			"ip route replace %s dev cni0",
			netip.PrefixFrom(netip.AddrFrom4([4]byte{ns.Addr.As4()[0], ns.Addr.As4()[1], 7, 0}), 24),
		),
	)
	began := time.Now()
	return func() {
		stop()
		wg.Wait()
		t.Logf(
			"%.0f SYNs a second, sockets by state: %v",
			float64(sent.Load())/time.Since(began).Seconds(),
			b.sockets(":988"),
		)
	}
}

// synPacket is an IPv4 packet with a SYN. The kernel fills in the header's own checksum.
func synPacket(from, to netip.AddrPort, sequence uint32) []byte {
	p := make([]byte, 40)
	p[0], p[8], p[9] = 0x45, 64, unix.IPPROTO_TCP
	binary.BigEndian.PutUint16(p[2:], 40)
	source, target := from.Addr().As4(), to.Addr().As4()
	copy(p[12:], source[:])
	copy(p[16:], target[:])
	tcp := p[20:]
	binary.BigEndian.PutUint16(tcp, from.Port())
	binary.BigEndian.PutUint16(tcp[2:], to.Port())
	binary.BigEndian.PutUint32(tcp[4:], sequence)
	tcp[12], tcp[13] = 5<<4, 2
	binary.BigEndian.PutUint16(tcp[14:], 64240)
	sum := uint32(unix.IPPROTO_TCP + 20)
	for i := 12; i < 40; i += 2 { // the addresses, and all of TCP
		sum += uint32(binary.BigEndian.Uint16(p[i:]))
	}
	for sum>>16 > 0 {
		sum = sum&0xffff + sum>>16
	}
	binary.BigEndian.PutUint16(tcp[16:], ^uint16(sum))
	return p
}
