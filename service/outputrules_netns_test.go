package service

import (
	"cmp"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/doctor"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
)

// rejectLinkLocal is what images of Oracle's cloud have: the node itself may send to a few services
// of 169.254.0.0/16 alone.
const rejectLinkLocal = `%[1]s-restore --noflush <<'END'
*filter
:LinkLocal - [0:0]
-A OUTPUT -d 169.254.0.0/16 -j LinkLocal
-A LinkLocal -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j ACCEPT
-A LinkLocal -d 169.254.169.254/32 -p udp -m udp --dport 53 -j ACCEPT
-A LinkLocal -d 169.254.0.0/16 -p tcp -m tcp -j REJECT --reject-with tcp-reset
-A LinkLocal -d 169.254.0.0/16 -p udp -m udp -j REJECT --reject-with icmp-port-unreachable
COMMIT
END`

// TestOutputRejects: where a rule in OUTPUT rejects what the node sends to the listener, the
// service is READY, its watchdog is notified, and pods are served. In mode iptables the node's own
// processes are too; a table of our own cannot overrule the rule, and doctor names it.
func TestOutputRejects(t *testing.T) {
	t.Parallel()
	onEachDNAT(t, func(t *testing.T, plan routing.Plan) {
		k := newKernelNodeIn(t, plan, "hostIdentities: [{unit: kubelet.service, serviceAccount: default/plain}]")
		k.kill(k.server)
		k.run(fmt.Sprintf(rejectLinkLocal, cmp.Or(plan.Binary, "iptables-nft")))
		notified := k.notifySocket()
		k.server = k.command(filepath.Join(k.dir, "config.yaml"))
		k.server.Stderr = k.log
		k.server.Env = append(k.server.Env, "NOTIFY_SOCKET="+notified.path, "WATCHDOG_USEC=600000")
		if err := k.cgroups.Start(k.node.NS, "/system.slice/gke-metadata-emulator.service", k.server); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { k.kill(k.server) })
		notified.wait(t, "READY=1")
		for range 3 {
			notified.wait(t, "WATCHDOG=1")
		}
		k.eventually(t, "pods are known", func() bool {
			st := statusOf(t, k.dir)
			return st.Cluster != nil && st.Cluster.Watching && st.Attestation.Kernel.Helper
		})

		ns, err := k.node.AddPod("pod")
		if err != nil {
			t.Fatal(err)
		}
		pod, host := k.newPod("pod", ns), k.newPod("host", k.node.NS)
		kubelet := k.newPod("kubelet", k.node.NS)
		kubelet.cgroup = "/system.slice/kubelet.service"
		for _, p := range []*podNode{pod, host, kubelet} {
			if err := p.start(); err != nil {
				t.Fatal(err)
			}
		}
		pod.tell()
		host.tell()
		if a := pod.served(t, accts+"default/token"); a.Status != 200 || k.subjectOf(t, a.Body) != "default:pod" {
			t.Errorf("the pod: %+v", a)
		}
		overruled := plan.Mode == routing.ModeIPTables
		for p, how := range map[*podNode]string{host: "169.254.169.254:80,,2s", kubelet: "169.254.169.252:988,,2s"} {
			a, err := p.ask(how, accts+"default/token")
			if err != nil || (a.Status == 200) != overruled || (a.Err == "") != overruled {
				t.Errorf("%s: %+v, %v", p.Name, a, err)
			}
		}
		st := statusOf(t, k.dir)
		if (st.Unreachable == "") != overruled {
			t.Errorf("unreachable: %q", st.Unreachable)
		}
		var text strings.Builder
		err = st.Text(&text, time.Now())
		if err != nil || strings.Contains(text.String(), "the node's own connections fail") == overruled {
			t.Errorf("%v:\n%s", err, &text)
		}

		found := k.doctor(t)["listener"]
		named := found.Verdict == doctor.Warn && strings.Contains(found.Finding, "nft chain ip filter LinkLocal (rule: ")
		if named == overruled || overruled && found.Verdict != doctor.OK {
			t.Errorf("doctor's own connection: %+v", found)
		}
	})
}

// notifications are what the service tells systemd.
type notifications struct {
	*net.UnixConn
	path string
}

func (k *kernelNode) notifySocket() notifications {
	k.t.Helper()
	path := filepath.Join(k.dir, "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() { _ = c.Close() })
	return notifications{c, path}
}

// wait reads until a notification begins with prefix.
func (n notifications) wait(t *testing.T, prefix string) {
	t.Helper()
	_ = n.SetReadDeadline(time.Now().Add(testTimeout))
	for b := make([]byte, 4096); ; {
		size, err := n.Read(b)
		if err != nil {
			t.Fatalf("waiting for %s: %v", prefix, err)
		}
		if strings.HasPrefix(string(b[:size]), prefix) {
			return
		}
	}
}
