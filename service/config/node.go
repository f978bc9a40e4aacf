package config

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
)

// network6 is Google's for metadata servers: routing makes addresses in it this node's own.
var network6 = netip.MustParsePrefix("fd20:ce::/64")

// NodeWarnings returns what the settings name and this node does not have at present. On a first
// boot both are normal, so these warnings are for `config check` alone and not for the log. local
// are the addresses of the node's interfaces.
func (c Config) NodeWarnings(local []netip.Addr) (all []string) {
	if _, err := os.Stat(c.Kubeconfig); c.Kubeconfig != "" && errors.Is(err, fs.ErrNotExist) {
		all = append(all, fmt.Sprintf("kubeconfig: %s does not exist yet: pods get no tokens until it does",
			quote(c.Kubeconfig)))
	}
	mode := c.Routing.Mode
	for _, s := range []struct {
		key  string
		at   netip.AddrPort
		made bool // routing makes link-local addresses in the modes that redirect
	}{
		{"listen", c.Listen, mode == "loopback" || mode != "none" && c.Listen.Addr().IsLinkLocalUnicast()},
		{"listen6", c.Listen6, network6.Contains(c.Listen6.Addr())},
		{"healthListen", c.HealthListen, false},
	} {
		a := s.at.Addr()
		if !s.made && a.IsValid() && !a.IsUnspecified() && !a.IsLoopback() && !slices.Contains(local, a) {
			all = append(all, fmt.Sprintf("%s: no interface of this node has %s, and `routing install` does not make it: "+
				"write an address of this node, unless the service listens in another network namespace", s.key, a))
		}
	}
	return all
}
