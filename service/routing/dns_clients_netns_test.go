package routing

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/compute/metadata"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/dns"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// resolveAs is a process that asks one server, and prints the answer.
func resolveAs(arg string) error {
	server, name, _ := strings.Cut(arg, " ")
	c, err := net.Dial("udp", server)
	if err != nil {
		return err
	}
	defer c.Close()
	r := &resolver{c: c}
	if err := r.send(name, dnsmessage.TypeA); err != nil {
		return err
	}
	_, answer, err := r.receive(long)
	fmt.Print(answer)
	return err
}

// detect is a program of Google's library that looks whether it is on Google Cloud.
func detect() error {
	fmt.Print(metadata.OnGCE())
	return nil
}

// TestDNSHostPods: pods on the host network are answered where their requests are redirected, and
// the node's own processes never are.
func TestDNSHostPods(t *testing.T) {
	t.Parallel()
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		dnsNode(b)
		n := newBPFNode(t, b)
		b.plan.InterceptHostPods = "on"
		slice, err := filepath.Rel(cgroup2(), filepath.Join(n.cgroups, "system.slice")) // rules have paths from the root
		if err != nil {
			t.Fatal(err)
		}
		r := b.router(b.plan).(*router)
		r.hostCgroups = []string{slice}
		do := func(f func(context.Context) error) {
			t.Helper()
			if err := b.Do(func() error { return f(t.Context()) }); err != nil {
				t.Fatal(err)
			}
		}
		resolves := func(cgroup, server, want string) {
			t.Helper()
			cmd := n.in(cgroup, b.play("resolve", server+" "+dnsName+".", b.self()))
			if out, err := cmd.CombinedOutput(); err != nil || string(out) != want {
				t.Errorf("%s asked %s: %q (%v), want %q", cgroup, server, out, err, want)
			}
		}
		before := b.ruleset()
		do(r.Install)
		do(r.Check)
		for _, server := range []string{cloudDNS, clusterDNS, cachedDNS} {
			resolves(podCgroup, server, "169.254.169.254")
			resolves("system.slice", server, "NameError")
		}
		b.resolves(b.pod, clusterDNS, dnsName+".", dnsmessage.TypeA, "169.254.169.254")
		do(r.Remove)
		b.requireEqual("remove", b.ruleset(), before)
		resolves(podCgroup, cloudDNS, "NameError")
	})
}

// TestDNSElsewhere: queries are forwarded to an emulator in a namespace of its own, and back.
func TestDNSElsewhere(t *testing.T) {
	t.Parallel()
	onBothBackends(t, func(t *testing.T, b *testNode) {
		box, err := b.AddRoutedPod("box")
		if err != nil {
			t.Fatal(err)
		}
		b.plan.Listen = netip.AddrPortFrom(box.Addr, 988)
		dnsNodeAt(b, box)
		b.run("iptables -A FORWARD -p udp --dport 53 -j ACCEPT; iptables -A FORWARD -p udp --sport 53 -j ACCEPT; " +
			"iptables -P FORWARD DROP")
		before := b.ruleset()
		b.install(b.plan)
		b.requireOK(b.plan)
		b.resolves(b.pod, clusterDNS, dnsName+".", dnsmessage.TypeA, "169.254.169.254")
		b.resolves(b.pod, clusterDNS, "example.com.", dnsmessage.TypeA, "192.0.2.1")
		b.resolves(b.pod, b.plan.Listen.String(), dnsName+".", dnsmessage.TypeA, "")
		b.remove(b.plan)
		b.requireEqual("remove", b.ruleset(), before)
	})
}

// TestDNSWithoutBPF: a node whose kernel or iptables has no match of BPF serves requests all the
// requireEqual, and says why it answers no queries.
func TestDNSWithoutBPF(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	dnsNode(b)
	dir := t.TempDir()
	for _, command := range []string{"iptables-nft", "iptables-nft-restore", "ip6tables-nft", "ip6tables-nft-restore"} {
		path, err := exec.LookPath(command)
		if err != nil {
			t.Fatal(err)
		}
		text := "#!/bin/sh\ntext=$(cat)\ncase $text in *bytecode*) echo \"Couldn't load match 'bpf'\" >&2; exit 2;; esac\n" +
			"echo \"$text\" | exec " + path + " \"$@\"\n"
		if !strings.HasSuffix(command, "restore") {
			err = os.Symlink(path, filepath.Join(dir, command))
		} else {
			err = os.WriteFile(filepath.Join(dir, command), []byte(text), 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	before := b.ruleset()
	b.plan.Binary = filepath.Join(dir, "iptables-nft")
	b.install(b.plan)
	b.requireOK(b.plan)
	b.answers(b.pod, "169.254.169.254:80", emulator)
	b.resolves(b.pod, clusterDNS, dnsName+".", dnsmessage.TypeA, "NameError")
	s, err := ReadState(b.plan.RunDir)
	if err != nil || !strings.Contains(s.DNSRefused, "load match 'bpf'") || !s.DNS || !s.Standing.Good {
		t.Errorf("%+v, %v", s, err)
	}
	w := b.watch(b.plan, time.Hour)
	if got := w.state(); !got.Standing.Good || got.Installs != s.Installs {
		t.Errorf("the watcher tries again: %+v", got)
	}
	w.end()
	b.plan.Binary = "iptables-nft" // the module came
	b.install(b.plan)
	b.requireOK(b.plan)
	b.resolves(b.pod, clusterDNS, dnsName+".", dnsmessage.TypeA, "169.254.169.254")
	b.remove(b.plan)
	b.requireEqual("remove", b.ruleset(), before)
}

// podCommand returns what makes a command of a pod, whose resolver asks the cluster's name server
// as kubelet has it, with one more option.
func (b *testNode) podCommand(option string) func(words ...string) *exec.Cmd {
	b.t.Helper()
	netnstest.Needs(b.t, "unshare", "mount")
	resolv := filepath.Join(b.t.TempDir(), "resolv.conf")
	host, _, _ := strings.Cut(clusterDNS, ":")
	if err := os.WriteFile(resolv, []byte("nameserver "+host+"\nsearch default.svc.cluster.local svc.cluster.local "+
		"cluster.local\noptions ndots:5 "+option+"\n"), 0o644); err != nil {
		b.t.Fatal(err)
	}
	return func(words ...string) *exec.Cmd {
		return b.pod.Command(b.t.Context(), "unshare", append([]string{"-m", "sh", "-c",
			`mount --bind "$0" /etc/resolv.conf && exec "$@"`, resolv}, words...)...)
	}
}

// TestDNSOfTheCLibrary: glibc finds the address, by way of the search list and without it, and asks
// the name server for none of the names below ours.
func TestDNSOfTheCLibrary(t *testing.T) {
	t.Parallel()
	netnstest.Needs(t, "getent")
	onEveryDNAT(t, func(t *testing.T, b *testNode) {
		servers, answered := dnsNode(b)
		podCommand := b.podCommand("")
		b.install(b.plan)
		for _, name := range []string{dnsName, dnsName + "."} {
			out, err := podCommand("getent", "ahosts", name).CombinedOutput()
			if err != nil || !strings.HasPrefix(string(out), "169.254.169.254 ") {
				t.Errorf("%s: %s (%v)", name, out, err)
			}
		}
		if n := servers.was(dnsName + "."); n != 0 || answered(dns.NXDomain) == 0 {
			t.Errorf("%d queries came to the name server, and %d of the search list's to us", n, answered(dns.NXDomain))
		}
	})
}

// TestDNSDetection: in a pod whose name server says NXDOMAIN at once, fresh processes of Google's
// Go library all find that they are on Google Cloud, by Go's resolver and by the C library's.
func TestDNSDetection(t *testing.T) {
	t.Parallel()
	b := newTestNode(t, "iptables-nft")
	b.plan.Listen = netip.MustParseAddrPort("169.254.169.251:988") // beside the testNode's, which speaks no HTTP
	servers, _ := dnsNode(b)
	l, err := b.Listen("tcp", b.plan.Listen.String())
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Metadata-Flavor", "Google")
		}))
	}()
	podCommand := b.podCommand("")
	processes := 25
	if os.Getenv("GME_DNS_LONG") != "" { // the figures of docs/clients.md
		processes = 200
	}
	found := func(resolver string) (n int) {
		t.Helper()
		for range processes {
			cmd := podCommand(b.self())
			cmd.Env = append(os.Environ(), "ROUTING_TEST_ROLE=detect", "GODEBUG=netdns="+resolver)
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if string(out) == "true" {
				n++
			}
		}
		return n
	}
	off := b.plan
	off.DNS = false
	b.install(off)
	for _, resolver := range []string{"go", "cgo"} {
		t.Logf("without: %d of %d by netdns=%s", found(resolver), processes, resolver)
	}
	if servers.was(dnsName+".") == 0 {
		t.Fatal("nobody asked the name server: is this test looking where it should?")
	}
	b.install(b.plan)
	asked := servers.was(dnsName + ".")
	for _, resolver := range []string{"go", "cgo"} {
		n := found(resolver)
		t.Logf("with: %d of %d by netdns=%s", n, processes, resolver)
		if n != processes {
			t.Errorf("%d of %d processes found Google Cloud by netdns=%s", n, processes, resolver)
		}
	}
	if n := servers.was(dnsName+".") - asked; n != 0 {
		t.Errorf("%d queries for the name went to the name server", n)
	}
}
