package routing

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/nft"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/probe"
)

// Examination is what is to be seen of a Plan on this node, by whoever looks. Nothing is changed by
// it.
type Examination struct {
	Rules   error    // what Check says; ErrPermission is wrapped where the firewall cannot be read
	Guard   []string // faults of the guard alone, which needs no privilege to be read
	Bypass  []string // policy rules of others that come before the guard and that it cannot be put before
	Untrack []string // chains of others that may keep pods from being redirected
	Uplinks []Uplink
	Remarks []string // on interfaces that an operator should look at

	Local      bool       // the listen address is the node's own, or will be
	Holder     ListenedBy // who listens there
	Holder6    ListenedBy // who listens where requests by IPv6 are sent, if they are
	Queries    ListenedBy // who has UDP of the listen address, where DNS queries are redirected to
	Queries6   ListenedBy // the same of IPv6
	CgroupV2   string     // where the hierarchy is mounted; "" = it is not
	HostSlices []string   // the host's own cgroups that exist
	IPv6       bool       // the node has IPv6

	Redirected  *uint64  // connections that the redirecting rule has counted; nil: unknown, or the mode counts none
	Redirected6 *uint64  // the same of IPv6; nil as well where its requests are not redirected
	Policies    []string // base chains on the way to the emulator with policy drop; nil without the privilege
	Facts       Facts
}

// Uplink is an interface from which no pod of this node speaks, and why it is taken for one.
type Uplink struct{ Name, Why string }

// Examine looks at the node in the network namespace of the calling thread. state is what was
// installed last.
func Examine(ctx context.Context, p Plan, state State) Examination {
	p, err := p.checked()
	x := Examination{Rules: err, Facts: ReadFacts(ctx), IPv6: netobj.HaveIPv6(), CgroupV2: cgroup2(),
		HostSlices: existing(cgroup2(), HostCgroups())}
	r := &router{plan: p, hostCgroups: HostCgroups()}
	if err == nil {
		x.Rules = r.Check(ctx)
	}
	if in, err := r.inForce(state); err == nil {
		r, p = in, in.plan
	}
	s, _ := r.look(false) // what it could not read, whyUplinks says
	for _, err := range checkGuard(p, s) {
		x.Guard = append(x.Guard, strings.TrimPrefix(err.Error(), fault.ErrMissing.Error()+": "))
	}
	x.Bypass, x.Untrack = bypasses(p, s), untracking(p)
	x.Uplinks, x.Remarks = whyUplinks(p)
	x.Holder = Listener(p.Listen) // of the closed guard's too: the socket unit listens there at once
	if p.guardAlone() {
		return x
	}
	if have, err := netobj.Read(); err == nil {
		x.Local = isLocal(p.Listen.Addr(), have) || p.traits().localServer // there it is for pods alone
	}
	x.Queries = QueryListener(p.Listen)
	served := []netobj.Family{netobj.IPv4}
	if p.Listen6.IsValid() {
		served = netobj.Families
		x.Holder6, x.Queries6 = Listener(p.Listen6), QueryListener(p.Listen6)
	}
	if m, err := openMode(ctx, p, state.Command); err == nil {
		x.Redirected = m.redirected(netobj.IPv4)
		if slices.Contains(served, netobj.IPv6) {
			x.Redirected6 = m.redirected(netobj.IPv6)
		}
	}
	x.Policies = dropPolicies(ctx, x.Local, served)
	return x
}

func whyUplinks(p Plan) (found []Uplink, remarks []string) {
	if len(p.Uplinks) > 0 {
		for _, name := range p.Uplinks {
			found = append(found, Uplink{name, "routing.uplinks"})
		}
		return found, nil
	}
	devices, err := readDevices()
	if err != nil {
		return nil, []string{err.Error()}
	}
	names, remarks := uplinks(devices)
	for _, name := range names {
		i := slices.IndexFunc(devices, func(d device) bool { return d.name == name })
		found = append(found, Uplink{name, devices[i].why()})
	}
	return found, remarks
}

// why says what makes an uplink of a device that is one.
func (d device) why() string {
	switch {
	case d.defaultRoute:
		return "default route"
	case d.nodeAddress:
		return "the node's address"
	case d.kind == "":
		return "hardware"
	}
	return d.kind
}

// dropPolicies names the base chains, of nf_tables (those of iptables-nft among them) and of legacy
// iptables, that drop by their policy what goes to an emulator of this node, or is forwarded to one
// elsewhere, in the families that are served.
func dropPolicies(ctx context.Context, local bool, served []netobj.Family) (names []string) {
	hook, legacy := uint32(unix.NF_INET_FORWARD), "FORWARD"
	if local {
		hook, legacy = unix.NF_INET_LOCAL_IN, "INPUT"
	}
	chains, err := nft.Ask(unix.NFT_MSG_GETCHAIN, unix.NLM_F_DUMP, unix.NFT_MSG_NEWCHAIN, unix.AF_UNSPEC)
	if err != nil {
		return nil
	}
	names = []string{}
	for _, c := range chains {
		policy := nft.Attribute(c, unix.NFTA_CHAIN_POLICY)
		family := nft.FamilyWord(c)
		if len(policy) != 4 || nft.Uint32(policy) != 0 || family != "ip" && family != "inet" &&
			(family != "ip6" || !slices.Contains(served, netobj.IPv6)) {
			continue
		}
		if n := nft.Within(nft.Attribute(c, unix.NFTA_CHAIN_HOOK), unix.NFTA_HOOK_HOOKNUM); len(n) != 4 ||
			nft.Uint32(n) != hook {
			continue
		}
		table, name := nft.Attribute(c, unix.NFTA_CHAIN_TABLE), nft.Attribute(c, unix.NFTA_CHAIN_NAME)
		names = append(names, fmt.Sprintf("%s %s %s", family, unix.ByteSliceToString(table), unix.ByteSliceToString(name)))
	}
	drops := map[string]uint64{}
	for _, f := range served {
		maps.Copy(drops, probe.LegacyDrops(ctx, f))
	}
	for name := range drops {
		if strings.Contains(name, "tables chain "+legacy+" ") && strings.HasSuffix(name, " (policy DROP)") {
			names = append(names, strings.TrimSuffix(name, " (policy DROP)"))
		}
	}
	slices.Sort(names)
	return names
}

// Faults are the lines of what Check said, without the word that they all begin with.
func Faults(err error) (lines []string) {
	if err == nil {
		return nil
	}
	for line := range strings.SplitSeq(err.Error(), "\n") {
		lines = append(lines, strings.TrimPrefix(line, fault.ErrMissing.Error()+": "))
	}
	return lines
}

// NotPermitted says whether the error is that of a process without the privilege.
func NotPermitted(err error) bool {
	return errors.Is(err, fault.ErrPermission) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES)
}

// MetadataServer is where clients send their requests.
func MetadataServer() netip.AddrPort { return metadataServer }

// MetadataServer6 is where they do by IPv6 (H-24).
func MetadataServer6() netip.AddrPort { return metadataServer6 }
