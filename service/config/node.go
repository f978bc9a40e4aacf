package config

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
)

// NodeWarnings returns what the settings name and this node does not have at present. On a first
// boot both are normal, so these warnings are for `config check` alone and not for the log. local
// are the addresses of the node's interfaces, and makes says which address to listen at `routing
// install` makes.
func (c Config) NodeWarnings(local []netip.Addr, makes func(netip.Addr) bool) (all []string) {
	if _, err := os.Stat(c.Kubeconfig); c.Kubeconfig != "" && errors.Is(err, fs.ErrNotExist) {
		all = append(all, fmt.Sprintf("kubeconfig: %s does not exist yet: pods get no tokens until it does",
			quote(c.Kubeconfig)))
	}
	for _, s := range []struct {
		key  string
		at   netip.AddrPort
		made bool
	}{
		{"listen", c.Listen, makes(c.Listen.Addr())},
		{"listen6", c.Listen6, makes(c.Listen6.Addr())},
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
