package attest

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// index is a Pods whose contents a test sets.
type index struct {
	mu      sync.Mutex
	pods    map[netip.Addr][]workload.Caller
	uids    map[string]workload.Caller
	err     error
	changed chan struct{}
}

func newIndex() *index {
	return &index{pods: map[netip.Addr][]workload.Caller{}, changed: make(chan struct{})}
}

func (x *index) At(a netip.Addr) ([]workload.Caller, <-chan struct{}, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.pods[a], x.changed, x.err
}

func (x *index) Of(uid string) (workload.Caller, bool, <-chan struct{}, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	c, known := x.uids[uid]
	if known {
		return c, true, x.changed, nil
	}
	return c, false, x.changed, x.err
}

// live makes these the pods that are known by UID.
func (x *index) live(err error, pods ...workload.Caller) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.uids, x.err = map[string]workload.Caller{}, err
	for _, p := range pods {
		x.uids[p.PodUID] = p
	}
	close(x.changed)
	x.changed = make(chan struct{})
}

func (x *index) set(err error, addr string, uids ...string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	var pods []workload.Caller
	for _, uid := range uids {
		pods = append(pods, workload.Caller{PodUID: uid, PodName: "pod-" + uid,
			ServiceAccount: workload.ServiceAccount{Namespace: "ns", Name: "sa-" + uid}})
	}
	x.pods[netip.MustParseAddr(addr)], x.err = pods, err
	close(x.changed)
	x.changed = make(chan struct{})
}

func peer(client string) *Peer {
	return &Peer{Conn: Conn{Client: netip.MustParseAddrPort(client)}}
}

func attestor(x *index) *Attestor {
	a := New(Options{Pods: x})
	a.ownAddrs = func() ([]net.Addr, error) {
		return []net.Addr{&net.IPNet{IP: net.ParseIP("192.0.2.10"), Mask: net.CIDRMask(24, 32)}}, nil
	}
	return a
}

func TestAttest(t *testing.T) {
	away := errors.New("the API server is away")
	for name, tt := range map[string]struct {
		setup func(*index)
		peer  string
		later func(*index) // after one second
		want  string
		err   error
		took  time.Duration
	}{
		"a known pod is answered at once": {
			setup: func(x *index) { x.set(nil, "10.1.0.1", "a") }, peer: "10.1.0.1:1000", want: "a",
		},
		"N-11: a pod whose address arrives late is waited for": {
			peer: "10.1.0.1:1000", later: func(x *index) { x.set(nil, "10.1.0.1", "a") }, want: "a", took: time.Second,
		},
		"H-22: a stranger is refused after the hold": {
			peer: "10.1.0.9:1000", err: ErrUnknown, took: Hold,
		},
		"H-22: news of others does not lengthen the hold": {
			peer: "10.1.0.9:1000", later: func(x *index) { x.set(nil, "10.1.0.1", "a") }, err: ErrUnknown, took: Hold,
		},
		"U-06: two live pods with one address are a refusal": {
			setup: func(x *index) { x.set(nil, "10.1.0.1", "a", "b") }, peer: "10.1.0.1:1000", err: ErrAmbiguous, took: Hold,
		},
		"U-06: the ambiguity ends with the older pod": {
			setup: func(x *index) { x.set(nil, "10.1.0.1", "a", "b") }, peer: "10.1.0.1:1000",
			later: func(x *index) { x.set(nil, "10.1.0.1", "b") }, want: "b", took: time.Second,
		},
		"N-14: the node's own address is no pod's": {peer: "192.0.2.10:1000", err: ErrNotPod},
		"N-14: loopback is no pod's":               {peer: "127.0.0.1:1000", err: ErrNotPod},
		"an index that cannot be believed gives nobody": {
			setup: func(x *index) { x.set(away, "10.1.0.1", "a") }, peer: "10.1.0.1:1000", err: away, took: Hold,
		},
		"an index that recovers within the hold": {
			setup: func(x *index) { x.set(away, "10.1.0.1", "a") }, peer: "10.1.0.1:1000",
			later: func(x *index) { x.set(nil, "10.1.0.1", "a") }, want: "a", took: time.Second,
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := newIndex()
				if tt.setup != nil {
					tt.setup(x)
				}
				if tt.later != nil {
					time.AfterFunc(time.Second, func() { tt.later(x) })
				}
				start := time.Now()
				got, err := attestor(x).Attest(t.Context(), peer(tt.peer))
				if !errors.Is(err, tt.err) || got.PodUID != tt.want {
					t.Errorf("Attest = %q, %v; want %q, %v", got.PodUID, err, tt.want, tt.err)
				}
				if took := time.Since(start); took != tt.took {
					t.Errorf("took %v, want %v", took, tt.took)
				}
			})
		})
	}
}

// A connection stays with the pod that opened it: the next owner of the address gets nothing on it.
func TestAddressChangesHands(t *testing.T) {
	x := newIndex()
	x.set(nil, "10.1.0.1", "a")
	a, p := attestor(x), peer("10.1.0.1:1000")
	if err := a.Check(t.Context(), p); !errors.Is(err, ErrUnknown) {
		t.Errorf("Check before Attest = %v, want ErrUnknown", err)
	}
	if _, err := a.Attest(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if err := a.Check(t.Context(), p); err != nil {
		t.Errorf("Check of an unchanged pod = %v", err)
	}
	for name, uids := range map[string][]string{"the next owner": {"b"}, "two owners": {"a", "b"}, "no owner": nil} {
		x.set(nil, "10.1.0.1", uids...)
		if err := a.Check(t.Context(), p); !errors.Is(err, ErrChanged) {
			t.Errorf("%s: Check = %v, want ErrChanged", name, err)
		}
		if _, err := a.Attest(t.Context(), p); !errors.Is(err, ErrChanged) {
			t.Errorf("%s: Attest = %v, want ErrChanged", name, err)
		}
	}
	x.set(nil, "10.1.0.1", "b")
	if c, err := a.Attest(t.Context(), peer("10.1.0.1:1001")); err != nil || c.PodUID != "b" {
		t.Errorf("a new connection = %q, %v; want b", c.PodUID, err)
	}
}

func TestAskerLeaves(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := attestor(newIndex()).Attest(ctx, peer("10.1.0.1:1")); !errors.Is(err, context.Canceled) {
		t.Errorf("Attest = %v, want context.Canceled", err)
	}
}

func TestAccept(t *testing.T) {
	for network, address := range map[string]string{"tcp4": "127.0.0.1:0", "tcp6": "[::1]:0"} {
		t.Run(network, func(t *testing.T) {
			l, err := net.Listen(network, address)
			if err != nil {
				t.Fatalf("this test needs a %s loopback: %v", network, err)
			}
			defer l.Close()
			client, err := net.Dial(network, l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			server, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close()
			p := Accept(server)
			if want := addrPort(client.LocalAddr()); p.Client != want {
				t.Errorf("Client = %v, want %v", p.Client, want)
			}
			if want := addrPort(l.Addr()); p.Server != want || p.Original != want {
				t.Errorf("Server, Original = %v, %v; want %v", p.Server, p.Original, want)
			}
		})
	}
}

// A dual-stack listener sees IPv4 clients as ::ffff:a.b.c.d; the index knows a.b.c.d.
func TestMappedAddress(t *testing.T) {
	got := addrPort(&net.TCPAddr{IP: net.ParseIP("10.1.0.1").To16(), Port: 7})
	if want := netip.MustParseAddrPort("10.1.0.1:7"); got != want {
		t.Errorf("addrPort = %v, want %v", got, want)
	}
}

func BenchmarkAttestKnown(b *testing.B) {
	x := newIndex()
	x.set(nil, "10.1.0.1", "a")
	a, p := attestor(x), peer("10.1.0.1:1000")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := a.Attest(b.Context(), p); err != nil {
			b.Fatal(err)
		}
	}
}

// Whoever is held when the configuration changes asks the next attestor, and is not refused by the
// old one.
func TestReplaced(t *testing.T) {
	replaced := make(chan struct{})
	a := New(Options{Pods: newIndex(), Replaced: replaced})
	close(replaced)
	if _, err := a.Attest(t.Context(), peer("10.1.0.1:1")); !errors.Is(err, ErrReplaced) {
		t.Errorf("Attest = %v, want ErrReplaced", err)
	}
}
