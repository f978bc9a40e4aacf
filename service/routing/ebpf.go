package routing

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/bpf"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/nft"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/watch"
)

// ebpfMode is mode ebpf: programs at connect(), and the chains of mode none in the table of mode
// nftables. Rewritten packets come in with the listen address as their destination, so it is the
// interface that tells who may reach it: nobody who comes from an uplink.
type ebpfMode struct {
	*nfTables
	bpf.Pins
}

func openEBPF(p Plan) (*ebpfMode, error) {
	m := &ebpfMode{nfTables: &nfTables{plan: p}, Pins: p.pins(ModeEBPF, bpf.RedirectHooks)}
	return m, m.Usable()
}

// DefaultBPFDir is where programs are pinned, in a directory for each mode.
const DefaultBPFDir = "/sys/fs/bpf/gke-metadata-emulator"

// pins of one mode. What another has pinned is not theirs.
func (p Plan) pins(mode string, hooks []bpf.Hook) bpf.Pins {
	return bpf.Pins{Dir: filepath.Join(p.BPFDir, mode), Root: p.CgroupRoot, Hooks: hooks}
}

const detaching = "detaching an eBPF program"

func (m *ebpfMode) wakes() (c watch.Causes, silent string) {
	return watch.NFTables | watch.EBPF, detaching
}

// rewriting is what the programs have to do here and now.
func (m *ebpfMode) rewriting(s nodeFacts) (r bpf.Rewriting, err error) {
	r = bpf.Rewriting{Server: metadataServer, Listen: m.plan.Listen, HostPods: s.hostPods}
	if r.HostPods {
		r.Spared = bpf.CgroupIDs(m.Root, s.slices)
	}
	r.HostNet, err = bpf.HostNetwork()
	return r, err
}

// survey tells of the programs too, if they are gone.
func (m *ebpfMode) survey(ctx context.Context, s nodeFacts) (faults []error, err error) {
	if faults, err = m.nfTables.survey(ctx, s); err != nil {
		return nil, err
	}
	r, err := m.rewriting(s)
	if err != nil {
		return nil, err
	}
	return append(faults, fault.Flushed(m.Pins.Check(r))...), nil
}

// put begins with the chains, but where DNAT stands: that goes when the programs have taken over,
// and kept other hosts out until then.
func (m *ebpfMode) put(ctx context.Context, s nodeFacts) error {
	r, err := m.rewriting(s)
	if err != nil {
		return err
	}
	before, err := nft.Read()
	if err != nil {
		return err
	}
	programs := func() error { return m.Pins.Install(r) }
	chains := func() error { return m.nfTables.put(ctx, s) }
	steps := []func() error{chains, programs}
	if len(before[0].Rules["prerouting"]) > 0 {
		steps = []func() error{programs, chains}
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	if order := m.Order(); order != "" {
		m.plan.Log.WithField("order", order).Info("routing: programs of others are attached at connect(), too: " +
			"one that comes before ours and sends 169.254.169.254:80 elsewhere has the last word")
	}
	return nil
}

func (m *ebpfMode) check(ctx context.Context, s nodeFacts) []error {
	errs := m.nfTables.check(ctx, s)
	r, err := m.rewriting(s)
	if err != nil {
		return append(errs, err)
	}
	return append(errs, m.Verify(r)...)
}

func (m *ebpfMode) changed() bool { return m.Pins.Changed() || m.nfTables.changed() }

// ebpfText is the chains as commands, and the programs, which no command can type, as comments.
func ebpfText(p Plan, s nodeFacts) (string, error) {
	m := &ebpfMode{nfTables: &nfTables{plan: p}, Pins: p.pins(ModeEBPF, bpf.RedirectHooks)}
	r, err := m.rewriting(s)
	if err != nil {
		return "", err
	}
	chains, err := nftablesText(p, s)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	b.WriteString(strings.Replace(chains, "# rules (IPv4)", "# other hosts are kept out", 1))
	who := "of other network namespaces than this one"
	if r.HostPods {
		who += ", and of processes outside " + strings.Join(s.slices, ", ")
	}
	fmt.Fprintf(
		&b,
		"\n# Programs at %s, pinned below %s.\n# For sockets %s,\n# connect() to %s goes to %s, and getpeername() says "+
			"the former. No command can type them; instruction by instruction:\n",
		m.Root,
		m.Dir,
		who,
		metadataServer,
		p.Listen,
	)
	for _, h := range slices.Backward(m.Hooks) {
		spec, err := r.Spec(h)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&b, "\n# %s:\n", h.Name)
		for line := range strings.Lines(fmt.Sprint(spec.Instructions)) {
			b.WriteString("#" + strings.TrimRight(line, "\n") + "\n")
		}
	}
	return b.String(), nil
}
