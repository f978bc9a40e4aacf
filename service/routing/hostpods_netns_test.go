package routing

import (
	"strings"
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
		b.sh(c.before)
		if got := found(); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
		b.sh(c.after)
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
	b.sh(refuse) // and then it is away
	b.install(b.plan)
	says("left alone: the cloud's metadata server answers")
	b.answersIn(podCgroup, b.NS, "169.254.169.254:80", "")
	b.remove(b.plan)

	b.plan.RunDir = t.TempDir() // another boot
	b.install(b.plan)
	says("redirected: no metadata server of a cloud answers")
	b.answersIn(podCgroup, b.NS, "169.254.169.254:80", emulator)
	b.sh("iptables -F OUTPUT") // from here on it would answer
	b.install(b.plan)
	b.green(b.plan)
	says("redirected: no metadata server of a cloud answers")
	b.answersIn("system.slice", b.NS, "169.254.169.254:80", cloud)
	b.remove(b.plan)

	// The watcher comes before the network, and learns when there is one.
	b.sh("ip route del default; " + refuse)
	b.plan.RunDir = t.TempDir()
	w := b.watch(b.plan, time.Hour)
	says("left alone: there is no way to 169.254.169.254 yet")
	b.sh("ip route add default via 198.51.100.1")
	w.until("it learned", func() bool { return w.state().CloudServer.Found == cloudNone && w.state().Standing.Good })
	says("redirected: no metadata server of a cloud answers")
	b.answersIn(podCgroup, b.NS, "169.254.169.254:80", emulator)
	b.green(b.plan)
	w.end()
	if got := w.state().Repairs.Total(); got != 0 {
		t.Errorf("%d repairs: nothing was broken", got)
	}
	b.remove(b.plan)
}
