package service

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// subjectOf is whose the token in an answer is.
func (b *testNode) subjectOf(t testing.TB, body string) string {
	t.Helper()
	_, after, _ := strings.Cut(body, `"access_token":"`)
	value, _, _ := strings.Cut(after, `"`)
	issued, _ := b.google.Lookup(value)
	return strings.TrimPrefix(issued.Subject, "system:serviceaccount:")
}

// TestKernelChurn has 200 pods start, ask at once and die, each with the address of the one before
// it, while the API server tells of all this up to 1.5 s late: nobody gets another's identity,
// everybody is served (N-11, U-06), and whoever keeps a dead pod's connection gets nothing on it,
// though Kubernetes says that the pod lives. By address alone 174 of these 200 get another's.
func TestKernelChurn(t *testing.T) {
	const slots, lives = 10, 20
	k := newKernelNode(t, "prefetch: none")
	late := func() time.Duration { return rand.N(1500 * time.Millisecond) }
	var news, wg sync.WaitGroup
	var mu sync.Mutex
	var wrong, unknown, held, dead int
	var window time.Duration
	for slot := range slots {
		wg.Go(func() {
			var before *netnstest.NS
			for life := range lives {
				name := fmt.Sprintf("churn-%d-%d", slot, life)
				add := k.node.AddPod
				if before != nil {
					add = func(name string) (*netnstest.NS, error) { return k.node.AddPodAs(name, before) }
				}
				ns, err := add(name)
				if err != nil {
					t.Error(err)
					return
				}
				before = ns
				p := k.newPod(name, ns)
				if err := p.start(); err != nil {
					t.Error(err)
					return
				}
				registered := make(chan struct{})
				news.Go(func() {
					<-time.After(late())
					p.tell()
					close(registered)
				})
				a, err := p.ask("fresh", accts+"default/token")
				for asked := time.Now(); err == nil && a.Status == http.StatusServiceUnavailable &&
					time.Since(asked) < testTimeout; {
					mu.Lock()
					held++
					mu.Unlock()
					t.Logf("%s is to ask again: %+v", name, a)
					a, err = p.ask("fresh", accts+"default/token")
				}
				if err != nil {
					t.Errorf("%s: %v", name, err)
				}
				mu.Lock()
				switch {
				case a.Status == 200 && k.subjectOf(t, a.Body) != "default:"+name:
					wrong++
				case a.Status != 200:
					unknown++
					t.Logf("%s: %+v", name, a)
				}
				mu.Unlock()
				kept, err := p.pass()
				if err != nil {
					t.Errorf("%s: %v", name, err)
					return
				}
				p.die()
				died := time.Now()
				<-registered // Kubernetes says that it lives
				r := bufio.NewReader(kept)
				var after said
				for over := died.Add(testTimeout); time.Now().Before(over); <-time.After(time.Millisecond) {
					if after = exchangeOn(kept, r, accts+"default/email"); after.Status != 200 {
						break
					}
				}
				mu.Lock()
				window = max(window, time.Since(died))
				if after.Status != 503 || !after.Close || !strings.Contains(after.Body, "process or pod has ended") {
					dead++
					t.Logf("%s is dead: %+v", name, after)
				}
				mu.Unlock()
				_ = kept.Close()
				// As a CNI does before it gives the address to another: what is left of this namespace is not
				// to answer for it.
				if err := errors.Join(ns.Unplug(), ns.Close()); err != nil {
					t.Error(err)
				}
				news.Go(func() {
					<-time.After(late())
					k.kube.DeletePod("default", name)
				})
			}
		})
	}
	wg.Wait()
	news.Wait()
	t.Logf(
		"%d pods: %d wrong identities, %d never served, %d times not known after the hold, %d served when dead; the last "+
			"answer %v after a death at most",
		slots*lives,
		wrong,
		unknown,
		held,
		dead,
		window,
	)
	if wrong+unknown+dead > 0 {
		t.Fail()
	}
	log := k.log.String()
	issued := 0
	for line := range strings.Lines(log) {
		if strings.Contains(line, "token issued") {
			issued++
			if !strings.Contains(line, `"evidence":"cgroup"`) || !strings.Contains(line, `"container":"0`) {
				t.Errorf("an audit line without evidence or container: %s", line)
			}
		}
	}
	if issued != slots*lives {
		t.Errorf("%d tokens were issued to %d pods", issued, slots*lives)
	}
}

// TestKernel has everybody ask: pods on the pod network and on the host's, processes of the node
// with an identity and without, a sandbox that only its address can name; with the API server there
// and away, with the helper there and away.
func TestKernel(t *testing.T) {
	t.Parallel()
	k := newKernelNode(t, `hostIdentities:
- {unit: kubelet.service, serviceAccount: default/plain}
- {cgroup: /system.slice/docker-*.scope, serviceAccount: default/reader}`)
	start := func(name string, ns *netnstest.NS, change func(*podNode)) *podNode {
		t.Helper()
		p := k.newPod(name, ns)
		if change != nil {
			change(p)
		}
		if err := p.start(); err != nil {
			t.Fatal(err)
		}
		return p
	}
	network := func(name string) *netnstest.NS {
		t.Helper()
		ns, err := k.node.AddPod(name)
		if err != nil {
			t.Fatal(err)
		}
		return ns
	}
	in := func(cgroup string) func(*podNode) { return func(p *podNode) { p.cgroup = cgroup } }
	gets := func(p *podNode, subject string) {
		t.Helper()
		if a := p.served(t, accts+"default/token"); a.Status != 200 || k.subjectOf(t, a.Body) != subject {
			t.Errorf("%s: %d, token of %q; want %q", p.Name, a.Status, k.subjectOf(t, a.Body), subject)
		}
	}
	refused := func(p *podNode, status int, says ...string) {
		t.Helper()
		ask := p.served
		if status == http.StatusServiceUnavailable {
			ask = p.mustAsk
		}
		a := ask(t, accts+"default/token")
		for _, s := range says {
			if a.Status != status || !strings.Contains(a.Body, s) {
				t.Errorf("%s: %d %q; want %d %q", p.Name, a.Status, a.Body, status, s)
			}
		}
	}

	pod, other := start("a", network("a"), nil), start("b", network("b"), nil)
	host := start("host", k.node.NS, nil)
	// The helper finds namespaces by cgroups, so these stay unknown to it, as those of sandboxes that
	// have no address do.
	sandbox := start("sandbox", network("sandbox"), func(p *podNode) { p.RuntimeClass, p.cgroup = "gvisor", "" })
	kata := start("kata", network("kata"), func(p *podNode) { p.RuntimeClass, p.cgroup = "kata", "" })
	static := start("static", k.node.NS, func(p *podNode) { p.MirrorOf, p.UID, p.ServiceAccount = p.UID, "", "" })
	for _, p := range []*podNode{pod, other, host, sandbox, kata, static} {
		p.tell()
	}
	kubelet := start("kubelet", k.node.NS, in("/system.slice/kubelet.service"))
	docker := start("docker", k.node.NS, in("/system.slice/docker-0abc.scope/init"))
	sshd := start("sshd", k.node.NS, in("/system.slice/sshd.service"))
	container := start("container", network("container"), in("/system.slice/docker-"+strings.Repeat("1f", 32)+".scope"))
	stranger := start(
		"stranger",
		network("stranger"),
		in("/machine.slice/libpod-"+strings.Repeat("2e", 32)+".scope/container"),
	)
	pretender := start("pretender", k.node.NS, in("/system.slice/evil.service/kubelet.service"))
	k.google.Allow("system:serviceaccount:default:reader", gsa)

	gets(pod, "default:a")
	gets(other, "default:b")
	gets(host, "default:host")
	gets(sandbox, "default:sandbox")
	gets(kubelet, "default:plain")
	for _, p := range []*podNode{docker, container} { // on the node's network, and on one of its own
		if a := p.served(t, accts+"default/email"); a.Body != gsa {
			t.Errorf("%s: %+v", p.Name, a)
		}
	}
	refused(kata, 503, "RuntimeClass", "attestation.byAddress")
	refused(static, 403, "static pod")
	refused(sshd, 403, "hostIdentities")
	refused(stranger, 403, "hostIdentities")
	refused(pretender, 403, "hostIdentities")
	if a, err := pod.ask("kept", accts+"default/token"); err != nil || k.subjectOf(t, a.Body) != "default:a" {
		t.Errorf("on a kept connection: %+v, %v", a, err)
	}
	if a, err := kubelet.ask("direct", accts+"default/token"); err != nil || k.subjectOf(t, a.Body) != "default:plain" {
		t.Errorf("kubelet at the listen address: %+v, %v", a, err)
	}

	log := k.log.String()
	for _, want := range []string{
		`"evidence":"cgroup","expires"`, `"pod":"default/a"`, `"container":"` + pod.container,
		`"evidence":"source-ip","expires"`, `"pod":"default/sandbox"`, `"unit":"kubelet.service"`,
	} {
		if !strings.Contains(log, want) {
			t.Errorf("the log has no %s", want)
		}
	}
	var text strings.Builder
	st := statusOf(t, k.dir)
	if err := st.Text(&text, time.Now()); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`attestation +by the kernel: \d+ cgroups and \d+ network namespaces`, `default +a +10\.244\.\S+ +cgroup +a\n`,
		`default +host +host network +cgroup +host\n`,
		`default +sandbox +10\.244\.\S+ +source-ip +sandbox\n`, `default +static +host network +none +\(static pod\)\n`,
		`HOST IDENTITIES: 2\n`, `kubelet\.service +default/plain\n`, `/system\.slice/docker-\*\.scope +default/reader +` +
			gsa,
	} {
		if !regexp.MustCompile(want).MatchString(text.String()) {
			t.Errorf("status has no %s:\n%s", want, &text)
		}
	}

	t.Run("the API server is away", func(t *testing.T) {
		late := start("late", network("late"), nil)
		k.kube.Refuse()
		defer k.kube.Accept()
		k.eventually(t, "the watch is broken", func() bool { return !statusOf(t, k.dir).Cluster.Watching })
		gets(pod, "default:a")
		gets(host, "default:host")
		gets(kubelet, "default:plain")
		refused(sandbox, 503, "attestation.byAddress")
		refused(late, 503, "the Kubernetes API is unavailable since")
	})
	k.eventually(t, "the API server is back", func() bool { return statusOf(t, k.dir).Cluster.Watching })
	gets(sandbox, "default:sandbox")

	t.Run("the helper is away", func(t *testing.T) {
		k.kill(k.helper)
		k.eventually(t, "that is known", func() bool { return !statusOf(t, k.dir).Attestation.Kernel.Helper })
		late := start("later", network("later"), nil)
		late.tell()
		gets(pod, "default:a")
		gets(host, "default:host")
		refused(late, 503, "gke-metadata-emulator-attest.service")
		refused(
			sandbox,
			503,
			"gke-metadata-emulator-attest.service",
		) // a namespace may have the address, for all that is known
		k.startHelper()
		k.eventually(t, "it is there again", func() bool { return statusOf(t, k.dir).Attestation.Kernel.Helper })
		gets(late, "default:later")
	})
}
