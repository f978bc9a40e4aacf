package routing

import (
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/watch"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestAskCloud: what the host finds at 169.254.169.254.
func TestAskCloud(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	found := func() (found string) {
		t.Helper()
		_ = b.Do(func() error { found = askCloud().answer(); return nil })
		return found
	}
	for _, c := range []struct{ name, before, after, want string }{
		{"it answers", "true", "true", cloudAnswers},
		{"nobody listens", "iptables -A OUTPUT -d 169.254.169.254 -p tcp -j REJECT --reject-with tcp-reset",
			"iptables -F OUTPUT", cloudNone},
		{"no route beyond the router",
			"iptables -A OUTPUT -d 169.254.169.254 -p tcp -j REJECT --reject-with icmp-host-unreachable", "iptables -F OUTPUT",
			cloudSilent},
		{"silence", "iptables -A INPUT -s 169.254.169.254 -j DROP", "iptables -F INPUT", cloudSilent},
		{"no network yet", "ip route del default", "ip route add default via 198.51.100.1", cloudUnknown},
		{"the address is the node's own", "ip address add 169.254.169.254/32 dev lo",
			"ip address del 169.254.169.254/32 dev lo", cloudUnknown},
	} {
		b.run(c.before)
		if got := found(); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
		b.run(c.after)
	}
}

// TestHostPodsAuto: they are left to the cloud where it answers, and what was found out outlives a
// restart; where nobody is, they are ours.
func TestHostPodsAuto(t *testing.T) {
	t.Parallel()
	b := ebpfNode(t)
	says := func(want string) {
		t.Helper()
		s, err := ReadState(b.plan.RunDir)
		if err != nil || !strings.Contains(s.HostNetwork, want) {
			t.Errorf("state: %q, %v, want %q in it", s.HostNetwork, err, want)
		}
	}
	const refuse = "iptables -A OUTPUT -d 169.254.169.254 -p tcp -j REJECT --reject-with tcp-reset"
	b.install(b.plan)
	says("left alone: the cloud's metadata server answers")
	b.run(refuse) // and then it is away
	b.install(b.plan)
	says("left alone: the cloud's metadata server answers")
	b.answersIn(podCgroup, b.NS, "169.254.169.254:80", "")
	b.remove(b.plan)

	b.plan.RunDir = t.TempDir() // another boot
	b.install(b.plan)
	says("redirected: no metadata server of a cloud answers")
	b.answersIn(podCgroup, b.NS, "169.254.169.254:80", emulator)
	b.run("iptables -F OUTPUT") // from here on it would answer
	b.install(b.plan)
	b.requireOK(b.plan)
	says("redirected: no metadata server of a cloud answers")
	b.answersIn("system.slice", b.NS, "169.254.169.254:80", cloud)
	b.remove(b.plan)

	// The watcher comes before the network, and learns when there is one.
	b.run("ip route del default; " + refuse)
	b.plan.RunDir = t.TempDir()
	w := b.watch(b.plan, time.Hour)
	says("left alone: there is no route to 169.254.169.254 yet")
	b.run("ip route add default via 198.51.100.1")
	w.until("it learned", func() bool { return w.state().CloudServer.Found == cloudNone && w.state().Standing.Good })
	says("redirected: no metadata server of a cloud answers")
	b.answersIn(podCgroup, b.NS, "169.254.169.254:80", emulator)
	b.requireOK(b.plan)
	w.end()
	if got := w.state().Repairs.Total(); got != 0 {
		t.Errorf("%d repairs: nothing was broken", got)
	}
	b.remove(b.plan)
}

// TestHostPodsSilence: on a node without a cloud nobody refuses, the network is silent. Silence is
// an answer, and where it was the wrong one because the cloud's server came late, it is corrected.
func TestHostPodsSilence(t *testing.T) {
	t.Parallel()
	b := ebpfNode(t)
	const silent = "iptables -A INPUT -s 169.254.169.254 -p tcp -j DROP"
	b.run("ip route del default; " + silent)
	b.plan.RunDir = t.TempDir()
	// The watcher is one of the node's own processes: else its second question would be redirected.
	watcher := b.in("system.slice", b.play("watch by programs",
		strings.Join([]string{b.plan.RunDir, b.plan.BPFDir, b.plan.CgroupRoot}, " "), b.self()))
	var out strings.Builder
	watcher.Stdout, watcher.Stderr = &out, &out
	if err := watcher.Start(); err != nil {
		t.Fatal(err)
	}
	end := sync.OnceFunc(func() { _ = watcher.Process.Kill(); _ = watcher.Wait() })
	t.Cleanup(end)
	until := func(want string) {
		t.Helper()
		var s State
		for deadline := time.Now().Add(long); ; {
			if s, _ = ReadState(b.plan.RunDir); strings.Contains(s.HostNetwork, want) && s.Standing.Good {
				return
			}
			if time.Now().After(deadline) {
				end()
				t.Fatalf("state: %q, want %q in it\n%s", s.HostNetwork, want, out.String())
			}
			<-time.After(10 * time.Millisecond)
		}
	}
	until("left alone: there is no route to 169.254.169.254 yet")
	b.run("ip route add default via 198.51.100.1")
	until("redirected: no metadata server of a cloud has answered at 169.254.169.254 so far")
	b.answersIn(podCgroup, b.NS, "169.254.169.254:80", emulator)
	b.run("iptables -F INPUT")
	until("left alone: the cloud's metadata server answers")
	b.answersIn(podCgroup, b.NS, "169.254.169.254:80", cloud)
	end()
	b.remove(b.plan)
}

// TestHostPodsSilentForLong: the rules stay as they are, and what is said of them is not what was
// said before.
func TestHostPodsSilentForLong(t *testing.T) {
	t.Parallel()
	b := ebpfNode(t)
	b.plan.RunDir = t.TempDir()
	b.run("iptables -A INPUT -s 169.254.169.254 -p tcp -j DROP")
	b.install(b.plan)
	s, err := ReadState(b.plan.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	s.CloudServer.Since = s.CloudServer.Since.Add(-silence)
	if err := writeState(b.plan.RunDir, s); err != nil {
		t.Fatal(err)
	}
	r := b.router(b.plan).(*router)
	r.remember(s)
	if err := b.Do(func() error {
		n, err := r.open(t.Context(), s.Command, false)
		if err != nil {
			return err
		}
		_, err = r.install(t.Context(), &repair{of: s, node: n, mode: true, found: cloudSilent})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if s, err = ReadState(b.plan.RunDir); err != nil ||
		s.HostNetwork != "redirected: no metadata server of a cloud answers at 169.254.169.254" {
		t.Errorf("state: %q, %v", s.HostNetwork, err)
	}
	b.remove(b.plan)
}

// TestNetworkChangesWhileAsking: the network that a question is asked in changes before the answer.
// It is asked again as soon as that question is answered, and not at the next sweep.
func TestNetworkChangesWhileAsking(t *testing.T) {
	w := &watcher{router: &router{plan: Plan{InterceptHostPods: "auto"}}, asking: true}
	w.askCloud(watch.Route)
	w.learn(t.Context(), cloudUnknown)
	if w.askAgain.IsZero() || time.Until(w.askAgain) > 0 {
		t.Errorf("it is asked again at %v, want now", w.askAgain)
	}
}
