# the guard that survives a flush of the firewall; where others have rules with a lower preference it goes before those
ip rule add pref 98 nop protocol kernel
ip rule add pref 97 iif lo to 169.254.169.254/32 goto 98 protocol kernel
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
		iifname "eth0" fib daddr type local tcp dport 8988 drop
	}
	chain input {
		type filter hook input priority -10; policy accept;
		iifname "eth0" fib daddr type local tcp dport 8988 drop
	}
	chain forward {
		type filter hook forward priority -10; policy accept;
		ip daddr 169.254.169.254 tcp dport 80 reject with tcp reset
		ip daddr 169.254.169.254 tcp dport 443 reject with tcp reset
		ip daddr 169.254.169.254 tcp dport 8080 reject with tcp reset
	}
}
END

# what pods need in their environment
#   env:
#   - name: NODE_IP
#     valueFrom: {fieldRef: {fieldPath: status.hostIP}}
#   - name: GCE_METADATA_HOST
#     value: $(NODE_IP):8988
#   - name: GCE_METADATA_IP
#     value: $(NODE_IP):8988
#   - name: GCE_METADATA_ROOT
#     value: $(NODE_IP):8988
