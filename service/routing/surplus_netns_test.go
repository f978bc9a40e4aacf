package routing

import (
	"strings"
	"testing"
	"time"
)

// TestRuleTooMany: a rule of ours that is left over may come before those that are wanted, and
// refuse what they let through: pods in mode loopback, the node's own processes in all modes. Check
// names it; install and the watcher take it away.
func TestRuleTooMany(t *testing.T) {
	t.Parallel()
	const left = "pref 96 to 169.254.169.254/32 ipproto tcp dport 80 prohibit protocol kernel"
	for mode, asks := range map[string]func(*testNode, string){
		ModeLoopback:   func(b *testNode, who string) { b.answers(b.pod, "169.254.169.254:80", who) },
		"iptables-nft": func(b *testNode, who string) { b.answers(b.NS, "169.254.169.254:80", who) },
	} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			b := modeNode(t, mode)
			served := map[string]string{ModeLoopback: emulator, "iptables-nft": cloud}[mode]
			b.install(b.plan)
			asks(b, served)
			b.run("ip rule add " + left)
			asks(b, "")
			if err := b.check(b.plan); err == nil ||
				!strings.Contains(err.Error(), "ip rule: "+left+" should not be there any more") {
				t.Errorf("check says %v", err)
			}
			b.install(b.plan)
			asks(b, served)
			w := b.watch(b.plan, time.Hour)
			b.run("ip rule add " + left)
			w.until("the watcher takes it away", func() bool { return b.stands(b.plan) })
			asks(b, served)
		})
	}
}

// TestGuardDeletedOneByOne: while somebody deletes the rules one after the other, the watcher adds
// them anew. Whichever way the two meet, pods are served as soon as check is content.
func TestGuardDeletedOneByOne(t *testing.T) {
	t.Parallel()
	b := modeNode(t, ModeLoopback)
	b.install(b.plan)
	w := b.watch(b.plan, time.Hour)
	for range 20 {
		b.run(`for pref in $(ip rule | sed -nE 's/^(9[789]|10[123]):.*/\1/p'); do ip rule del pref "$pref" || exit 0; done`)
		w.until("the rules stand", func() bool { return b.stands(b.plan) })
		b.answers(b.pod, "169.254.169.254:80", emulator)
	}
}
