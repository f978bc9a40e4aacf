# the guard that survives a flush of the firewall
ip rule add pref 97 iif lo to 169.254.169.254/32 lookup main protocol kernel
ip -6 rule add pref 97 iif lo to fd00:ec2::254/128 lookup main protocol kernel
ip -6 rule add pref 97 iif lo to fd20:ce::254/128 lookup main protocol kernel
ip rule add pref 98 to 169.254.169.254/32 ipproto tcp dport 80 prohibit protocol kernel
ip -6 rule add pref 98 to fd00:ec2::254/128 ipproto tcp dport 80 prohibit protocol kernel
ip -6 rule add pref 98 to fd20:ce::254/128 ipproto tcp dport 80 prohibit protocol kernel
