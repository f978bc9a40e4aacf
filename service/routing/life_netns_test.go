package routing

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// TestRefusals: what belongs to somebody else is not touched, and the error says whose it is.
func TestRefusals(t *testing.T) {
	t.Parallel()
	onBothBackends(t, func(t *testing.T, b *testNode) {
		refused := func(words ...string) {
			t.Helper()
			before := b.ruleset()
			err := b.Do(func() error { return b.router(b.plan).Install(t.Context()) })
			if !errors.Is(err, fault.ErrForeign) {
				t.Fatalf("install: %v, want ErrForeign", err)
			}
			for _, w := range words {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q does not say %q", err, w)
				}
			}
			b.requireEqual("refused install", b.ruleset(), before)
			if s, err := ReadState(b.plan.RunDir); err != nil || s.Desired != "" {
				t.Errorf("state after refusal: %+v, %v", s, err)
			}
		}
		b.run(
			"iptables -t nat -A PREROUTING ! -i eth0 -d 169.254.169.254 -p tcp --dport 80 -j DNAT --to-destination " +
				"169.254.169.252:988",
		) // K-07
		refused("169.254.169.254:80", "PREROUTING", "GKE")
		b.run("iptables -t nat -F PREROUTING; iptables -N GME-FWD; iptables -A FORWARD -j GME-FWD")
		refused("GME-FWD", "-A FORWARD -j GME-FWD")
		if err := b.Do(func() error { return b.router(b.plan).Remove(t.Context()) }); !errors.Is(err, fault.ErrForeign) {
			t.Errorf("remove: %v, want ErrForeign", err)
		}
		b.run("iptables -F FORWARD; iptables -X GME-FWD")
		if err := os.RemoveAll(b.plan.RunDir); err != nil {
			t.Fatal(err)
		}

		// Another program on the port, by a copy of this one: this one itself is taken for the
		// emulator.
		b.plan.Listen = netip.MustParseAddrPort("169.254.169.252:1988")
		lustre := filepath.Join(t.TempDir(), "lustre")
		// Not by this process: a child of another test could inherit the descriptor that writes, and the
		// copy then be busy.
		if out, err := exec.CommandContext(t.Context(), "cp", b.self(), lustre).CombinedOutput(); err != nil {
			t.Fatalf("cp: %v: %s", err, out)
		}
		cmd := b.play("listen", "0.0.0.0:1988", lustre)
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if line, err := bufio.NewReader(stdout).ReadString('\n'); !strings.HasPrefix(line, "listening <nil>") {
			t.Fatal(line, err)
		}
		refused("lustre", "1988")
		_ = stdin.Close()
		_ = cmd.Wait()
		b.install(b.plan)
	})
}

// TestClosedGuard is what stands while the configuration is broken.
func TestClosedGuard(t *testing.T) {
	t.Parallel()
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		before := b.ruleset()
		closed := Plan{Closed: true, RunDir: b.plan.RunDir, Binary: b.plan.Binary}
		if got, want := len(faults(t, b.check(closed))), len(guardRules(Plan{Guard: DefaultGuard()},
			nodeFacts{})); got != want {
			t.Errorf("%d faults named, want %d", got, want)
		}
		b.install(closed)
		b.requireOK(closed)
		b.answers(b.pod, "169.254.169.254:80", "")
		b.answers(b.pod, "[fd00:ec2::254]:80", "")
		b.answers(b.pod, "[fd20:ce::254]:80", "")
		b.answers(b.pod, "169.254.169.254:53", cloud)
		b.answers(b.NS, "169.254.169.254:80", cloud)
		if s, err := ReadState(closed.RunDir); err != nil || s.Desired != Installed || !s.Closed || !s.Standing.Good {
			t.Errorf("state: %+v, %v", s, err)
		}
		b.install(b.plan)
		b.answers(b.pod, "169.254.169.254:80", emulator)
		whole := b.ruleset()
		b.install(closed) // the configuration broke: pods go on reaching the emulator, which says so
		b.requireEqual("closed after a good install", b.ruleset(), whole)
		b.remove(closed)
		b.requireEqual("remove", b.ruleset(), before)
	})
}

// TestRemoveWhileServing: who waits for an answer is told that there will be none, whether the
// connection was accepted or is in the backlog of a listener that nobody accepts from.
func TestRemoveWhileServing(t *testing.T) {
	t.Parallel()
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		idle := netip.MustParseAddrPort("169.254.169.252:989")
		if _, err := b.Listen("tcp", idle.String()); err != nil {
			t.Fatal(err)
		}
		for _, b.plan.Listen = range []netip.AddrPort{b.plan.Listen, idle} {
			before := b.ruleset()
			b.install(b.plan)
			c, err := b.pod.Dial(t.Context(), "tcp", "169.254.169.254:80")
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			b.remove(b.plan)
			_ = c.SetReadDeadline(time.Now().Add(long)) // its own keepalive would find out later
			if n, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%s: a client got %d bytes (%v), want a reset", b.plan.Listen, n, err)
			}
			b.requireEqual("remove", b.ruleset(), before)
		}
	})
}

// TestInstallWhileServing repeats Install, eight at once, under load: 0 lost, and one
// result.
func TestInstallWhileServing(t *testing.T) {
	t.Parallel()
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		b.install(b.plan)
		whole := b.ruleset()
		var asked, lost atomic.Int64
		done := make(chan struct{})
		var clients, installs sync.WaitGroup
		for range 2 {
			clients.Go(func() {
				for {
					select {
					case <-done:
						return
					default:
					}
					asked.Add(1)
					if who, err := ask(b.pod, "169.254.169.254:80", long); who != emulator {
						lost.Add(1)
						t.Errorf("%q answered (%v)", who, err)
					}
				}
			})
		}
		for range 8 {
			r := b.router(b.plan)
			installs.Go(func() {
				if err := b.Do(func() error { return r.Install(context.Background()) }); err != nil {
					t.Errorf("install: %v", err)
				}
				if err := b.Do(func() error { return r.Check(context.Background()) }); err != nil {
					t.Errorf("check: %v", err)
				}
			})
		}
		installs.Wait()
		close(done)
		clients.Wait()
		t.Logf("%d of %d requests lost", lost.Load(), asked.Load())
		b.requireEqual("installs at once", b.ruleset(), whole)
	})
}

// TestReplaceWhileServing has other rules each time, so that what stands is replaced under load: 0
// lost.
func TestReplaceWhileServing(t *testing.T) {
	t.Parallel()
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		b.install(b.plan)
		whole := b.ruleset()
		var asked, lost atomic.Int64
		done := make(chan struct{})
		var clients sync.WaitGroup
		for range 2 {
			clients.Go(func() {
				for {
					select {
					case <-done:
						return
					default:
					}
					asked.Add(1)
					if who, err := ask(b.pod, "169.254.169.254:80", long); who != emulator {
						lost.Add(1)
						t.Errorf("%q answered (%v)", who, err)
					}
				}
			})
		}
		for i := range 20 {
			p := b.plan
			p.Uplinks = []string{"eth0", fmt.Sprintf("wan%d", i)}
			b.install(p)
		}
		b.install(b.plan)
		close(done)
		clients.Wait()
		t.Logf("%d of %d requests lost", lost.Load(), asked.Load())
		b.requireEqual("back", sorted(b.ruleset()), sorted(whole))
	})
}

// TestConcurrentFirstInstalls converge from nothing.
func TestConcurrentFirstInstalls(t *testing.T) {
	t.Parallel()
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		before := b.ruleset()
		var installs sync.WaitGroup
		for range 8 {
			r := b.router(b.plan)
			installs.Go(func() {
				if err := b.Do(func() error { return r.Install(context.Background()) }); err != nil {
					t.Errorf("install: %v", err)
				}
			})
		}
		installs.Wait()
		b.requireOK(b.plan)
		b.remove(b.plan)
		b.requireEqual("remove", b.ruleset(), before)
	})
}

// TestWithoutPrivilege says plainly what is missing.
func TestWithoutPrivilege(t *testing.T) {
	t.Parallel()
	onBothBackends(t, func(t *testing.T, b *testNode) {
		netnstest.Needs(t, "setpriv")
		out, err := b.play("install", filepath.Join(t.TempDir(), b.plan.Binary), b.self(), "setpriv", "--bounding-set",
			"-all", "--inh-caps", "-all").
			Output()
		if err == nil || !strings.Contains(string(out), "CAP_NET_ADMIN") {
			t.Errorf("%v: %s", err, out)
		}
	})
}

// TestKubeletsBackend: the default command follows the node's kubelet, and cleans up after an
// earlier choice.
func TestKubeletsBackend(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ kubelet, other string }{{"iptables-legacy", "iptables-nft"},
		{"iptables-nft", "iptables-legacy"}} {
		t.Run(c.kubelet, func(t *testing.T) {
			netnstest.Needs(t, "iptables", c.other)
			b := newTestNode(t, c.other)
			before := b.ruleset()
			b.install(b.plan) // by the wrong backend
			b.plan.Binary = c.kubelet
			b.run("iptables -t mangle -N KUBE-IPTABLES-HINT")
			b.plan.Binary = ""
			b.install(b.plan)
			b.plan.Binary = c.kubelet
			b.requireOK(b.plan)
			if out := b.run(c.other + " -t nat -S"); strings.Contains(out, "GME-") {
				t.Errorf("left in %s: %s", c.other, out)
			}
			b.answers(b.pod, "169.254.169.254:80", emulator)
			b.run("iptables -t mangle -X KUBE-IPTABLES-HINT")
			b.plan.Binary = ""
			b.remove(b.plan)
			b.requireEqual("remove", b.ruleset(), before)
		})
	}
}

// TestStateAfterEachStep: what is desired and what stands can be read by anybody, after success and
// after failure.
func TestStateAfterEachStep(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	read := func() State {
		t.Helper()
		s, err := ReadState(b.plan.RunDir)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	b.install(b.plan)
	first := read()
	if first.Desired != Installed || first.Command != "iptables-nft" || first.Listen != "169.254.169.252:988" ||
		!first.Standing.Good ||
		first.Standing.Time.IsZero() {
		t.Errorf("after install: %+v", first)
	}
	b.install(b.plan)
	if s := read(); !s.Since.Equal(first.Since) || s.Standing.Time.Before(first.Standing.Time) {
		t.Errorf("after a second install: %+v", s)
	}
	b.remove(b.plan)
	if s := read(); s.Desired != Removed || !s.Standing.Good {
		t.Errorf("after remove: %+v", s)
	}
	b.plan.Binary = "iptables-that-nobody-has"
	if err := b.Do(func() error { return b.router(b.plan).Install(t.Context()) }); err == nil {
		t.Error("installed without iptables")
	}
	if s := read(); s.Desired != Installed || s.Standing.Good || len(s.Standing.Faults) == 0 {
		t.Errorf("after a failure: %+v", s)
	}
	b.answers(b.pod, "169.254.169.254:80", "") // closed, not open
	b.answers(b.pod, "[fd00:ec2::254]:80", "")
	b.remove(b.plan) // who has no iptables has no rules
	b.answers(b.pod, "169.254.169.254:80", cloud)
}

// TestBusyIsTriedAgain: exit status 4 is no failure, and no reason to wait for ever.
func TestBusyIsTriedAgain(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	dir := t.TempDir()
	script := func(name string, busy int) {
		t.Helper()
		real, err := exec.LookPath(name)
		if err != nil {
			netnstest.Lacks(t, err)
		}
		text := fmt.Sprintf(`#!/bin/sh
test "$1" = --version && exec %[1]s "$@"
n=$(cat %[2]s/%[3]s.n 2>/dev/null || echo 0)
echo $((n+1)) >%[2]s/%[3]s.n
test $n -lt %[4]d && { echo "Resource temporarily unavailable" >&2; exit 4; }
exec %[1]s "$@"
`, real, dir, name, busy)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"iptables-nft", "iptables-nft-restore", "ip6tables-nft", "ip6tables-nft-restore"} {
		script(name, 2)
	}
	b.plan.Binary = filepath.Join(dir, "iptables-nft")
	b.install(b.plan)
	b.requireOK(b.plan)
	b.answers(b.pod, "169.254.169.254:80", emulator)

	b.run("iptables -t nat -F")
	script("iptables-nft-restore", 1<<30)
	tries := filepath.Join(dir, "iptables-nft-restore.n")
	if err := os.Remove(tries); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	go func() { // until it was tried a few times
		for n := 0; n < 3 && ctx.Err() == nil; <-time.After(time.Millisecond) {
			text, _ := os.ReadFile(tries)
			n, _ = strconv.Atoi(strings.TrimSpace(string(text)))
		}
		cancel(errors.New("enough"))
	}()
	err := b.Do(func() error { return b.router(b.plan).Install(ctx) })
	if err == nil || !strings.Contains(err.Error(), "Resource temporarily unavailable (enough)") {
		t.Errorf("installed by a command that is always busy: %v", err)
	}
}

// TestResetSocket: a connection that was closed after it was listed is nobody's to reset, least of
// all its listener's.
func TestResetSocket(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	at := netip.AddrPortFrom(b.Addr, 80)
	b.serve(b.NS, at.String(), emulator)
	c, err := b.pod.Dial(t.Context(), "tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if who, err := talk(c, long); who != emulator {
		t.Fatalf("%q (%v)", who, err)
	}
	if err := b.Do(func() error {
		sockets, err := netlink.SocketDiagTCP(unix.AF_INET)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(sockets, func(s *netlink.Socket) bool {
			return s.State == netlink.TCP_ESTABLISHED && s.ID.Source.Equal(at.Addr().AsSlice()) && s.ID.SourcePort == at.Port()
		})
		if i < 0 {
			return errors.New("the connection is not listed")
		}
		if err := resetSocket(unix.AF_INET, sockets[i].ID); err != nil {
			return err
		}
		if err := resetSocket(unix.AF_INET, sockets[i].ID); !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ESTALE) {
			return fmt.Errorf("reset again: %v, want ENOENT or ESTALE", err)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := talk(c, long); !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
		t.Errorf("the connection got %v", err)
	}
	b.answers(b.pod, at.String(), emulator)
}
