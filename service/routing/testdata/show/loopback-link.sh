# the metadata server's address is this node's own, for those whom the rules below send to that table
ip route add local 169.254.169.254 dev lo table 988 protocol kernel

# and everybody's, by a link
ip link add gme0 up type dummy
ip link set gme0 alias gke-metadata-emulator
ip address add 169.254.169.254/32 dev gme0 label gme0:gme

# the guard that survives a flush of the firewall; where others have rules with a lower preference it goes before those
ip rule add pref 98 nop protocol kernel
ip rule add pref 97 iif lo to 169.254.169.254/32 goto 98 protocol kernel
ip rule add pref 97 iif eth0 to 169.254.169.254/32 ipproto tcp dport 80 prohibit protocol kernel
ip rule add pref 97 to 169.254.169.254/32 ipproto tcp dport 80 lookup 988 protocol kernel
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
		iifname "eth0" ip daddr 169.254.169.254 tcp dport 80 drop
	}
	chain input {
		type filter hook input priority -10; policy accept;
		iifname "eth0" ip daddr 169.254.169.254 tcp dport 80 drop
	}
	chain forward {
		type filter hook forward priority -10; policy accept;
		ip daddr 169.254.169.254 tcp dport 80 reject with tcp reset
		ip daddr 169.254.169.254 tcp dport 443 reject with tcp reset
		ip daddr 169.254.169.254 tcp dport 8080 reject with tcp reset
	}
}
END
