package routing

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/dns"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// dnsClient is a program that looks names up: of each it prints a line with what it found.
type dnsClient struct {
	name      string
	words     []string
	env       []string
	oneSocket bool // one socket for all names
	absolute  bool // it takes names as they are, without the search list
}

// cLibraries compiles the clients in C. One that cannot be compiled here is a subtest that is
// skipped, and names the package that is lacking.
func cLibraries(t *testing.T) (all []dnsClient) {
	t.Helper()
	dir := t.TempDir()
	for _, c := range []struct {
		client                     dnsClient
		compiler, source, includes string
		flags                      []string
	}{
		{client: dnsClient{name: "glibc"}, compiler: "gcc", source: "getaddrinfo.c"},
		{client: dnsClient{name: "glibc, one socket", oneSocket: true, absolute: true}, compiler: "gcc", source: "stayopen.c",
			flags: []string{"-lresolv"}},
		{client: dnsClient{name: "musl"}, compiler: "musl-gcc", source: "getaddrinfo.c", flags: []string{"-static"}},
		{client: dnsClient{name: "c-ares", oneSocket: true}, compiler: "gcc", source: "cares.c", includes: "ares.h",
			flags: []string{"-lcares"}},
	} {
		t.Run(c.client.name, func(t *testing.T) {
			if _, err := exec.LookPath(c.compiler); err != nil {
				netnstest.Lacks(t, fmt.Errorf("%w: apt-get install gcc libc6-dev musl-tools", err))
			}
			if c.includes != "" && exec.Command(c.compiler, "-E", "-include", c.includes, "-x", "c", os.DevNull).Run() != nil {
				netnstest.Lacks(t, fmt.Errorf("%s finds no %s: apt-get install libc-ares-dev", c.compiler, c.includes))
			}
			program := filepath.Join(dir, strings.ReplaceAll(c.client.name, " ", "-"))
			args := append([]string{"-Wall", "-Werror", "-o", program, filepath.Join("testdata", "dns", c.source)}, c.flags...)
			if out, err := exec.Command(c.compiler, args...).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			c.client.words = []string{program}
			all = append(all, c.client)
		})
	}
	return all
}

// goResolvers are Go's own resolver, and Go's way to the C library's.
func (b *testNode) goResolvers() (all []dnsClient) {
	for _, resolver := range []string{"go", "cgo"} {
		all = append(all, dnsClient{name: "Go, netdns=" + resolver, words: []string{b.self()},
			env: []string{"ROUTING_TEST_ROLE=look up", "GODEBUG=netdns=" + resolver, "GORACE=atexit_sleep_ms=0"}})
	}
	return all
}

// lookUp is a program in Go: of each name it prints addresses of both families and of each one, the
// canonical name, and other records.
func lookUp(names string) error {
	ctx := context.Background()
	var r net.Resolver
	for name := range strings.FieldsSeq(names) {
		show := func(what string, found any, err error) {
			var failure *net.DNSError
			switch {
			case errors.As(err, &failure) && failure.IsNotFound:
				found = "not found"
			case err != nil:
				found = err
			}
			fmt.Println(name, what, found)
		}
		for _, network := range []string{"ip", "ip4", "ip6"} {
			found, err := r.LookupNetIP(ctx, network, name)
			show(network, found, err)
		}
		canonical, err := r.LookupCNAME(ctx, name)
		show("CNAME", canonical, err)
		mx, err := r.LookupMX(ctx, name)
		show("MX", mx, err)
		txt, err := r.LookupTXT(ctx, name)
		show("TXT", txt, err)
		_, srv, err := r.LookupSRV(ctx, "", "", name)
		show("SRV", srv, err)
	}
	return nil
}

// run returns what the client prints for the names, in a pod.
func (c dnsClient) run(t *testing.T, podCommand func(...string) *exec.Cmd, names ...string) string {
	t.Helper()
	cmd := podCommand(append(slices.Clone(c.words), names...)...)
	cmd.Env = append(os.Environ(), "ROUTING_TEST_ARG="+strings.Join(names, " "))
	cmd.Env = append(cmd.Env, c.env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", c.name, err, out)
	}
	return string(out)
}

// TestDNSLibraries: musl, glibc and c-ares find the address, and those that ask for all names from
// one socket get each answer from where it belongs. What they do with sockets differs:
//
//   - musl asks for A and AAAA of a name from one socket, and takes another one for the next name.
//   - glibc does so too, with single-request (one after the other) and without (at once), and with
//     single-request-reopen takes a socket for each. With RES_STAYOPEN it keeps one for all names.
//   - c-ares has one socket for all look-ups that are under way at once.
func TestDNSLibraries(t *testing.T) {
	t.Parallel()
	libraries := cLibraries(t)
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		servers, answered := dnsNode(b)
		b.install(b.plan)
		for _, option := range []string{"", "single-request", "single-request-reopen"} {
			podCommand := b.podCommand(option)
			for _, c := range libraries {
				names := []string{"a.example.", dnsName + ".", "b.example.", "c.example.", dnsName + "."}
				if !c.absolute {
					names[4] = dnsName // by way of the search list
				}
				want := ""
				for _, name := range names {
					found := "192.0.2.1"
					if strings.HasPrefix(name, dnsName) {
						found = "169.254.169.254"
					}
					want += name + " " + found + "\n"
				}
				if c.oneSocket {
					want += "sockets: 1\n"
				}
				other := servers.was("a.example.") + servers.was("b.example.") + servers.was("c.example.")
				if got := c.run(t, podCommand, names...); got != want {
					t.Errorf("%s, options %s: got\n%swant\n%s", c.name, option, got, want)
				}
				if n := servers.was("a.example.") + servers.was("b.example.") + servers.was("c.example.") - other; n < 3 {
					t.Errorf("%s, options %s: %d other queries came to the name server", c.name, option, n)
				}
			}
		}
		if n := servers.was(dnsName + "."); n != 0 {
			t.Errorf("%d queries for the name went to the name server", n)
		}
		if n := answered(dns.Refused) + answered(dns.Malformed); n != 0 {
			t.Errorf("%d other queries came to the emulator", n)
		}
	})
}

// TestDNSStorm: with ndots:5 and three search domains, as kubelet writes them, one look-up of the
// name is eight queries: of two types for four names. Without `dns: answer` the name server has all
// of them. With it the name server has none, and the node answers those that the client still
// sends.
func TestDNSStorm(t *testing.T) {
	t.Parallel()
	libraries := cLibraries(t)
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		servers, answered := dnsNode(b)
		podCommand := b.podCommand("")
		getent := dnsClient{name: "getent", words: []string{"getent", "ahosts"}}
		clients := slices.DeleteFunc(append(slices.Clone(libraries), getent),
			func(c dnsClient) bool { return c.absolute })
		off := b.plan
		off.DNS = false
		look := func(c dnsClient, name string) (questions, queries, here int) {
			t.Helper()
			servers.forget()
			before := answered(dns.Address) + answered(dns.Empty) + answered(dns.NXDomain)
			_, _ = podCommand(append(slices.Clone(c.words), name)...).CombinedOutput() // getent fails where there is no address
			here = answered(dns.Address) + answered(dns.Empty) + answered(dns.NXDomain) - before
			return servers.questions(dnsName + "."), servers.was(dnsName + "."), here
		}
		for _, c := range []struct {
			plan Plan
			name string
			want [2]int // questions at the name server, and at the node
		}{
			{off, dnsName, [2]int{8, 0}},
			{off, dnsName + ".", [2]int{2, 0}},
			{b.plan, dnsName, [2]int{0, 8}},
			{b.plan, dnsName + ".", [2]int{0, 2}},
		} {
			b.install(c.plan)
			for _, client := range clients {
				questions, queries, here := look(client, c.name)
				t.Logf("dns: answer %t, %s, %s: %d questions in %d queries at the name server, %d queries at the node",
					c.plan.DNS, client.name, c.name, questions, queries, here)
				// A client repeats a query after seconds, if the machine is that slow.
				if questions != c.want[0] || (queries > 0) != (c.want[0] > 0) || here < c.want[1] || (here > 0) != (c.want[1] > 0) {
					t.Errorf("dns: answer %t, %s, %s: %d questions in %d queries at the name server, %d queries at the node, want %d "+
						"and %d", c.plan.DNS, client.name, c.name, questions, queries, here, c.want[0], c.want[1])
				}
			}
		}
	})
}
