package watch

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/nft"
)

func routeMessage(bits byte, dst string) []byte {
	m := make([]byte, unix.SizeofRtMsg)
	m[0], m[1] = unix.AF_INET, bits
	// Another attribute comes first, of an odd length.
	m = append(m, 5, 0, unix.RTA_OIF, 0, 1, 0, 0, 0)
	if dst != "" {
		a := netip.MustParseAddr(dst).AsSlice()
		m = binary.NativeEndian.AppendUint16(m, uint16(4+len(a)))
		m = binary.NativeEndian.AppendUint16(m, unix.RTA_DST)
		m = append(m, a...)
	}
	return m
}

// TestRouteEvent: routes to pods come and go all day, and are nobody's business here.
func TestRouteEvent(t *testing.T) {
	server, listen := netip.MustParseAddr("169.254.169.254"), netip.MustParseAddr("10.245.0.3")
	for _, c := range []struct {
		name string
		kind uint16
		data []byte
		want Causes
	}{
		{"rule", unix.RTM_DELRULE, nil, Rule},
		{"address", unix.RTM_NEWADDR, nil, Address},
		{"link", unix.RTM_DELLINK, nil, Link},
		{"default route", unix.RTM_NEWROUTE, routeMessage(0, ""), Route},
		{"the metadata server's", unix.RTM_DELROUTE, routeMessage(32, "169.254.169.254"), Route},
		{"all link-local addresses'", unix.RTM_DELROUTE, routeMessage(16, "169.254.0.0"), Route},
		{"the listen address's", unix.RTM_NEWROUTE, routeMessage(24, "10.245.0.0"), Route},
		{"a pod's", unix.RTM_NEWROUTE, routeMessage(32, "10.245.1.3"), 0},
		{"a pod's over IPv6", unix.RTM_NEWROUTE, routeMessage(128, "fd00:245::3"), 0},
		{"a neighbour", unix.RTM_NEWNEIGH, nil, 0},
		{"cut short", unix.RTM_NEWROUTE, []byte{2}, Route},
		{"an attribute that is longer than the message", unix.RTM_NEWROUTE,
			append(routeMessage(24, "")[:unix.SizeofRtMsg], 255, 0, 1, 0), Route},
	} {
		if got := routeEvent(c.kind, c.data, server, listen); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestGenerationEvent(t *testing.T) {
	be := binary.BigEndian
	m := []byte{0, 0, 0, 0}
	attr := func(kind uint16, v []byte) {
		m = binary.NativeEndian.AppendUint16(m, uint16(4+len(v)))
		m = binary.NativeEndian.AppendUint16(m, kind)
		m = append(m, v...)
		for len(m)%4 != 0 {
			m = append(m, 0)
		}
	}
	attr(unix.NFTA_GEN_ID, be.AppendUint32(nil, 7))
	attr(unix.NFTA_GEN_PROC_PID, be.AppendUint32(nil, 42))
	attr(unix.NFTA_GEN_PROC_NAME, []byte("nft\x00"))
	if c, by := generationEvent(nft.Subsystem|unix.NFT_MSG_NEWGEN, m); c != NFTables || by != "nft (42)" {
		t.Errorf("%v, %q", c, by)
	}
	if c, _ := generationEvent(nft.Subsystem|unix.NFT_MSG_NEWRULE, m); c != 0 {
		t.Errorf("a rule: %v", c)
	}
	for cut := range m { // a message that is cut short is no reason to fall over
		generationEvent(nft.Subsystem|unix.NFT_MSG_NEWGEN, m[:cut])
	}
}

func TestCauses(t *testing.T) {
	c := NFTables | Rule | Sweep
	for layer, want := range map[string]string{fault.IPTables: "nftables", fault.Rule: "ip-rule",
		fault.Address: "nftables"} {
		if got := c.Behind(layer); got != want {
			t.Errorf("%s: %s, want %s", layer, got, want)
		}
	}
	if got := len(Names); 1<<(got-1) != Install {
		t.Errorf("%d names: one for each cause", got)
	}
}
