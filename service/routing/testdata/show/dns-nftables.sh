# the emulator's address, unless the node has it already
ip address add 169.254.169.252/32 dev lo scope host label lo:gme

# the guard that survives a flush of the firewall; where others have rules with a lower preference it goes before those
ip rule add pref 98 nop protocol kernel
ip rule add pref 97 iif lo to 169.254.169.254/32 goto 98 protocol kernel
ip rule add pref 97 iif docker0 to 169.254.169.254/32 goto 98 protocol kernel
ip rule add pref 97 to 169.254.169.254/32 ipproto tcp dport 80 prohibit protocol kernel
ip rule add pref 97 to 169.254.169.254/32 ipproto tcp dport 1-79 goto 98 protocol kernel
ip rule add pref 97 to 169.254.169.254/32 ipproto tcp dport 81-65534 goto 98 protocol kernel
ip rule add pref 97 to 169.254.169.254/32 ipproto tcp prohibit protocol kernel

# rules (IPv4)
nft -f - <<'END'
add table ip gke-metadata-emulator
delete table ip gke-metadata-emulator
table ip gke-metadata-emulator {
	chain raw {
		type filter hook prerouting priority -310; policy accept;
		iifname != "lo" ip daddr 169.254.169.252 tcp dport 988 drop
		iifname != "lo" ip daddr 169.254.169.252 udp dport 988 drop
		iifname "docker0" return
		ip daddr 169.254.169.254 tcp dport 80 ct zone set 0
		ip saddr 169.254.169.252 tcp sport 988 ct zone set 0
		ip saddr 169.254.169.252 udp sport 988 ct zone set 988
		iifname "lo" return
		iifname "docker0" return
		iifname "eth0" return
		udp dport 53 @th,80,16 & 0xf800 == 0 @th,96,16 1 @th,160,128 & 0xffdfdfdfdfdfdfdfdfffdfdfdfdfdfdf == 0x084d4554414441544106474f4f474c45 @th,288,72 & 0xffdfdfdfdfdfdfdfdf == 0x08494e5445524e414c ct zone set 988
	}
	chain raw-output {
		type filter hook output priority -310; policy accept;
		ip saddr 169.254.169.252 tcp sport 988 ct zone set 0
		ip saddr 169.254.169.252 udp sport 988 ct zone set 988
	}
	chain forward {
		type filter hook forward priority -10; policy accept;
		iifname "docker0" return
		ip daddr 169.254.169.254 tcp dport 80 reject with tcp reset
		ip daddr 169.254.169.254 tcp dport 443 reject with tcp reset
		ip daddr 169.254.169.254 tcp dport 8080 reject with tcp reset
		oifname "docker0" ip saddr 169.254.169.252 udp sport 988 drop
		oifname "eth0" ip saddr 169.254.169.252 udp sport 988 drop
	}
	chain input {
		type filter hook input priority -10; policy accept;
		ip daddr 169.254.169.252 tcp dport 988 ct status snat reject with tcp reset
		ip daddr 169.254.169.252 tcp dport 988 ct original ip daddr 169.254.169.254 accept
		iifname != "lo" ip daddr 169.254.169.252 tcp dport 988 drop
		iifname "docker0" ip daddr 169.254.169.252 udp dport 988 drop
		iifname "eth0" ip daddr 169.254.169.252 udp dport 988 drop
		ip daddr 169.254.169.252 udp dport 988 ct status dnat accept
		iifname != "lo" ip daddr 169.254.169.252 udp dport 988 drop
	}
	chain local {
		type filter hook output priority -10; policy accept;
		ip saddr 169.254.169.252 tcp sport 988 tcp flags & rst == 0 ct status snat drop
		oifname "docker0" ip saddr 169.254.169.252 udp sport 988 drop
		oifname "eth0" ip saddr 169.254.169.252 udp sport 988 drop
	}
	chain prerouting {
		type nat hook prerouting priority -110; policy accept;
		iifname "lo" return
		iifname "docker0" return
		iifname "eth0" return
		ip daddr 169.254.169.254 tcp dport 80 counter dnat to 169.254.169.252:988
		udp dport 53 @th,80,16 & 0xf800 == 0 @th,96,16 1 @th,160,128 & 0xffdfdfdfdfdfdfdfdfffdfdfdfdfdfdf == 0x084d4554414441544106474f4f474c45 @th,288,72 & 0xffdfdfdfdfdfdfdfdf == 0x08494e5445524e414c counter dnat to 169.254.169.252:988
	}
}
END
