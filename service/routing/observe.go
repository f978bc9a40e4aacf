package routing

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/bpf"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/watch"
)

// observeMode is mode observe (U-36): mode ebpf's programs count who connects to
// 169.254.169.254:80, by cgroup, and change nothing. Of what all modes share there is the listen
// address only, so that the service finds itself; no guard.
type observeMode struct {
	bpf.Pins
	plan Plan
}

// Observation is how often the processes of one cgroup connected to the metadata server since mode
// observe was installed.
type Observation struct {
	Cgroup      string `json:"cgroup"`                // from the root of the hierarchy; "" if it is gone
	HostNetwork bool   `json:"hostNetwork,omitempty"` // from the host's network namespace, outside the host's own slices
	Connects    uint64 `json:"connects"`
}

// observedAtMost bounds the kernel's table: of more cgroups than that the ones that asked longest
// ago are forgotten.
const observedAtMost = 4096

// publishedAtMost bounds the file of the state. All of them are Observed's.
const publishedAtMost = 200

// count is a key of the table, as the programs write it.
type count struct{ Cgroup, Network uint64 }

func openObserve(p Plan) (*observeMode, error) {
	m := &observeMode{Pins: p.pins(ModeObserve, bpf.ObserveHooks), plan: p}
	return m, m.Usable()
}

func (m *observeMode) command() string { return "" }
func (m *observeMode) wakes() (c watch.Causes, silent string) {
	return watch.EBPF, detaching
}
func (m *observeMode) redirected(netobj.Family) *uint64 { return nil }
func (m *observeMode) table() string                    { return filepath.Join(m.Dir, "counts") }

func (m *observeMode) changed() bool { return m.Pins.Changed() }

// counting is what the programs do here; without the table, which is nil, they cannot.
func (m *observeMode) counting(s nodeFacts, table *ebpf.Map) (r bpf.Rewriting, err error) {
	r = bpf.Rewriting{Server: metadataServer, Counts: table, HostPods: len(s.slices) > 0,
		Spared: bpf.CgroupIDs(m.Root, s.slices)}
	r.HostNet, err = bpf.HostNetwork()
	return r, err
}

func (m *observeMode) survey(ctx context.Context, s nodeFacts) (faults []error, err error) {
	return fault.Flushed(m.check(ctx, s)), nil
}

func (m *observeMode) put(_ context.Context, s nodeFacts) error {
	table, err := ebpf.LoadPinnedMap(m.table(), nil)
	if errors.Is(err, fs.ErrNotExist) {
		table, err = m.newTable()
	}
	if err != nil {
		return fmt.Errorf("table of mode observe: %w", bpf.Permission(err))
	}
	defer table.Close()
	r, err := m.counting(s, table)
	if err != nil {
		return err
	}
	return m.Install(r)
}

func (m *observeMode) newTable() (*ebpf.Map, error) {
	if err := os.MkdirAll(m.Dir, 0o700); err != nil {
		return nil, err
	}
	table, err := ebpf.NewMap(&ebpf.MapSpec{Name: "gme_counts", Type: ebpf.LRUHash,
		KeySize: uint32(binary.Size(count{})), ValueSize: 8, MaxEntries: observedAtMost})
	if err != nil {
		return nil, err
	}
	if err := table.Pin(m.table()); err != nil {
		return nil, errors.Join(err, table.Close())
	}
	return table, nil
}

func (m *observeMode) check(_ context.Context, s nodeFacts) []error {
	m.Verified = nil
	table, err := ebpf.LoadPinnedMap(m.table(), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return []error{fault.Missing(fault.EBPF, "eBPF table, pinned as %s", m.table())}
	}
	if err != nil {
		return []error{fmt.Errorf("%s: %w", m.table(), bpf.Permission(err))}
	}
	defer table.Close()
	r, err := m.counting(s, table)
	if err != nil {
		return []error{err}
	}
	return m.Verify(r)
}

// Observed reads what mode observe has counted, the most first. It needs the right to read the
// kernel's table.
func Observed(p Plan) ([]Observation, error) {
	p, err := p.checked()
	if err != nil {
		return nil, err
	}
	m, err := openObserve(p)
	if err != nil {
		return nil, err
	}
	return m.observed()
}

func (m *observeMode) observed() (all []Observation, err error) {
	table, err := ebpf.LoadPinnedMap(m.table(), &ebpf.LoadPinOptions{ReadOnly: true})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("nothing is counted: %w: mode %s is not installed", fault.ErrMissing, ModeObserve)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", m.table(), bpf.Permission(err))
	}
	defer table.Close()
	host, err := bpf.HostNetwork()
	if err != nil {
		return nil, err
	}
	names := cgroupNames(m.Root)
	found := map[Observation]uint64{} // a pod has several network namespaces if it makes them
	var key count
	var times uint64
	for entries := table.Iterate(); entries.Next(&key, &times); err = entries.Err() {
		found[Observation{Cgroup: names[key.Cgroup], HostNetwork: key.Network == host}] += times
	}
	// Aborted: the table changed too fast, and what was read is good.
	if err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return nil, err
	}
	for o, times := range found {
		o.Connects = times
		all = append(all, o)
	}
	slices.SortFunc(all, func(a, b Observation) int {
		return cmp.Or(cmp.Compare(b.Connects, a.Connects), strings.Compare(a.Cgroup, b.Cgroup))
	})
	return all, nil
}

// cgroupNames are the paths of all cgroups below the root, by id.
func cgroupNames(root string) map[uint64]string {
	names := map[uint64]string{}
	_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			var s unix.Stat_t
			if unix.Stat(path, &s) == nil {
				names[s.Ino] = "/" + strings.TrimPrefix(strings.TrimPrefix(path, root), "/")
			}
		}
		return nil // one that is gone meanwhile has no name
	})
	return names
}
