# the emulator's address, unless the node has it already
ip address add 169.254.169.252/32 dev lo scope host label lo:gme

# its IPv6 address, unless the node has it already
ip -6 route add local fd20:ce::252 dev lo table local protocol 252

# the guard that survives a flush of the firewall; where others have rules with a lower preference it goes before those
ip rule add pref 98 nop protocol kernel
ip rule add pref 97 iif lo to 169.254.169.254/32 goto 98 protocol kernel
ip rule add pref 97 iif docker0 to 169.254.169.254/32 goto 98 protocol kernel
ip rule add pref 97 to 169.254.169.254/32 ipproto tcp dport 80 prohibit protocol kernel
ip rule add pref 97 to 169.254.169.254/32 ipproto tcp dport 1-79 goto 98 protocol kernel
ip rule add pref 97 to 169.254.169.254/32 ipproto tcp dport 81-65534 goto 98 protocol kernel
ip rule add pref 97 to 169.254.169.254/32 ipproto tcp prohibit protocol kernel

# rules (IPv6)
ip6tables-restore --wait --noflush <<'END'
*filter
:GME-FWD - [0:0]
:GME-IN - [0:0]
:GME-LOCAL - [0:0]
-A GME-FWD -i docker0 -j RETURN
-A GME-FWD -s fd20:ce::252/128 -o docker0 -p udp -m udp --sport 988 -j DROP
-A GME-FWD -s fd20:ce::252/128 -o eth0 -p udp -m udp --sport 988 -j DROP
-A GME-FWD -d fd20:ce::252/128 -p udp -m udp --dport 988 -m conntrack --ctstate DNAT -j ACCEPT
-A GME-FWD -s fd20:ce::252/128 -p udp -m udp --sport 988 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A GME-FWD -d fd20:ce::252/128 -p tcp -m tcp --dport 988 -m conntrack --ctstate NEW,RELATED,ESTABLISHED -j ACCEPT
-A GME-FWD -s fd20:ce::252/128 -p tcp -m tcp --sport 988 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A GME-FWD -d fd20:ce::254/128 -p tcp -m multiport --dports 80,443,8080 -j REJECT --reject-with tcp-reset
-A GME-IN -d fd20:ce::252/128 -p tcp -m tcp --dport 988 -m conntrack --ctstate SNAT -j REJECT --reject-with tcp-reset
-A GME-IN -d fd20:ce::252/128 -p tcp -m tcp --dport 988 -m conntrack --ctorigdst fd20:ce::254 -j ACCEPT
-A GME-IN -d fd20:ce::252/128 ! -i lo -p tcp -m tcp --dport 988 -j DROP
-A GME-IN -d fd20:ce::252/128 -i docker0 -p udp -m udp --dport 988 -j DROP
-A GME-IN -d fd20:ce::252/128 -i eth0 -p udp -m udp --dport 988 -j DROP
-A GME-IN -d fd20:ce::252/128 -p udp -m udp --dport 988 -m conntrack --ctstate DNAT -j ACCEPT
-A GME-IN -d fd20:ce::252/128 ! -i lo -p udp -m udp --dport 988 -j DROP
-A GME-LOCAL -s fd20:ce::252/128 -p tcp -m tcp --sport 988 ! --tcp-flags RST RST -m conntrack --ctstate SNAT -j DROP
-A GME-LOCAL -s fd20:ce::252/128 -p tcp -m tcp --sport 988 -j ACCEPT
-A GME-LOCAL -d fd20:ce::252/128 -p tcp -m tcp --dport 988 -j ACCEPT
-A GME-LOCAL -s fd20:ce::252/128 -o docker0 -p udp -m udp --sport 988 -j DROP
-A GME-LOCAL -s fd20:ce::252/128 -o eth0 -p udp -m udp --sport 988 -j DROP
-A GME-LOCAL -s fd20:ce::252/128 -p udp -m udp --sport 988 -j ACCEPT
-A GME-LOCAL -d fd20:ce::252/128 -p udp -m udp --dport 988 -j ACCEPT
-I FORWARD 1 -m comment --comment gke-metadata-emulator -j GME-FWD
-I INPUT 1 -m comment --comment gke-metadata-emulator -j GME-IN
-I OUTPUT 1 -m comment --comment gke-metadata-emulator -j GME-LOCAL
COMMIT
*raw
:GME-RAW - [0:0]
:GME-RAW-OUT - [0:0]
-A GME-RAW -d fd20:ce::252/128 ! -i lo -p tcp -m tcp --dport 988 -j DROP
-A GME-RAW -d fd20:ce::252/128 ! -i lo -p udp -m udp --dport 988 -j DROP
-A GME-RAW -i docker0 -j RETURN
-A GME-RAW -d fd20:ce::254/128 -p tcp -m tcp --dport 80 -j CT
-A GME-RAW -s fd20:ce::252/128 -p tcp -m tcp --sport 988 -j CT
-A GME-RAW -i lo -j RETURN
-A GME-RAW -i docker0 -j RETURN
-A GME-RAW -i eth0 -j RETURN
-A GME-RAW -p udp -m udp --dport 53 -m bpf --bytecode "31,1 0 0 40,48 0 0 6,21 0 27 17,72 0 0 10,84 0 0 63488,21 0 24 0,72 0 0 12,21 0 22 1,64 0 0 20,84 0 0 4292861919,21 0 19 139281748,64 0 0 24,84 0 0 3755991007,21 0 16 1094992212,64 0 0 28,84 0 0 3758088159,21 0 13 1090930511,64 0 0 32,84 0 0 3755991007,21 0 10 1330072645,64 0 0 36,84 0 0 4292861919,21 0 7 139021908,64 0 0 40,84 0 0 3755991007,21 0 4 1163021889,80 0 0 44,84 0 0 223,21 0 1 76,6 0 0 65535,6 0 0 0" -j CT --zone-orig 988
-A GME-RAW-OUT -d fd20:ce::254/128 -p tcp -m tcp --dport 80 -j CT
-A GME-RAW-OUT -s fd20:ce::252/128 -p tcp -m tcp --sport 988 -j CT
-A GME-RAW-OUT -m cgroup --path system.slice -j RETURN
-A GME-RAW-OUT -p udp -m udp --dport 53 -m bpf --bytecode "31,1 0 0 40,48 0 0 6,21 0 27 17,72 0 0 10,84 0 0 63488,21 0 24 0,72 0 0 12,21 0 22 1,64 0 0 20,84 0 0 4292861919,21 0 19 139281748,64 0 0 24,84 0 0 3755991007,21 0 16 1094992212,64 0 0 28,84 0 0 3758088159,21 0 13 1090930511,64 0 0 32,84 0 0 3755991007,21 0 10 1330072645,64 0 0 36,84 0 0 4292861919,21 0 7 139021908,64 0 0 40,84 0 0 3755991007,21 0 4 1163021889,80 0 0 44,84 0 0 223,21 0 1 76,6 0 0 65535,6 0 0 0" -j CT --zone-orig 988
-I PREROUTING 1 -m comment --comment gke-metadata-emulator -j GME-RAW
-I OUTPUT 1 -m comment --comment gke-metadata-emulator -j GME-RAW-OUT
COMMIT
*nat
:GME-OUT - [0:0]
:GME-PRE - [0:0]
-A GME-OUT -m cgroup --path system.slice -j RETURN
-A GME-OUT -d fd20:ce::254/128 -p tcp -m tcp --dport 80 -j DNAT --to-destination [fd20:ce::252]:988
-A GME-OUT -p udp -m udp --dport 53 -m bpf --bytecode "31,1 0 0 40,48 0 0 6,21 0 27 17,72 0 0 10,84 0 0 63488,21 0 24 0,72 0 0 12,21 0 22 1,64 0 0 20,84 0 0 4292861919,21 0 19 139281748,64 0 0 24,84 0 0 3755991007,21 0 16 1094992212,64 0 0 28,84 0 0 3758088159,21 0 13 1090930511,64 0 0 32,84 0 0 3755991007,21 0 10 1330072645,64 0 0 36,84 0 0 4292861919,21 0 7 139021908,64 0 0 40,84 0 0 3755991007,21 0 4 1163021889,80 0 0 44,84 0 0 223,21 0 1 76,6 0 0 65535,6 0 0 0" -j DNAT --to-destination [fd20:ce::252]:988
-A GME-PRE -i lo -j RETURN
-A GME-PRE -i docker0 -j RETURN
-A GME-PRE -i eth0 -j RETURN
-A GME-PRE -d fd20:ce::254/128 -p tcp -m tcp --dport 80 -j DNAT --to-destination [fd20:ce::252]:988
-A GME-PRE -p udp -m udp --dport 53 -m bpf --bytecode "31,1 0 0 40,48 0 0 6,21 0 27 17,72 0 0 10,84 0 0 63488,21 0 24 0,72 0 0 12,21 0 22 1,64 0 0 20,84 0 0 4292861919,21 0 19 139281748,64 0 0 24,84 0 0 3755991007,21 0 16 1094992212,64 0 0 28,84 0 0 3758088159,21 0 13 1090930511,64 0 0 32,84 0 0 3755991007,21 0 10 1330072645,64 0 0 36,84 0 0 4292861919,21 0 7 139021908,64 0 0 40,84 0 0 3755991007,21 0 4 1163021889,80 0 0 44,84 0 0 223,21 0 1 76,6 0 0 65535,6 0 0 0" -j DNAT --to-destination [fd20:ce::252]:988
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
-A GME-FWD -s 169.254.169.252/32 -o docker0 -p udp -m udp --sport 988 -j DROP
-A GME-FWD -s 169.254.169.252/32 -o eth0 -p udp -m udp --sport 988 -j DROP
-A GME-FWD -d 169.254.169.252/32 -p udp -m udp --dport 988 -m conntrack --ctstate DNAT -j ACCEPT
-A GME-FWD -s 169.254.169.252/32 -p udp -m udp --sport 988 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A GME-FWD -d 169.254.169.252/32 -p tcp -m tcp --dport 988 -m conntrack --ctstate NEW,RELATED,ESTABLISHED -j ACCEPT
-A GME-FWD -s 169.254.169.252/32 -p tcp -m tcp --sport 988 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A GME-FWD -d 169.254.169.254/32 -p tcp -m multiport --dports 80,443,8080 -j REJECT --reject-with tcp-reset
-A GME-IN -d 169.254.169.252/32 -p tcp -m tcp --dport 988 -m conntrack --ctstate SNAT -j REJECT --reject-with tcp-reset
-A GME-IN -d 169.254.169.252/32 -p tcp -m tcp --dport 988 -m conntrack --ctorigdst 169.254.169.254 -j ACCEPT
-A GME-IN -d 169.254.169.252/32 ! -i lo -p tcp -m tcp --dport 988 -j DROP
-A GME-IN -d 169.254.169.252/32 -i docker0 -p udp -m udp --dport 988 -j DROP
-A GME-IN -d 169.254.169.252/32 -i eth0 -p udp -m udp --dport 988 -j DROP
-A GME-IN -d 169.254.169.252/32 -p udp -m udp --dport 988 -m conntrack --ctstate DNAT -j ACCEPT
-A GME-IN -d 169.254.169.252/32 ! -i lo -p udp -m udp --dport 988 -j DROP
-A GME-LOCAL -s 169.254.169.252/32 -p tcp -m tcp --sport 988 ! --tcp-flags RST RST -m conntrack --ctstate SNAT -j DROP
-A GME-LOCAL -s 169.254.169.252/32 -p tcp -m tcp --sport 988 -j ACCEPT
-A GME-LOCAL -d 169.254.169.252/32 -p tcp -m tcp --dport 988 -j ACCEPT
-A GME-LOCAL -s 169.254.169.252/32 -o docker0 -p udp -m udp --sport 988 -j DROP
-A GME-LOCAL -s 169.254.169.252/32 -o eth0 -p udp -m udp --sport 988 -j DROP
-A GME-LOCAL -s 169.254.169.252/32 -p udp -m udp --sport 988 -j ACCEPT
-A GME-LOCAL -d 169.254.169.252/32 -p udp -m udp --dport 988 -j ACCEPT
-I FORWARD 1 -m comment --comment gke-metadata-emulator -j GME-FWD
-I INPUT 1 -m comment --comment gke-metadata-emulator -j GME-IN
-I OUTPUT 1 -m comment --comment gke-metadata-emulator -j GME-LOCAL
COMMIT
*raw
:GME-RAW - [0:0]
:GME-RAW-OUT - [0:0]
-A GME-RAW -d 169.254.169.252/32 ! -i lo -p tcp -m tcp --dport 988 -j DROP
-A GME-RAW -d 169.254.169.252/32 ! -i lo -p udp -m udp --dport 988 -j DROP
-A GME-RAW -i docker0 -j RETURN
-A GME-RAW -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j CT
-A GME-RAW -s 169.254.169.252/32 -p tcp -m tcp --sport 988 -j CT
-A GME-RAW -i lo -j RETURN
-A GME-RAW -i docker0 -j RETURN
-A GME-RAW -i eth0 -j RETURN
-A GME-RAW -p udp -m udp --dport 53 -m bpf --bytecode "29,177 0 0 0,72 0 0 10,84 0 0 63488,21 0 24 0,72 0 0 12,21 0 22 1,64 0 0 20,84 0 0 4292861919,21 0 19 139281748,64 0 0 24,84 0 0 3755991007,21 0 16 1094992212,64 0 0 28,84 0 0 3758088159,21 0 13 1090930511,64 0 0 32,84 0 0 3755991007,21 0 10 1330072645,64 0 0 36,84 0 0 4292861919,21 0 7 139021908,64 0 0 40,84 0 0 3755991007,21 0 4 1163021889,80 0 0 44,84 0 0 223,21 0 1 76,6 0 0 65535,6 0 0 0" -j CT --zone-orig 988
-A GME-RAW-OUT -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j CT
-A GME-RAW-OUT -s 169.254.169.252/32 -p tcp -m tcp --sport 988 -j CT
-A GME-RAW-OUT -m cgroup --path system.slice -j RETURN
-A GME-RAW-OUT -p udp -m udp --dport 53 -m bpf --bytecode "29,177 0 0 0,72 0 0 10,84 0 0 63488,21 0 24 0,72 0 0 12,21 0 22 1,64 0 0 20,84 0 0 4292861919,21 0 19 139281748,64 0 0 24,84 0 0 3755991007,21 0 16 1094992212,64 0 0 28,84 0 0 3758088159,21 0 13 1090930511,64 0 0 32,84 0 0 3755991007,21 0 10 1330072645,64 0 0 36,84 0 0 4292861919,21 0 7 139021908,64 0 0 40,84 0 0 3755991007,21 0 4 1163021889,80 0 0 44,84 0 0 223,21 0 1 76,6 0 0 65535,6 0 0 0" -j CT --zone-orig 988
-I PREROUTING 1 -m comment --comment gke-metadata-emulator -j GME-RAW
-I OUTPUT 1 -m comment --comment gke-metadata-emulator -j GME-RAW-OUT
COMMIT
*nat
:GME-OUT - [0:0]
:GME-PRE - [0:0]
-A GME-OUT -m cgroup --path system.slice -j RETURN
-A GME-OUT -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 169.254.169.252:988
-A GME-OUT -p udp -m udp --dport 53 -m bpf --bytecode "29,177 0 0 0,72 0 0 10,84 0 0 63488,21 0 24 0,72 0 0 12,21 0 22 1,64 0 0 20,84 0 0 4292861919,21 0 19 139281748,64 0 0 24,84 0 0 3755991007,21 0 16 1094992212,64 0 0 28,84 0 0 3758088159,21 0 13 1090930511,64 0 0 32,84 0 0 3755991007,21 0 10 1330072645,64 0 0 36,84 0 0 4292861919,21 0 7 139021908,64 0 0 40,84 0 0 3755991007,21 0 4 1163021889,80 0 0 44,84 0 0 223,21 0 1 76,6 0 0 65535,6 0 0 0" -j DNAT --to-destination 169.254.169.252:988
-A GME-PRE -i lo -j RETURN
-A GME-PRE -i docker0 -j RETURN
-A GME-PRE -i eth0 -j RETURN
-A GME-PRE -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 169.254.169.252:988
-A GME-PRE -p udp -m udp --dport 53 -m bpf --bytecode "29,177 0 0 0,72 0 0 10,84 0 0 63488,21 0 24 0,72 0 0 12,21 0 22 1,64 0 0 20,84 0 0 4292861919,21 0 19 139281748,64 0 0 24,84 0 0 3755991007,21 0 16 1094992212,64 0 0 28,84 0 0 3758088159,21 0 13 1090930511,64 0 0 32,84 0 0 3755991007,21 0 10 1330072645,64 0 0 36,84 0 0 4292861919,21 0 7 139021908,64 0 0 40,84 0 0 3755991007,21 0 4 1163021889,80 0 0 44,84 0 0 223,21 0 1 76,6 0 0 65535,6 0 0 0" -j DNAT --to-destination 169.254.169.252:988
-I OUTPUT 1 -m comment --comment gke-metadata-emulator -j GME-OUT
-I PREROUTING 1 -m comment --comment gke-metadata-emulator -j GME-PRE
COMMIT
END

# only on a node that has no other route there
ip route add 169.254.169.254/32 dev lo scope link protocol kernel src 169.254.169.252
