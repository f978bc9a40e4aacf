package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// keepMemoryPrivate prevents other processes of the same user from reading this process's memory,
// which holds tokens. It is called before any secret is read. No systemd directive does this.
func keepMemoryPrivate() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("PR_SET_DUMPABLE: %w", err)
	}
	return nil
}
