package routing

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
)

// ResolveAuto returns the Plan with the mode that fits the node now in the place of auto, and why.
// A Plan of another mode stays as it is.
//
// It never is loopback: there the emulator listens elsewhere, and systemd holds the listener. Where
// that would fit, ebpf does as well, if it can be had; else it is iptables, which keeps pods from
// the real server, and the reason says what to do.
func (p Plan) ResolveAuto(ctx context.Context) Plan {
	if p.Mode != ModeAuto || p.Closed {
		return p
	}
	return p.fit(ReadFacts(ctx))
}

func (p Plan) fit(f Facts) Plan {
	p.Mode, p.Reason = Detect(f)
	switch {
	case p.Mode == ModeLoopback && f.CgroupV2 && f.BPF && Supported(ModeEBPF):
		p.Mode = ModeEBPF
	case p.Mode == ModeLoopback:
		p.Reason = fmt.Sprintf(
			"%s, which asks for routing.mode loopback: name it, for the listener to move to %s",
			p.Reason,
			metadataServer,
		)
		p.Mode = ModeIPTables
	case !Supported(p.Mode):
		p.Reason = fmt.Sprintf("%s, which asks for mode %s, and this version has none", p.Reason, p.Mode)
		p.Mode = ModeIPTables
	}
	return p.withoutIPv6()
}

// withoutIPv6 is the Plan of a mode that was found out, and that may serve IPv4 alone.
func (p Plan) withoutIPv6() Plan {
	if p.Listen6.IsValid() && !p.dnats() {
		p.Listen6 = netip.AddrPort{}
		p.Reason += "; it serves IPv4 alone, so listen6 is not"
	}
	return p
}

// Modes are those that a Plan may have.
func Modes() []string { return slices.Clone(modes) }

// Supported says whether a Plan may have the mode.
func Supported(mode string) bool { return slices.Contains(modes, mode) }

// AsInstalled is ResolveAuto, but for what the last Install came to where that is what is desired:
// a node whose network changes under rules that stand has the same rules until the next Install.
func (p Plan) AsInstalled(ctx context.Context) Plan {
	if p.Mode != ModeAuto || p.Closed {
		return p
	}
	if s, err := ReadState(p.RunDir); err == nil && s.Desired == Installed && s.Reason != "" {
		p.Mode, p.Reason = s.Mode, s.Reason
		if !p.dnats() {
			p.Listen6 = netip.AddrPort{} // as the reason says
		}
		return p
	}
	return p.ResolveAuto(ctx)
}
