# the guard that survives a flush of the firewall; where others have rules with a lower preference it goes before those
ip rule add pref 98 nop protocol kernel
ip -6 rule add pref 98 nop protocol kernel
ip rule add pref 97 iif lo to 169.254.169.254/32 goto 98 protocol kernel
ip -6 rule add pref 97 iif lo to fd00:c1::a9fe:a9fe/128 goto 98 protocol kernel
ip -6 rule add pref 97 iif lo to fd00:ec2::254/128 goto 98 protocol kernel
ip -6 rule add pref 97 iif lo to fd20:ce::254/128 goto 98 protocol kernel
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
