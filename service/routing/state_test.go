package routing

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestStateFile(t *testing.T) {
	dir := t.TempDir()
	if s, err := ReadState(dir); err != nil || s.Desired != "" {
		t.Errorf("without a file: %+v, %v", s, err)
	}
	want := State{
		Desired:  Installed,
		Mode:     ModeIPTables,
		Listen:   "169.254.169.252:988",
		Guard:    DefaultGuard(),
		Since:    time.Unix(1, 0).UTC(),
		Standing: Standing{Time: time.Unix(2, 0).UTC(), Faults: []string{"missing: x"}},
	}
	if err := writeState(dir, want); err != nil {
		t.Fatal(err)
	}
	got, err := ReadState(dir)
	if err != nil || got.Listen != want.Listen || got.Guard[1] != want.Guard[1] ||
		!got.Standing.Time.Equal(want.Standing.Time) ||
		got.Standing.Faults[0] != "missing: x" {
		t.Errorf("%+v, %v", got, err)
	}
	if info, err := os.Stat(statePath(dir)); err != nil ||
		info.Mode().Perm() != 0o644 { // an unprivileged process reads it
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if err := os.WriteFile(statePath(dir), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadState(dir); err == nil {
		t.Error("a broken file was read")
	}
}

// TestStateFollowsNoLink: the directory may be the unprivileged service's, the writer is root.
func TestStateFollowsNoLink(t *testing.T) {
	dir, victim := t.TempDir(), filepath.Join(t.TempDir(), "victim")
	if err := os.WriteFile(victim, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"routing.json", "routing.json.new", "routing.lock"} {
		if err := os.Symlink(victim, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := writeState(dir, State{Desired: Removed}); err != nil {
		t.Error(err)
	}
	if _, err := lock(t.Context(), dir, unix.LOCK_EX); err == nil {
		t.Error("the lock was taken through a link")
	}
	if b, err := os.ReadFile(victim); err != nil || string(b) != "precious" {
		t.Errorf("%q, %v", b, err)
	}
}

func TestLock(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	unlock, err := lock(t.Context(), dir, unix.LOCK_SH) // nobody ever installed: nothing is made
	if err != nil {
		t.Fatal(err)
	}
	unlock()
	if _, err := os.Stat(dir); err == nil {
		t.Error("a reader made the run directory")
	}
	if unlock, err = lock(t.Context(), dir, unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	over, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("enough"))
	for _, how := range []int{unix.LOCK_EX, unix.LOCK_SH} {
		if _, err := lock(over, dir, how); err == nil {
			t.Error("locked twice")
		}
	}
	unlock()

	var inside, had atomic.Int32
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			unlock, err := lock(t.Context(), dir, unix.LOCK_EX)
			if err != nil {
				t.Error(err)
				return
			}
			if inside.Add(1) != 1 {
				t.Error("two are inside")
			}
			had.Add(1)
			inside.Add(-1)
			unlock()
		})
	}
	all.Wait()
	if had.Load() != 8 {
		t.Errorf("%d of 8 got the lock", had.Load())
	}
}

// TestStateSince: a mode is installed since it was changed to, not since another one was installed.
func TestStateSince(t *testing.T) {
	hourAgo := time.Now().Add(-time.Hour).UTC().Truncate(time.Second)
	for name, c := range map[string]struct {
		plan Plan
		kept bool
	}{
		"the same mode": {Plan{Mode: ModeIPTables}, true},
		"another mode":  {Plan{Mode: ModeNFTables}, false},
		"closed":        {Plan{Mode: ModeIPTables, Closed: true}, false},
	} {
		c.plan.RunDir = t.TempDir()
		if err := writeState(c.plan.RunDir, State{Desired: Installed, Mode: ModeIPTables, Since: hourAgo}); err != nil {
			t.Fatal(err)
		}
		_, now := (&router{plan: c.plan}).state(Installed)
		if now.Since.Equal(hourAgo) != c.kept {
			t.Errorf("%s: since %s, want it kept: %t", name, now.Since, c.kept)
		}
	}
}
