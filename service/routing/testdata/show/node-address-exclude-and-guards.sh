# the guard that survives a flush of the firewall; where others have rules with a lower preference it goes before those
ip rule add pref 98 nop protocol kernel
ip -6 rule add pref 98 nop protocol kernel
ip rule add pref 97 iif lo to 168.63.129.16/32 goto 98 protocol kernel
ip rule add pref 97 iif docker0 to 168.63.129.16/32 goto 98 protocol kernel
ip rule add pref 97 iif eth0 to 168.63.129.16/32 goto 98 protocol kernel
ip rule add pref 97 iif lo to 169.254.169.254/32 goto 98 protocol kernel
ip rule add pref 97 iif docker0 to 169.254.169.254/32 goto 98 protocol kernel
ip rule add pref 97 iif eth0 to 169.254.169.254/32 goto 98 protocol kernel
ip -6 rule add pref 97 iif lo to fd00:ec2::254/128 goto 98 protocol kernel
ip -6 rule add pref 97 iif docker0 to fd00:ec2::254/128 goto 98 protocol kernel
ip -6 rule add pref 97 iif eth0 to fd00:ec2::254/128 goto 98 protocol kernel
ip rule add pref 97 to 168.63.129.16/32 ipproto tcp dport 80 prohibit protocol kernel
ip rule add pref 97 to 168.63.129.16/32 ipproto tcp dport 32526 prohibit protocol kernel
ip rule add pref 97 to 169.254.169.254/32 ipproto tcp dport 80 prohibit protocol kernel
ip rule add pref 97 to 169.254.169.254/32 ipproto tcp dport 8775 prohibit protocol kernel
ip -6 rule add pref 97 to fd00:ec2::254/128 ipproto tcp dport 80 prohibit protocol kernel
ip rule add pref 97 to 168.63.129.16/32 ipproto tcp dport 1-79 goto 98 protocol kernel
ip rule add pref 97 to 168.63.129.16/32 ipproto tcp dport 81-32525 goto 98 protocol kernel
ip rule add pref 97 to 168.63.129.16/32 ipproto tcp dport 32527-65534 goto 98 protocol kernel
ip rule add pref 97 to 168.63.129.16/32 ipproto tcp prohibit protocol kernel
ip rule add pref 97 to 169.254.169.254/32 ipproto tcp dport 1-79 goto 98 protocol kernel
ip rule add pref 97 to 169.254.169.254/32 ipproto tcp dport 81-8774 goto 98 protocol kernel
ip rule add pref 97 to 169.254.169.254/32 ipproto tcp dport 8776-65534 goto 98 protocol kernel
ip rule add pref 97 to 169.254.169.254/32 ipproto tcp prohibit protocol kernel
ip -6 rule add pref 97 to fd00:ec2::254/128 ipproto udp goto 98 protocol kernel
ip -6 rule add pref 97 to fd00:ec2::254/128 ipproto ipv6-icmp goto 98 protocol kernel
ip -6 rule add pref 97 to fd00:ec2::254/128 ipproto tcp dport 1-79 goto 98 protocol kernel
ip -6 rule add pref 97 to fd00:ec2::254/128 ipproto tcp dport 81-65534 goto 98 protocol kernel
ip -6 rule add pref 97 to fd00:ec2::254/128 prohibit protocol kernel

# guard (IPv6)
ip6tables-restore --wait --noflush <<'END'
*filter
:GME-FWD - [0:0]
-A GME-FWD -i docker0 -j RETURN
-A GME-FWD -i eth0 -j RETURN
-A GME-FWD -d fd00:ec2::254/128 -p tcp -m multiport --dports 80 -j REJECT --reject-with tcp-reset
-I FORWARD 1 -m comment --comment gke-metadata-emulator -j GME-FWD
COMMIT
END

# rules (IPv4)
iptables-restore --wait --noflush <<'END'
*filter
:GME-FWD - [0:0]
:GME-IN - [0:0]
:GME-LOCAL - [0:0]
-A GME-FWD -i docker0 -j RETURN
-A GME-FWD -i eth0 -j RETURN
-A GME-FWD -d 10.0.0.5/32 -p tcp -m tcp --dport 18080 -m conntrack --ctstate NEW,RELATED,ESTABLISHED -j ACCEPT
-A GME-FWD -s 10.0.0.5/32 -p tcp -m tcp --sport 18080 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A GME-FWD -d 169.254.169.254/32 -p tcp -m multiport --dports 80,443,8080,8775 -j REJECT --reject-with tcp-reset
-A GME-FWD -d 168.63.129.16/32 -p tcp -m multiport --dports 80,32526 -j REJECT --reject-with tcp-reset
-A GME-IN -d 10.0.0.5/32 -p tcp -m tcp --dport 18080 -m conntrack --ctstate SNAT -j REJECT --reject-with tcp-reset
-A GME-IN -d 10.0.0.5/32 -p tcp -m tcp --dport 18080 -m conntrack --ctorigdst 169.254.169.254 -j ACCEPT
-A GME-IN -d 10.0.0.5/32 ! -i lo -p tcp -m tcp --dport 18080 -j DROP
-A GME-LOCAL -s 10.0.0.5/32 -p tcp -m tcp --sport 18080 ! --tcp-flags RST RST -m conntrack --ctstate SNAT -j DROP
-A GME-LOCAL -s 10.0.0.5/32 -p tcp -m tcp --sport 18080 -j ACCEPT
-A GME-LOCAL -d 10.0.0.5/32 -p tcp -m tcp --dport 18080 -j ACCEPT
-I FORWARD 1 -m comment --comment gke-metadata-emulator -j GME-FWD
-I INPUT 1 -m comment --comment gke-metadata-emulator -j GME-IN
-I OUTPUT 1 -m comment --comment gke-metadata-emulator -j GME-LOCAL
COMMIT
*raw
:GME-RAW - [0:0]
:GME-RAW-OUT - [0:0]
-A GME-RAW -d 10.0.0.5/32 ! -i lo -p tcp -m tcp --dport 18080 -j DROP
-A GME-RAW -i docker0 -j RETURN
-A GME-RAW -i eth0 -j RETURN
-A GME-RAW -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j CT
-A GME-RAW -s 10.0.0.5/32 -p tcp -m tcp --sport 18080 -j CT
-A GME-RAW-OUT -s 10.0.0.5/32 -p tcp -m tcp --sport 18080 -j CT
-I PREROUTING 1 -m comment --comment gke-metadata-emulator -j GME-RAW
-I OUTPUT 1 -m comment --comment gke-metadata-emulator -j GME-RAW-OUT
COMMIT
*nat
:GME-PRE - [0:0]
-A GME-PRE -i lo -j RETURN
-A GME-PRE -i docker0 -j RETURN
-A GME-PRE -i eth0 -j RETURN
-A GME-PRE -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.5:18080
-I PREROUTING 1 -m comment --comment gke-metadata-emulator -j GME-PRE
COMMIT
END
