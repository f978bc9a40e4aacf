package routing

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// nftNode is a testNode in mode nftables.
func nftNode(t testing.TB) *testNode {
	t.Helper()
	netnstest.Needs(t, "nft")
	b := newTestNode(t, "iptables-nft")
	b.plan.Mode = ModeNFTables
	return b
}

// golden compares with a file below testdata, or writes it with -update.
func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s: got\n%s\nwant\n%s", name, got, want)
	}
}

// TestNFTablesStory is a node's life in mode nftables: install, a request arrives, others flush,
// nothing leaks, check names what is missing, the watcher repairs, remove leaves no trace.
func TestNFTablesStory(t *testing.T) {
	t.Parallel()
	b := nftNode(t)
	routed, err := b.AddRoutedPod("routed") // K-08
	if err != nil {
		t.Fatal(err)
	}
	b.run(
		"nft add table inet others; nft add chain inet others c '{ type filter hook forward priority 0; }'; nft add rule " +
			"inet others c tcp dport 1 drop; iptables -t nat -A PREROUTING -p tcp --dport 9 -j ACCEPT",
	)
	before := b.ruleset()
	b.answers(b.pod, "169.254.169.254:80", cloud)
	b.install(b.plan)
	b.requireOK(b.plan)
	whole := b.ruleset()
	tables := b.run("nft list table ip gke-metadata-emulator; nft list table ip6 gke-metadata-emulator")
	served := func() {
		t.Helper()
		b.answers(b.pod, "169.254.169.254:80", emulator)
		b.answers(routed, "169.254.169.254:80", emulator)
		b.answers(b.NS, "169.254.169.254:80", cloud)
		b.answers(b.pod, "169.254.169.254:53", cloud)
		b.answers(b.pod, "169.254.169.254:443", "")
		b.answers(b.pod, "[fd00:ec2::254]:80", "")
		b.answers(b.pod, "[fd20:ce::254]:80", "")
		b.answers(b.pod, "169.254.169.252:988", "")
	}
	served()
	golden(t, "nft/default.nft", tables)
	handles := b.run("nft -a list ruleset | grep -v counter")
	b.install(b.plan)
	b.requireEqual("second install", b.run("nft -a list ruleset | grep -v counter"), handles)

	w := b.watch(b.plan, time.Hour)
	for _, c := range []struct {
		name, flush string
		want        []string // what Check names, exactly, without nft in front
	}{
		{"the ruleset", "nft flush ruleset", []string{
			"add chain ip gke-metadata-emulator raw { type filter hook prerouting priority -310; policy accept; }",
			"add rule ip gke-metadata-emulator raw iifname != \"lo\" ip daddr 169.254.169.252 tcp dport 988 drop",
			"add rule ip gke-metadata-emulator raw ip daddr 169.254.169.254 tcp dport 80 ct zone set 0",
			"add rule ip gke-metadata-emulator raw ip saddr 169.254.169.252 tcp sport 988 ct zone set 0",
			"add chain ip gke-metadata-emulator raw-output { type filter hook output priority -310; policy accept; }",
			"add rule ip gke-metadata-emulator raw-output ip saddr 169.254.169.252 tcp sport 988 ct zone set 0",
			"add chain ip gke-metadata-emulator forward { type filter hook forward priority -10; policy accept; }",
			"add rule ip gke-metadata-emulator forward ip daddr 169.254.169.254 tcp dport 80 reject with tcp reset",
			"add rule ip gke-metadata-emulator forward ip daddr 169.254.169.254 tcp dport 443 reject with tcp reset",
			"add rule ip gke-metadata-emulator forward ip daddr 169.254.169.254 tcp dport 8080 reject with tcp reset",
			"add chain ip gke-metadata-emulator input { type filter hook input priority -10; policy accept; }",
			"add rule ip gke-metadata-emulator input ip daddr 169.254.169.252 tcp dport 988 ct status snat reject with tcp " +
				"reset",
			"add rule ip gke-metadata-emulator input ip daddr 169.254.169.252 tcp dport 988 ct original ip daddr " +
				"169.254.169.254 accept",
			"add rule ip gke-metadata-emulator input iifname != \"lo\" ip daddr 169.254.169.252 tcp dport 988 drop",
			"add chain ip gke-metadata-emulator local { type filter hook output priority -10; policy accept; }",
			"add rule ip gke-metadata-emulator local ip saddr 169.254.169.252 tcp sport 988 tcp flags & rst == 0 ct status " +
				"snat drop",
			"add chain ip gke-metadata-emulator prerouting { type nat hook prerouting priority -110; policy accept; }",
			"add rule ip gke-metadata-emulator prerouting iifname \"lo\" return",
			"add rule ip gke-metadata-emulator prerouting iifname \"eth0\" return",
			"add rule ip gke-metadata-emulator prerouting ip daddr 169.254.169.254 tcp dport 80 counter dnat to " +
				"169.254.169.252:988",
			"add chain ip6 gke-metadata-emulator forward { type filter hook forward priority -10; policy accept; }",
			"add rule ip6 gke-metadata-emulator forward ip6 daddr fd00:c1::a9fe:a9fe tcp dport 80 reject with tcp reset",
			"add rule ip6 gke-metadata-emulator forward ip6 daddr fd00:ec2::254 tcp dport 80 reject with tcp reset",
			"add rule ip6 gke-metadata-emulator forward ip6 daddr fd20:ce::254 tcp dport 80 reject with tcp reset",
		}},
		{"the table's rules", "nft flush chain ip gke-metadata-emulator prerouting", []string{
			"add rule ip gke-metadata-emulator prerouting iifname \"lo\" return",
			"add rule ip gke-metadata-emulator prerouting iifname \"eth0\" return",
			"add rule ip gke-metadata-emulator prerouting ip daddr 169.254.169.254 tcp dport 80 counter dnat to " +
				"169.254.169.252:988",
		}},
		{"a rule too much", "nft insert rule ip gke-metadata-emulator prerouting accept", nil},
		{"a rule replaced", "nft replace rule ip gke-metadata-emulator prerouting handle $(nft -a list chain ip " +
			"gke-metadata-emulator prerouting | sed -n 's/.*\"eth0\".*handle //p') iifname eth9 return", nil},
		{"order", "nft insert rule ip gke-metadata-emulator raw accept; nft delete rule ip gke-metadata-emulator raw " +
			"handle $(nft -a list chain ip gke-metadata-emulator raw | sed -n 's/.*drop.*handle //p')", nil},
		{"another policy", "nft 'add chain ip gke-metadata-emulator forward { policy drop; }'", []string{
			"add chain ip gke-metadata-emulator forward { type filter hook forward priority -10; policy accept; }"}},
		{"a chain too much", "nft add chain ip gke-metadata-emulator x; nft add rule ip gke-metadata-emulator x drop",
			[]string{"chain ip gke-metadata-emulator x should not be there"}},
		{"IPv6", "nft delete table ip6 gke-metadata-emulator", []string{
			"add chain ip6 gke-metadata-emulator forward { type filter hook forward priority -10; policy accept; }",
			"add rule ip6 gke-metadata-emulator forward ip6 daddr fd00:c1::a9fe:a9fe tcp dport 80 reject with tcp reset",
			"add rule ip6 gke-metadata-emulator forward ip6 daddr fd00:ec2::254 tcp dport 80 reject with tcp reset",
			"add rule ip6 gke-metadata-emulator forward ip6 daddr fd20:ce::254 tcp dport 80 reject with tcp reset",
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b.t = t
			w.end() // first without the watcher
			b.run(c.flush)
			var got []string
			for _, f := range faults(t, b.check(b.plan)) {
				got = append(got, strings.TrimPrefix(f, "missing: nft "))
			}
			if c.want != nil && !slices.Equal(got, c.want) || len(got) == 0 {
				t.Errorf("check named\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
			}
			if got, err := ask(b.pod, "169.254.169.254:80", short); got == cloud {
				t.Errorf("the real server answered (%v)", err)
			}
			if got, err := ask(b.pod, "[fd00:ec2::254]:80", short); got == cloud {
				t.Errorf("the real IPv6 server answered (%v)", err)
			}
			if c.name == "the ruleset" { // with what others had in it
				b.run(
					"nft add table inet others; nft add chain inet others c '{ type filter hook forward priority 0; }'; nft add " +
						"rule inet others c tcp dport 1 drop; iptables -t nat -A PREROUTING -p tcp --dport 9 -j ACCEPT",
				)
			}
			w = b.watch(b.plan, time.Hour) // finds it when it starts
			w.until("a repair", func() bool { return b.stands(b.plan) && w.state().Standing.Good })
			b.requireEqual("repair",
				b.run("nft list table ip gke-metadata-emulator; nft list table ip6 gke-metadata-emulator"), tables)
			served()
			said := len(w.repaired())
			b.run(c.flush) // and when it runs
			w.until("the line", func() bool { return len(w.repaired()) > said && b.stands(b.plan) && w.state().Standing.Good })
			if line := w.repaired()[said]; line.Data["layer"] != fault.NFTables || line.Data["cause"] != "nftables" ||
				!strings.HasPrefix(fmt.Sprint(line.Data["by"]), "nft (") {
				t.Errorf("%v", line.Data)
			}
			if c.name == "the ruleset" {
				b.run(
					"nft add table inet others; nft add chain inet others c '{ type filter hook forward priority 0; }'; nft add " +
						"rule inet others c tcp dport 1 drop; iptables -t nat -A PREROUTING -p tcp --dport 9 -j ACCEPT",
				)
			}
		})
	}
	b.t = t
	w.end()
	b.requireEqual("after all", sorted(b.ruleset()), sorted(whole)) // tables that are made anew come in another order
	b.remove(b.plan)
	b.requireEqual("remove", sorted(b.ruleset()), sorted(before))
	b.answers(b.pod, "169.254.169.254:80", cloud)
	b.remove(b.plan)
}

func sorted(s string) string {
	l := lines(s)
	slices.Sort(l)
	return strings.Join(l, "\n")
}

// TestNFTablesSurvivesIPTables: what flushes iptables' tables does not touch ours, and costs
// no look at them.
func TestNFTablesSurvivesIPTables(t *testing.T) {
	t.Parallel()
	b := nftNode(t)
	b.run("iptables -t nat -A PREROUTING -p tcp --dport 9 -j ACCEPT")
	b.install(b.plan)
	w := b.watch(b.plan, time.Hour)
	reads, installs := w.reads.Load(), w.state().Installs
	b.run("iptables -F; iptables -t nat -F; iptables -t raw -F; ip6tables -F; nft delete table ip nat")
	b.run("ip rule del pref 97 prohibit") // the last event: when it is repaired, all before it were looked at
	w.until("the repair", func() bool { return w.state().Installs == installs+1 })
	b.requireOK(b.plan)
	b.answers(b.pod, "169.254.169.254:80", emulator)
	if got := w.reads.Load() - reads; got != 0 {
		t.Errorf("our rules were read %d times for changes to those of others", got)
	}
}

// TestModeChanges: an install takes away what another mode left, and pods are served all the while
//
func TestModeChanges(t *testing.T) {
	t.Parallel()
	b := nftNode(t)
	before := b.ruleset()
	other := b.plan
	other.Mode = ModeIPTables
	b.install(other)
	whole := b.ruleset()
	done, lost := make(chan struct{}), make(chan string, 1)
	go func() {
		defer close(lost)
		for {
			select {
			case <-done:
				return
			default:
			}
			if who, err := ask(b.pod, "169.254.169.254:80", long); who != emulator {
				lost <- who + " answered: " + errText(err)
				return
			}
		}
	}()
	for range 5 {
		b.install(b.plan)
		b.requireOK(b.plan)
		if s := b.ruleset(); strings.Contains(s, "GME-") {
			t.Errorf("left of mode iptables:\n%s", s)
		}
		b.install(other)
		b.requireOK(other)
	}
	close(done)
	if l, any := <-lost; any {
		t.Error(l)
	}
	b.requireEqual("back", sorted(b.ruleset()), sorted(whole)) // chains that are made anew come in another order
	b.install(b.plan)
	b.remove(other) // by another mode's Plan
	b.requireEqual("remove", b.ruleset(), before)
}

func errText(err error) string {
	if err == nil {
		return "nothing"
	}
	return err.Error()
}

// TestNFTablesShownText runs the shown commands by a shell. What they put there has not our marks,
// so it is compared as nft lists it.
func TestNFTablesShownText(t *testing.T) {
	t.Parallel()
	b := nftNode(t)
	var shown string
	if err := b.Do(func() (err error) { shown, err = Show(b.plan); return err }); err != nil {
		t.Fatal(err)
	}
	b.run(shown)
	byHand := b.ruleset()
	b.install(b.plan)
	b.requireOK(b.plan)
	b.requireEqual("install after the shown text", b.ruleset(), byHand)
}

// TestAnotherDNATKeepsConnections: who has a connection by the rules of one mode keeps it by those
// of the other, and is told when those of none translate it any more.
func TestAnotherDNATKeepsConnections(t *testing.T) {
	t.Parallel()
	for _, binary := range []string{"iptables-nft", "iptables-legacy"} {
		t.Run(binary, func(t *testing.T) {
			b := newTestNode(t, binary)
			plans := map[string]Plan{}
			for _, mode := range []string{ModeIPTables, ModeNFTables, ModeNone} {
				p := b.plan
				p.Mode = mode
				plans[mode] = p
			}
			b.install(plans[ModeIPTables])
			c, err := b.pod.Dial(t.Context(), "tcp", metadataServer.String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			for _, mode := range []string{ModeIPTables, ModeNFTables, ModeIPTables} {
				b.install(plans[mode])
				if who, err := talk(c, long); who != emulator {
					t.Fatalf("in mode %s the connection has %q (%v)", mode, who, err)
				}
			}
			b.install(plans[ModeNone])
			if _, err := talk(c, long); !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
				t.Errorf("in mode none the connection got %v", err)
			}
		})
	}
}
