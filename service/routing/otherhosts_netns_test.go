package routing

import (
	"context"
	"net"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// modeNode is a testNode whose emulator listens where the mode has it.
func modeNode(t testing.TB, name string) *testNode {
	t.Helper()
	var b *testNode
	switch name {
	case "iptables-nft", "iptables-legacy":
		return newTestNode(t, name)
	case ModeNFTables:
		return nftNode(t)
	case ModeLoopback:
		b = nftNode(t)
		b.plan.Mode, b.plan.Listen, b.plan.Force = ModeLoopback, metadataServer, true // the testNode's cloud answers the host
		b.serveTransparent(emulator)
	case "linked":
		b = modeNode(t, ModeLoopback)
		b.run("ip link add gme0 type bridge") // whether the kernel has dummy links or not
		b.plan.Link = "gme0"
	case ModeNone:
		b = nftNode(t)
		b.plan.Mode = ModeNone
	case ModeEBPF:
		return ebpfNode(t).testNode
	default:
		t.Fatal(name)
	}
	return b
}

// serveTransparent has an emulator listen at the metadata server's own address.
func (b *testNode) serveTransparent(who string) {
	b.t.Helper()
	if err := b.Do(func() error {
		lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
			_ = c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1) })
			return err
		}}
		l, err := lc.Listen(context.Background(), "tcp", metadataServer.String())
		if err == nil {
			b.t.Cleanup(func() { _ = l.Close() })
			go answerAll(l, who)
		}
		return err
	}); err != nil {
		b.t.Fatal(err)
	}
}

// TestTwoChecks: in every mode each of two chains alone keeps a neighbour out, and without
// both it gets in: so they are what kept it.
func TestTwoChecks(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		mode string
		open []string // each opens one check
	}{
		{"iptables-nft", []string{"iptables -t raw -F", "iptables -F"}},
		{"iptables-legacy", []string{"iptables -t raw -F", "iptables -F"}},
		{ModeNFTables, []string{"nft flush chain ip gke-metadata-emulator raw",
			"nft flush chain ip gke-metadata-emulator input"}},
		{ModeLoopback, []string{"nft flush chain ip gke-metadata-emulator raw; nft flush chain ip gke-metadata-emulator " +
			"input",
			"ip rule del pref 97 iif eth0 to 169.254.169.254"}},
		{"linked", []string{"nft flush chain ip gke-metadata-emulator raw",
			"nft flush chain ip gke-metadata-emulator input"}},
		{ModeNone, []string{"nft flush chain ip gke-metadata-emulator raw",
			"nft flush chain ip gke-metadata-emulator input"}},
		{ModeEBPF, []string{"nft flush chain ip gke-metadata-emulator raw",
			"nft flush chain ip gke-metadata-emulator input"}},
	} {
		t.Run(c.mode, func(t *testing.T) {
			b := modeNode(t, c.mode)
			b.install(b.plan)
			for _, to := range []string{"169.254.169.254", "169.254.169.252"} {
				if out, err := b.neighbour.Command(t.Context(), "ip", "route", "add", to+"/32", "via",
					b.Addr.String()).CombinedOutput(); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
			}
			refused := func(how string) {
				t.Helper()
				for _, at := range slices.Compact([]string{"169.254.169.254:80", b.plan.Listen.String()}) {
					if who, err := ask(b.neighbour, at, short); who != "" {
						t.Errorf("%s: %s answered the neighbour at %s (%v)", how, who, at, err)
					}
				}
			}
			refused("installed")
			for _, open := range c.open {
				b.run(open)
				refused(open)
				if err := b.check(b.plan); err == nil {
					t.Errorf("%s: check finds nothing", open)
				}
				b.install(b.plan)
				b.requireOK(b.plan)
			}
			b.run(strings.Join(c.open, "; "))
			b.answers(b.neighbour, b.plan.Listen.String(), emulator)
		})
	}
}
