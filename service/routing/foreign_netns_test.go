package routing

import (
	"context"
	"fmt"
	"regexp"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// foreignRuleset is what somebody else puts up on a node. Each is the small form of what a product
// does.
type foreignRuleset struct {
	name  string
	put   string // by a shell on the node
	inPod string // by a shell in the pod, before all else
	flush bool   // the promise is the guard's: it holds when the firewall is flushed, too

	routed   bool // the pod has an interface of its own, and finds its gateway without a question
	relative bool // the kernel chooses the preferences of policy rules by those that stand
	drops    bool // a policy drops what comes in, which a table of our own cannot overrule: doctor names the chain

	overtakes bool // put after an install it drops pods' packets before our jump: only the next install moves that up
}

// foreignRulesets: pods are served beside each of them, and what they get is not the cloud's.
var foreignRulesets = []foreignRuleset{
	// Images of a cloud that reject what the node itself sends to link-local addresses.
	{name: "link-local rejected in OUTPUT", put: `restore <<'END'
*filter
:CLOUD - [0:0]
-A OUTPUT -d 169.254.0.0/16 -j CLOUD
-A CLOUD -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j ACCEPT
-A CLOUD -p tcp -j REJECT --reject-with tcp-reset
COMMIT
END`},
	// A gateway whose DNAT is a rule of nft's in the chain that iptables-nft uses.
	{name: "a rule of nft's in nat PREROUTING", put: `nft -f - <<'END'
table ip nat {
	chain PREROUTING {
		type nat hook prerouting priority dstnat; policy accept;
		iifname "eth0" tcp dport 9443 dnat to 10.244.0.77
	}
}
END`},
	// The same in the tables of both families that have an accept and a drop of ours.
	{name: "rules of nft's in filter and raw", put: `nft -f - <<'END'
table ip filter {
	chain INPUT {
		type filter hook input priority filter; policy accept;
		iifname "eth0" tcp dport { 9443, 9444 } ct state new accept
	}
	chain FORWARD {
		type filter hook forward priority filter; policy accept;
		iifname "eth0" tcp dport { 9443, 9444 } ct state new accept
	}
}
table ip6 raw {
	chain PREROUTING {
		type filter hook prerouting priority raw; policy accept;
		iifname "eth0" udp dport 9443 accept
	}
}
END`},
	// A network that takes its pods out of conntrack.
	{name: "pods not tracked", put: `restore <<'END'
*raw
:NET_IN - [0:0]
:NET_OUT - [0:0]
-I PREROUTING 1 -j NET_IN
-I OUTPUT 1 -j NET_OUT
-A NET_IN -s 10.244.0.0/16 -j CT --notrack
-A NET_IN -d 10.244.0.0/16 -j CT --notrack
-A NET_OUT -s 10.244.0.0/16 -j CT --notrack
-A NET_OUT -d 10.244.0.0/16 -j CT --notrack
COMMIT
END`},
	{name: "pods not tracked, by nft", put: `nft -f - <<'END'
table inet untracked {
	chain in { type filter hook prerouting priority -290; ip saddr 10.244.0.0/16 notrack; ip daddr 10.244.0.0/16 notrack; }
	chain out { type filter hook output priority -290; ip daddr 10.244.0.0/16 notrack; }
}
END`},
	// A network that has a zone of conntrack for its pods.
	{name: "pods in a zone", put: `restore <<'END'
*raw
-I PREROUTING 1 -i cni0 -j CT --zone 4097
-I OUTPUT 1 -d 10.244.0.0/16 -j CT --zone 4097
COMMIT
END`},
	// Networks that route each pod by a policy rule, and the strict layout, in which table
	// local comes later.
	{name: "a policy rule for pods", flush: true, put: `ip route add default via 198.51.100.1 dev eth0 table 101
ip rule add pref 10 iif cni0 lookup 101
ip -6 route add default via fd00:51::1 dev eth0 table 101
ip -6 rule add pref 10 iif cni0 lookup 101`},
	{
		name:   "a policy rule before all, local behind",
		flush:  true,
		routed: true,
		put: `ip route add default via 198.51.100.1 dev eth0 table 101
ip rule add pref 1 from 10.245.0.0/16 lookup 101
ip rule add pref 20 lookup local
ip rule del pref 0
ip -6 rule add pref 20 lookup local
ip -6 rule del pref 0`,
	},
	{
		name:     "policy rules without a preference",
		flush:    true,
		relative: true,
		put: `ip route add default via 198.51.100.1 dev eth0 table 101
ip rule add not fwmark 0xca6c lookup 101
ip rule add lookup main suppress_prefixlength 0`,
	},
	// A host firewall that lets in what it knows and drops the rest, and what conntrack calls invalid.
	{name: "a host firewall with policy DROP", drops: true, put: `restore <<'END'
*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:HOST - [0:0]
-A INPUT -i lo -j ACCEPT
-A INPUT -j HOST
-A FORWARD -j HOST
-A HOST -m conntrack --ctstate INVALID -j DROP
-A HOST -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A HOST -p icmp -j ACCEPT
COMMIT
END`},
	// A container engine beside kubelet: its own bridge, isolation, and packets dropped in raw.
	{name: "a container engine's chains", put: `restore <<'END'
*raw
-A PREROUTING -d 172.17.0.2/32 ! -i docker0 -j DROP
COMMIT
*nat
:ENGINE - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j ENGINE
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j ENGINE
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A ENGINE ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
COMMIT
*filter
:FORWARD DROP [0:0]
:ENGINE-USER - [0:0]
-A FORWARD -j ENGINE-USER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A ENGINE-USER -j RETURN
COMMIT
END`},
	// A network that marks connections of pods and routes by the mark.
	{name: "marks restored, and routed by", put: `restore <<'END'
*mangle
-A PREROUTING -i eth0 -j CONNMARK --set-xmark 0x80/0x80
-A PREROUTING -i cni0 -j CONNMARK --restore-mark --nfmask 0x80 --ctmask 0x80
COMMIT
END
ip rule add pref 1024 fwmark 0x80/0x80 lookup main
ip rule add pref 5210 fwmark 0x80000/0xff0000 lookup main
ip rule add pref 5270 lookup 52`},
	// Packets whose source is not reached by the interface that they came in by.
	{name: "a check of the reverse path, by nft", put: `nft -f - <<'END'
table inet reversed {
	chain in { type filter hook prerouting priority raw + 10; policy accept; iifname != "lo" fib saddr . iif oif missing drop; }
}
END`},
	// Masquerading of all that leaves, with ports chosen at random.
	{name: "random masquerading", put: `restore <<'END'
*nat
-A POSTROUTING -s 10.244.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE --random-fully
-A POSTROUTING ! -s 10.244.0.0/16 -d 10.244.0.0/16 -j MASQUERADE --random-fully
COMMIT
END`},
}

// foreignCase is one of them on a node of its own.
type foreignCase struct {
	*testNode
	foreignRuleset
	label  string
	before string // what is to be left after a removal
	stood  string // with ours
	then   State  // at that time
	served string // where pods are answered by the emulator
	watch  *running
}

// TestForeignRulesets puts up what others do, before an install and after it, for each backend and
// mode: pods are served, check finds nothing, the watcher finds nothing to do for 10 s, and a
// removal leaves theirs byte for byte. All nodes of a kind are watched at once.
func TestForeignRulesets(t *testing.T) { testForeign(t, foreignRulesets) }

// TestForeignProducts does the same for the default forms of products.
func TestForeignProducts(t *testing.T) { testForeign(t, foreignProducts) }

func testForeign(t *testing.T, rulesets []foreignRuleset) {
	netnstest.Needs(t, "nft")
	for _, kind := range []string{"iptables-nft", "iptables-legacy", ModeNFTables, ModeLoopback, ModeNone} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			var cases []*foreignCase
			for _, ruleset := range rulesets {
				if (kind == ModeLoopback || kind == ModeNone) && !ruleset.flush {
					continue // neither has rules that others' could meet
				}
				if kind == ModeNFTables && ruleset.drops {
					continue
				}
				left := ""
				for _, order := range []string{"before", "after"} {
					c := &foreignCase{testNode: foreignNode(t, kind), foreignRuleset: ruleset, label: ruleset.name + ", put " + order}
					cases = append(cases, c)
					c.up(order == "before", &left)
				}
			}
			<-time.After(10 * time.Second) // while each is watched; a change that was undone is counted too
			for _, c := range cases {
				c.unchanged()
			}
			for _, c := range cases {
				c.down()
			}
		})
	}
}

// foreignNode is a node for one of the modes, or one backend of mode iptables.
func foreignNode(t *testing.T, kind string) *testNode {
	switch kind {
	case ModeNFTables:
		return nftNode(t)
	case ModeLoopback, ModeNone:
		return modeNode(t, kind)
	}
	return newTestNode(t, kind)
}

func (c *foreignCase) fault(format string, args ...any) {
	c.t.Helper()
	c.t.Errorf("%s: %s", c.label, fmt.Sprintf(format, args...))
}

// up brings rules of both sides up, in either order, and has them watched.
func (c *foreignCase) up(first bool, left *string) {
	if c.routed {
		var err error
		if c.pod, err = c.AddRoutedPod("routed"); err != nil {
			c.t.Fatal(err)
		}
	}
	if c.inPod != "" {
		if out, err := c.pod.Command(context.Background(), "sh", "-ec", c.inPod).CombinedOutput(); err != nil {
			c.t.Fatalf("%s: in the pod: %v: %s", c.label, err, out)
		}
	}
	c.served = "169.254.169.254:80"
	if c.plan.Mode == ModeNone {
		c.served = c.plan.Listen.String()
	}
	put := func() { c.run("restore() { " + c.plan.Binary + "-restore --noflush; }\n" + c.put) }
	if first {
		put()
		*left = c.ruleset()
	}
	c.before = *left
	c.install(c.plan)
	c.watch = c.testNode.watch(c.plan, time.Hour)
	if !first {
		put()
	}
	c.watch.until(c.label+": all stands", func() bool { return c.stands(c.plan) })
	if c.overtakes && !first {
		if who, _ := ask(c.pod, c.served, short); who != "" {
			c.fault("%q answered a pod before the jump was moved up: overtakes is no longer true", who)
		}
		c.install(c.plan)
	}
	c.serves()
	if err := c.check(c.plan); err != nil {
		c.fault("check: %v", err)
	}
	c.watch.until(c.label+": the watcher's answer", func() bool { return c.watch.state().Standing.Good })
	c.stood, c.then = c.ruleset(), c.watch.state()
}

// unchanged fails if the watcher did anything.
func (c *foreignCase) unchanged() {
	c.t.Helper()
	c.requireEqual(c.label+": while it is watched", sorted(c.ruleset()), sorted(c.stood))
	now := c.watch.state()
	if now.Installs != c.then.Installs || now.Repairs.Total() != c.then.Repairs.Total() {
		c.fault("the watcher installed and repaired: %d and %d times, before %d and %d", now.Installs, now.Repairs.Total(),
			c.then.Installs, c.then.Repairs.Total())
	}
}

func (c *foreignCase) serves() {
	if who, err := ask(c.pod, c.served, long); who != emulator {
		c.fault("%q answered a pod (%v)", who, err)
	}
}

// down flushes the firewall where that is to make no difference, and removes ours.
func (c *foreignCase) down() {
	c.serves()
	c.watch.end()
	if c.flush {
		c.run("nft flush ruleset; iptables-legacy -F; iptables-legacy -t nat -F")
		for _, at := range []string{"169.254.169.254:80", "[fd00:ec2::254]:80"} {
			if who, _ := ask(c.pod, at, short); who == cloud {
				c.fault("the cloud's own server answered a pod at %s when the firewall was flushed", at)
			}
		}
		if who, err := ask(c.NS, "169.254.169.254:80", long); who != cloud {
			c.fault("%q answered the node itself (%v)", who, err)
		}
	}
	if err := c.Do(func() error { return c.router(c.plan).Remove(context.Background()) }); err != nil {
		c.fault("remove: %v", err)
	}
	now, before := c.ruleset(), c.before
	if c.relative {
		now, before = preference.ReplaceAllString(now, ""), preference.ReplaceAllString(before, "")
	}
	c.requireEqual(c.label+": remove", sorted(now), sorted(before))
	if err := c.Close(); err != nil {
		c.fault("%v", err)
	}
}

// preference is what a policy rule begins with.
var preference = regexp.MustCompile(`(?m)^\d+:`)
