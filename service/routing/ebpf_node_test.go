package routing

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/bpf"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// bpfNode is a root of cgroups and a bpf file system of the test's own. Nothing is ever attached to
// the machine's root of cgroups, and the file system is mounted nowhere: both are gone with the
// test, and the programs with them.
type bpfNode struct {
	*testNode
	cgroups string // below the machine's hierarchy; stands for its root
	bpffs   string
}

func newBPFNode(t testing.TB, b *testNode) *bpfNode {
	t.Helper()
	return &bpfNode{testNode: b, cgroups: testCgroups(t), bpffs: netnstest.MountBPF(t)}
}

// testCgroups makes a cgroup with the host's slices and a pod's below it.
func testCgroups(t testing.TB) string {
	t.Helper()
	root := cgroup2()
	if root == "" {
		netnstest.Lacks(t, fmt.Errorf("no cgroup v2 hierarchy is mounted"))
	}
	dir, err := os.MkdirTemp(root, fmt.Sprintf("gme-test-%d-", os.Getpid()))
	if err != nil {
		netnstest.Lacks(t, err)
	}
	t.Cleanup(func() { removeCgroup(t, dir) })
	for _, c := range []string{"system.slice", "kubepods.slice", podCgroup} {
		if err := os.MkdirAll(filepath.Join(dir, c), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

const podCgroup = "kubepods.slice/kubepods-pod11111111_1111_1111_1111_111111111111.slice"

// removeCgroup removes the cgroup and what is below it. The processes in it have been waited for.
func removeCgroup(t testing.TB, dir string) {
	t.Helper()
	below, _ := filepath.Glob(filepath.Join(dir, "*", "cgroup.procs"))
	for _, c := range below {
		removeCgroup(t, filepath.Dir(c))
	}
	if err := unix.Rmdir(dir); err != nil {
		t.Errorf("remove cgroup %s: %v", dir, err)
	}
}

// in has the command start in a cgroup of the testNode.
func (b *bpfNode) in(cgroup string, cmd *exec.Cmd) *exec.Cmd {
	b.t.Helper()
	dir, err := os.Open(filepath.Join(b.cgroups, cgroup))
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { _ = dir.Close() })
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	return cmd
}

// asks has a process of the cgroup ask from the network namespace.
func (b *bpfNode) asks(cgroup string, ns *netnstest.NS, at string) (string, error) {
	b.t.Helper()
	cmd := b.in(cgroup, ns.Command(b.t.Context(), b.self()))
	cmd.Env = append(os.Environ(), "ROUTING_TEST_ROLE=ask", "ROUTING_TEST_ARG="+at)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%w: %s%s", err, out, stderr.String())
	}
	return string(out), nil
}

// answersIn fails unless who answers a process of the cgroup.
func (b *bpfNode) answersIn(cgroup string, ns *netnstest.NS, at, who string) {
	b.t.Helper()
	got, err := b.asks(cgroup, ns, at)
	if who == "" && err == nil || who != "" && got != who {
		b.t.Errorf("%s, %s asked %s: %q answered (%v), want %q", cgroup, ns.Name, at, got, err, who)
	}
}

// load has a process of the cgroup ask again and again until end, which fails if a request was not
// answered by an emulator.
func (b *bpfNode) load(cgroup string, ns *netnstest.NS) (end func()) {
	b.t.Helper()
	cmd := b.in(cgroup, ns.Command(b.t.Context(), b.self()))
	cmd.Env = append(os.Environ(), "ROUTING_TEST_ROLE=load", "ROUTING_TEST_ARG=169.254.169.254:80")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		b.t.Fatal(err)
	}
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	return func() {
		b.t.Helper()
		_ = stdin.Close()
		if err := cmd.Wait(); err != nil {
			b.t.Errorf("%v: %s", err, out.String())
		}
		b.t.Log(strings.TrimSpace(out.String()))
	}
}

func (b *bpfNode) pins() bpf.Pins {
	return Plan{
		BPFDir:     filepath.Join(b.bpffs, "gke-metadata-emulator"),
		CgroupRoot: b.cgroups,
	}.pins(
		ModeEBPF,
		bpf.RedirectHooks,
	)
}

func (b *bpfNode) at(port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr("169.254.169.252"), port)
}

// nothing is a program that lets everything pass.
func nothing() asm.Instructions { return asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()} }

func (b *bpfNode) rewriting() bpf.Rewriting {
	b.t.Helper()
	r := bpf.Rewriting{Server: metadataServer, Listen: netip.MustParseAddrPort("169.254.169.252:988")}
	if err := b.Do(func() (err error) { r.HostNet, err = bpf.HostNetwork(); return err }); err != nil {
		b.t.Fatal(err)
	}
	return r
}
