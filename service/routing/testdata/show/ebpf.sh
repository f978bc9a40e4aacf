# the emulator's address, unless the node has it already
ip address add 169.254.169.252/32 dev lo scope host label lo:gme

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

# other hosts are kept out
nft -f - <<'END'
add table ip gke-metadata-emulator
delete table ip gke-metadata-emulator
table ip gke-metadata-emulator {
	chain raw {
		type filter hook prerouting priority -310; policy accept;
		iifname "bond0" ip daddr 169.254.169.252 tcp dport 988 drop
		iifname "eth0" ip daddr 169.254.169.252 tcp dport 988 drop
	}
	chain input {
		type filter hook input priority -10; policy accept;
		iifname "bond0" ip daddr 169.254.169.252 tcp dport 988 drop
		iifname "eth0" ip daddr 169.254.169.252 tcp dport 988 drop
	}
	chain forward {
		type filter hook forward priority -10; policy accept;
		ip daddr 169.254.169.254 tcp dport 80 reject with tcp reset
		ip daddr 169.254.169.254 tcp dport 443 reject with tcp reset
		ip daddr 169.254.169.254 tcp dport 8080 reject with tcp reset
	}
}
END

# guard (IPv6)
nft -f - <<'END'
add table ip6 gke-metadata-emulator
delete table ip6 gke-metadata-emulator
table ip6 gke-metadata-emulator {
	chain forward {
		type filter hook forward priority -10; policy accept;
		ip6 daddr fd00:c1::a9fe:a9fe tcp dport 80 reject with tcp reset
		ip6 daddr fd00:ec2::254 tcp dport 80 reject with tcp reset
		ip6 daddr fd20:ce::254 tcp dport 80 reject with tcp reset
	}
}
END

# Programs at /sys/fs/cgroup, pinned below /sys/fs/bpf/gke-metadata-emulator/ebpf.
# For sockets of other network namespaces than this one,
# connect() to 169.254.169.254:80 goes to 169.254.169.252:988, and getpeername() says the former. No command can type them; instruction by instruction:

# connect6:
#	 0: MovReg dst: r6 src: r1
#	 1: LdXMemW dst: r1 src: r6 off: 20 imm: 0
#	 2: JNE32Imm dst: r1 off: 19 imm: -22413655 <leave>
#	 3: LdXMemW dst: r1 src: r6 off: 24 imm: 0
#	 4: JNE32Imm dst: r1 off: 17 imm: 20480 <leave>
#	 5: LdXMemW dst: r1 src: r6 off: 32 imm: 0
#	 6: JNE32Imm dst: r1 off: 15 imm: 1 <leave>
#	 7: LdXMemW dst: r1 src: r6 off: 8 imm: 0
#	 8: JNE32Imm dst: r1 off: 13 imm: 0 <leave>
#	 9: LdXMemW dst: r1 src: r6 off: 12 imm: 0
#	10: JNE32Imm dst: r1 off: 11 imm: 0 <leave>
#	11: LdXMemW dst: r1 src: r6 off: 16 imm: 0
#	12: JNE32Imm dst: r1 off: 9 imm: -65536 <leave>
#	13: MovReg dst: r1 src: r6
#	14: Call FnGetNetnsCookie
#	15: LdImmDW dst: r1 imm: COOKIE
#	17: JEqReg dst: r0 off: 4 src: r1 <leave>
#take:
#	18: MovImm32 dst: r1 imm: -55968087
#	19: StXMemW dst: r6 src: r1 off: 20 imm: 0
#	20: MovImm32 dst: r1 imm: 56323
#	21: StXMemW dst: r6 src: r1 off: 24 imm: 0
#leave:
#	22: MovImm dst: r0 imm: 1
#	23: Exit

# connect4:
#	 0: MovReg dst: r6 src: r1
#	 1: LdXMemW dst: r1 src: r6 off: 4 imm: 0
#	 2: JNE32Imm dst: r1 off: 13 imm: -22413655 <leave>
#	 3: LdXMemW dst: r1 src: r6 off: 24 imm: 0
#	 4: JNE32Imm dst: r1 off: 11 imm: 20480 <leave>
#	 5: LdXMemW dst: r1 src: r6 off: 32 imm: 0
#	 6: JNE32Imm dst: r1 off: 9 imm: 1 <leave>
#	 7: MovReg dst: r1 src: r6
#	 8: Call FnGetNetnsCookie
#	 9: LdImmDW dst: r1 imm: COOKIE
#	11: JEqReg dst: r0 off: 4 src: r1 <leave>
#take:
#	12: MovImm32 dst: r1 imm: -55968087
#	13: StXMemW dst: r6 src: r1 off: 4 imm: 0
#	14: MovImm32 dst: r1 imm: 56323
#	15: StXMemW dst: r6 src: r1 off: 24 imm: 0
#leave:
#	16: MovImm dst: r0 imm: 1
#	17: Exit

# getpeername6:
#	 0: MovReg dst: r6 src: r1
#	 1: LdXMemW dst: r1 src: r6 off: 20 imm: 0
#	 2: JNE32Imm dst: r1 off: 19 imm: -55968087 <leave>
#	 3: LdXMemW dst: r1 src: r6 off: 24 imm: 0
#	 4: JNE32Imm dst: r1 off: 17 imm: 56323 <leave>
#	 5: LdXMemW dst: r1 src: r6 off: 32 imm: 0
#	 6: JNE32Imm dst: r1 off: 15 imm: 1 <leave>
#	 7: LdXMemW dst: r1 src: r6 off: 8 imm: 0
#	 8: JNE32Imm dst: r1 off: 13 imm: 0 <leave>
#	 9: LdXMemW dst: r1 src: r6 off: 12 imm: 0
#	10: JNE32Imm dst: r1 off: 11 imm: 0 <leave>
#	11: LdXMemW dst: r1 src: r6 off: 16 imm: 0
#	12: JNE32Imm dst: r1 off: 9 imm: -65536 <leave>
#	13: MovReg dst: r1 src: r6
#	14: Call FnGetNetnsCookie
#	15: LdImmDW dst: r1 imm: COOKIE
#	17: JEqReg dst: r0 off: 4 src: r1 <leave>
#take:
#	18: MovImm32 dst: r1 imm: -22413655
#	19: StXMemW dst: r6 src: r1 off: 20 imm: 0
#	20: MovImm32 dst: r1 imm: 20480
#	21: StXMemW dst: r6 src: r1 off: 24 imm: 0
#leave:
#	22: MovImm dst: r0 imm: 1
#	23: Exit

# getpeername4:
#	 0: MovReg dst: r6 src: r1
#	 1: LdXMemW dst: r1 src: r6 off: 4 imm: 0
#	 2: JNE32Imm dst: r1 off: 13 imm: -55968087 <leave>
#	 3: LdXMemW dst: r1 src: r6 off: 24 imm: 0
#	 4: JNE32Imm dst: r1 off: 11 imm: 56323 <leave>
#	 5: LdXMemW dst: r1 src: r6 off: 32 imm: 0
#	 6: JNE32Imm dst: r1 off: 9 imm: 1 <leave>
#	 7: MovReg dst: r1 src: r6
#	 8: Call FnGetNetnsCookie
#	 9: LdImmDW dst: r1 imm: COOKIE
#	11: JEqReg dst: r0 off: 4 src: r1 <leave>
#take:
#	12: MovImm32 dst: r1 imm: -22413655
#	13: StXMemW dst: r6 src: r1 off: 4 imm: 0
#	14: MovImm32 dst: r1 imm: 20480
#	15: StXMemW dst: r6 src: r1 off: 24 imm: 0
#leave:
#	16: MovImm dst: r0 imm: 1
#	17: Exit
