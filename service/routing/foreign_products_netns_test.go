package routing

// foreignProducts are more of what others put up: the default forms of host firewalls, container
// engines, virtual machine managers, networks and VPNs.
var foreignProducts = []foreignRuleset{
	// A host firewall whose chains end in a limit for what is not for this host (ufw).
	{name: "a host firewall with addrtype", drops: true, put: `restore <<'END'
*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:HOST-BEFORE - [0:0]
:HOST-NOT-LOCAL - [0:0]
-A INPUT -j HOST-BEFORE
-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A HOST-BEFORE -i lo -j ACCEPT
-A HOST-BEFORE -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A HOST-BEFORE -m conntrack --ctstate INVALID -j DROP
-A HOST-BEFORE -j HOST-NOT-LOCAL
-A HOST-NOT-LOCAL -m addrtype --dst-type LOCAL -j RETURN
-A HOST-NOT-LOCAL -m addrtype --dst-type MULTICAST -j RETURN
-A HOST-NOT-LOCAL -m limit --limit 3/min --limit-burst 10 -j DROP
-A HOST-NOT-LOCAL -j DROP
COMMIT
END`},
	// A host firewall of zones, which accepts what somebody has redirected (firewalld).
	{name: "a host firewall of zones, by nft", put: `nft -f - <<'END'
table inet zones {
	chain mangle_PREROUTING { type filter hook prerouting priority mangle + 10; policy accept; meta nfproto ipv6 fib saddr . mark . iif oif missing drop; }
	chain nat_PREROUTING { type nat hook prerouting priority dstnat + 10; policy accept; }
	chain nat_POSTROUTING { type nat hook postrouting priority srcnat + 10; policy accept; oifname "eth0" masquerade; }
	chain filter_INPUT {
		type filter hook input priority filter + 10; policy accept;
		ct state { established, related } accept
		ct status dnat accept
		iifname "lo" accept
		meta l4proto { icmp, icmpv6 } accept
		ct state invalid drop
		reject with icmpx type admin-prohibited
	}
	chain filter_OUTPUT { type filter hook output priority filter + 10; policy accept; oifname "lo" accept; }
}
END`},
	// A container engine's own tables, with packets to containers dropped in raw (Docker).
	{name: "a container engine's tables, by nft", put: `nft -f - <<'END'
table ip engine {
	chain raw-in { type filter hook prerouting priority raw; policy accept; ip daddr 172.17.0.2 iifname != "docker0" drop; }
	chain nat-in { type nat hook prerouting priority dstnat; policy accept; fib daddr type local tcp dport 8080 dnat to 172.17.0.2:80; }
	chain nat-out { type nat hook output priority -100; policy accept; ip daddr != 127.0.0.0/8 fib daddr type local tcp dport 8080 dnat to 172.17.0.2:80; }
	chain forward { type filter hook forward priority filter; policy accept; oifname "docker0" ct state established,related accept; oifname "docker0" drop; }
	chain nat-post { type nat hook postrouting priority srcnat; policy accept; ip saddr 172.17.0.0/16 oifname != "docker0" masquerade; }
}
END`},
	// Isolation of a container engine's networks, in iptables.
	{name: "a container engine's isolation", put: `restore <<'END'
*filter
:ENGINE-USER - [0:0]
:ENGINE-ISOLATION-1 - [0:0]
:ENGINE-ISOLATION-2 - [0:0]
-I FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-I FORWARD -j ENGINE-ISOLATION-1
-I FORWARD -j ENGINE-USER
-A ENGINE-ISOLATION-1 -i docker0 ! -o docker0 -j ENGINE-ISOLATION-2
-A ENGINE-ISOLATION-2 -o docker0 -j DROP
-A ENGINE-USER -j RETURN
COMMIT
END`},
	// Networks of virtual machines (libvirt).
	{name: "virtual machines' networks, by nft", put: `nft -f - <<'END'
table ip machines {
	chain guest_out { ip saddr 192.168.122.0/24 iifname "virbr0" counter accept; iifname "virbr0" counter reject; }
	chain guest_in { oifname "virbr0" ip daddr 192.168.122.0/24 ct state related,established counter accept; oifname "virbr0" counter reject; }
	chain forward { type filter hook forward priority filter; policy accept; counter jump guest_out; counter jump guest_in; }
	chain guest_nat { type nat hook postrouting priority srcnat; policy accept; ip saddr 192.168.122.0/24 ip daddr != 192.168.122.0/24 masquerade; }
}
END`},
	// A network whose chains are first, accept by mark, and drop what pods send to the node (Calico).
	{name: "accepted by mark, pods to the node dropped", drops: true, overtakes: true, put: `restore <<'END'
*raw
:NET-PRE - [0:0]
-I PREROUTING 1 -j NET-PRE
-A NET-PRE -j MARK --set-xmark 0x0/0xf0000
-A NET-PRE -i cni0 -j MARK --set-xmark 0x40000/0x40000
-A NET-PRE -m mark --mark 0x40000/0x40000 -m rpfilter --validmark --invert -j DROP
-A NET-PRE -m mark --mark 0x10000/0x10000 -j ACCEPT
COMMIT
*mangle
:NET-PRE - [0:0]
-I PREROUTING 1 -j NET-PRE
-A NET-PRE -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A NET-PRE -m mark --mark 0x10000/0x10000 -j ACCEPT
COMMIT
*filter
:NET-INPUT - [0:0]
:NET-WL-TO-HOST - [0:0]
-I INPUT 1 -j NET-INPUT
-A NET-INPUT -i cni0 -g NET-WL-TO-HOST
-A NET-INPUT -m mark --mark 0x10000/0x10000 -j ACCEPT
-A NET-WL-TO-HOST -p udp -m udp --dport 67 -j ACCEPT
-A NET-WL-TO-HOST -j DROP
COMMIT
END`},
	// A network whose proxy's packets have a mark and are not tracked, and table local behind
	// (Cilium).
	{name: "a proxy's mark not tracked", put: `restore <<'END'
*raw
:NET-PRE - [0:0]
:NET-OUT - [0:0]
-A PREROUTING -j NET-PRE
-A OUTPUT -j NET-OUT
-A NET-PRE -m mark --mark 0x200/0xf00 -j CT --notrack
-A NET-OUT -o cni0 -m mark --mark 0xa00/0xfffffeff -j CT --notrack
-A NET-OUT -o cni0 -m mark --mark 0x800/0xe00 -j CT --notrack
COMMIT
*mangle
:NET-PRE - [0:0]
-A PREROUTING -j NET-PRE
-A NET-PRE ! -i lo -m socket --transparent -j MARK --set-xmark 0x200/0xffffffff
COMMIT
END
ip rule add pref 9 fwmark 0x200/0xf00 lookup 2004
ip route add local default dev lo table 2004`},
	{
		name:  "a proxy's policy rule, table local behind",
		flush: true,
		put: `ip rule add pref 9 fwmark 0x200/0xf00 lookup 2004
ip route add local default dev lo table 2004
ip rule add pref 100 lookup local
ip rule del pref 0
ip -6 rule add pref 100 lookup local
ip -6 rule del pref 0`,
	},
	// Network policy that drops what conntrack calls invalid, everywhere (kube-router).
	{name: "invalid packets dropped in every chain", put: `restore <<'END'
*filter
:NET-POLICY - [0:0]
-I INPUT 1 -j NET-POLICY
-I FORWARD 1 -j NET-POLICY
-I OUTPUT 1 -j NET-POLICY
-A NET-POLICY -m conntrack --ctstate INVALID -j DROP
-A NET-POLICY -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A NET-POLICY -m mark --mark 0x20000/0x20000 -j ACCEPT
COMMIT
END`},
	// A network that gives pods addresses of the cloud's own, and routes by what mark came in (AWS).
	{name: "connmarks of pods and routes by mark", put: `restore <<'END'
*mangle
-A PREROUTING -i eth0 -m addrtype --dst-type LOCAL --limit-iface-in -j CONNMARK --set-xmark 0x80/0x80
-A PREROUTING -i cni0 -j CONNMARK --restore-mark --nfmask 0x80 --ctmask 0x80
COMMIT
*nat
:NET-CONNMARK - [0:0]
-A PREROUTING -i cni0 -j NET-CONNMARK
-A PREROUTING -j CONNMARK --restore-mark --nfmask 0x80 --ctmask 0x80
-A NET-CONNMARK -d 10.0.0.0/8 -j RETURN
-A NET-CONNMARK -j CONNMARK --set-xmark 0x80/0x80
COMMIT
END
ip rule add pref 1024 fwmark 0x80/0x80 lookup main`},
	{name: "routes by source", flush: true, put: `ip route add default via 198.51.100.1 dev eth0 table 2
ip rule add pref 512 to 10.244.0.0/16 lookup main
ip rule add pref 1024 fwmark 0x80/0x80 lookup main
ip rule add pref 1536 from 10.244.0.0/16 lookup 2`},
	// A VPN that drops the shared address space on every other interface, where pods have it
	// (Tailscale).
	{name: "a VPN of the address space of pods", drops: true, overtakes: true, inPod: `ip addr add 100.64.0.9/16 dev eth0
ip route replace default via 10.244.0.1 dev eth0 src 100.64.0.9`, put: `ip route add 100.64.0.0/16 dev cni0
restore <<'END'
*filter
:VPN-IN - [0:0]
-I INPUT 1 -j VPN-IN
-A VPN-IN -s 100.100.0.1/32 -i lo -j ACCEPT
-A VPN-IN -s 100.64.0.0/10 ! -i vpn0 -j DROP
COMMIT
END
ip rule add pref 5210 fwmark 0x80000/0xff0000 lookup main
ip rule add pref 5230 fwmark 0x80000/0xff0000 lookup default
ip rule add pref 5250 fwmark 0x80000/0xff0000 unreachable
ip rule add pref 5270 lookup 52`},
	// Reverse paths by sysctl, and addresses answered by their own interface alone.
	{name: "strict reverse paths by sysctl", routed: true, put: `for i in all default cni0 eth0; do
	echo 1 >/proc/sys/net/ipv4/conf/$i/rp_filter
	echo 1 >/proc/sys/net/ipv4/conf/$i/arp_ignore
	echo 2 >/proc/sys/net/ipv4/conf/$i/arp_announce
	echo 0 >/proc/sys/net/ipv4/conf/$i/route_localnet
done`},
	{
		name: "loose reverse paths by sysctl",
		put:  `for i in all default cni0 eth0; do echo 2 >/proc/sys/net/ipv4/conf/$i/rp_filter; done`,
	},
	// Bridges whose packets go through iptables, as kubelet's documentation asks for.
	{
		name: "bridged packets through iptables",
		put:  `for f in iptables ip6tables arptables; do echo 1 >/proc/sys/net/bridge/bridge-nf-call-$f; done`,
	},
	// Packets that no conntrack sees: a DNS cache at a link-local address.
	{name: "a DNS cache not tracked", put: `restore <<'END'
*raw
-I PREROUTING 1 -d 169.254.20.10/32 -p tcp -m tcp --dport 53 -j CT --notrack
-I OUTPUT 1 -s 169.254.20.10/32 -p tcp -m tcp --sport 53 -j CT --notrack
COMMIT
END`},
}
