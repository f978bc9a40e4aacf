package routing

import (
	"context"
	"fmt"
	"slices"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/bpf"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/watch"
)

// mode is what one way of bringing requests to the emulator has that the others have not: a
// firewall's rules, or programs, or nothing. A value belongs to one node and remembers what stood
// when check found nothing missing, for changed. All else is written once, in router: the desired
// state and its lock, the guard, addresses and routes, uplinks, reading back, counting.
type mode interface {
	// command is the program by which the kernel is changed, for State; "" where there is none.
	command() string
	// wakes is the cause that the kernel tells when something of the mode's may have changed. silent
	// names what changes without an event, "" if nothing does: then changed is asked every
	// pollSilent, and c is the cause that is reported.
	wakes() (c watch.Causes, silent string)
	// changed says whether anything of the mode's may be other than check found it when it was
	// right. It takes microseconds.
	changed() bool
	// survey looks at all that put depends on, and changes nothing. It refuses what belongs to
	// somebody else (ErrForeign), and returns what of the mode's is not as it should be, as far as
	// the survey saw it.
	survey(ctx context.Context, s nodeFacts) (faults []error, err error)
	// put makes the mode's part of the Plan stand, closed things before open ones. A survey came
	// before it.
	put(ctx context.Context, s nodeFacts) error
	// redirected is how many connections the rule that redirects pods has counted in one family;
	// nil: that cannot be read, or the mode counts none.
	redirected(netobj.Family) *uint64
	// check returns a fault (see missing) for whatever is not as the Plan wants it, and an error
	// for what cannot be read.
	check(ctx context.Context, s nodeFacts) []error
}

// traits are what shared code has to know of a mode. A new mode has its row here, and in this
// package its case in openMode, modeText and removers. CONTRIBUTING.md lists the rest.
type traits struct {
	mode string

	dnat      bool // conntrack translates the destination: chains of type nat, IPv6, the listen address's route
	redirects bool // by whatever means the emulator listens elsewhere than pods ask; host pods can be taken, too
	observes  bool // the mode counts who connects and changes nothing: it has no guard, and needs no uplinks

	localServer   bool // policy rules make the metadata server's address this node's own for pods; we listen there
	anyListener   bool // pods are told where the emulator listens, so that it may be at any address
	blindToLinks  bool // the mode sees who connects, and not by which interface
	firstTargetCT bool // whether a packet is tracked is said by the first rule that it meets
	runsIPTables  bool // the kernel is changed by commands
	readsQueries  bool // rules see for which name a DNS query asks
}

var modeTraits = []traits{
	{mode: ModeIPTables, dnat: true, redirects: true, firstTargetCT: true, runsIPTables: true, readsQueries: true},
	{mode: ModeNFTables, dnat: true, redirects: true, readsQueries: true},
	{mode: ModeLoopback, localServer: true},
	{mode: ModeEBPF, redirects: true, blindToLinks: true},
	{mode: ModeNone, anyListener: true},
	{mode: ModeObserve, observes: true},
}

// modes are those that there is a Router for.
var modes = func() (names []string) {
	for _, t := range modeTraits {
		names = append(names, t.mode)
	}
	return names
}()

// traits are those of the Plan's mode; none where that is unknown or to be found out.
func (p Plan) traits() traits {
	if i := slices.IndexFunc(modeTraits, func(t traits) bool { return t.mode == p.Mode }); i >= 0 {
		return modeTraits[i]
	}
	return traits{}
}

// DNATs reports whether conntrack translates the destination in this mode: it needs netfilter, and
// serves IPv6.
func DNATs(mode string) bool { return Plan{Mode: mode}.dnats() }

func (p Plan) redirects() bool { return p.traits().redirects }
func (p Plan) dnats() bool     { return p.traits().dnat }

// openMode gets ready the mode of a checked Plan that is not Closed. command is State's of the last
// Install, "" if there is none or if it is to be chosen anew.
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

// removers take away what modes have in the kernel beside what all share: all that any Install can
// have put there, without memory of it, and by any Plan. instead says whether the Plan's mode
// stands already, and is to do what was done.
var removers = []struct {
	// modes that have it: a change to one of them leaves it, a change to any other takes it away
	keptBy []string
	remove func(ctx context.Context, p Plan, instead bool) error
}{
	{[]string{ModeEBPF}, func(_ context.Context, p Plan, _ bool) error {
		return p.pins(ModeEBPF, bpf.RedirectHooks).Remove()
	}},
	{[]string{ModeObserve}, func(_ context.Context, p Plan, _ bool) error {
		return p.pins(ModeObserve, bpf.ObserveHooks).Remove()
	}},
	{[]string{ModeIPTables}, removeIPTables},
	{[]string{ModeNFTables, ModeLoopback, ModeNone, ModeEBPF}, removeNFTables},
}

// modeText is what put does on a node that has nothing of it yet, as shell commands.
func modeText(p Plan, s nodeFacts, command string) (string, error) {
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
			p.CgroupRoot, p.pins(ModeObserve, nil).Dir, metadataServer), nil
	}
	return "", nil
}

// node is where a Plan stands, as far as it is known.
type node struct {
	nodeFacts
	mode
}

// around is what is known of the node.
func (n *node) around() (s nodeFacts) {
	if n != nil {
		s = n.nodeFacts
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
