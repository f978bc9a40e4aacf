# the emulator's address, unless the node has it already
ip address add 169.254.169.252/32 dev lo scope host label lo:gme


# Programs at /sys/fs/cgroup, pinned below /sys/fs/bpf/gke-metadata-emulator/observe, which count who connects to 169.254.169.254:80. No command can type them.
