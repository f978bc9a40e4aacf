package probe

import (
	"slices"
	"testing"
)

func TestSavedDrops(t *testing.T) {
	const before = `# Generated
*filter
:INPUT DROP [5:300]
:FORWARD ACCEPT [7:400]
:OUTPUT DROP [1:60]
[3:180] -A INPUT -s 10.0.0.0/8 -j DROP
[4:240] -A INPUT -j ACCEPT
[9:540] -A FORWARD -d 10.1.0.0/16 -p tcp -j REJECT --reject-with icmp-port-unreachable
[1:60] -A INPUT -j DROPPED
COMMIT
`
	const after = `*filter
:INPUT DROP [6:360]
:FORWARD ACCEPT [9:400]
:OUTPUT DROP [1:60]
[3:180] -A INPUT -s 10.0.0.0/8 -j DROP
[8:240] -A INPUT -j ACCEPT
[10:600] -A FORWARD -d 10.1.0.0/16 -p tcp -j REJECT --reject-with icmp-port-unreachable
[2:60] -A INPUT -j DROPPED
COMMIT
`
	was, is := map[string]uint64{}, map[string]uint64{}
	savedDrops("iptables", "filter", before, was)
	savedDrops("iptables", "filter", after, is)
	want := []string{
		"iptables chain FORWARD of table filter (rule: -A FORWARD -d 10.1.0.0/16 -p tcp -j REJECT --reject-with " +
			"icmp-port-unreachable)",
		"iptables chain INPUT of table filter (policy DROP)",
	}
	if got := risen(was, is); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
