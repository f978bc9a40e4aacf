package netobj

import (
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

var (
	server = netip.MustParseAddr("169.254.169.254")
	to     = Host(server)
	to6    = Host(netip.MustParseAddr("fd20:ce::254"))

	end    = Rule{Pref: 98, To: Any(server), Action: unix.FR_ACT_NOP}
	host   = Rule{Pref: 97, To: to, IIF: "lo", Action: unix.FR_ACT_GOTO, Arg: 98}
	closed = Rule{Pref: 97, To: to, Port: 80, Action: unix.FR_ACT_PROHIBIT}
	rest   = Rule{Pref: 97, To: to, Proto: unix.IPPROTO_TCP, Action: unix.FR_ACT_PROHIBIT}

	address = Address{Prefix: Host(netip.MustParseAddr("169.254.169.252")), Dev: "lo", Scope: unix.RT_SCOPE_HOST,
		Label: "lo:gme"}
	link   = Link{Name: "gme0", Kind: "dummy", Alias: "ours", Up: true}
	onLink = Address{Prefix: to, Dev: "gme0", Label: "gme0:gme"}
	route  = Route{Dst: to, Type: unix.RTN_UNICAST, Loopback: true, Table: unix.RT_TABLE_MAIN,
		Scope: unix.RT_SCOPE_LINK, Protocol: unix.RTPROT_KERNEL, Src: address.Prefix.Addr()}
	table = Route{Dst: to, Type: unix.RTN_LOCAL, Loopback: true, Table: 988, Scope: unix.RT_SCOPE_HOST,
		Protocol: unix.RTPROT_KERNEL}
	local6 = Route{Dst: to6, Type: unix.RTN_LOCAL, Loopback: true, Table: unix.RT_TABLE_LOCAL, Protocol: 252}
)

// texts are objects as a person types them.
var texts = []struct {
	object Object
	text   string
}{
	{end, "ip rule add pref 98 nop protocol kernel\n"},
	{host, "ip rule add pref 97 iif lo to 169.254.169.254/32 goto 98 protocol kernel\n"},
	{closed, "ip rule add pref 97 to 169.254.169.254/32 ipproto tcp dport 80 prohibit protocol kernel\n"},
	{rest, "ip rule add pref 97 to 169.254.169.254/32 ipproto tcp prohibit protocol kernel\n"},
	{Rule{Pref: 97, To: to, Port: 1, Last: 79, Action: unix.FR_ACT_GOTO, Arg: 98},
		"ip rule add pref 97 to 169.254.169.254/32 ipproto tcp dport 1-79 goto 98 protocol kernel\n"},
	{Rule{Pref: 97, To: to, Port: 80, Action: unix.FR_ACT_TO_TBL, Arg: 988},
		"ip rule add pref 97 to 169.254.169.254/32 ipproto tcp dport 80 lookup 988 protocol kernel\n"},
	{Rule{Pref: 8, To: to, Port: 988, Action: unix.FR_ACT_TO_TBL, Arg: unix.RT_TABLE_LOCAL},
		"ip rule add pref 8 to 169.254.169.254/32 ipproto tcp dport 988 lookup local protocol kernel\n"},
	{Rule{Pref: 98, To: Any(to6.Addr()), Action: unix.FR_ACT_NOP}, "ip -6 rule add pref 98 nop protocol kernel\n"},
	{Rule{Pref: 97, To: to6, Proto: unix.IPPROTO_ICMPV6, Action: unix.FR_ACT_GOTO, Arg: 98},
		"ip -6 rule add pref 97 to fd20:ce::254/128 ipproto ipv6-icmp goto 98 protocol kernel\n"},
	{address, "ip address add 169.254.169.252/32 dev lo scope host label lo:gme\n"},
	{link, "ip link add gme0 up type dummy\nip link set gme0 alias ours\n"},
	{onLink, "ip address add 169.254.169.254/32 dev gme0 label gme0:gme\n"},
	{route, "ip route add 169.254.169.254/32 dev lo scope link protocol kernel src 169.254.169.252\n"},
	{table, "ip route add local 169.254.169.254 dev lo table 988 protocol kernel\n"},
	{local6, "ip -6 route add local fd20:ce::254 dev lo table local protocol 252\n"},
}

func TestCommands(t *testing.T) {
	for _, c := range texts {
		if got := Commands(c.object); got != c.text {
			t.Errorf("%#v\n is %s want %s", c.object, got, c.text)
		}
	}
}

func TestDiff(t *testing.T) {
	foreign := Rule{Pref: 5, To: to, Action: unix.FR_ACT_TO_TBL, Arg: 7, Foreign: "from all lookup 7"}
	main := Rule{Pref: 32766, To: Any(server), Action: unix.FR_ACT_TO_TBL, Arg: unix.RT_TABLE_MAIN}
	ours := func(o Object) bool {
		l, is := o.(Link)
		return o != Object(foreign) && o != Object(main) && (!is || l.Alias == "ours")
	}
	down, sourceless, used := link, route, Link{Name: "gme0", Kind: "bridge"}
	down.Up, sourceless.Src = false, netip.Addr{}
	guard, rule6 := []Object{end, host, closed, rest}, Rule{Pref: 98, To: Any(to6.Addr()), Action: unix.FR_ACT_NOP}
	for _, c := range []struct {
		name                         string
		want, have, missing, surplus []Object
	}{
		{name: "nothing"},
		{"all", append(guard, address), append(guard, address), append(guard, address), nil}, // see below
		{"first", guard, []Object{main}, guard, nil},
		{"stands", guard, []Object{foreign, host, closed, rest, end, main}, nil, nil},
		{"one is missing", guard, []Object{host, rest, end}, guard, nil},
		{"not in order", guard, []Object{closed, host, rest, end}, guard, nil},
		{"added anew", guard, []Object{closed, host, rest, host, closed, rest, end, end}, nil,
			[]Object{closed, rest, host, end}},
		{"two end", guard, []Object{host, closed, rest, end, end}, nil, []Object{end}},
		{"each family alone", append(guard, rule6), []Object{host, closed, rest, end}, []Object{rule6}, nil},
		{"removal", nil, []Object{foreign, host, closed, rest, end, route, table, address, link, onLink},
			nil, []Object{route, closed, rest, host, end, address, onLink, link, table}},
		{"another address", []Object{address}, []Object{onLink}, []Object{address}, []Object{onLink}},
		{"a link that is down", []Object{link}, []Object{down}, []Object{link}, nil},
		{"a link of somebody's", []Object{used}, []Object{used}, nil, nil},
		{"and without us", nil, []Object{used}, nil, nil},
		{"a route with another source", []Object{route}, []Object{sourceless}, []Object{route}, nil},
	} {
		if c.name == "all" { // the kernel has them in the order of their preferences
			c.have, c.missing = []Object{host, closed, rest, end, address}, nil
		}
		missing, surplus := Diff(c.want, c.have, ours)
		if !slices.Equal(missing, c.missing) || !slices.Equal(surplus, c.surplus) {
			t.Errorf("%s:\nmissing %v\nsurplus %v\nwant %v\nand %v", c.name, missing, surplus, c.missing, c.surplus)
		}
	}
}

func TestSnapshot(t *testing.T) {
	all := func(text string, kind uint8) Route {
		return Route{Dst: netip.MustParsePrefix(text), Type: kind, Table: unix.RT_TABLE_LOCAL}
	}
	s := Snapshot{all("169.254.0.0/16", unix.RTN_LOCAL), all("169.254.169.254/32", unix.RTN_UNICAST), table, local6}
	for text, want := range map[string]bool{"169.254.169.252": true, "169.254.169.254": false, "192.0.2.1": false,
		"fd20:ce::254": true} {
		if got := s.Local(netip.MustParseAddr(text)); got != want {
			t.Errorf("%s is local: %t", text, got)
		}
	}
	if got := s.Routes(988, server); len(got) != 1 || got[0] != table {
		t.Errorf("%v", got)
	}
}

func TestDiverts(t *testing.T) {
	for _, c := range []struct {
		rule Rule
		want bool
	}{
		{Rule{To: Any(server), Action: unix.FR_ACT_TO_TBL, Arg: 7, Foreign: "x"}, true},
		{Rule{To: netip.MustParsePrefix("169.254.0.0/16"), Action: unix.FR_ACT_PROHIBIT, Foreign: "x"}, true},
		{Rule{To: netip.MustParsePrefix("192.0.2.0/24"), Action: unix.FR_ACT_TO_TBL, Arg: 7, Foreign: "x"}, false},
		{Rule{To: Any(to6.Addr()), Action: unix.FR_ACT_TO_TBL, Arg: 7, Foreign: "x"}, false},
		{Rule{To: Any(server), IIF: "lo", Action: unix.FR_ACT_TO_TBL, Arg: 7, Foreign: "x"}, false},
		{Rule{To: Any(server), Sent: true, Action: unix.FR_ACT_TO_TBL, Arg: 7, Foreign: "x"}, false},
		{Rule{To: Any(server), Action: unix.FR_ACT_TO_TBL, Arg: unix.RT_TABLE_LOCAL}, false},
		{end, false},
	} {
		if got := c.rule.Diverts(server); got != c.want {
			t.Errorf("%v: %t", c.rule, got)
		}
	}
}

// FuzzParseRule: no message of the kernel's makes the parser panic, and only a rule that says it
// all is not foreign.
func FuzzParseRule(f *testing.F) {
	f.Add([]byte{2, 32, 0, 0, 254, 0, 0, 1, 0, 0, 0, 0, 8, 0, 1, 0, 169, 254, 169, 254})
	f.Add(make([]byte, 12))
	f.Fuzz(func(t *testing.T, message []byte) {
		r, ok := ParseRule(message)
		if ok && r.Foreign == "" && (r.Sent || !r.To.IsValid() || r.Port != 0 && r.Proto != 0) {
			t.Errorf("%+v was taken for one that says it all", r)
		}
	})
}
