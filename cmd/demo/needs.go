package main

import (
	"fmt"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

// needs returns an error that names everything that this machine or process lacks for the demo.
func needs(effective uint64, keep bool) error {
	var lacking []string
	for _, c := range []struct {
		bit  int
		name string
	}{
		{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"}, {unix.CAP_NET_RAW, "CAP_NET_RAW"},
		{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN"}, {unix.CAP_SYS_PTRACE, "CAP_SYS_PTRACE"},
	} {
		if effective&(1<<c.bit) == 0 {
			lacking = append(lacking, c.name)
		}
	}
	if lacking != nil {
		return fmt.Errorf("this process lacks %s: run `make demo` as root; in a container, use docker run --privileged",
			strings.Join(lacking, ", "))
	}
	tools := []string{"ip", "iptables", "nsenter", "mount", "unshare", "sh"}
	if keep {
		tools = append(tools, "curl") // the commands that --keep prints use it
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			lacking = append(lacking, tool)
		}
	}
	if lacking != nil {
		hint := "`make demo` installs them on Debian and Ubuntu"
		if keep {
			hint += ", all but curl, which only --keep needs"
		}
		return fmt.Errorf("this machine has no %s in $PATH: %s", strings.Join(lacking, ", "), hint)
	}
	return nil
}

// capabilities returns this process's effective capabilities, one bit each; 0 if capget fails.
func capabilities() uint64 {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return 0
	}
	return uint64(data[1].Effective)<<32 | uint64(data[0].Effective)
}
