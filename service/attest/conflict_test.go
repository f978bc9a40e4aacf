package attest

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// Conflicts are bounded, and forgotten; the client is not told who has the other socket.
func TestConflicts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := NewKernel(KernelOptions{Log: quiet()})
		a, b := &namespace{inode: 7, pod: "a"}, &namespace{inode: 8, cgroups: []string{"/x"}}
		conflict := func(n int) {
			err := k.conflict(Conn{Client: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(n)}), 1)}, a, b)
			if !errors.Is(err, ErrSockets) || strings.Contains(err.Error(), "/x") || strings.Contains(err.Error(), "namespace") {
				t.Errorf("%v", err)
			}
			time.Sleep(time.Second) // of synctest's clock
		}
		for n := range maxConflicts + 2 {
			conflict(n)
		}
		conflict(maxConflicts + 1)
		all := k.Status().Conflicts
		if len(all) != maxConflicts || all[0].Address != netip.MustParseAddr("10.0.0.2") ||
			all[maxConflicts-1].Refused != 2 ||
			all[0].Between != [2]string{"a", "network namespace 8 of /x"} {
			t.Errorf("%+v", all)
		}
		time.Sleep(conflictAge)
		if all := k.Status().Conflicts; len(all) != 0 {
			t.Errorf("%+v after an hour", all)
		}
	})
}
