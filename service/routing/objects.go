package routing

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
)

// What all modes share in the kernel are objects of package netobj: the guard's policy rules
// (guard.go), and what makes the emulator's address this node's own. Whose an object is, its marks
// say, so that it can be removed without memory.
//
//	inet 169.254.169.252/32 scope host lo:gme                           the listen address, if nobody has it
//	local fd20:ce::252 dev lo table local proto 252                     the same of IPv6
//	169.254.169.254 dev lo proto kernel scope link src 169.254.169.252  where the node has no route there
//	local 169.254.169.254 dev lo table 988 proto kernel                 mode loopback
//	gme0: <BROADCAST,NOARP,UP,LOWER_UP> … alias gke-metadata-emulator   mode loopback with a link, if there is none
//	inet 169.254.169.254/32 scope global gme0:gme                       of that name
//
// IPv6 addresses have no labels, and what marks them (IFA_PROTO) came with Linux 5.18: so there it
// is a route, which every kernel marks. No source address is chosen from it either, as one might be
// from an address on lo of a node that has no other.
//
// Mode loopback is for networks whose data path bypasses netfilter's DNAT. For Cilium with BPF host
// routing it needs the link: its programs hand to the node's own stack only what is sent to an
// address of one of its links, lo excepted. Then the metadata server's address is the node's own
// for everybody and for every port: the node's daemons get no other answer than ours, and a name
// server of the cloud's at that address is out of reach. An address of scope host would be passed
// over too.
const (
	loopbackLabel  = "lo" + linkLabelEnd
	linkLabelEnd   = ":gme"
	linkAlias      = "gke-metadata-emulator"
	listenProtocol = 252
)

// network6 is Google's for metadata servers: an address in it needs no network, so it is ours to
// make this node's.
var network6 = netip.MustParsePrefix("fd20:ce::/64")

// serverPrefix is the metadata server's address alone.
var serverPrefix = netobj.Host(metadataServer.Addr())

// loopbackRoute is mode loopback's.
var loopbackRoute = netobj.Route{Dst: serverPrefix, Type: unix.RTN_LOCAL, Loopback: true, Table: ourTable,
	Scope: unix.RT_SCOPE_HOST, Protocol: unix.RTPROT_KERNEL}

// metadataRoute is that of a node without one to the metadata server: connect() would fail before
// nat OUTPUT sees a packet. The source is given, since a node without any IPv4 address of its own
// has none to choose; an emulator elsewhere answers to the node's own address.
func metadataRoute(source netip.Addr) netobj.Route {
	return netobj.Route{Dst: serverPrefix, Type: unix.RTN_UNICAST, Loopback: true, Table: unix.RT_TABLE_MAIN,
		Scope: unix.RT_SCOPE_LINK, Protocol: unix.RTPROT_KERNEL, Src: source}
}

// listenObject makes the address this node's own; nil: it is not ours to do so. One that needs no
// network is. Any other that is not local lives elsewhere: in another namespace, a container or a
// machine of the node.
func listenObject(a netip.Addr) netobj.Object {
	switch {
	case a.Is4() && a.IsLinkLocalUnicast() && a != metadataServer.Addr():
		return netobj.Address{Prefix: netobj.Host(a), Dev: "lo", Scope: unix.RT_SCOPE_HOST, Label: loopbackLabel}
	case network6.Contains(a):
		return netobj.Route{Dst: netobj.Host(a), Type: unix.RTN_LOCAL, Loopback: true, Table: unix.RT_TABLE_LOCAL,
			Protocol: listenProtocol}
	}
	return nil
}

// Makes reports whether Install makes the address this node's own, if the node does not have it:
// the address that the emulator listens at.
func (p Plan) Makes(listen netip.Addr) bool {
	return listenObject(listen) != nil || p.traits().localServer && listen == metadataServer.Addr()
}

// needsListenObject says whether the address is to be made this node's own by us.
func needsListenObject(a netip.Addr, have netobj.Snapshot) bool {
	o := listenObject(a)
	return o != nil && (have.Has(o) || !have.Local(a))
}

// linkAddress is what makes the metadata server's address everybody's.
func linkAddress(link string) netobj.Address {
	return netobj.Address{Prefix: serverPrefix, Dev: link, Label: link + linkLabelEnd}
}

// ownLink is the link that is made where there is none of that name.
func ownLink(name string) netobj.Link {
	return netobj.Link{Name: name, Kind: "dummy", Alias: linkAlias, Up: true}
}

// ours says whether any Install can have made the object.
func ours(o netobj.Object) bool {
	switch o := o.(type) {
	case netobj.Rule:
		return ourRule(o)
	case netobj.Address:
		return o.Label == loopbackLabel || strings.HasSuffix(o.Label, linkLabelEnd) && o.Prefix == serverPrefix
	case netobj.Link:
		return o.Kind == "dummy" && o.Alias == linkAlias
	case netobj.Route:
		listens := o.Protocol == listenProtocol && o.Table == unix.RT_TABLE_LOCAL && o.Type == unix.RTN_LOCAL &&
			o.Dst.Addr().Is6() && o.Dst.IsSingleIP()
		return listens || o == loopbackRoute || o == metadataRoute(o.Src)
	}
	return false
}

// desiredObjects lists the objects of the Plan on this node, in the order in which to add them.
func desiredObjects(p Plan, s nodeFacts, have netobj.Snapshot) (all []netobj.Object) {
	listen := p.Listen.Addr()
	switch {
	case p.guardAlone():
	case p.traits().localServer:
		all = append(all, loopbackRoute)
		if p.Link != "" {
			link := ownLink(p.Link)
			if l, exists := have.Link(p.Link); exists {
				link.Kind, link.Alias = l.Kind, l.Alias // it is used as it is, and stays when we go
			}
			all = append(all, link, linkAddress(p.Link))
		}
	case listen.Is4() && needsListenObject(listen, have):
		all = append(all, listenObject(listen))
	}
	for _, g := range guards(p, s, have) {
		all = append(all, netobj.Objects(g.want)...)
	}
	if p.guardAlone() {
		return all
	}
	if a := s.listen6.Addr(); needsListenObject(a, have) {
		all = append(all, listenObject(a))
	}
	if needsRoute(p, s) && !routed(have) {
		source := netip.Addr{}
		if needsListenObject(listen, have) || have.Local(listen) {
			source = listen
		}
		all = append(all, metadataRoute(source))
	}
	return all
}

// needsRoute says whether there is to be a route to the metadata server. Only what this host sends
// needs it, so it is there only where pods on the host network are redirected, and only as long as
// table main has no other: it would take the real server away from the node's daemons. Programs see
// connect() before it asks for a route.
func needsRoute(p Plan, s nodeFacts) bool { return s.hostPods && p.dnats() }

// routed says whether somebody else has a route there.
func routed(have netobj.Snapshot) bool {
	return slices.ContainsFunc(have.Routes(unix.RT_TABLE_MAIN, metadataServer.Addr()), func(r netobj.Route) bool {
		return r.Type == unix.RTN_UNICAST && !ours(r)
	})
}

// selection picks some of the objects.
type selection func(netobj.Object) bool

func everything(netobj.Object) bool { return true }

func onlyRules(o netobj.Object) bool { _, is := o.(netobj.Rule); return is }

// closedOnes are those that stand before the mode's part does. The route of R-07 comes last: as
// long as nothing redirects, a connect() that fails at once is better than one that waits.
func closedOnes(o netobj.Object) bool {
	r, is := o.(netobj.Route)
	return !is || r.Type == unix.RTN_LOCAL
}

// onLinks are those that let other hosts and the node itself in.
func onLinks(o netobj.Object) bool {
	_, link := o.(netobj.Link)
	a, address := o.(netobj.Address)
	return link || address && a.Label != loopbackLabel
}

// diffObjects reads what there is, and compares the selected objects.
func diffObjects(p Plan, s nodeFacts, of selection) (absent, surplus []netobj.Object, err error) {
	have, err := netobj.Read(p.Link)
	absent, surplus = netobj.Diff(desiredObjects(p, s, have), have, ours)
	// Where not all could be read the rules are put up: closed, whatever else is not to be had.
	others := func(o netobj.Object) bool { return !of(o) || err != nil && !onlyRules(o) }
	return slices.DeleteFunc(absent, others), slices.DeleteFunc(surplus, others), err
}

// addObjects adds what is missing of the selected objects.
func addObjects(p Plan, s nodeFacts, of selection) error {
	absent, _, err := diffObjects(p, s, of)
	return errors.Join(err, addAll(absent))
}

// addAll goes on after a failure, but not with objects of the kind, nor with the address of a link
// that failed.
func addAll(objects []netobj.Object) error {
	var errs []error
	failed := map[string]bool{}
	for _, o := range objects {
		kind := o.Command()
		if onLinks(o) {
			kind = netobj.Link{}.Command()
		}
		if failed[kind] {
			continue
		}
		if err := netobj.Add(o); err != nil {
			failed[kind] = true
			errs = append(errs, fmt.Errorf("%s add %s: %w", o.Command(), o, fault.Permission(err)))
		}
	}
	return errors.Join(errs...)
}

// addClosed adds what stands before the mode's part does. Rules of the guard that are not wanted
// any more have to go before mode loopback's can serve; those of mode loopback stay until another
// mode's part stands, and go in trimObjects.
func addClosed(p Plan, s nodeFacts) error {
	err := addObjects(p, s, closedOnes)
	if err == nil && p.traits().localServer {
		err = trimObjects(p, s, onlyRules)
	}
	return err
}

// trimObjects deletes what of the selected objects is not wanted, last of all that Install does. As
// long as rules, or conntrack by rules of before, lead to an address, it has to be this node's:
// else the packets are forwarded, and a connect() fails by what a router says of them. What others
// do meanwhile may have the kernel delete another one of ours: so what is left is looked at again.
func trimObjects(p Plan, s nodeFacts, of selection) error {
	for range 5 {
		absent, surplus, err := diffObjects(p, s, of)
		errs := []error{err, addAll(absent)}
		for _, o := range surplus {
			if !onLinks(o) { // that address stays this node's for those who were served there
				resetAt(o)
			}
			if err := netobj.Delete(o); err != nil {
				errs = append(errs, fmt.Errorf("%s del %s: %w", o.Command(), o, fault.Permission(err)))
			}
		}
		if err := errors.Join(errs...); err != nil || len(surplus) == 0 {
			return err
		}
	}
	return nil
}

// checkGuard names what of the guard is not there. Rules of ours beside it are no fault here: those
// of a good configuration serve beside a closed guard, and where the node is not known,
// neither is all that is wanted.
func checkGuard(p Plan, s nodeFacts) []error {
	have, err := netobj.Read()
	if err != nil {
		return []error{err}
	}
	return guardFaults(guards(p, s, have))
}

// checkObjects names what is not as the Plan wants it. A rule too many is a fault too: it may come
// before the others, and refuse what they let through. It is named where the guard has no other.
func checkObjects(p Plan, s nodeFacts) (errs []error) {
	have, err := netobj.Read(p.Link)
	if err != nil {
		return []error{err}
	}
	errs = guardFaults(guards(p, s, have))
	whole := len(errs) == 0
	absent, surplus := netobj.Diff(desiredObjects(p, s, have), have, ours)
	for _, o := range absent {
		if !onlyRules(o) {
			errs = append(errs, fault.Missing(layerOf(o), "%s: %s", o.Command(), o))
		}
	}
	for _, o := range surplus {
		if whole || !onlyRules(o) {
			errs = append(errs, fault.Missing(layerOf(o), "%s: %s should not be there any more", o.Command(), o))
		}
	}
	return errs
}

func guardFaults(both []guard) (errs []error) {
	for _, g := range both {
		errs = append(errs, g.faults()...)
	}
	return errs
}

func layerOf(o netobj.Object) string {
	switch o.(type) {
	case netobj.Rule:
		return fault.Rule
	case netobj.Route:
		return fault.Route
	}
	return fault.Address
}

// isLocal says whether the node takes packets to the address as its own, or will by us.
func isLocal(a netip.Addr, have netobj.Snapshot) bool {
	return have.Local(a) || needsListenObject(a, have)
}

// foreignAddress returns an error where the metadata server's address is this node's own already,
// and not by us.
func foreignAddress(have netobj.Snapshot) error {
	if !have.Local(metadataServer.Addr()) || slices.ContainsFunc(have, func(o netobj.Object) bool {
		a, is := o.(netobj.Address)
		return is && ours(a) && a.Label != loopbackLabel
	}) {
		return nil
	}
	return fmt.Errorf("%s %w: it is an address of this node, as on GKE, or with another metadata server; "+
		"remove that first", metadataServer.Addr(), fault.ErrForeign)
}

// resetListeners ends what is open at all addresses that Install made this node's.
func resetListeners() {
	have, _ := netobj.Read()
	for _, o := range have {
		if ours(o) && !onLinks(o) && o != netobj.Object(loopbackRoute) {
			resetAt(o)
		}
	}
}

// resetAt ends what this node has open at the address that the object makes its own. Without the
// address the kernel sends nothing for a socket, not even that it was closed: a client whose
// request was taken in, and be it by the backlog alone, would wait for the answer until its own
// keepalive finds out. It is done as well as can be: a kernel without CONFIG_INET_DIAG_DESTROY
// leaves clients to that.
func resetAt(o netobj.Object) {
	var at netip.Addr
	switch o := o.(type) {
	case netobj.Address:
		at = o.Prefix.Addr()
	case netobj.Route:
		if o.Type != unix.RTN_LOCAL {
			return
		}
		at = o.Dst.Addr()
	default:
		return
	}
	family := uint8(netobj.FamilyOf(at))
	sockets, err := netlink.SocketDiagTCP(family)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return
	}
	for _, s := range sockets {
		if s.ID.Source.Equal(at.AsSlice()) && s.State != netlink.TCP_LISTEN && s.State != netlink.TCP_TIME_WAIT {
			_ = resetSocket(family, s.ID)
		}
	}
}

// resetSocket ends the very socket that was listed. Without its cookie, which netlink v1.3.1's
// SocketDestroy does not send, the kernel looks for whoever takes packets of such a connection:
// where that was closed meanwhile it is the listener, and the service with it.
func resetSocket(family uint8, id netlink.SocketID) error {
	b := make([]byte, 56) // struct inet_diag_req_v2
	b[0], b[1] = family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(b[4:], 1<<32-1) // whatever its state
	binary.BigEndian.PutUint16(b[8:], id.SourcePort)
	binary.BigEndian.PutUint16(b[10:], id.DestinationPort)
	source, destination := id.Source, id.Destination
	if family == unix.AF_INET {
		source, destination = source.To4(), destination.To4()
	}
	copy(b[12:28], source)
	copy(b[28:44], destination)
	binary.NativeEndian.PutUint32(b[44:], id.Interface)
	binary.NativeEndian.PutUint32(b[48:], id.Cookie[0])
	binary.NativeEndian.PutUint32(b[52:], id.Cookie[1])
	req := nl.NewNetlinkRequest(nl.SOCK_DESTROY, unix.NLM_F_ACK)
	req.AddRawData(b)
	_, err := req.Execute(unix.NETLINK_INET_DIAG, 0)
	return err
}
