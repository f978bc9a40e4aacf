package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// keepMemoryPrivate has the kernel refuse this process's memory to other processes of its user: tokens are in it. It is to be called before
// any secret is read. No directive of systemd's does this.
func keepMemoryPrivate() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("PR_SET_DUMPABLE: %w", err)
	}
	return nil
}
