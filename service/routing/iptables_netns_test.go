package routing

import (
	"errors"
	"net"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// TestStory is a node's life: install, a request arrives, others flush, nothing leaks, install
// repairs, remove leaves no trace.
func TestStory(t *testing.T) {
	t.Parallel()
	onBothBackends(t, func(t *testing.T, b *testNode) {
		routed, err := b.AddRoutedPod("routed") // K-08: the node's end of its link has no address
		if err != nil {
			t.Fatal(err)
		}
		before := b.ruleset()
		b.answers(b.pod, "169.254.169.254:80", cloud) // the testNode would show a leak
		b.install(b.plan)
		b.requireOK(b.plan)
		b.answers(b.pod, "169.254.169.254:80", emulator)
		b.answers(routed, "169.254.169.254:80", emulator)
		b.answers(b.NS, "169.254.169.254:80", cloud)  // the node's own daemons do not notice
		b.answers(b.pod, "169.254.169.254:53", cloud) // DNS passes
		b.answers(b.pod, "169.254.169.254:443", "")
		b.answers(b.pod, "[fd00:ec2::254]:80", "")
		b.answers(b.pod, "[fd20:ce::254]:80", "")
		b.answers(b.pod, "169.254.169.252:988", "") // not directly
		first := b.ruleset()
		b.install(b.plan)
		b.requireEqual("second install", b.ruleset(), first)

		for _, c := range []struct {
			name, flush string
			want        []string // what Check names, exactly
		}{
			{"filter", "iptables -F", []string{
				"-t filter -I FORWARD 1 -m comment --comment gke-metadata-emulator -j GME-FWD",
				"-t filter -A GME-FWD -d 169.254.169.252/32 -p tcp -m tcp --dport 988 -m conntrack --ctstate " +
					"NEW,RELATED,ESTABLISHED -j ACCEPT",
				"-t filter -A GME-FWD -s 169.254.169.252/32 -p tcp -m tcp --sport 988 -m conntrack --ctstate " +
					"RELATED,ESTABLISHED -j ACCEPT",
				"-t filter -A GME-FWD -d 169.254.169.254/32 -p tcp -m multiport --dports 80,443,8080 -j REJECT --reject-with " +
					"tcp-reset",
				"-t filter -I INPUT 1 -m comment --comment gke-metadata-emulator -j GME-IN",
				"-t filter -A GME-IN -d 169.254.169.252/32 -p tcp -m tcp --dport 988 -m conntrack --ctstate SNAT -j REJECT " +
					"--reject-with tcp-reset",
				"-t filter -A GME-IN -d 169.254.169.252/32 -p tcp -m tcp --dport 988 -m conntrack --ctorigdst 169.254.169.254 " +
					"-j ACCEPT",
				"-t filter -A GME-IN -d 169.254.169.252/32 ! -i lo -p tcp -m tcp --dport 988 -j DROP",
				"-t filter -I OUTPUT 1 -m comment --comment gke-metadata-emulator -j GME-LOCAL",
				"-t filter -A GME-LOCAL -s 169.254.169.252/32 -p tcp -m tcp --sport 988 ! --tcp-flags RST RST -m conntrack " +
					"--ctstate SNAT -j DROP",
				"-t filter -A GME-LOCAL -s 169.254.169.252/32 -p tcp -m tcp --sport 988 -j ACCEPT",
				"-t filter -A GME-LOCAL -d 169.254.169.252/32 -p tcp -m tcp --dport 988 -j ACCEPT",
			}},
			{"nat", "iptables -t nat -F", []string{
				"-t nat -I PREROUTING 1 -m comment --comment gke-metadata-emulator -j GME-PRE",
				"-t nat -A GME-PRE -i lo -j RETURN",
				"-t nat -A GME-PRE -i eth0 -j RETURN",
				"-t nat -A GME-PRE -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 169.254.169.252:988",
			}},
			{"nat and its chains", "iptables -t nat -F; iptables -t nat -X", []string{
				"-t nat -I PREROUTING 1 -m comment --comment gke-metadata-emulator -j GME-PRE",
				"-t nat -A GME-PRE -i lo -j RETURN",
				"-t nat -A GME-PRE -i eth0 -j RETURN",
				"-t nat -A GME-PRE -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 169.254.169.252:988",
			}},
			{"raw", "iptables -t raw -F", []string{
				"-t raw -I PREROUTING 1 -m comment --comment gke-metadata-emulator -j GME-RAW",
				"-t raw -A GME-RAW -d 169.254.169.252/32 ! -i lo -p tcp -m tcp --dport 988 -j DROP",
				"-t raw -A GME-RAW -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j CT",
				"-t raw -A GME-RAW -s 169.254.169.252/32 -p tcp -m tcp --sport 988 -j CT",
				"-t raw -I OUTPUT 1 -m comment --comment gke-metadata-emulator -j GME-RAW-OUT",
				"-t raw -A GME-RAW-OUT -s 169.254.169.252/32 -p tcp -m tcp --sport 988 -j CT",
			}},
			{"base chain only", "iptables -t nat -F PREROUTING", []string{
				"-t nat -I PREROUTING 1 -m comment --comment gke-metadata-emulator -j GME-PRE",
			}},
			{"one rule", "iptables -t nat -D GME-PRE -i eth0 -j RETURN", []string{"-t nat -A GME-PRE -i eth0 -j RETURN"}},
			{"a rule too much", "iptables -t nat -I GME-PRE -p tcp -j ACCEPT",
				[]string{"-t nat -A GME-PRE -p tcp -j ACCEPT should not be there"}},
			{"a second jump", "iptables -t nat -A PREROUTING -m comment --comment gke-metadata-emulator -j GME-PRE", []string{
				"-t nat -A PREROUTING -m comment --comment gke-metadata-emulator -j GME-PRE should be there once, not 2 times",
			}},
			{"order", "iptables -t nat -D GME-PRE -i eth0 -j RETURN; iptables -t nat -A GME-PRE -i eth0 -j RETURN", []string{
				"-t nat the rules of GME-PRE are doubled or not in order",
			}},
			{"guard", "ip rule del pref 97 prohibit",
				[]string{"ip rule: pref 97 to 169.254.169.254/32 ipproto tcp dport 80 prohibit protocol kernel"}},
			{"guard of IPv6", "for n in 1 2 3; do ip -6 rule del pref 97 iif lo; ip -6 rule del pref 97 prohibit; done",
				[]string{
					"ip -6 rule: pref 97 iif lo to fd00:c1::a9fe:a9fe/128 goto 98 protocol kernel",
					"ip -6 rule: pref 97 iif lo to fd00:ec2::254/128 goto 98 protocol kernel",
					"ip -6 rule: pref 97 iif lo to fd20:ce::254/128 goto 98 protocol kernel",
					"ip -6 rule: pref 97 to fd00:c1::a9fe:a9fe/128 ipproto tcp dport 80 prohibit protocol kernel",
					"ip -6 rule: pref 97 to fd00:ec2::254/128 ipproto tcp dport 80 prohibit protocol kernel",
					"ip -6 rule: pref 97 to fd20:ce::254/128 ipproto tcp dport 80 prohibit protocol kernel",
				}},
			{"address", "ip address del 169.254.169.252/32 dev lo",
				[]string{"ip address: 169.254.169.252/32 dev lo scope host label lo:gme"}},
			{"IPv6 filter", "ip6tables -F; ip6tables -X", []string{
				"-t filter -I FORWARD 1 -m comment --comment gke-metadata-emulator -j GME-FWD",
				"-t filter -A GME-FWD -d fd00:c1::a9fe:a9fe/128 -p tcp -m multiport --dports 80 -j REJECT --reject-with tcp-reset",
				"-t filter -A GME-FWD -d fd00:ec2::254/128 -p tcp -m multiport --dports 80 -j REJECT --reject-with tcp-reset",
				"-t filter -A GME-FWD -d fd20:ce::254/128 -p tcp -m multiport --dports 80 -j REJECT --reject-with tcp-reset",
			}},
		} {
			t.Run(c.name, func(t *testing.T) {
				b.t = t
				b.run(c.flush)
				var got []string
				for _, f := range faults(t, b.check(b.plan)) {
					f = strings.TrimPrefix(f, "missing: ")
					f = strings.TrimPrefix(f, b.plan.Binary+" ")
					got = append(got, strings.TrimPrefix(f, strings.Replace(b.plan.Binary, "iptables", "ip6tables", 1)+" "))
				}
				if !slices.Equal(got, c.want) {
					t.Errorf("check named\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
				}
				// an error, never the real server's answer.
				if got, err := ask(b.pod, "169.254.169.254:80", short); got == cloud {
					t.Errorf("the real server answered (%v)", err)
				}
				for _, server := range []string{"[fd00:c1::a9fe:a9fe]:80", "[fd00:ec2::254]:80", "[fd20:ce::254]:80"} {
					if got, err := ask(b.pod, server, short); got == cloud {
						t.Errorf("the real server at %s answered (%v)", server, err)
					}
				}
				b.install(b.plan)
				b.requireOK(b.plan)
				b.answers(b.pod, "169.254.169.254:80", emulator)
				b.requireEqual("repair", b.ruleset(), first)
			})
		}
		b.t = t
		if s, err := ReadState(b.plan.RunDir); err != nil || s.Repairs.Total() != 6 {
			t.Errorf("six flushes took a jump away, and the state counts %d repairs (%v)", s.Repairs.Total(), err)
		}
		b.remove(b.plan)
		b.requireEqual("remove", b.ruleset(), before)
		b.answers(b.pod, "169.254.169.254:80", cloud)
		b.remove(b.plan) // again, from nothing
		b.requireEqual("second remove", b.ruleset(), before)
	})
}

// TestNftFlushRuleset is what a restart of nftables.service does.
func TestNftFlushRuleset(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	b.install(b.plan)
	whole := b.ruleset()
	b.run("nft flush ruleset")
	if got := len(faults(t, b.check(b.plan))); got != 26 {
		t.Errorf("%d faults named, want 26: %v", got, b.check(b.plan))
	}
	b.answers(b.pod, "169.254.169.254:80", "")
	b.answers(b.pod, "[fd00:ec2::254]:80", "")
	b.install(b.plan)
	b.requireEqual("repair", b.ruleset(), whole)
	b.answers(b.pod, "169.254.169.254:80", emulator)
}

// TestShownTextIsWhatInstallDoes runs the shown commands by a shell and finds nothing missing.
func TestShownTextIsWhatInstallDoes(t *testing.T) {
	t.Parallel()
	onBothBackends(t, func(t *testing.T, b *testNode) {
		var shown string
		if err := b.Do(func() (err error) {
			shown, err = Show(b.plan)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		b.run(shown)
		b.requireOK(b.plan)
		byHand := b.ruleset()
		b.install(b.plan)
		b.requireEqual("install after the shown text", b.ruleset(), byHand)
	})
}

// TestEstablishedConnection: who talked to the real server before the install does not go on, and
// is told so at once.
func TestEstablishedConnection(t *testing.T) {
	t.Parallel()
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		// As on any Kubernetes node connections are tracked: these are not redirected at their first
		// packet.
		b.run(
			"iptables -A FORWARD -m conntrack --ctstate ESTABLISHED -j ACCEPT; ip6tables -A FORWARD -m conntrack --ctstate " +
				"ESTABLISHED -j ACCEPT",
		)
		open := func(ns *netnstest.NS, at string) net.Conn {
			c, err := ns.Dial(t.Context(), "tcp", at)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = c.Close() })
			if who, err := talk(c, long); who != cloud {
				t.Fatal(at, who, err)
			}
			return c
		}
		reset := []net.Conn{open(b.pod, "169.254.169.254:80"), open(b.pod, "169.254.169.254:443")}
		ipv6, host := open(b.pod, "[fd00:ec2::254]:80"), open(b.NS, "169.254.169.254:80")
		b.install(b.plan)
		for _, c := range reset {
			if who, err := talk(c, long); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("%s: %q, %v; want a reset", c.RemoteAddr(), who, err)
			}
		}
		if who, err := talk(ipv6, short); who != "" {
			t.Errorf("%s: %q, %v; want no answer", ipv6.RemoteAddr(), who, err)
		}
		if who, err := talk(host, long); who != cloud {
			t.Errorf("the node's own connection: %q, %v; want it left alone", who, err)
		}
	})
}

// TestWrittenIsCounted: what somebody changes between the writing and the first look, which counts
// rules, is noticed and named all the same.
func TestWrittenIsCounted(t *testing.T) {
	t.Parallel()
	onBothBackends(t, func(t *testing.T, b *testNode) {
		for _, c := range []struct{ harm, want string }{
			{"true", ""},
			{"iptables -t nat -D GME-PRE -i eth0 -j RETURN", "-A GME-PRE -i eth0 -j RETURN"},
			{"iptables -t nat -A GME-PRE -p tcp -j ACCEPT", "-A GME-PRE -p tcp -j ACCEPT should not be there"},
			{"iptables -D INPUT -m comment --comment gke-metadata-emulator -j GME-IN", "-I INPUT 1 "},
			{"iptables -t raw -F; iptables -t raw -X", "-A GME-RAW "},
		} {
			var errs []error
			if err := b.Do(func() error {
				r := b.router(b.plan).(*router)
				n, err := r.open(t.Context(), "", false)
				if err != nil {
					return err
				}
				if _, err := n.survey(t.Context(), n.nodeFacts); err != nil {
					return err
				}
				if err := n.put(t.Context(), n.nodeFacts); err != nil {
					return err
				}
				b.run(c.harm)
				errs = n.check(t.Context(), n.nodeFacts)
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			if text := errors.Join(errs...); (text == nil) != (c.want == "") ||
				text != nil && !strings.Contains(text.Error(), c.want) {
				t.Errorf("after %s: %v, want %q", c.harm, text, c.want)
			}
		}
	})
}

// TestUnlistableChain: a rule of nft's in a chain of ours, which iptables cannot list, is
// named as a fault, and the next install takes it away.
func TestUnlistableChain(t *testing.T) {
	b := newTestNode(t, "iptables-nft")
	b.install(b.plan)
	whole := b.ruleset()
	b.run("nft insert rule ip nat GME-PRE tcp dport { 7, 8 } dnat to 10.244.0.77")
	if err := b.check(b.plan); !errors.Is(err, fault.ErrMissing) ||
		!strings.Contains(err.Error(), "-t nat the rules of GME-PRE are not ours alone") {
		t.Errorf("check: %v", err)
	}
	b.install(b.plan)
	b.requireEqual("repair", b.ruleset(), whole)
	b.requireOK(b.plan)
}
