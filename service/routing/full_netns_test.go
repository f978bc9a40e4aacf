package routing

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/watch"
)

// fill writes to a directory until its file system is full, of data or of files.
func fill(t *testing.T, dir string, data bool) {
	t.Helper()
	var err error
	if data {
		err = os.WriteFile(filepath.Join(dir, "full"), make([]byte, 1<<20), 0o600)
	}
	for i := 0; err == nil; i++ {
		err = os.WriteFile(filepath.Join(dir, fmt.Sprint("full", i)), nil, 0o600)
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
}

// TestFullRunDirectory: where the run directory's file system is full, of data or of files, remove
// takes everything away all the same and a watcher leaves it so. Where not even the files of before
// are there, remove says what it could not write, and install why it cannot install, with the guard
// up.
func TestFullRunDirectory(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	before := sorted(b.ruleset())
	for name, data := range map[string]bool{"data": true, "files": false} {
		p := b.plan
		p.RunDir = netnstest.MountFull(t)
		b.install(p)
		w := b.watch(p, 100*time.Millisecond)
		fill(t, p.RunDir, data)
		b.remove(p)
		w.until(name+": the watcher obeys", func() bool { return strings.Contains(w.last(), "removed") })
		w.end()
		b.requireEqual(name+": remove", sorted(b.ruleset()), before)
		if s, err := ReadState(p.RunDir); err != nil || s.Desired != Removed || !s.Standing.Good {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
	}

	p := b.plan
	p.RunDir = netnstest.MountFull(t)
	b.install(p)
	for _, file := range []string{"routing.json", "routing.lock"} {
		if err := os.Remove(filepath.Join(p.RunDir, file)); err != nil {
			t.Fatal(err)
		}
	}
	fill(t, p.RunDir, false)
	says := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, errFull) || !strings.Contains(err.Error(), "no space left on device") ||
			!strings.Contains(err.Error(), "df -i "+p.RunDir) {
			t.Errorf("%s: %v", what, err)
		}
	}
	says("remove", b.Do(func() error { return b.router(p).Remove(t.Context()) }))
	b.requireEqual("nothing to write to: remove", sorted(b.ruleset()), before)
	says("install", b.Do(func() error { return b.router(p).Install(t.Context()) }))
	if err := b.Do(func() error { return errors.Join(checkGuard(p, nodeFacts{})...) }); err != nil {
		t.Errorf("install without space: %v", err)
	}
	b.remove(b.plan)
}

// TestRepairNamesAll: what went missing after the look that brought a repair is counted and named
// by that repair, too.
func TestRepairNamesAll(t *testing.T) {
	t.Parallel()
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		b.install(b.plan)
		if err := b.Do(func() error {
			r, err := newRouter(b.plan)
			if err != nil {
				return err
			}
			n, err := r.open(t.Context(), "", false)
			if err != nil {
				return err
			}
			if errs := r.check(t.Context(), n); len(errs) > 0 {
				return errors.Join(errs...)
			}
			b.run("iptables -F; nft 'flush chain ip gke-metadata-emulator prerouting' || true")
			state, err := ReadState(b.plan.RunDir)
			if err != nil {
				return err
			}
			seen := n.check(t.Context(), n.nodeFacts)
			b.run("ip6tables -F; nft 'flush chain ip6 gke-metadata-emulator forward' || true; ip rule del pref 97 prohibit; " +
				"ip address del 169.254.169.252/32 dev lo")
			why := &repair{of: state, why: watch.NFTables, faults: seen, node: n, mode: true}
			if _, err = r.install(t.Context(), why); err != nil {
				return err
			}
			wanted := []string{"ip rule: pref 97 to 169.254.169.254/32", "ip address: 169.254.169.252/32"}
			layers := []string{fault.Rule, fault.Address}
			switch b.plan.Mode {
			case ModeNFTables:
				wanted = append(wanted, "ip6 gke-metadata-emulator forward")
				layers = append(layers, fault.NFTables)
			default:
				wanted = append(wanted, "ip6tables", "-I FORWARD 1")
				layers = append(layers, fault.IPTables, fault.IP6Tables)
			}
			for _, text := range wanted {
				if all := strings.Join(texts(why.faults), "\n"); !strings.Contains(all, text) {
					t.Errorf("%q is not named by %s", text, all)
				}
			}
			after, err := ReadState(b.plan.RunDir)
			for _, layer := range layers {
				if after.Repairs[layer] == nil {
					t.Errorf("%s is not counted: %v", layer, after.Repairs)
				}
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		b.requireOK(b.plan)
	})
}
