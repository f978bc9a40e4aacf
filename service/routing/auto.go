package routing

import (
	"context"
	"fmt"
	"slices"
)

// Fitted is the Plan with the mode that fits the node now in the place of auto, and why. A Plan of another mode stays as it is.
func (p Plan) Fitted(ctx context.Context) Plan {
	if p.Mode != ModeAuto || p.Closed {
		return p
	}
	return p.fit(ReadFacts(ctx))
}

func (p Plan) fit(f Facts) Plan {
	p.Mode, p.Reason = Detect(f)
	switch {
	case !Supported(p.Mode):
		p.Reason = fmt.Sprintf("%s, which asks for mode %s, and this version has none", p.Reason, p.Mode)
		p.Mode = ModeIPTables
	case p.Mode == ModeLoopback && p.Listen != metadataServer:
		// The listener cannot follow by itself: systemd has it.
		p.Reason = fmt.Sprintf("%s, which asks for mode %s: name it, since it listens at %s", p.Reason, p.Mode, metadataServer)
		p.Mode = ModeIPTables
	}
	return p
}

// Supported says whether a Plan may have the mode.
func Supported(mode string) bool { return slices.Contains(modes, mode) }

// AsInstalled is Fitted, but for what the last Install came to where that is what is desired: a node whose network changes under rules that
// stand has the same rules until the next Install.
func (p Plan) AsInstalled(ctx context.Context) Plan {
	if p.Mode != ModeAuto || p.Closed {
		return p
	}
	if s, err := ReadState(p.RunDir); err == nil && s.Desired == Installed && s.Reason != "" {
		p.Mode, p.Reason = s.Mode, s.Reason
		return p
	}
	return p.Fitted(ctx)
}
