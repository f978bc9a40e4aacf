package routing

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
)

// ebpfMode is mode ebpf: programs at connect(), and the doors of mode none in the table of mode
// nftables. Rewritten packets come in with the listen address as their destination, so it is the
// interface that tells who may reach it: nobody who comes from an uplink.
type ebpfMode struct {
	*nfTables
	pins
}

func openEBPF(p Plan) (*ebpfMode, error) {
	m := &ebpfMode{nfTables: &nfTables{plan: p}, pins: p.pins(ModeEBPF, redirectHooks)}
	return m, m.usable()
}

const detaching = "detaching an eBPF program"

func (m *ebpfMode) wakes() (c causes, silent string) { return causeNFTables | causeEBPF, detaching }

// rewriting is what the programs have to do here and now.
func (m *ebpfMode) rewriting(s nodeFacts) (r rewriting, err error) {
	r = rewriting{listen: m.plan.Listen, hostPods: s.hostPods}
	if r.hostPods {
		r.spared = cgroupIDs(m.root, s.slices)
	}
	r.hostNet, err = hostNetwork()
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
	return append(faults, fault.Flushed(m.pins.check(r))...), nil
}

// put begins with the doors, but where DNAT stands: that goes when the programs have taken over,
// and kept other hosts out until then.
func (m *ebpfMode) put(ctx context.Context, s nodeFacts) error {
	r, err := m.rewriting(s)
	if err != nil {
		return err
	}
	before, err := readNFTables()
	if err != nil {
		return err
	}
	programs := func() error { return m.pins.install(r) }
	doors := func() error { return m.nfTables.put(ctx, s) }
	steps := []func() error{doors, programs}
	if len(before[0].rules["prerouting"]) > 0 {
		steps = []func() error{programs, doors}
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	if order := m.order(); order != "" {
		m.plan.Log.WithField("order", order).Info("routing: other people's programs see connect() too: " +
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
	return append(errs, m.verify(r)...)
}

func (m *ebpfMode) changed() bool { return m.pins.changed() || m.nfTables.changed() }

// ebpfText is the doors as commands, and the programs, which no command can type, as comments.
func ebpfText(p Plan, s nodeFacts) (string, error) {
	m := &ebpfMode{nfTables: &nfTables{plan: p}, pins: p.pins(ModeEBPF, redirectHooks)}
	r, err := m.rewriting(s)
	if err != nil {
		return "", err
	}
	doors, err := nftablesText(p, s)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	b.WriteString(strings.Replace(doors, "# the way to the emulator", "# other hosts are kept out", 1))
	who := "of other network namespaces than this one"
	if r.hostPods {
		who += ", and of processes outside " + strings.Join(s.slices, ", ")
	}
	fmt.Fprintf(
		&b,
		"\n# Programs at %s, pinned below %s.\n# For sockets %s,\n# connect() to %s goes to %s, and getpeername() says the former. No command can type them; instruction by instruction:\n",
		m.root,
		m.dir,
		who,
		metadataServer,
		p.Listen,
	)
	for _, h := range slices.Backward(m.hooks) {
		spec, err := r.spec(h)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&b, "\n# %s:\n", h.name)
		for line := range strings.Lines(fmt.Sprint(spec.Instructions)) {
			b.WriteString("#" + strings.TrimRight(line, "\n") + "\n")
		}
	}
	return b.String(), nil
}
