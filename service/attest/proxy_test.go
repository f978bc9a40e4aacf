package attest

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// a mesh's node proxy makes sockets of its own cgroup in the network namespaces of other
// pods. It does not lend them its identity.
func TestProxyNamespace(t *testing.T) {
	b := newTestNode(t)
	proxyNS, appNS := b.pod("proxy"), b.pod("app")
	proxy := b.client(containerPath(1, 1), proxyNS)
	// the second process of its cgroup, as a thread of ztunnel's is not seen either
	inApp := b.client(containerPath(1, 1), appNS)
	b.client("/system.slice/containerd.service", appNS)
	b.startHelper()
	b.mustBe(proxy, dial, podUID(1), containerIDOf(1))
	b.requireRefused("the pod of the namespace has no process yet", accepted(b.accept(inApp.do(dial))), ErrNamespaceOwner)
	app := b.client(containerPath(2, 2), appNS)
	b.mustBe(app, dial, podUID(2), containerIDOf(2))
	conn := accepted(b.accept(inApp.do(dial)))
	b.requireRefused("a proxy in the app's namespace", conn, ErrOtherNamespace)
	_, err := b.kernel.Look(conn)
	var other *OtherNamespaceError
	if !errors.As(err, &other) || other.Pod != podUID(2) || other.Cgroup.PodUID != podUID(1) || !other.life.Load() {
		t.Fatalf("%+v, %v", other, err)
	}

	// The operator's proxy asks for the pod; any other does not.
	x := newIndex()
	x.live(nil, pod(podUID(1), ""), pod(podUID(2), ""))
	name := pod(podUID(1), "").ServiceAccount.String()
	a := New(Options{Pods: x, Kernel: b.kernel, Proxies: []string{"ns/another"}})
	if _, err := a.Attest(t.Context(), seen(a, b.accept(inApp.do(dial)))); !errors.Is(err, ErrOtherNamespace) {
		t.Errorf("a proxy that nobody named: %v", err)
	}
	a = New(Options{Pods: x, Kernel: b.kernel, Proxies: []string{name}})
	peer := seen(a, b.accept(inApp.do(dial)))
	if c, err := a.Attest(t.Context(), peer); err != nil || c.PodUID != podUID(2) {
		t.Fatalf("through the proxy: %v, %v", c, err)
	}
	if kind, _ := peer.Evidence(); kind != ByProxy || peer.HostPod() {
		t.Errorf("evidence %q", kind)
	}
	if err := a.Check(t.Context(), peer); err != nil {
		t.Errorf("again: %v", err)
	}

	// It lasts as long as both: the proxy's cgroup, and the pod's namespace.
	second := seen(a, b.accept(inApp.do(dial)))
	if _, err := a.Attest(t.Context(), second); err != nil {
		t.Fatal(err)
	}
	kill(inApp.cmd)
	kill(proxy.cmd)
	eventually(t, "it dies with the proxy", func() bool { return errors.Is(a.Check(t.Context(), peer), ErrChanged) })
	b.mustBe(app, dial, podUID(2), containerIDOf(2))
}

// seen is a connection whose other end was asked for.
func seen(a *Attestor, c net.Conn) *Peer {
	p := Accept(c)
	a.Look(p)
	return p
}

// What the operator's list of proxies makes of a socket in another pod's namespace.
func TestProxies(t *testing.T) {
	for name, tt := range map[string]struct {
		proxies []string
		pods    []workload.Caller
		pod     string // whose namespace it is
		dead    func(*Evidence, *OtherNamespaceError)
		want    string
		err     error
	}{
		"nobody is named": {pods: []workload.Caller{pod("z", ""), pod("b", "")}, pod: "b",
			err: ErrOtherNamespace},
		"another is named": {proxies: []string{"ns/sa-b"}, pods: []workload.Caller{pod("z", ""),
			pod("b", "")}, pod: "b", err: ErrOtherNamespace},
		"the proxy is named": {proxies: []string{"ns/sa-z"}, pods: []workload.Caller{pod("z", ""),
			pod("b", "")}, pod: "b", want: "b"},
		"several pods are in there": {proxies: []string{"ns/sa-z"}, pods: []workload.Caller{pod("z", ""),
			pod("b", "")}, err: ErrOtherNamespace},
		"Kubernetes knows no such proxy": {proxies: []string{"ns/sa-z"}, pods: []workload.Caller{pod("b", "")}, pod: "b",
			err: ErrUnknown},
		"Kubernetes knows no such pod": {proxies: []string{"ns/sa-z"}, pods: []workload.Caller{pod("z", "")}, pod: "b",
			err: ErrUnknown},
		"the proxy's cgroup is dead": {proxies: []string{"ns/sa-z"}, pods: []workload.Caller{pod("z", ""),
			pod("b", "")}, pod: "b", dead: func(e *Evidence, _ *OtherNamespaceError) { e.life.Store(false) }, err: ErrChanged},
		"the pod's namespace is no more": {proxies: []string{"ns/sa-z"}, pods: []workload.Caller{pod("z", ""),
			pod("b", "")}, pod: "b", dead: func(_ *Evidence, o *OtherNamespaceError) { o.life.Store(false) }, err: ErrChanged},
		"a pod without a service account": {proxies: []string{"ns/sa-z"}, pods: []workload.Caller{pod("z", ""),
			{PodUID: "b", PodName: "b"}}, pod: "b", err: ErrNoAccount},
	} {
		t.Run(name, func(t *testing.T) {
			x, proxy := newIndex(), inPod("z")
			x.live(nil, tt.pods...)
			other := &OtherNamespaceError{Cgroup: proxy, Pod: tt.pod, namespace: "x", life: alive(Evidence{}).life}
			if tt.dead != nil {
				tt.dead(proxy, other)
			}
			a := New(Options{Pods: x, Kernel: newWitness(nil, fmt.Errorf("looking: %w", other)), Proxies: tt.proxies})
			p := &Peer{Conn: peer(podClient).Conn, err: fmt.Errorf("looking: %w", other)}
			b, _, err := a.find(p)
			if !errors.Is(err, tt.err) || err == nil && (b.caller.PodUID != tt.want || b.kind() != ByProxy) {
				t.Errorf("%+v, %v; want %s, %v", b, err, tt.want, tt.err)
			}
			if err == nil {
				p.binding.Store(&b)
				a.Proxies = nil
				if err := a.Check(t.Context(), p); !errors.Is(err, ErrChanged) {
					t.Errorf("after it was taken from the list: %v", err)
				}
			}
			if errors.Is(err, ErrOtherNamespace) && !strings.Contains(err.Error(), "attestation.proxies") {
				t.Errorf("%v does not say what to do", err)
			}
		})
	}
}
