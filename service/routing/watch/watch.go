// Package watch hears from the kernel what changes in a network namespace: policy rules, addresses,
// routes, links and nf_tables. It names the causes for which the rules are looked at again.
package watch

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/nft"
)

// Causes are why the watcher looks, as a set. In a metric and in the log the first of a set is
// reported.
type Causes uint16

const (
	NFTables Causes = 1 << iota // a transaction of nf_tables
	XTables                     // a legacy table is not as it was
	EBPF                        // other programs are attached than were
	Rule
	Address
	Route
	Link
	Reload
	Start
	Sweep
	Retry   // what failed before
	Install // somebody installs anew

	Around     = Address | Route | Link // what comes by the dozen as pods come and go
	Kernel     = Rule | Around          // what rtnetlink tells
	Everything = Reload | Start | Sweep | Retry
)

// Names are the words for a metric's label, in the order of the bits.
var Names = []string{
	"nftables",
	"xtables",
	"ebpf",
	"ip-rule",
	"ip-address",
	"ip-route",
	"link",
	"reload",
	"start",
	"sweep",
	"retry",
	"install",
}

// String returns the word for the metric's label.
func (c Causes) String() string {
	for i, name := range Names {
		if c&(1<<i) != 0 {
			return name
		}
	}
	return "none"
}

// Behind is the cause that is most likely behind a fault in the layer.
func (c Causes) Behind(layer string) string {
	own := map[string]Causes{fault.Rule: Rule, fault.Address: Address, fault.Route: Route,
		fault.EBPF: EBPF}[layer]
	if c&own != 0 {
		return own.String()
	}
	return c.String()
}

// Events are what the kernel tells of changes to rules, policy rules, addresses, routes and links
// in one network namespace.
type Events struct {
	Changed chan struct{} // holds one when there is something to take
	Failed  chan error    // holds one when no more events will come
	sockets []*nl.NetlinkSocket
	readers sync.WaitGroup

	mu     sync.Mutex
	causes Causes
	by     string // the process behind the last transaction of nf_tables
}

// Listen subscribes in the network namespace of the calling thread. Of changes to routes it tells
// those of routes to one of the addresses, and of default routes.
func Listen(addresses func() []netip.Addr) (*Events, error) {
	e := &Events{Changed: make(chan struct{}, 1), Failed: make(chan error, 2)}
	for _, s := range []struct {
		protocol int
		groups   []uint
		read     func(kind uint16, data []byte) (Causes, string)
	}{
		{unix.NETLINK_ROUTE, []uint{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
			unix.RTNLGRP_IPV4_ROUTE,
			unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE},
			func(kind uint16, data []byte) (Causes, string) { return routeEvent(kind, data, addresses()...), "" }},
		{unix.NETLINK_NETFILTER, []uint{unix.NFNLGRP_NFTABLES}, generationEvent},
	} {
		socket, err := nl.Subscribe(s.protocol, s.groups...)
		if err == nil && s.protocol == unix.NETLINK_NETFILTER {
			err = onlyGenerations(socket)
		}
		if err != nil {
			e.Close()
			return nil, fmt.Errorf("listen to the kernel's events: %w", fault.Permission(err))
		}
		e.sockets = append(e.sockets, socket)
		e.readers.Go(func() { e.read(socket, s.read) })
	}
	return e, nil
}

func (e *Events) Close() {
	for _, s := range e.sockets {
		s.Close()
	}
	e.readers.Wait()
}

// onlyGenerations has the kernel pass one message a transaction, not one a rule: somebody's restore
// of 10,000 rules is one event.
func onlyGenerations(s *nl.NetlinkSocket) error {
	kind := binary.NativeEndian.AppendUint16(nil, nft.Subsystem|unix.NFT_MSG_NEWGEN)
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_ABS, K: 4}, // nlmsg_type, which the filter reads as big endian
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uint32(binary.BigEndian.Uint16(kind)), Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 1<<32 - 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
	return unix.SetsockoptSockFprog(
		s.GetFd(),
		unix.SOL_SOCKET,
		unix.SO_ATTACH_FILTER,
		&unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]},
	)
}

// read reads one socket until it is closed.
func (e *Events) read(s *nl.NetlinkSocket, of func(kind uint16, data []byte) (Causes, string)) {
	for {
		messages, from, err := s.Receive()
		switch {
		case errors.Is(err, unix.ENOBUFS): // more than the socket could hold: anything may have happened
			e.note(Kernel|NFTables, "")
			continue
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			e.Failed <- fmt.Errorf("the kernel's events: %w", err) // it has room for each reader
			return
		case from.Pid != nl.PidKernel:
			continue
		}
		for _, m := range messages {
			if c, by := of(m.Header.Type, m.Data); c != 0 {
				e.note(c, by)
			}
		}
	}
}

func (e *Events) note(c Causes, by string) {
	e.mu.Lock()
	e.causes |= c
	if by != "" {
		e.by = by
	}
	e.mu.Unlock()
	select {
	case e.Changed <- struct{}{}:
	default:
	}
}

// Take returns what happened since it was asked last.
func (e *Events) Take() (c Causes, by string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	c, by = e.causes, e.by
	e.causes, e.by = 0, ""
	return c, by
}

// generationEvent reads who made the transaction: the name that the process gives itself.
func generationEvent(kind uint16, data []byte) (Causes, string) {
	if kind != nft.Subsystem|unix.NFT_MSG_NEWGEN {
		return 0, ""
	}
	by := unix.ByteSliceToString(nft.Attribute(data, unix.NFTA_GEN_PROC_NAME))
	if pid := nft.Attribute(data, unix.NFTA_GEN_PROC_PID); len(pid) == 4 {
		by = strings.TrimSpace(fmt.Sprintf("%s (%d)", by, binary.BigEndian.Uint32(pid)))
	}
	return NFTables, by
}

// routeEvent says what a message of rtnetlink is about. Routes to pods come and go all day; only
// those matter that one of the addresses or everything can be reached by.
func routeEvent(kind uint16, data []byte, addresses ...netip.Addr) Causes {
	switch kind {
	case unix.RTM_NEWRULE, unix.RTM_DELRULE:
		return Rule
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		return Address
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		return Link
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		if len(data) < unix.SizeofRtMsg {
			return Route
		}
		bits := int(data[1]) // rtm_dst_len
		if bits == 0 {
			return Route
		}
		for rest := data[unix.SizeofRtMsg:]; len(rest) >= unix.SizeofRtAttr; {
			size := int(binary.NativeEndian.Uint16(rest))
			if size < unix.SizeofRtAttr || size > len(rest) {
				return Route
			}
			if binary.NativeEndian.Uint16(rest[2:]) == unix.RTA_DST {
				to, ok := netip.AddrFromSlice(rest[unix.SizeofRtAttr:size])
				prefix := netip.PrefixFrom(to, bits)
				if !ok || slices.ContainsFunc(addresses, prefix.Contains) {
					return Route
				}
				return 0
			}
			rest = rest[min((size+3)&^3, len(rest)):]
		}
	}
	return 0
}
