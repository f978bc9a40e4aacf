package bpf

import (
	"encoding/binary"
	"io"
	"net/netip"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
)

// Mode ebpf changes where a connect() goes, before there is a packet: a program at the root of the
// cgroup v2 hierarchy sees every connect() of this machine, with all others that are attached there
// (Cilium's too), and puts the listen address in the place of 169.254.169.254:80.
//
// The network namespace of the socket decides who is a pod, not its cgroup. A pod has one of
// its own, and so has whatever else iptables would redirect; the node's daemons are in the host's.
// So there is no path of kubelet's to know, and none that is not there yet or is made anew,
// and pods are found in whichever cgroup a container runtime puts them. Only in the host's own
// namespace the cgroup decides, by exclusion as in mode iptables: what is not in one of the host's
// slices is a pod on the host network.
//
// Namespaces and cgroups are named by numbers that the kernel never uses twice until the machine is
// booted again.

// Hook is one place where a program is attached.
type Hook struct {
	Name   string
	attach ebpf.AttachType
	family netobj.Family // of the socket. To one of ipv6 the address is IPv4, mapped (clients in Java have no other)
	back   bool          // getpeername(): the client sees the address that it asked for
}

// shownName is the name that bpftool shows; the kernel takes 15 characters.
func (h Hook) shownName() string { return ("gme_" + h.Name)[:min(len(h.Name)+4, 15)] }

// RedirectHooks are mode ebpf's, in the order in which they are put up; ObserveHooks are mode
// observe's.
var (
	RedirectHooks = []Hook{
		{Name: "getpeername4", attach: ebpf.AttachCgroupInet4GetPeername, family: netobj.IPv4, back: true},
		{Name: "getpeername6", attach: ebpf.AttachCgroupInet6GetPeername, family: netobj.IPv6, back: true},
		ObserveHooks[0], ObserveHooks[1],
	}
	ObserveHooks = []Hook{
		{Name: "connect4", attach: ebpf.AttachCGroupInet4Connect, family: netobj.IPv4},
		{Name: "connect6", attach: ebpf.AttachCGroupInet6Connect, family: netobj.IPv6},
	}
)

// Rewriting is what the programs are made of. The same values make the same instructions, and so
// the same tag: the kernel tells by it whether what stands is what is wanted.
type Rewriting struct {
	Server   netip.AddrPort // where clients send their requests: IPv4
	Listen   netip.AddrPort // where they are to go: IPv4
	HostNet  uint64         // the cookie of the host's network namespace
	HostPods bool           // rewrite in the host's namespace too, but for
	Spared   []uint64       // these cgroups and what is below them, by id
	Counts   *ebpf.Map      // observe: count who connects by cgroup, and rewrite nothing; nil: rewrite
}

// Offsets in the kernel's struct bpf_sock_addr, of which all fields are 32 bits wide and addresses
// and ports in network order.
const (
	sockAddrIP4  = 4
	sockAddrIP6  = 8 // four words
	sockAddrPort = 24
	sockAddrType = 32
)

// sparedDepth is how deep below the root of all cgroups a spared one is looked for. It is 1 on a
// node, and more where the node is a container itself: there a process cannot know how deep its own
// root is.
const sparedDepth = 6

// instructions are the program of one hook. It always returns 1: the call goes on.
func (r Rewriting) instructions(h Hook) asm.Instructions {
	const leave, take = "leave", "take"
	from, to := r.Server, r.Listen
	if h.back {
		from, to = to, from
	}
	ip := int16(sockAddrIP4)
	insns := asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}
	unless := func(offset int16, value uint32) {
		insns = append(insns, asm.LoadMem(asm.R1, asm.R6, offset, asm.Word), asm.JNE.Imm32(asm.R1, int32(value), leave))
	}
	// The likeliest to differ first: nearly all of a machine's connections are somebody else's.
	if h.family == netobj.IPv6 {
		ip = sockAddrIP6 + 12
	}
	unless(ip, word(from.Addr()))
	unless(sockAddrPort, port(from))
	unless(sockAddrType, unix.SOCK_STREAM) // TCP and MPTCP
	if h.family == netobj.IPv6 {
		mapped := netip.AddrFrom16(from.Addr().As16()).As16()
		for i := range 3 {
			unless(sockAddrIP6+4*int16(i), binary.NativeEndian.Uint32(mapped[4*i:]))
		}
	}

	insns = append(
		insns,
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.FnGetNetnsCookie.Call(),
		asm.LoadImm(asm.R1, int64(r.HostNet), asm.DWord),
	)
	if r.HostPods {
		insns = append(insns, asm.JNE.Reg(asm.R0, asm.R1, take))
		for level := range sparedDepth {
			insns = append(insns, asm.Mov.Imm(asm.R1, int32(level+1)), asm.FnGetCurrentAncestorCgroupId.Call())
			for _, id := range r.Spared {
				insns = append(insns, asm.LoadImm(asm.R1, int64(id), asm.DWord), asm.JEq.Reg(asm.R0, asm.R1, leave))
			}
		}
	} else {
		insns = append(insns, asm.JEq.Reg(asm.R0, asm.R1, leave))
	}

	taken := len(insns)
	if r.Counts != nil {
		insns = append(insns, r.count(leave)...)
	} else {
		insns = append(insns,
			asm.Mov.Imm32(asm.R1, int32(word(to.Addr()))), asm.StoreMem(asm.R6, ip, asm.R1, asm.Word),
			asm.Mov.Imm32(asm.R1, int32(port(to))), asm.StoreMem(asm.R6, sockAddrPort, asm.R1, asm.Word))
	}
	insns[taken] = insns[taken].WithSymbol(take)
	return append(insns, asm.Mov.Imm(asm.R0, 1).WithSymbol(leave), asm.Return())
}

// count adds one to the caller's cgroup. Two first calls at once count as one.
func (r Rewriting) count(leave string) asm.Instructions {
	const known = "known"
	return asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.R6), asm.FnGetNetnsCookie.Call(), asm.StoreMem(asm.R10, -8, asm.R0, asm.DWord),
		asm.FnGetCurrentCgroupId.Call(), asm.StoreMem(asm.R10, -16, asm.R0, asm.DWord),
		asm.LoadMapPtr(asm.R1, r.Counts.FD()),
		asm.Mov.Reg(asm.R2, asm.R10), asm.Add.Imm(asm.R2, -16),
		asm.FnMapLookupElem.Call(),
		asm.JNE.Imm(asm.R0, 0, known),
		asm.Mov.Imm(asm.R1, 1), asm.StoreMem(asm.R10, -24, asm.R1, asm.DWord),
		asm.LoadMapPtr(asm.R1, r.Counts.FD()),
		asm.Mov.Reg(asm.R2, asm.R10), asm.Add.Imm(asm.R2, -16),
		asm.Mov.Reg(asm.R3, asm.R10), asm.Add.Imm(asm.R3, -24),
		asm.Mov.Imm(asm.R4, unix.BPF_NOEXIST),
		asm.FnMapUpdateElem.Call(),
		asm.Ja.Label(leave),
		asm.Mov.Imm(asm.R1, 1).WithSymbol(known),
		asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
	}
}

// Spec is the program of one hook.
func (r Rewriting) Spec(h Hook) (*ebpf.ProgramSpec, error) {
	insns := r.instructions(h)
	// Jumps get their distances as they are written down, and the tag is that of what was written.
	var order binary.ByteOrder = binary.LittleEndian
	if word(netip.AddrFrom4([4]byte{3: 1})) == 1 {
		order = binary.BigEndian // the library does not know binary.NativeEndian
	}
	if err := insns.Marshal(io.Discard, order); err != nil {
		return nil, err
	}
	return &ebpf.ProgramSpec{
		Name:         h.shownName(),
		Type:         ebpf.CGroupSockAddr,
		AttachType:   h.attach,
		Instructions: insns,
		License:      "Apache-2.0",
	}, nil
}

// word is an IPv4 address as a 32-bit load from memory in network order sees it; port is a port
// likewise.
func word(a netip.Addr) uint32 {
	b := a.As4()
	return binary.NativeEndian.Uint32(b[:])
}

func port(a netip.AddrPort) uint32 {
	return uint32(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, a.Port())))
}
