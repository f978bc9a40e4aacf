# the emulator's address, unless the node has it already
ip address add 169.254.169.252/32 dev lo scope host label lo:gme


# rules (IPv4)
iptables-restore --wait --noflush <<'END'
*filter
:GME-FWD - [0:0]
:GME-IN - [0:0]
:GME-LOCAL - [0:0]
-A GME-FWD -d 169.254.169.252/32 -p tcp -m tcp --dport 988 -m conntrack --ctstate NEW,RELATED,ESTABLISHED -j ACCEPT
-A GME-FWD -s 169.254.169.252/32 -p tcp -m tcp --sport 988 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A GME-FWD -d 169.254.169.254/32 -p tcp -m multiport --dports 80,443,8080 -j REJECT --reject-with tcp-reset
-A GME-IN -d 169.254.169.252/32 -p tcp -m tcp --dport 988 -m conntrack --ctstate SNAT -j REJECT --reject-with tcp-reset
-A GME-IN -d 169.254.169.252/32 -p tcp -m tcp --dport 988 -m conntrack --ctorigdst 169.254.169.254 -j ACCEPT
-A GME-IN -d 169.254.169.252/32 ! -i lo -p tcp -m tcp --dport 988 -j DROP
-A GME-LOCAL -s 169.254.169.252/32 -p tcp -m tcp --sport 988 ! --tcp-flags RST RST -m conntrack --ctstate SNAT -j DROP
-A GME-LOCAL -s 169.254.169.252/32 -p tcp -m tcp --sport 988 -j ACCEPT
-A GME-LOCAL -d 169.254.169.252/32 -p tcp -m tcp --dport 988 -j ACCEPT
-I FORWARD 1 -m comment --comment gke-metadata-emulator -j GME-FWD
-I INPUT 1 -m comment --comment gke-metadata-emulator -j GME-IN
-I OUTPUT 1 -m comment --comment gke-metadata-emulator -j GME-LOCAL
COMMIT
*raw
:GME-RAW - [0:0]
:GME-RAW-OUT - [0:0]
-A GME-RAW -d 169.254.169.252/32 ! -i lo -p tcp -m tcp --dport 988 -j DROP
-A GME-RAW -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j CT
-A GME-RAW -s 169.254.169.252/32 -p tcp -m tcp --sport 988 -j CT
-A GME-RAW-OUT -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j CT
-A GME-RAW-OUT -s 169.254.169.252/32 -p tcp -m tcp --sport 988 -j CT
-I PREROUTING 1 -m comment --comment gke-metadata-emulator -j GME-RAW
-I OUTPUT 1 -m comment --comment gke-metadata-emulator -j GME-RAW-OUT
COMMIT
*nat
:GME-OUT - [0:0]
:GME-PRE - [0:0]
-A GME-OUT -m cgroup --path system.slice -j RETURN
-A GME-OUT -m cgroup --path user.slice -j RETURN
-A GME-OUT -m cgroup --path init.scope -j RETURN
-A GME-OUT -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 169.254.169.252:988
-A GME-PRE -i lo -j RETURN
-A GME-PRE -i bond0 -j RETURN
-A GME-PRE -i eth1 -j RETURN
-A GME-PRE -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 169.254.169.252:988
-I OUTPUT 1 -m comment --comment gke-metadata-emulator -j GME-OUT
-I PREROUTING 1 -m comment --comment gke-metadata-emulator -j GME-PRE
COMMIT
END

# only on a node that has no other route there
ip route add 169.254.169.254/32 dev lo scope link protocol kernel src 169.254.169.252
