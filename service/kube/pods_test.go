package kube

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// N-11: the first request comes before the watch has the pod's address; the channel says when it is
// worth asking again.
func TestAddressComesLater_N11(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	b := run(t, s, nil)
	got := b.at(t, "10.1.0.11", "p1")
	if got[0].ServiceAccount != ksa || got[0].PodUID == "" {
		t.Errorf("caller %+v", got[0])
	}
	early, changed, err := b.At(netip.MustParseAddr("10.1.0.99"))
	if len(early) != 0 || err != nil {
		t.Fatalf("At = %v, %v", early, err)
	}
	select {
	case <-changed:
		t.Fatal("changed without a change")
	default:
	}
	s.SetPod(kubetest.Pod{Namespace: "ns1", Name: "late", Node: "node1", ServiceAccount: "ksa", Phase: "Pending"})
	<-changed // a live pod without an address is a change of ServiceAccounts' users
	b.at(t, "10.1.0.99")
	s.SetPod(kubetest.Pod{Namespace: "ns1", Name: "late", Node: "node1", ServiceAccount: "ksa",
		Addresses: []string{"10.1.0.99"}})
	b.at(t, "10.1.0.99", "late")
}

// N-12, U-06: phase and deletion decide, and what of the containers still runs.
func TestLive(t *testing.T) {
	now := metav1.Now()
	running, waiting, ended := corev1.ContainerState{Running: &corev1.ContainerStateRunning{}},
		corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{}},
		corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}}
	cs := func(states ...corev1.ContainerState) (out []corev1.ContainerStatus) {
		for _, s := range states {
			out = append(out, corev1.ContainerStatus{State: s})
		}
		return out
	}
	for _, c := range []struct {
		name    string
		phase   corev1.PodPhase
		deleted bool
		init    []corev1.ContainerStatus
		main    []corev1.ContainerStatus
		ephem   []corev1.ContainerStatus
		want    bool
	}{
		{name: "running", phase: "Running", main: cs(running), want: true},
		{name: "pending", phase: "Pending", want: true},
		{name: "unknown", phase: "Unknown", main: cs(running), want: true},
		{name: "succeeded keeps its podIP", phase: "Succeeded", main: cs(ended)},
		{name: "failed", phase: "Failed", main: cs(ended)},
		{name: "evicted: failed while a container is said to run", phase: "Failed", main: cs(running)},
		{name: "terminating and running", phase: "Running", deleted: true, main: cs(ended, running), want: true},
		{name: "terminating, all ended", phase: "Running", deleted: true, init: cs(ended), main: cs(ended, ended)},
		{name: "terminating, a debug container runs", phase: "Running", deleted: true, main: cs(ended), ephem: cs(running),
			want: true},
		{name: "terminating, an init container runs", phase: "Pending", deleted: true, init: cs(running), main: cs(waiting),
			want: true},
		{name: "terminating, may be starting", phase: "Pending", deleted: true, main: cs(waiting), want: true},
		{name: "terminating, nothing known", phase: "Pending", deleted: true, want: true},
		{name: "crashed, not deleted", phase: "Running", main: cs(ended), want: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := &corev1.Pod{Status: corev1.PodStatus{Phase: c.phase, InitContainerStatuses: c.init, ContainerStatuses: c.main,
				EphemeralContainerStatuses: c.ephem}}
			if c.deleted {
				p.DeletionTimestamp = &now
			}
			small, err := strip(p)
			if err != nil {
				t.Fatal(err)
			}
			if live(p) != c.want || live(small.(*corev1.Pod)) != c.want {
				t.Errorf("live = %v, stripped %v, want %v", live(p), live(small.(*corev1.Pod)), c.want)
			}
		})
	}
}

func TestAddresses(t *testing.T) {
	for _, c := range []struct {
		name string
		host bool
		ip   string
		ips  []string
		want string
	}{
		{"none", false, "", nil, "[]"},
		{"one", false, "10.1.0.11", []string{"10.1.0.11"}, "[10.1.0.11]"},
		{"dual stack", false, "10.1.0.11", []string{"10.1.0.11", "fd00::11"}, "[10.1.0.11 fd00::11]"},
		{"podIP only", false, "10.1.0.11", nil, "[10.1.0.11]"},
		{"4-in-6", false, "", []string{"::ffff:10.1.0.11"}, "[10.1.0.11]"},
		{"host network (N-14)", true, "192.0.2.1", []string{"192.0.2.1"}, "[]"},
		{"nonsense", false, "", []string{"10.1.0.256", "", "fe80::1%eth0"}, "[]"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := &corev1.Pod{Spec: corev1.PodSpec{HostNetwork: c.host}, Status: corev1.PodStatus{PodIP: c.ip}}
			for _, ip := range c.ips {
				p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip})
			}
			small, err := strip(p)
			if err != nil {
				t.Fatal(err)
			}
			if got := fmt.Sprint(convert(small.(*corev1.Pod)).addrs); got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
		})
	}
}

// U-06: of two live pods with one address At returns both; whoever asks refuses. N-12: an ended one
// does not count.
func TestOneAddressTwoPods_U06(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	b := run(t, s, nil)
	s.SetPod(kubetest.Pod{Namespace: "ns1", Name: "p2", Node: "node1", ServiceAccount: "other",
		Addresses: []string{"10.1.0.11"}})
	b.at(t, "10.1.0.11", "p1", "p2")
	s.SetPod(kubetest.Pod{Namespace: "ns1", Name: "p1", Node: "node1", ServiceAccount: "ksa",
		Addresses: []string{"10.1.0.11"}, Phase: "Succeeded", Ended: true})
	b.at(t, "10.1.0.11", "p2")
	s.SetPod(kubetest.Pod{Namespace: "ns1", Name: "p2", Node: "node1", ServiceAccount: "other",
		Addresses: []string{"10.1.0.11"}, Terminating: true})
	b.at(t, "::ffff:10.1.0.11", "p2") // terminating and running: still itself
	s.SetPod(kubetest.Pod{Namespace: "ns1", Name: "p2", Node: "node1", ServiceAccount: "other",
		Addresses: []string{"10.1.0.11"}, Terminating: true, Ended: true})
	b.at(t, "10.1.0.11")
}

// K-03: pods on the host network have no address in the index, but their ServiceAccounts are used.
func TestServiceAccounts(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	s.SetPod(kubetest.Pod{Namespace: "ns1", Name: "host", Node: "node1", ServiceAccount: "agent",
		Addresses: []string{"192.0.2.1"}, HostNetwork: true})
	s.SetPod(kubetest.Pod{Namespace: "ns1", Name: "done", Node: "node1", ServiceAccount: "batch",
		Addresses: []string{"10.1.0.50"}, Phase: "Failed"})
	s.SetPod(kubetest.Pod{Namespace: "ns1", Name: "elsewhere", Node: "node2", ServiceAccount: "far",
		Addresses: []string{"10.2.0.1"}})
	b := run(t, s, func(_ *testNode, o *Options) {
		if sas, _ := New(*o).ServiceAccounts(); sas != nil {
			t.Error("not nil before the pods are known")
		}
		o.Metrics = nil
	})
	b.at(t, "10.1.0.11", "p1")
	b.at(t, "192.0.2.1")
	b.at(t, "10.2.0.1")
	sas, changed := b.ServiceAccounts()
	if want := []workload.ServiceAccount{{Namespace: "ns1", Name: "agent"}, ksa}; !slices.Equal(sas, want) {
		t.Errorf("got %v, want %v", sas, want)
	}
	s.DeletePod("ns1", "host")
	<-changed
	s.DeletePod("ns1", "p1")
	until(t, "no ServiceAccount", func() bool { sas, _ = b.ServiceAccounts(); return len(sas) == 0 })
	if sas == nil {
		t.Error("nil means unknown, and it is known that there is none")
	}
}

// The hot path neither locks nor allocates.
func TestAtAllocatesNothing(t *testing.T) {
	b := run(t, newServer(t, kubetest.Options{}), nil)
	a := netip.MustParseAddr("10.1.0.11")
	b.at(t, "10.1.0.11", "p1")
	least := math.Inf(1)
	for range 5 { // what others allocate meanwhile counts too, and does not always
		least = min(least, testing.AllocsPerRun(100, func() {
			if cs, _, err := b.At(a); err != nil || len(cs) != 1 {
				t.Error("not found")
			}
		}))
	}
	if least != 0 {
		t.Errorf("%v allocations", least)
	}
}

// U-06: pods come and go, watches break, history is compacted; in the end the index is the truth.
func TestChurn(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	b := run(t, s, nil)
	b.at(t, "10.1.0.11", "p1")
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 60 {
				name := fmt.Sprintf("churn-%d-%d", w, i%7)
				s.DeletePod("ns1", name)
				s.SetPod(kubetest.Pod{Namespace: "ns1", Name: name, Node: "node1", ServiceAccount: "ksa",
					Addresses: []string{fmt.Sprintf("10.9.%d.%d", w, i)}})
				_, _, _ = b.At(netip.MustParseAddr("10.1.0.11")) // races are what is looked for
				switch i % 20 {
				case 7:
					s.DropWatches()
				case 13:
					s.Compact()
					s.DropWatches()
				case 17:
					s.Bookmark()
				}
			}
		})
	}
	wg.Wait()
	s.SetPod(kubetest.Pod{Namespace: "ns1", Name: "last", Node: "node1", ServiceAccount: "ksa",
		Addresses: []string{"10.9.9.9"}})
	b.at(t, "10.9.9.9", "last")
	for w := range 4 {
		b.at(t, fmt.Sprintf("10.9.%d.59", w), fmt.Sprintf("churn-%d-%d", w, 59%7))
		b.at(t, fmt.Sprintf("10.9.%d.1", w)) // its owner has another address now
	}
	if n := len(b.pods.current.Load().pods); n != 4*7+2 {
		t.Errorf("%d pods, want %d", n, 4*7+2)
	}
}

// Whatever the API server does wrong is got over.
func TestFaults(t *testing.T) {
	for _, c := range []struct {
		name string
		o    kubetest.Options
		f    []kubetest.Fault
	}{
		{name: "no watch-list (before 1.32)", o: kubetest.Options{NoWatchList: true}},
		{name: "410", f: []kubetest.Fault{{Verb: "watch", Resource: "pods", Code: 410, Times: 2}}},
		{name: "410 on list", o: kubetest.Options{NoWatchList: true},
			f: []kubetest.Fault{{Verb: "list", Resource: "pods", Code: 410, Times: 1}}},
		{name: "429", f: []kubetest.Fault{{Resource: "pods", Code: 429, Times: 3}}},
		{name: "500", f: []kubetest.Fault{{Resource: "pods", Code: 500, Times: 3}}},
		{name: "503", f: []kubetest.Fault{{Resource: "pods", Code: 503, Times: 3}}},
		{name: "504", f: []kubetest.Fault{{Resource: "pods", Code: 504, Times: 3}}},
		{name: "truncated watch", f: []kubetest.Fault{{Verb: "watch", Resource: "pods", Truncate: true, Times: 2}}},
		{name: "truncated list", o: kubetest.Options{NoWatchList: true},
			f: []kubetest.Fault{{Verb: "list", Resource: "pods", Truncate: true, Times: 2}}},
		{name: "aborted", f: []kubetest.Fault{{Resource: "pods", Abort: true, Times: 4}}},
		{name: "slow", f: []kubetest.Fault{{Latency: 20 * time.Millisecond}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newServer(t, c.o)
			for _, f := range c.f {
				s.Inject(f)
			}
			b := run(t, s, nil)
			b.at(t, "10.1.0.11", "p1")
			s.SetPod(kubetest.Pod{Namespace: "ns1", Name: "p2", Node: "node1", ServiceAccount: "ksa",
				Addresses: []string{"10.1.0.12"}})
			b.at(t, "10.1.0.12", "p2")
			if p := b.Status().Problem; p != "" {
				t.Errorf("problem left over: %s", p)
			}
		})
	}
}

// The API server restarts: a UID is still the pod's, an address is nobody's until the server is
// back and has reported what we missed.
func TestAPIServerRestarts(t *testing.T) {
	for name, gap := range map[string]time.Duration{"for a moment": 0, "for long": time.Hour} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t, kubetest.Options{})
			b := run(t, s, nil)
			uid := b.at(t, "10.1.0.11", "p1")[0].PodUID
			s.Refuse()
			until(t, "the watch to break", func() bool { return !b.pods.watching.Load() })
			b.pods.touched.Store(time.Now().Add(-gap).UnixNano())
			_, changed, err := b.At(netip.MustParseAddr("10.1.0.11"))
			var away *AwayError
			if !errors.As(err, &away) || time.Since(away.Since) < gap {
				t.Fatalf("At: %v", err)
			}
			if c, known, _, err := b.Of(uid); !known || err != nil || c.PodName != "p1" {
				t.Errorf("Of = %v, %v, %v", c, known, err)
			}
			if _, known, _, err := b.Of("another"); known || !errors.As(err, &away) {
				t.Errorf("Of an unknown UID = %v, %v", known, err)
			}
			if age := b.watchAge(); age < gap.Seconds() {
				t.Errorf("pod watch age %v", age)
			}
			until(t, "the API server to be missed", func() bool {
				_, err := b.Token(t.Context(), ksa)
				return errors.As(err,
					&away)
			})
			s.DeletePod("ns1", "p1") // unseen
			s.SetPod(kubetest.Pod{Namespace: "ns1", Name: "p2", Node: "node1", ServiceAccount: "ksa",
				Addresses: []string{"10.1.0.11"}})
			s.Accept()
			<-changed // who waits is woken
			for {
				got, changed, err := b.At(netip.MustParseAddr("10.1.0.11"))
				if gap > 0 && len(got) == 1 && got[0].PodName == "p1" {
					t.Fatal("the pod that went away while nobody watched is believed for its address")
				}
				if err == nil && len(got) == 1 && got[0].PodName == "p2" {
					break
				}
				<-changed
			}
			if _, known, _, err := b.Of(uid); known || err != nil {
				t.Errorf("Of a pod that went away = %v, %v", known, err)
			}
			until(t, "the log to say so", func() bool {
				return strings.Contains(b.logs.String(),
					"the Kubernetes API is available again")
			})
		})
	}
}

// Pods are known by their UIDs before they have an address, on the host network too, and with their
// RuntimeClass.
func TestOf(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	b := run(t, s, nil)
	b.at(t, "10.1.0.11", "p1")
	for _, p := range []kubetest.Pod{
		{Name: "starting", Phase: "Pending", ServiceAccount: "ksa"},
		{Name: "host", ServiceAccount: "ksa", Addresses: []string{"192.0.2.1"}, HostNetwork: true},
		{Name: "sandboxed", ServiceAccount: "ksa", Addresses: []string{"10.1.0.12"}, RuntimeClass: "gvisor"},
	} {
		p.Namespace, p.Node = "ns1", "node1"
		uid := s.SetPod(p)
		b.of(t, uid, workload.Caller{PodUID: uid, PodName: p.Name, HostNetwork: p.HostNetwork, RuntimeClass: p.RuntimeClass,
			ServiceAccount: ksa})
		p.Phase, p.Ended = "Succeeded", true
		s.SetPod(p)
		b.of(t, uid, workload.Caller{})
	}
}

// A static pod's cgroup names the UID that kubelet gave it, and not its mirror's. It has no
// ServiceAccount; who has one is in nobody's place.
func TestStaticPods(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	b := run(t, s, nil)
	victim := b.at(t, "10.1.0.11", "p1")[0]
	mirror := s.SetPod(kubetest.Pod{Namespace: "ns1", Name: "static", Node: "node1", Addresses: []string{"10.1.0.12"},
		MirrorOf: "0123abcd"})
	static := workload.Caller{PodUID: mirror, PodName: "static", ServiceAccount: workload.ServiceAccount{Namespace: "ns1"}}
	b.of(t, "0123abcd", static)
	s.SetPod(kubetest.Pod{Namespace: "ns1", Name: "evil", Node: "node1", MirrorOf: victim.PodUID})
	s.SetPod(kubetest.Pod{Namespace: "ns1", Name: "eviler", Node: "node1", ServiceAccount: "ksa", MirrorOf: "0123abcd",
		Addresses: []string{"10.1.0.13"}})
	b.at(t, "10.1.0.13", "eviler")
	b.of(t, victim.PodUID, victim)
	b.of(t, "0123abcd", static)
	if sas, _ := b.ServiceAccounts(); !slices.Equal(sas, []workload.ServiceAccount{ksa}) {
		t.Errorf("ServiceAccounts %v: static pods use none", sas)
	}
}

// A stop does not wait for the reflector's next attempt, whatever it waits for.
func TestStopWhileBackingOff(t *testing.T) {
	for name, broken := range map[string]func(*kubetest.Server){
		"connection refused": (*kubetest.Server).Close,
		"connection reset":   (*kubetest.Server).Refuse,
		"429":                func(s *kubetest.Server) { s.Inject(kubetest.Fault{Code: 429}) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t, kubetest.Options{})
			broken(s)
			b := run(t, s, nil, func(b *testNode) { b.backoff = wait.Backoff{Duration: time.Hour, Steps: 1} })
			until(t, "an error", func() bool { return b.Status().Problem != "" })
			stopped := make(chan struct{})
			go func() { b.stop(); close(stopped) }()
			select {
			case <-stopped:
			case <-time.After(waitLimit):
				t.Fatal("Run goes on")
			}
		})
	}
}

// A quiet watch is not a broken one, and touches nothing.
func TestQuietWatchIsHealthy(t *testing.T) {
	b := run(t, newServer(t, kubetest.Options{}), nil)
	b.at(t, "10.1.0.11", "p1")
	until(t, "the watch", func() bool { return b.pods.watching.Load() })
	b.pods.touched.Store(time.Now().Add(-time.Hour).UnixNano())
	if _, _, err := b.At(netip.MustParseAddr("10.1.0.11")); err != nil {
		t.Errorf("At: %v", err)
	}
	if age := b.watchAge(); age != 0 {
		t.Errorf("age %v", age)
	}
}
