package routing

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/bpf"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// TestRewriting: each way to connect, as a pod, as a pod on the host network and as a daemon of the
// host.
func TestRewriting(t *testing.T) {
	t.Parallel()
	b := newBPFNode(t, newTestNode(t, "iptables-nft"))
	b.run("ip address add 169.254.169.252/32 dev lo")
	p, r := b.pins(), b.rewriting()
	r.HostPods, r.Spared = true, []uint64{bpf.CgroupID(b.cgroups + "/system.slice")}
	if err := p.Install(r); err != nil {
		t.Fatal(err)
	}
	const real, other = "169.254.169.254:80", "169.254.169.252:988"
	for _, c := range []struct{ how, at, cgroup, want string }{
		{"tcp", real, podCgroup, "emulator " + real}, // getpeername() tells what was asked for
		{"tcp", other, podCgroup, "emulator " + real},
		{"mapped", "[::ffff:169.254.169.254]:80", podCgroup, "emulator [::ffff:169.254.169.254]:80"},
		{"mptcp", real, podCgroup, "emulator " + real},
		{"fastopen", real, podCgroup, "emulator " + real},
		{"udp", real, podCgroup, real},
		{"udp", other, podCgroup, other},
		{"tcp", "169.254.169.254:53", podCgroup, "cloud 169.254.169.254:53"},
		{"tcp", "169.254.169.254:443", podCgroup, "cloud 169.254.169.254:443"},
		// The pod's network namespace is all that counts: runtimes put pods into the host's slices too.
		{"tcp", real, "system.slice", "emulator " + real},
	} {
		cmd := b.in(c.cgroup, b.pod.Command(t.Context(), b.self()))
		cmd.Env = append(os.Environ(), "ROUTING_TEST_ROLE=connect", "ROUTING_TEST_ARG="+c.how+" "+c.at)
		out, err := cmd.CombinedOutput()
		if got := string(out); got != c.want {
			t.Errorf("%s to %s in %s: %q (%v), want %q", c.how, c.at, c.cgroup, got, err, c.want)
		}
	}
	b.answersIn(podCgroup, b.NS, real, emulator)
	b.answersIn("system.slice", b.NS, real, cloud)
	r.HostPods = false
	if err := p.Install(r); err != nil {
		t.Fatal(err)
	}
	b.answersIn(podCgroup, b.NS, real, cloud)
	b.answersIn(podCgroup, b.pod, real, emulator)
}

// TestPins: what stands outlives who made it, is found again, replaced without a loss, and goes
// without a trace.
func TestPins(t *testing.T) {
	t.Parallel()
	b := newBPFNode(t, newTestNode(t, "iptables-nft"))
	b.run("ip address add 169.254.169.252/32 dev lo")
	p, r := b.pins(), b.rewriting()
	foreign := b.attachForeign(t)
	before := b.attachedText(t)
	install := func() {
		t.Helper()
		if err := p.Install(r); err != nil {
			t.Fatal(err)
		}
		if errs := p.Check(r); len(errs) > 0 {
			t.Error(errs)
		}
		b.answersIn(podCgroup, b.pod, "169.254.169.254:80", emulator)
	}
	install()
	first := b.attachedText(t)
	if !strings.Contains(first, fmt.Sprintf("connect4 [%d ", foreign)) {
		t.Errorf("another's program is not where it was: %s", first)
	}
	if got := p.Order(); got != "connect4 2 of 2" {
		t.Errorf("order: %q", got)
	}
	install()
	b.requireEqual("second install", b.attachedText(t), first)

	connect4 := bpf.ObserveHooks[0]
	for _, c := range []struct {
		name string
		harm func() error
		want string
	}{
		{"detached by force", func() error {
			l, err := link.LoadPinnedLink(p.LinkPath(connect4), nil)
			if err != nil {
				return err
			}
			return errors.Join(l.Detach(), l.Close())
		}, "connect4 at " + b.cgroups + ": "},
		{"link's pin removed", func() error { return os.Remove(p.LinkPath(connect4)) }, "connect4 at " + b.cgroups +
			", pinned as " + p.LinkPath(connect4)},
		{"program's pin removed", func() error { return os.Remove(p.ProgramPath(connect4)) }, "connect4: its pin " +
			p.ProgramPath(connect4)},
		{"everything removed", func() error { return os.RemoveAll(p.Dir) }, "connect4 at " + b.cgroups + ", pinned as "},
		{"an install that broke off", func() error {
			return errors.Join(os.Rename(p.ProgramPath(connect4), p.ProgramPath(connect4)+"_next"),
				os.Link(p.ProgramPath(connect4)+"_next", p.ProgramPath(connect4)))
		}, ""},
	} {
		if err := c.harm(); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if got := fmt.Sprint(p.Check(r)); !strings.Contains(got, c.want) {
			t.Errorf("%s: %s, want %q in it", c.name, got, c.want)
		}
		install()
	}

	// Another listen address: clients that connect meanwhile get the old one or the new one.
	b.serve(b.NS, "169.254.169.252:1988", emulator)
	old, end := r, b.load(podCgroup, b.pod)
	for i := range 100 {
		r.Listen = old.Listen
		if i%2 == 0 {
			r.Listen = b.at(1988)
		}
		if err := p.Install(r); err != nil {
			t.Error(err)
		}
	}
	end()

	if err := p.Remove(); err != nil {
		t.Fatal(err)
	}
	b.answersIn(podCgroup, b.pod, "169.254.169.254:80", cloud)
	b.requireEqual("remove", b.attachedText(t), before)
	if _, err := os.Stat(p.Dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory is left behind: %v", err)
	}
	if err := p.Remove(); err != nil {
		t.Errorf("second remove: %v", err)
	}
}

// TestPinsRefusals: each reason why programs cannot be had is reported with the remedy.
func TestPinsRefusals(t *testing.T) {
	t.Parallel()
	netnstest.Needs(t, "setpriv")
	b := newBPFNode(t, newTestNode(t, "iptables-nft"))
	p, r := b.pins(), b.rewriting()
	for _, c := range []struct {
		name string
		p    bpf.Pins
		want string
	}{
		{"cgroup v1", bpf.Pins{Dir: p.Dir, Hooks: p.Hooks}, "use routing mode iptables"},
		{"no bpf file system", bpf.Pins{Dir: t.TempDir() + "/x/ebpf", Root: p.Root}, "mount -t bpf"},
		{"none at all", bpf.Pins{Dir: t.TempDir() + "/x/y/ebpf", Root: p.Root}, "mount -t bpf"},
	} {
		if err := c.p.Install(r); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q in it", c.name, err, c.want)
		}
	}
	// Who attaches alone (an old Cilium) keeps everybody else out.
	alone := b.program(t)
	cgroup, err := os.Open(b.cgroups)
	if err != nil {
		t.Fatal(err)
	}
	defer cgroup.Close()
	if err := link.RawAttachProgram(link.RawAttachProgramOptions{Target: int(cgroup.Fd()), Program: alone,
		Attach: ebpf.AttachCGroupInet4Connect}); err != nil {
		t.Fatal(err)
	}
	if err := p.Install(r); !errors.Is(err, fault.ErrForeign) {
		t.Errorf("%v, want ErrForeign", err)
	}

	cmd := b.play(
		"pins",
		p.Dir+" "+p.Root,
		b.self(),
		"setpriv",
		"--bounding-set=-bpf,-sys_admin,-perfmon",
		"--inh-caps=-bpf,-sys_admin,-perfmon",
		"--",
	)
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "needs root with CAP_BPF and CAP_NET_ADMIN") {
		t.Errorf("without the right: %v: %s", err, out)
	}
}

// program is one that does nothing.
func (b *bpfNode) program(t *testing.T) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(
		&ebpf.ProgramSpec{Name: "foreign", Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect,
			License: "Apache-2.0", Instructions: nothing()},
	)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

// attachForeign attaches another's program to connect4, as Cilium does, and returns its number.
func (b *bpfNode) attachForeign(t *testing.T) ebpf.ProgramID {
	t.Helper()
	p := b.program(t)
	l, err := link.AttachCgroup(link.CgroupOptions{Path: b.cgroups, Attach: ebpf.AttachCGroupInet4Connect, Program: p})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	info, err := p.Info()
	if err != nil {
		t.Fatal(err)
	}
	id, _ := info.ID()
	return id
}

// attached lists the programs at each hook in the order in which they run.
func (b *bpfNode) attachedText(t *testing.T) string {
	t.Helper()
	var text strings.Builder
	all, err := b.pins().Attached(bpf.RedirectHooks...)
	if err != nil {
		t.Fatal(err)
	}
	for i, ids := range all {
		fmt.Fprintf(&text, "%s %v\n", bpf.RedirectHooks[i].Name, ids)
	}
	return text.String()
}
