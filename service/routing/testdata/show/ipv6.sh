# the emulator's address, unless the node has it already
ip address add 169.254.169.252/32 dev lo scope host label lo:gme

# its IPv6 address, unless the node has it already
ip -6 route add local fd20:ce::252 dev lo table local protocol 252

# the guard that survives a flush of the firewall; where others have rules with a lower preference it goes before those
ip rule add pref 98 nop protocol kernel
ip -6 rule add pref 98 nop protocol kernel
ip rule add pref 97 iif lo to 169.254.169.254/32 goto 98 protocol kernel
ip rule add pref 97 iif docker0 to 169.254.169.254/32 goto 98 protocol kernel
ip -6 rule add pref 97 iif lo to fd00:c1::a9fe:a9fe/128 goto 98 protocol kernel
ip -6 rule add pref 97 iif docker0 to fd00:c1::a9fe:a9fe/128 goto 98 protocol kernel
ip -6 rule add pref 97 iif lo to fd00:ec2::254/128 goto 98 protocol kernel
ip -6 rule add pref 97 iif docker0 to fd00:ec2::254/128 goto 98 protocol kernel
ip -6 rule add pref 97 iif lo to fd20:ce::254/128 goto 98 protocol kernel
ip -6 rule add pref 97 iif docker0 to fd20:ce::254/128 goto 98 protocol kernel
ip rule add pref 97 to 169.254.169.254/32 ipproto tcp dport 80 prohibit protocol kernel
ip -6 rule add pref 97 to fd00:c1::a9fe:a9fe/128 ipproto tcp dport 80 prohibit protocol kernel
ip -6 rule add pref 97 to fd00:ec2::254/128 ipproto tcp dport 80 prohibit protocol kernel
ip -6 rule add pref 97 to fd20:ce::254/128 ipproto tcp dport 80 prohibit protocol kernel
ip rule add pref 97 to 169.254.169.254/32 ipproto tcp dport 1-79 goto 98 protocol kernel
ip rule add pref 97 to 169.254.169.254/32 ipproto tcp dport 81-65534 goto 98 protocol kernel
ip rule add pref 97 to 169.254.169.254/32 ipproto tcp prohibit protocol kernel
ip -6 rule add pref 97 to fd00:c1::a9fe:a9fe/128 ipproto udp goto 98 protocol kernel
ip -6 rule add pref 97 to fd00:c1::a9fe:a9fe/128 ipproto ipv6-icmp goto 98 protocol kernel
ip -6 rule add pref 97 to fd00:c1::a9fe:a9fe/128 ipproto tcp dport 1-79 goto 98 protocol kernel
ip -6 rule add pref 97 to fd00:c1::a9fe:a9fe/128 ipproto tcp dport 81-65534 goto 98 protocol kernel
ip -6 rule add pref 97 to fd00:c1::a9fe:a9fe/128 prohibit protocol kernel
ip -6 rule add pref 97 to fd00:ec2::254/128 ipproto udp goto 98 protocol kernel
ip -6 rule add pref 97 to fd00:ec2::254/128 ipproto ipv6-icmp goto 98 protocol kernel
ip -6 rule add pref 97 to fd00:ec2::254/128 ipproto tcp dport 1-79 goto 98 protocol kernel
ip -6 rule add pref 97 to fd00:ec2::254/128 ipproto tcp dport 81-65534 goto 98 protocol kernel
ip -6 rule add pref 97 to fd00:ec2::254/128 prohibit protocol kernel
ip -6 rule add pref 97 to fd20:ce::254/128 ipproto udp goto 98 protocol kernel
ip -6 rule add pref 97 to fd20:ce::254/128 ipproto ipv6-icmp goto 98 protocol kernel
ip -6 rule add pref 97 to fd20:ce::254/128 ipproto tcp dport 1-79 goto 98 protocol kernel
ip -6 rule add pref 97 to fd20:ce::254/128 ipproto tcp dport 81-65534 goto 98 protocol kernel
ip -6 rule add pref 97 to fd20:ce::254/128 prohibit protocol kernel

# rules (IPv6)
ip6tables-restore --wait --noflush <<'END'
*filter
:GME-FWD - [0:0]
:GME-IN - [0:0]
:GME-LOCAL - [0:0]
-A GME-FWD -i docker0 -j RETURN
-A GME-FWD -d fd20:ce::252/128 -p tcp -m tcp --dport 988 -m conntrack --ctstate NEW,RELATED,ESTABLISHED -j ACCEPT
-A GME-FWD -s fd20:ce::252/128 -p tcp -m tcp --sport 988 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A GME-FWD -d fd20:ce::254/128 -p tcp -m multiport --dports 80,443,8080 -j REJECT --reject-with tcp-reset
-A GME-FWD -d fd00:c1::a9fe:a9fe/128 -p tcp -m multiport --dports 80 -j REJECT --reject-with tcp-reset
-A GME-FWD -d fd00:ec2::254/128 -p tcp -m multiport --dports 80 -j REJECT --reject-with tcp-reset
-A GME-IN -d fd20:ce::252/128 -p tcp -m tcp --dport 988 -m conntrack --ctstate SNAT -j REJECT --reject-with tcp-reset
-A GME-IN -d fd20:ce::252/128 -p tcp -m tcp --dport 988 -m conntrack --ctorigdst fd20:ce::254 -j ACCEPT
-A GME-IN -d fd20:ce::252/128 ! -i lo -p tcp -m tcp --dport 988 -j DROP
-A GME-LOCAL -s fd20:ce::252/128 -p tcp -m tcp --sport 988 ! --tcp-flags RST RST -m conntrack --ctstate SNAT -j DROP
-A GME-LOCAL -s fd20:ce::252/128 -p tcp -m tcp --sport 988 -j ACCEPT
-A GME-LOCAL -d fd20:ce::252/128 -p tcp -m tcp --dport 988 -j ACCEPT
-I FORWARD 1 -m comment --comment gke-metadata-emulator -j GME-FWD
-I INPUT 1 -m comment --comment gke-metadata-emulator -j GME-IN
-I OUTPUT 1 -m comment --comment gke-metadata-emulator -j GME-LOCAL
COMMIT
*raw
:GME-RAW - [0:0]
:GME-RAW-OUT - [0:0]
-A GME-RAW -d fd20:ce::252/128 ! -i lo -p tcp -m tcp --dport 988 -j DROP
-A GME-RAW -i docker0 -j RETURN
-A GME-RAW -d fd20:ce::254/128 -p tcp -m tcp --dport 80 -j CT
-A GME-RAW -s fd20:ce::252/128 -p tcp -m tcp --sport 988 -j CT
-A GME-RAW-OUT -d fd20:ce::254/128 -p tcp -m tcp --dport 80 -j CT
-A GME-RAW-OUT -s fd20:ce::252/128 -p tcp -m tcp --sport 988 -j CT
-I PREROUTING 1 -m comment --comment gke-metadata-emulator -j GME-RAW
-I OUTPUT 1 -m comment --comment gke-metadata-emulator -j GME-RAW-OUT
COMMIT
*nat
:GME-OUT - [0:0]
:GME-PRE - [0:0]
-A GME-OUT -m cgroup --path system.slice -j RETURN
-A GME-OUT -d fd20:ce::254/128 -p tcp -m tcp --dport 80 -j DNAT --to-destination [fd20:ce::252]:988
-A GME-PRE -i lo -j RETURN
-A GME-PRE -i docker0 -j RETURN
-A GME-PRE -i eth0 -j RETURN
-A GME-PRE -d fd20:ce::254/128 -p tcp -m tcp --dport 80 -j DNAT --to-destination [fd20:ce::252]:988
-I OUTPUT 1 -m comment --comment gke-metadata-emulator -j GME-OUT
-I PREROUTING 1 -m comment --comment gke-metadata-emulator -j GME-PRE
COMMIT
END

# rules (IPv4)
iptables-restore --wait --noflush <<'END'
*filter
:GME-FWD - [0:0]
:GME-IN - [0:0]
:GME-LOCAL - [0:0]
-A GME-FWD -i docker0 -j RETURN
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
-A GME-RAW -i docker0 -j RETURN
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
-A GME-OUT -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 169.254.169.252:988
-A GME-PRE -i lo -j RETURN
-A GME-PRE -i docker0 -j RETURN
-A GME-PRE -i eth0 -j RETURN
-A GME-PRE -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 169.254.169.252:988
-I OUTPUT 1 -m comment --comment gke-metadata-emulator -j GME-OUT
-I PREROUTING 1 -m comment --comment gke-metadata-emulator -j GME-PRE
COMMIT
END

# only on a node that has no other route there
ip route add 169.254.169.254/32 dev lo scope link protocol kernel src 169.254.169.252
