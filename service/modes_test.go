package service

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
)

// TestModesOfConfiguration: service/config refuses for a routing mode what service/routing refuses
// in a Plan, and nothing else. The two packages do not import each other.
func TestModesOfConfiguration(t *testing.T) {
	i := slices.IndexFunc(config.Keys(), func(k config.Key) bool { return k.Path == "routing.mode" })
	modes := config.Keys()[i].Values
	supported := 0
	for _, mode := range modes {
		if mode == routing.ModeAuto {
			continue
		}
		if !routing.Supported(mode) {
			t.Errorf("a choice of routing.mode, and no mode of service/routing: %s", mode)
			continue
		}
		supported++
		for _, c := range []struct{ key, value string }{
			{"routing.link", "gme0"},
			{"routing.interceptHostPods", "on"},
			{"routing.excludeInterfaces", "docker0"},
			{"listen", "0.0.0.0:1988"},
			{"listen6", "[fd20:ce::252]:988"},
			{"dns", "answer"},
		} {
			flags := map[string]string{"routing.mode": mode, c.key: c.value, "projectID": "my-project",
				"workloadIdentityProvider": "projects/1/locations/global/workloadIdentityPools/my-pool/providers/my-provider"}
			got, err := config.Load("", flags)
			if err != nil && !strings.Contains(err.Error(), "--"+config.FlagName(c.key)+":") {
				t.Fatal(err)
			}
			if c.key == "dns" {
				warned := slices.ContainsFunc(got.Warnings, func(w string) bool { return strings.HasPrefix(w, "dns: ") })
				if err != nil || warned != (routing.NoDNS(mode) != "") {
					t.Errorf("mode %s, dns: the configuration says %q (%v), routing %q", mode, got.Warnings, err, routing.NoDNS(mode))
				}
				continue
			}
			p := routing.Plan{Mode: mode, Listen: netip.MustParseAddrPort("169.254.169.252:988"), InterceptHostPods: "auto"}
			if mode == routing.ModeLoopback {
				p.Listen = netip.MustParseAddrPort("169.254.169.254:80")
			}
			switch c.key {
			case "routing.link":
				p.Link = c.value
			case "routing.interceptHostPods":
				p.InterceptHostPods = c.value
			case "routing.excludeInterfaces":
				p.ExcludeInterfaces = []string{c.value}
			case "listen":
				p.Listen = netip.MustParseAddrPort(c.value)
			case "listen6":
				p.Listen6 = netip.MustParseAddrPort(c.value)
			}
			if _, refused := routing.New(p); (refused == nil) != (err == nil) {
				t.Errorf("mode %s, %s: %s: the configuration says %v, routing %v", mode, c.key, c.value, err, refused)
			}
		}
	}
	if all := routing.Modes(); supported != len(all) {
		t.Errorf("choices of routing.mode are %v, and modes of service/routing %v", modes, all)
	}
}
