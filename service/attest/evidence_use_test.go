package attest

import (
	"errors"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// witness is a kernel that says what a test has it say.
type witness struct {
	mu       sync.Mutex
	evidence *Evidence
	err      error
	looks    int
	searched int64
	changed  chan struct{}
}

func (w *witness) Look(Conn) (*Evidence, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.looks++
	return w.evidence, w.err
}

func (w *witness) Changes() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.changed
}

func (w *witness) Search() int64 { return 1 }

func (w *witness) Searched(number int64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.searched >= number
}

// search ends one that finds nothing.
func (w *witness) search() {
	w.mu.Lock()
	w.searched++
	err := w.err
	w.mu.Unlock()
	w.say(nil, err)
}

func (w *witness) say(e *Evidence, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.evidence, w.err = e, err
	close(w.changed)
	w.changed = make(chan struct{})
}

func newWitness(e *Evidence, err error) *witness {
	return &witness{evidence: e, err: err, changed: make(chan struct{})}
}

func alive(e Evidence) *Evidence {
	e.life = new(atomic.Bool)
	e.life.Store(true)
	return &e
}

func inPod(uid string) *Evidence {
	return alive(Evidence{Kind: ByCgroup, PodUID: uid, Container: "c0ffee",
		Cgroup: "/kubepods.slice/kubepods-pod" + uid + ".slice/cri-containerd-c0ffee.scope"})
}

func inCgroup(path string) *Evidence { return alive(Evidence{Kind: ByCgroup, Cgroup: path}) }

func pod(uid, runtimeClass string) workload.Caller {
	return workload.Caller{PodUID: uid, PodName: "pod-" + uid, RuntimeClass: runtimeClass,
		ServiceAccount: workload.ServiceAccount{Namespace: "ns", Name: "sa-" + uid}}
}

func inNamespace(namespace, uid string) workload.Caller {
	c := pod(uid, "")
	c.ServiceAccount.Namespace = namespace
	return c
}

var puller = workload.ServiceAccount{Namespace: "kube-system", Name: "image-puller"}

const podClient = "10.1.0.1:1000"

func TestKernelEvidence(t *testing.T) {
	away := errors.New("the API server is away")
	noSocket := &NoSocketError{}
	searched := func(_ *index, w *witness) { w.search() }
	dead := inPod("a")
	dead.life.Store(false)
	for name, tt := range map[string]struct {
		evidence *Evidence
		look     error
		pods     []workload.Caller // known by UID
		at       []workload.Caller // having the client's address
		index    error
		later    func(*index, *witness) // after one second
		want     string                 // the pod's UID, or the unit
		account  workload.ServiceAccount
		err      error
		says     string
		took     time.Duration
	}{
		"the cgroup names the pod": {evidence: inPod("a"), pods: []workload.Caller{pod("a", "")}, want: "a"},
		"U-06: the cgroup decides, whoever has the address by what Kubernetes says": {
			evidence: inPod("a"), pods: []workload.Caller{pod("a", ""), pod("b", "")}, at: []workload.Caller{pod("b", "")},
			want: "a"},
		"K-03: a pod on the host network": {evidence: inPod("a"), pods: []workload.Caller{pod("a", "")}, want: "a"},
		"N-11: a UID that the API server reports later": {
			evidence: inPod("a"), later: func(x *index, _ *witness) { x.live(nil, pod("a", "")) }, want: "a", took: time.Second},
		"N-11: one that it never reports, though another pod has the address": {
			evidence: inPod("a"), at: []workload.Caller{pod("b", "gvisor")}, err: ErrUnknown, says: "pod a", took: Hold},
		"the API server is away: a known UID is still the pod's": {evidence: inPod("a"),
			pods: []workload.Caller{pod("a", "")}, index: away, want: "a"},
		"the API server is away: an unknown UID is held, and why": {evidence: inPod("a"),
			pods: []workload.Caller{pod("b", "")}, index: away, err: away, took: Hold},
		"a dead cgroup": {evidence: dead, pods: []workload.Caller{pod("a", "")}, at: []workload.Caller{pod("a", "gvisor")},
			err: ErrChanged},
		"A-13: no socket": {look: noSocket, at: []workload.Caller{pod("a", "")}, later: searched, err: ErrNoSocket,
			took: Hold},
		"A-13: a socket in a namespace that is found after the accept": {look: noSocket,
			pods: []workload.Caller{pod("a", "")}, later: func(_ *index, w *witness) { w.say(inPod("a"), nil) }, want: "a",
			took: time.Second},
		"nobody left where the socket was made": {look: ErrEmptyCgroup,
			at: []workload.Caller{pod("a", "gvisor")}, err: ErrEmptyCgroup},
		"a pod's name on somebody's cgroup": {look: ErrOwner,
			at: []workload.Caller{pod("a", "gvisor")}, err: ErrOwner},
		"A-12: sockets in two namespaces": {look: ErrSockets,
			at: []workload.Caller{pod("a", "gvisor")}, err: ErrSockets},
		"A-17: two pods": {look: ErrPods,
			at: []workload.Caller{pod("a", "gvisor")}, err: ErrPods},
		"no cgroup": {look: ErrNoCgroup,
			at: []workload.Caller{pod("a", "gvisor")}, err: ErrNoCgroup},
		"A-11: a cgroup that nobody knows": {look: ErrUnknownCgroup,
			at: []workload.Caller{pod("a", "gvisor")}, err: ErrUnknownCgroup, took: Hold},
		"the helper is away": {look: ErrHelperAway,
			at: []workload.Caller{pod("a", "gvisor")}, err: ErrHelperAway, says: "gke-metadata-emulator-attest.service",
			took: Hold},
		"the helper comes back": {look: ErrHelperAway,
			pods: []workload.Caller{pod("a", "")}, later: func(_ *index, w *witness) { w.say(inPod("a"), nil) }, want: "a",
			took: time.Second},
		"a namespace is found after the accept": {look: ErrNoNamespace,
			pods: []workload.Caller{pod("a", "")}, later: func(_ *index, w *witness) { w.say(inPod("a"), nil) }, want: "a",
			took: time.Second},

		"a pod whose namespace is not found is not believed for its address": {
			look: ErrNoNamespace, at: []workload.Caller{pod("a", "")}, later: searched, err: ErrNoNamespace, took: Hold},
		"A-14: a sandbox is, once its namespace was searched for": {
			look: ErrNoNamespace, at: []workload.Caller{pod("a", "gvisor")}, later: searched, want: "a", took: time.Second},
		"A-14: news of others is no search": {
			look: ErrNoNamespace, at: []workload.Caller{pod("a", "gvisor")},
			later: func(_ *index, w *witness) { w.say(nil, ErrNoNamespace) }, err: ErrNoNamespace, took: Hold},
		"A-14: a sandbox whose namespace has the address, and no socket": {
			look: &NoSocketError{Holder: "a"}, at: []workload.Caller{pod("a", "gvisor")}, later: searched, want: "a",
			took: time.Second},
		"A-14: a sandbox's address that another pod's namespace has": {
			look: &NoSocketError{Holder: "b"}, at: []workload.Caller{pod("a", "gvisor")}, later: searched, err: ErrNoSocket,
			took: Hold},
		"A-14: a sandbox whose machine has a cgroup of no pod": {
			look: &NoSocketError{Others: true}, at: []workload.Caller{pod("a", "gvisor")}, later: searched, want: "a",
			took: time.Second},
		"A-14: a sandbox's address that two namespaces have": {
			look: noSocket, at: []workload.Caller{pod("a", "gvisor")}, later: searched, err: ErrNoSocket, took: Hold},
		"A-14: the search finds whose address it is now": {
			look: ErrNoNamespace, at: []workload.Caller{pod("a", "gvisor")}, pods: []workload.Caller{pod("b", "")},
			later: func(_ *index, w *witness) { w.say(inPod("b"), nil) }, want: "b", took: time.Second},
		"A-14: a sandbox that is not configured": {
			look: ErrNoNamespace, at: []workload.Caller{pod("a", "kata")}, err: ErrNoNamespace, says: "attestation.byAddress",
			took: Hold},
		"A-14: two pods have the sandbox's address": {
			look: ErrNoNamespace, at: []workload.Caller{pod("a", "gvisor"), pod("b", "gvisor")}, later: searched,
			err: ErrNoNamespace, took: Hold},
		"A-14: a sandbox while the API server is away": {
			look: ErrNoNamespace, at: []workload.Caller{pod("a", "gvisor")}, index: away, later: searched, err: away,
			took: Hold},

		"A-14: a container that a pod runs itself": {
			look: &NoSocketError{Holder: "dind"}, at: []workload.Caller{pod("dind", "")}, later: searched, want: "dind",
			took: time.Second},
		"A-14: one in a namespace whose pods are named": {
			look: &NoSocketError{Holder: "a"}, at: []workload.Caller{inNamespace("builds", "a")}, later: searched, want: "a",
			took: time.Second},
		"A-14: one of a pod that is not named": {
			look: &NoSocketError{Holder: "a"}, at: []workload.Caller{pod("a", "")}, later: searched, err: ErrNoSocket,
			took: Hold},
		"A-14: a named pod's address that another pod's namespace has": {
			look: &NoSocketError{Holder: "b"}, at: []workload.Caller{pod("dind", "")}, later: searched, err: ErrNoSocket,
			took: Hold},
		"A-14: a named pod's address that no pod's namespace has": {
			look: &NoSocketError{Others: true}, at: []workload.Caller{pod("dind", "")}, later: searched, err: ErrNoSocket,
			took: Hold},
		"A-14: a named pod whose namespace is not found": {
			look: ErrNoNamespace, at: []workload.Caller{pod("dind", "")}, later: searched, err: ErrNoNamespace, took: Hold},
		"A-14: a named pod whose own process asks": {evidence: inPod("b"), at: []workload.Caller{pod("dind", "")},
			pods: []workload.Caller{pod("b", "")}, want: "b"},

		"a unit that is named": {evidence: inCgroup("/system.slice/kubelet.service"), want: "kubelet.service",
			account: puller},
		"a cgroup that is named": {evidence: inCgroup("/system.slice/docker-0abc.scope/init"),
			want: "docker-0abc.scope", account: workload.ServiceAccount{Namespace: "ns", Name: "docker"}},
		"a unit that is not": {evidence: inCgroup("/system.slice/sshd.service"),
			at: []workload.Caller{pod("a", "gvisor")}, err: ErrNotPod, says: "sshd.service"},
		"a cgroup of no unit": {evidence: inCgroup("/foo"), err: ErrNotPod, says: "/foo"},
		"a delegated cgroup named as one": {evidence: inCgroup("/system.slice/evil.service/kubelet.service"),
			err: ErrNotPod, says: "evil.service (cgroup /system.slice/evil.service/kubelet.service)"},
		"a pod's cgroup named as a unit's": {evidence: alive(Evidence{Kind: ByCgroup, PodUID: "a",
			Cgroup: "/kubepods.slice/kubepods-poda.slice/x.scope/kubelet.service"}), pods: []workload.Caller{pod("a", "")},
			want: "a"},
		"a static pod": {evidence: inPod("a"),
			pods: []workload.Caller{{PodUID: "a", PodName: "static", ServiceAccount: workload.ServiceAccount{Namespace: "ns"}}},
			err:  ErrNoAccount, says: "ns/static"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x, w := newIndex(), newWitness(tt.evidence, tt.look)
				x.live(tt.index, tt.pods...)
				x.pods[netip.MustParseAddrPort(podClient).Addr()] = tt.at
				if tt.later != nil {
					time.AfterFunc(time.Second, func() { tt.later(x, w) })
				}
				a := New(Options{Pods: x, Kernel: w, ByAddress: []string{"gvisor", "ns/sa-dind", "builds/*"}, Hosts: []Host{
					{Unit: "kubelet.service", ServiceAccount: puller},
					{Cgroup: "/system.slice/docker-*.scope", ServiceAccount: workload.ServiceAccount{Namespace: "ns", Name: "docker"}},
				}})
				start := time.Now()
				p := peer(podClient)
				p.evidence, p.err = w.Look(p.Conn)
				got, err := a.Attest(t.Context(), p)
				if !errors.Is(err, tt.err) || got.ID() != tt.want || (err != nil) != (tt.err != nil) {
					t.Fatalf("Attest = %q, %v; want %q, %v", got.ID(), err, tt.want, tt.err)
				}
				if tt.account.Name != "" && got.ServiceAccount != tt.account {
					t.Errorf("ServiceAccount %s, want %s", got.ServiceAccount, tt.account)
				}
				if err != nil && !strings.Contains(err.Error(), tt.says) {
					t.Errorf("%q does not say %q", err, tt.says)
				}
				if took := time.Since(start); took != tt.took {
					t.Errorf("took %v, want %v", took, tt.took)
				}
				if tt.err == nil && tt.evidence != nil && w.looks != 1 {
					t.Errorf("%d looks, want the one at accept", w.looks)
				}
			})
		})
	}
}

// After the evidence was used it is looked at again: the process, and the pod.
func TestEvidenceDies(t *testing.T) {
	for name, end := range map[string]func(*index, *Evidence){
		"the container": func(_ *index, e *Evidence) { e.life.Store(false) },
		"the pod":       func(x *index, _ *Evidence) { x.live(nil, pod("b", "")) },
	} {
		t.Run(name, func(t *testing.T) {
			x, e := newIndex(), inPod("a")
			x.live(nil, pod("a", ""))
			w := newWitness(e, nil)
			a, p := New(Options{Pods: x, Kernel: w}), peer(podClient)
			if _, err := a.Attest(t.Context(), p); err != nil {
				t.Fatal(err)
			}
			x.live(errors.New("away"), pod("a", "")) // and is known all the same
			if err := a.Check(t.Context(), p); err != nil {
				t.Errorf("Check = %v", err)
			}
			end(x, e)
			w.evidence = inPod("b") // nobody looks
			if err := a.Check(t.Context(), p); !errors.Is(err, ErrChanged) {
				t.Errorf("Check = %v, want ErrChanged", err)
			}
			if _, err := a.Attest(t.Context(), p); !errors.Is(err, ErrChanged) {
				t.Errorf("Attest = %v, want ErrChanged", err)
			}
		})
	}
}

// A connection outlives a reload; what it was attested by has to be good by the new configuration.
func TestConfigurationChanges(t *testing.T) {
	kubelet, byAddress := inCgroup("/system.slice/kubelet.service"), []workload.Caller{pod("a", "gvisor")}
	named := []Host{{Unit: "kubelet.service", ServiceAccount: puller}}
	for name, tt := range map[string]struct {
		before, after Options
		evidence      *Evidence
		want          error
	}{
		"from addresses to the kernel": {before: Options{}, after: Options{Kernel: newWitness(nil, ErrNoNamespace)},
			want: ErrChanged},
		"to the kernel, and a sandbox's": {before: Options{}, after: Options{Kernel: newWitness(nil, ErrNoNamespace),
			ByAddress: []string{"gvisor"}}},
		"a unit that is named no more": {before: Options{Kernel: newWitness(kubelet, nil), Hosts: named},
			after: Options{Kernel: newWitness(kubelet, nil)}, want: ErrChanged},
		"a unit that is still named": {before: Options{Kernel: newWitness(kubelet, nil), Hosts: named},
			after: Options{Hosts: named}},
		"a unit with another ServiceAccount": {before: Options{Kernel: newWitness(kubelet, nil), Hosts: named},
			after: Options{Hosts: []Host{{Unit: "kubelet.service"}}}, want: ErrChanged},
		"from the kernel to addresses: as good": {before: Options{Kernel: newWitness(inPod("a"), nil)}, after: Options{}},
	} {
		t.Run(name, func(t *testing.T) {
			x := newIndex()
			x.live(nil, pod("a", ""))
			x.pods[netip.MustParseAddrPort(podClient).Addr()] = byAddress
			tt.before.Pods, tt.after.Pods = x, x
			p := peer(podClient)
			if _, err := New(tt.before).Attest(t.Context(), p); err != nil {
				t.Fatal(err)
			}
			if _, err := New(tt.after).Attest(t.Context(), p); !errors.Is(err, tt.want) {
				t.Errorf("Attest = %v, want %v", err, tt.want)
			}
		})
	}
}

// By address, a request waits while the next watch is opened, and is not lost to it; when none is,
// it is refused.
func TestAddressWhileTheWatchIsReopened(t *testing.T) {
	for name, again := range map[string]bool{"opened": true, "not": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				away := errors.New("away")
				x := newIndex()
				x.set(nil, "10.1.0.1", "a")
				a, p := attestor(x), peer(podClient)
				if _, err := a.Attest(t.Context(), p); err != nil {
					t.Fatal(err)
				}
				x.set(away, "10.1.0.1", "a")
				if again {
					time.AfterFunc(time.Second, func() { x.set(nil, "10.1.0.1", "a") })
				}
				if err := a.Check(t.Context(), p); again && err != nil || !again && !errors.Is(err, away) {
					t.Errorf("Check = %v", err)
				}
			})
		})
	}
}

func TestParty(t *testing.T) {
	x := newIndex()
	for want, e := range map[string]*Evidence{"pod a": inPod("a"),
		"kubelet.service": inCgroup("/system.slice/kubelet.service"), "10.1.0.1": nil} {
		p := peer(podClient)
		p.evidence = e
		if got := p.Party().String(); got != want {
			t.Errorf("Party = %s, want %s", got, want)
		}
	}
	p := peer(podClient)
	if kind, container := p.Evidence(); kind != "" || container != "" {
		t.Errorf("Evidence before Attest = %q, %q", kind, container)
	}
	x.live(nil, pod("a", ""))
	r := prometheus.NewRegistry()
	a := New(Options{Pods: x, Kernel: newWitness(inPod("a"), nil), Metrics: NewMetrics(r)})
	if _, err := a.Attest(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if kind, container := p.Evidence(); kind != ByCgroup || container != "c0ffee" {
		t.Errorf("Evidence = %q, %q", kind, container)
	}
	families, err := r.Gather()
	if err != nil || len(families) != 1 {
		t.Fatal(families, err)
	}
	for _, m := range families[0].GetMetric() { // all of them are there from the start
		want := 0.0
		if labels(m) == "asker=pod evidence=cgroup" {
			want = 1
		}
		if m.GetCounter().GetValue() != want {
			t.Errorf("%s is %v, want %v", labels(m), m.GetCounter().GetValue(), want)
		}
	}
}

func labels(m *dto.Metric) string {
	var out []string
	for _, l := range m.GetLabel() {
		out = append(out, l.GetName()+"="+l.GetValue())
	}
	return strings.Join(out, " ")
}

func TestHostFits(t *testing.T) {
	for _, tt := range []struct {
		host   Host
		cgroup string
		want   bool
	}{
		{Host{Unit: "kubelet.service"}, "/system.slice/kubelet.service", true},
		{Host{Unit: "kubelet.service"}, "/system.slice/kubelet.service/sub", true},
		{Host{Unit: "kubelet.service"}, "/runtime.slice/kubelet.service", true},
		{Host{Unit: "kubelet.service"}, "/system.slice/other.service/kubelet.service", false},
		{Host{Unit: "kubelet.service"}, "/user.slice/user-1000.slice/user@1000.service/app.slice/kubelet.service", false},
		{Host{Unit: "docker-*.scope"}, "/system.slice/docker-0abc.scope", true},
		{Host{Unit: "kubelet"}, "/system.slice/kubelet.service", false},
		{Host{Cgroup: "/system.slice/docker-*.scope"}, "/system.slice/docker-0abc.scope", true},
		{Host{Cgroup: "/system.slice/docker-*.scope"}, "/system.slice/docker-0abc.scope/init", true},
		{Host{Cgroup: "/system.slice/docker-*.scope"}, "/system.slice/docker-0abc.scope.d", false},
		{Host{Cgroup: "/system.slice/docker-*.scope"}, "/system.slice", false},
		{Host{Cgroup: "/system.slice/docker-*.scope"}, "/x/system.slice/docker-0abc.scope", false},
		{Host{Cgroup: "/docker/*"}, "/docker/0abc", true},
		{Host{Cgroup: "/docker/*"}, "/docker", false},
		{Host{Cgroup: "/docker/*"}, "/docker/0abc/def", true},
		{Host{Cgroup: "/*"}, "/anything/at/all", true},
		{Host{Cgroup: "/docker/*"}, "", false},
	} {
		if got := tt.host.fits(inCgroup(tt.cgroup)); got != tt.want {
			t.Errorf("%+v fits %s: %v", tt.host, tt.cgroup, got)
		}
	}
}

func BenchmarkAttestKnownByKernel(b *testing.B) {
	x := newIndex()
	x.live(nil, pod("a", ""))
	a, p := New(Options{Pods: x, Kernel: newWitness(inPod("a"), nil)}), peer(podClient)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := a.Attest(b.Context(), p); err != nil {
			b.Fatal(err)
		}
	}
}

// TestHostPod: both the kernel and Kubernetes have to say so.
func TestHostPod(t *testing.T) {
	onHost := func(e *Evidence) *Evidence { e.OnHost = true; return e }
	hostPod := pod("a", "")
	hostPod.HostNetwork = true
	byNamespace := onHost(alive(Evidence{Kind: ByNamespace, PodUID: "a"}))
	for name, tt := range map[string]struct {
		evidence *Evidence
		err      error
		caller   workload.Caller
		maybe    bool // before it is attested
		is       bool
	}{
		"it is":                                  {onHost(inPod("a")), nil, hostPod, true, true},
		"a socket in a pod's namespace":          {inPod("a"), nil, hostPod, false, false},
		"a pod on the pod network by Kubernetes": {onHost(inPod("a")), nil, pod("a", ""), true, false},
		"a process of the node": {onHost(inCgroup("/system.slice/x.service")), nil,
			workload.Caller{Unit: "x.service"}, false, false},
		"a cgroup that is not known yet":               {nil, ErrUnknownCgroup, hostPod, true, false},
		"an address":                                   {nil, nil, hostPod, false, false},
		"a namespace that is not known yet":            {nil, ErrNoNamespace, hostPod, false, false},
		"a namespace is no cgroup, whosever it may be": {byNamespace, nil, hostPod, true, false},
	} {
		p := &Peer{evidence: tt.evidence, err: tt.err}
		if p.HostPod() || p.MaybeHostPod() != tt.maybe {
			t.Errorf("%s: before it is attested: %v, maybe %v", name, p.HostPod(), p.MaybeHostPod())
		}
		p.binding.Store(&binding{tt.caller, tt.evidence})
		if p.HostPod() != tt.is {
			t.Errorf("%s: %v", name, p.HostPod())
		}
	}
}
