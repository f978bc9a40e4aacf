package netobj

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// TestKernel: what Add makes is read back as the same value, ip(8) makes the same of its text, and
// Delete takes it away.
func TestKernel(t *testing.T) {
	netnstest.Needs(t, "ip", "sh")
	node := netnstest.Start(t, "netobj")
	run := func(script string) string {
		t.Helper()
		out, err := node.Command(t.Context(), "sh", "-ec", script).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", script, err, out)
		}
		return string(out)
	}
	read := func() (s Snapshot) {
		t.Helper()
		if err := node.Do(func() (err error) { s, err = Read("gme0"); return err }); err != nil {
			t.Fatal(err)
		}
		return s
	}
	state := func() string {
		return run(`{ ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; ip link; ip address
			} 2>/dev/null`) // it complains of links that other namespaces are about to lose
	}

	var objects []Object
	for _, c := range texts {
		switch c.object.(type) {
		case Link:
			if run("ip link add probe type dummy 2>/dev/null && ip link del probe && echo yes || echo no") != "yes\n" {
				t.Log("this kernel has no dummy links")
				continue
			}
		case Address:
			if c.object == Object(onLink) && !slices.Contains(objects, Object(link)) {
				continue
			}
		}
		objects = append(objects, c.object)
	}
	before, had := state(), read()
	for _, to := range []netip.Addr{server, to6.Addr()} {
		routes := had.Routes(unix.RT_TABLE_MAIN, to)
		if len(routes) != 1 || !strings.HasPrefix(routes[0].String(), "default ") {
			t.Errorf("%s goes by %v, and not by the default route", to, routes)
		}
	}
	for _, o := range objects {
		if had.Has(o) {
			t.Errorf("%s is there already", o)
		}
	}
	for _, method := range []struct {
		name string
		add  func(Object)
	}{
		{"Add", func(o Object) {
			if err := node.Do(func() error { return Add(o) }); err != nil {
				t.Errorf("%s: %v", o, err)
			}
		}},
		{"ip", func(o Object) { run(Commands(o)) }},
	} {
		for _, o := range objects {
			method.add(o)
		}
		have := read()
		for _, o := range objects {
			if !have.Has(o) {
				t.Errorf("%s: %s is not there as it was added:\n%s", method.name, o, state())
			}
		}
		missing, surplus := Diff(nil, have, func(o Object) bool { return slices.Contains(objects, o) })
		if len(missing) != 0 || len(surplus) != len(objects) {
			t.Errorf("%s: %d of %d objects are surplus where none is wanted: %v",
				method.name, len(surplus), len(objects), surplus)
		}
		for range 2 { // the second time they are gone
			for _, o := range surplus {
				if err := node.Do(func() error { return Delete(o) }); err != nil {
					t.Errorf("%s: delete %s: %v", method.name, o, err)
				}
			}
		}
		if after := state(); after != before {
			t.Errorf("%s: left behind:\n%s\nwhere there was\n%s", method.name, after, before)
		}
	}

	// A link that is there and down is set up, whatever its kind; a route's source is replaced.
	run("ip link add gme0 type bridge")
	used := Link{Name: "gme0", Kind: "bridge", Up: true}
	sourceless := route
	sourceless.Src = netip.Addr{}
	for _, o := range []Object{used, address, sourceless, route} {
		if err := node.Do(func() error { return Add(o) }); err != nil {
			t.Errorf("%s: %v", o, err)
		}
	}
	if have := read(); !have.Has(used) || !have.Has(route) || len(have.Routes(unix.RT_TABLE_MAIN, server)) != 2 {
		t.Errorf("%v", have)
	}
}

// TestForeign: rules of others are printed in the words of ip(8).
func TestForeign(t *testing.T) {
	netnstest.Needs(t, "ip", "sh")
	node := netnstest.Start(t, "netobj")
	for add, want := range map[string]string{
		"pref 10 iif eth9 lookup 101":                   "pref 10 from all iif eth9 lookup 101",
		"pref 11 fwmark 0x1/0xff lookup 101":            "pref 11 from all fwmark 0x1/0xff lookup 101",
		"pref 12 not from 10.0.0.0/8 lookup main":       "pref 12 not from 10.0.0.0/8 lookup main",
		"pref 13 to 10.0.0.0/8 oif eth9 unreachable":    "pref 13 from all to 10.0.0.0/8 oif eth9 unreachable",
		"pref 14 lookup main suppress_prefixlength 0":   "pref 14 from all suppress_prefixlength 0 lookup main",
		"pref 15 ipproto udp dport 53-54 blackhole":     "pref 15 from all ipproto 17 dport 53-54 blackhole",
		"pref 16 to 192.0.2.1 prohibit protocol static": "pref 16 from all to 192.0.2.1/32 prohibit",
	} {
		var have Snapshot
		out, err := node.Command(t.Context(), "sh", "-c", "ip rule add "+add).CombinedOutput()
		if err == nil {
			err = node.Do(func() (err error) { have, err = Read(); return err })
		}
		if err != nil {
			t.Fatalf("%s: %v: %s", add, err, out)
		}
		named := func(r Rule) bool { return r.String() == want && r.Foreign != "" }
		if !slices.ContainsFunc(have.Rules(unix.AF_INET), named) {
			t.Errorf("%s: %s", add, strings.Join(stringsOf(have.Rules(unix.AF_INET)), "\n"))
		}
	}
}

func stringsOf(rules []Rule) (texts []string) {
	for _, r := range rules {
		texts = append(texts, r.String())
	}
	return texts
}
