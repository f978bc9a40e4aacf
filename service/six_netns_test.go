package service

import (
	"net"
	"strings"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
)

// TestSix has pods ask at [fd20:ce::254]:80 (H-24): they are known by the kernel's evidence, which finds an IPv6 socket too, and whose
// Kubernetes' pod address is IPv4 alone.
func TestSix(t *testing.T) {
	for _, mode := range []string{"iptables", "nftables"} {
		t.Run(mode, func(t *testing.T) {
			k := newKernelBedIn(t, routing.Plan{Mode: mode})
			var pods []*podBed
			for _, name := range []string{"a", "b"} {
				ns, err := k.node.AddPod(name)
				if err != nil {
					t.Fatal(err)
				}
				p := k.newPod(name, ns)
				if err := p.start(); err != nil {
					t.Fatal(err)
				}
				p.tell()
				pods = append(pods, p)
			}
			for _, p := range pods {
				for range 2 {
					a, err := p.ask("six", accts+"default/token")
					if err != nil || a.Status != 200 || k.subjectOf(t, a.Body) != "default:"+p.Name {
						t.Errorf("%s: %+v, %v", p.Name, a, err)
					}
				}
				if a, err := p.ask("fresh", accts+"default/token"); err != nil || k.subjectOf(t, a.Body) != "default:"+p.Name {
					t.Errorf("%s by IPv4: %+v, %v", p.Name, a, err)
				}
			}
			log := k.log.String()
			for _, want := range []string{`"evidence":"cgroup"`, `"container":"` + pods[0].container, `"container":"` + pods[1].container} {
				if !strings.Contains(log, want) {
					t.Errorf("the log has no %s", want)
				}
			}
			neighbour, err := k.node.AddNeighbour("neighbour")
			if err != nil {
				t.Fatal(err)
			}
			for _, to := range []string{"fd20:ce::254", "fd20:ce::252"} {
				if out, err := neighbour.Command(t.Context(), "ip", "-6", "route", "add", to, "via", k.node.Six.String()).CombinedOutput(); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
			}
			for _, at := range []string{"[fd20:ce::254]:80", "[fd20:ce::252]:988"} {
				err := neighbour.Do(func() error {
					c, err := net.DialTimeout("tcp", at, time.Second/2)
					if err == nil {
						_ = c.Close()
					}
					return err
				})
				if err == nil {
					t.Errorf("the neighbour is connected to %s", at)
				}
			}
			st := statusOf(t, k.dir)
			var text strings.Builder
			if err := st.Text(&text, time.Now()); err != nil {
				t.Fatal(err)
			}
			for _, want := range []string{"169.254.169.252:988 and [fd20:ce::252]:988, ", "mode " + mode + " to 169.254.169.252:988 and [fd20:ce::252]:988"} {
				if !strings.Contains(text.String(), want) {
					t.Errorf("status has no %q:\n%s", want, &text)
				}
			}
		})
	}
}
