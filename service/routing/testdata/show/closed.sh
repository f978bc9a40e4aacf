# the guard that survives a flush of the firewall
ip rule add pref 97 iif lo to 169.254.169.254/32 lookup main protocol kernel
ip -6 rule add pref 97 iif lo to fd00:ec2::254/128 lookup main protocol kernel
ip -6 rule add pref 97 iif lo to fd20:ce::254/128 lookup main protocol kernel
ip rule add pref 98 to 169.254.169.254/32 ipproto tcp dport 80 prohibit protocol kernel
ip -6 rule add pref 98 to fd00:ec2::254/128 ipproto tcp dport 80 prohibit protocol kernel
ip -6 rule add pref 98 to fd20:ce::254/128 ipproto tcp dport 80 prohibit protocol kernel
ip rule add pref 103 to 169.254.169.254/32 nop protocol kernel
ip rule add pref 101 to 169.254.169.254/32 ipproto tcp dport 1-79 goto 103 protocol kernel
ip rule add pref 101 to 169.254.169.254/32 ipproto tcp dport 81-65534 goto 103 protocol kernel
ip rule add pref 102 to 169.254.169.254/32 ipproto tcp prohibit protocol kernel
ip -6 rule add pref 103 to fd00:ec2::254/128 nop protocol kernel
ip -6 rule add pref 101 to fd00:ec2::254/128 ipproto udp goto 103 protocol kernel
ip -6 rule add pref 101 to fd00:ec2::254/128 ipproto ipv6-icmp goto 103 protocol kernel
ip -6 rule add pref 101 to fd00:ec2::254/128 ipproto tcp dport 1-79 goto 103 protocol kernel
ip -6 rule add pref 101 to fd00:ec2::254/128 ipproto tcp dport 81-65534 goto 103 protocol kernel
ip -6 rule add pref 102 to fd00:ec2::254/128 prohibit protocol kernel
ip -6 rule add pref 103 to fd20:ce::254/128 nop protocol kernel
ip -6 rule add pref 101 to fd20:ce::254/128 ipproto udp goto 103 protocol kernel
ip -6 rule add pref 101 to fd20:ce::254/128 ipproto ipv6-icmp goto 103 protocol kernel
ip -6 rule add pref 101 to fd20:ce::254/128 ipproto tcp dport 1-79 goto 103 protocol kernel
ip -6 rule add pref 101 to fd20:ce::254/128 ipproto tcp dport 81-65534 goto 103 protocol kernel
ip -6 rule add pref 102 to fd20:ce::254/128 prohibit protocol kernel
