package routing

import (
	"context"
	"fmt"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
)

// ebpfMode is mode ebpf: programs at connect(), and a guard in the chains of mode iptables. Rewritten packets come in with the listen address as
// their destination, so it is the interface that tells who may reach it: nobody who comes from an uplink.
type ebpfMode struct {
	*iptables
	pins
	good [][]ebpf.ProgramID // by hook, what was attached when all was last found right; nil: not known
}

func openEBPF(ctx context.Context, p Plan, command string) (*ebpfMode, error) {
	m := &ebpfMode{pins: p.pins(ModeEBPF, redirectHooks)}
	if err := m.usable(); err != nil {
		return nil, err
	}
	var err error
	m.iptables, err = openIPTables(ctx, p, command)
	return m, err
}

func (m *ebpfMode) wakes() (c causes, silent string) {
	c, legacy := m.iptables.wakes()
	if legacy != "" {
		legacy += ", and "
	}
	return c | causeEBPF, legacy + "whoever detaches an eBPF program"
}

func (m *ebpfMode) forget() {
	m.good = nil
	m.iptables.forget()
}

// rewriting is what the programs have to do here and now.
func (m *ebpfMode) rewriting(s surroundings) (r rewriting, err error) {
	r = rewriting{listen: m.plan.Listen, hostPods: s.hostPods}
	if r.hostPods {
		for _, slice := range s.slices {
			r.spared = append(r.spared, cgroupID(filepath.Join(m.root, slice)))
		}
	}
	r.hostNet, err = hostNetwork()
	return r, err
}

// survey tells of the programs too, if they are gone.
func (m *ebpfMode) survey(ctx context.Context, s surroundings) (flushed []string, err error) {
	if flushed, err = m.iptables.survey(ctx, s); err != nil {
		return nil, err
	}
	r, err := m.rewriting(s)
	if err != nil {
		return nil, err
	}
	if len(layers(m.pins.check(r))) > 0 {
		flushed = append(flushed, layerEBPF)
	}
	return flushed, nil
}

// put changes from DNAT to programs without a gap: what redirects goes when the programs stand.
func (m *ebpfMode) put(ctx context.Context, s surroundings) error {
	r, err := m.rewriting(s)
	if err != nil {
		return err
	}
	wanted, rest := func(c chain) bool { return !c.absent }, func(c chain) bool { return c.absent }
	if err := m.putChains(ctx, s, wanted); err != nil {
		return err
	}
	if err := m.pins.install(r); err != nil {
		return err
	}
	if err := m.putChains(ctx, s, rest); err != nil {
		return err
	}
	m.clean(ctx, s)
	return nil
}

func (m *ebpfMode) check(ctx context.Context, s surroundings) []error {
	errs := m.iptables.check(ctx, s)
	m.good = nil
	r, err := m.rewriting(s)
	if err != nil {
		return append(errs, err)
	}
	before, err := m.allAttached()
	if err != nil {
		return append(errs, err)
	}
	found := m.pins.check(r)
	if len(found) == 0 {
		m.good = before
	}
	return append(errs, found...)
}

// changed asks what is attached, which takes some microseconds; the kernel tells nobody.
func (m *ebpfMode) changed() bool {
	if m.good == nil {
		return true
	}
	now, err := m.allAttached()
	return err != nil || !reflect.DeepEqual(now, m.good) || m.iptables.changed()
}

// ebpfText is the guard as commands, and the programs, which no command can type, as comments.
func ebpfText(p Plan, s surroundings, command string) (string, error) {
	m := &ebpfMode{iptables: &iptables{plan: p}, pins: p.pins(ModeEBPF, redirectHooks)}
	r, err := m.rewriting(s)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	b.WriteString(iptablesText(p, s, command))
	who := "of other network namespaces than this one"
	if r.hostPods {
		who += ", and of processes outside " + strings.Join(s.slices, ", ")
	}
	fmt.Fprintf(&b, "\n# Programs at %s, pinned below %s.\n# For sockets %s,\n# connect() to %s goes to %s, and getpeername() says the former. No command can type them; instruction by instruction:\n",
		m.root, m.dir, who, metadataServer, p.Listen)
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
