package routing

import (
	"context"
	"fmt"
)

// mode is what one way of bringing requests to the emulator has that the others have not: a firewall's rules, or programs, or nothing.
// A value belongs to one node and remembers what stood when check found nothing missing, for changed. All else is written once,
// in router: the desired state and its lock, the guard, addresses and routes, uplinks, reading back, counting.
type mode interface {
	// command is the program by which the kernel is changed, for State; "" where there is none.
	command() string
	// wakes is the cause after which changed is asked. Where the kernel tells nobody of a change, silent says what tells nothing:
	// then changed is asked every pollSilent, and wakes is told as the cause when it said yes.
	wakes() (c causes, silent string)
	// changed says whether anything of the mode's may be other than check found it when it was right. It takes microseconds.
	changed() bool
	// survey looks at all that put depends on, and changes nothing. It refuses what belongs to somebody else (ErrForeign), and
	// returns what of the mode's is not as it should be, as far as the survey saw it.
	survey(ctx context.Context, s surroundings) (faults []error, err error)
	// put makes the mode's part of the Plan stand, closed things before open ones. A survey came before it.
	put(ctx context.Context, s surroundings) error
	// check returns a fault (see missing) for whatever is not as the Plan wants it, and an error for what cannot be read.
	check(ctx context.Context, s surroundings) []error
}

// modes are those that there is a Router for.
var modes = []string{ModeIPTables, ModeNFTables, ModeLoopback, ModeEBPF, ModeNone, ModeObserve}

// openMode gets ready the mode of a checked Plan that is not Closed. command is State's of the last Install, "" if there is none or if it
// is to be chosen anew.
func openMode(ctx context.Context, p Plan, command string) (mode, error) {
	switch p.Mode {
	case ModeIPTables:
		return openIPTables(p, command)
	case ModeNFTables, ModeLoopback, ModeNone:
		return &nfTables{plan: p}, nil
	case ModeEBPF:
		return openEBPF(p)
	case ModeObserve:
		return openObserve(p)
	}
	return nil, fmt.Errorf("routing mode %q cannot be installed", p.Mode)
}

// parts are what modes have in the kernel beside what all share, and how all that any Install can have put there is taken away: without memory
// of the Install, and by any Plan. instead says whether the Plan's mode stands already, and is to do what the part did.
var parts = []struct {
	of     []string // modes
	remove func(ctx context.Context, p Plan, instead bool) error
}{
	{[]string{ModeEBPF}, func(_ context.Context, p Plan, _ bool) error { return p.pins(ModeEBPF, redirectHooks).remove() }},
	{[]string{ModeObserve}, func(_ context.Context, p Plan, _ bool) error { return p.pins(ModeObserve, observeHooks).remove() }},
	{[]string{ModeIPTables}, removeIPTables},
	{[]string{ModeNFTables, ModeLoopback, ModeNone, ModeEBPF}, removeNFTables},
}

// modeText is what put does on a node that has nothing of it yet, as shell commands.
func modeText(p Plan, s surroundings, command string) (string, error) {
	switch p.Mode {
	case ModeIPTables:
		return iptablesText(p, s, command), nil
	case ModeNFTables, ModeLoopback:
		return nftablesText(p, s)
	case ModeNone:
		rules, err := nftablesText(p, s)
		return rules + environmentText(p), err
	case ModeEBPF:
		return ebpfText(p, s)
	case ModeObserve:
		return fmt.Sprintf("\n# Programs at %s, pinned below %s, which count who connects to %s. No command can type them.\n",
			p.CgroupRoot, p.pins(ModeObserve, nil).dir, metadataServer), nil
	}
	return "", nil
}

// node is where a Plan stands, as far as it is known.
type node struct {
	surroundings
	mode
}

// around is what is known of the node's surroundings.
func (n *node) around() (s surroundings) {
	if n != nil {
		s = n.surroundings
	}
	return s
}

// silent says what of the mode tells nobody when it changes, "" if the kernel does.
func (n *node) silent() string {
	if n == nil {
		return ""
	}
	_, silent := n.wakes()
	return silent
}
