package routing

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/probe"
)

// TestJoinPod: a connection from a pod's own network namespace meets the rules that name pods'
// addresses, which one from a throw-away namespace does not.
func TestJoinPod(t *testing.T) {
	t.Parallel()
	onBothBackends(t, func(t *testing.T, b *testNode) {
		b.install(b.plan)
		addresses := []netip.Addr{netip.MustParseAddr("192.0.2.77"), b.pod.Addr}
		if err := b.Do(func() error { _, err := probe.JoinPod(addresses); return err }); !errors.Is(err, probe.ErrNoPod) {
			t.Errorf("without a process in the pod: %v", err)
		}
		process := b.pod.Command(t.Context(), "sleep", "60")
		if err := process.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = process.Process.Kill(); _ = process.Wait() })
		before := b.ruleset()
		for _, step := range []struct {
			rules              string
			throwaway, fromPod string
		}{
			{"", emulator, emulator},
			{"iptables -I INPUT 1 -s " + b.pod.Addr.String() + " -p tcp --dport 988 -j REJECT", emulator, ""},
		} {
			b.run(step.rules)
			if err := b.Do(func() error {
				pod, err := probe.JoinPod(addresses)
				if err != nil {
					return err
				}
				defer func() { err = errors.Join(err, pod.Close()) }()
				if pod.Addr != b.pod.Addr {
					t.Errorf("%s is not the pod's", pod.Addr)
				}
				if who := dialled(t, pod); who != step.fromPod {
					t.Errorf("%q: %q answered the pod", step.rules, who)
				}
				throwaway, err := probe.NewPod()
				if err != nil {
					return err
				}
				if who := dialled(t, throwaway); who != step.throwaway {
					t.Errorf("%q: %q answered the throw-away namespace", step.rules, who)
				}
				return throwaway.Close()
			}); err != nil {
				t.Fatal(err)
			}
		}
		b.run("iptables -D INPUT 1")
		b.requireEqual("after the probes", sorted(b.ruleset()), sorted(before))
	})
}

// dialled is who answers the Pod; "" is nobody.
func dialled(t *testing.T, pod *probe.Pod) string {
	c, err := pod.Dial(t.Context(), "tcp", "169.254.169.254:80")
	if err != nil {
		return ""
	}
	defer c.Close()
	who, _ := talk(c, long)
	return who
}
