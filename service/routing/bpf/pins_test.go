package bpf

import (
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
)

// A failed install of mode ebpf says what to do: about a missing right, and about anything else.
func TestFailureSaysWhatToDo(t *testing.T) {
	for want, err := range map[string]error{
		"routing-ebpf.conf as a drop-in of gke-metadata-emulator-routing.service": unix.EPERM,
		"mode ebpf needs Linux 5.14 or later: set routing.mode: iptables":         unix.EINVAL,
	} {
		got := remedied(Permission(err))
		if text := got.Error(); !strings.HasPrefix(text, err.Error()+": ") || !strings.Contains(text,
			want) || !errors.Is(got, err) {
			t.Errorf("%v: no %q in %q", err, want, text)
		}
		if denied := errors.Is(err, unix.EPERM); errors.Is(got, fault.ErrPermission) != denied {
			t.Errorf("%v: is ErrPermission is %t", err, !denied)
		}
	}
}
