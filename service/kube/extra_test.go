package kube

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/klog/v2"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
)

// Metrics have few labels and no names of pods or accounts.
func TestMetrics(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	b := run(t, s, nil)
	if age := b.watchAge(); age != -1 && age != 0 {
		t.Errorf("age before the first contact: %v", age)
	}
	b.at(t, "10.1.0.11", "p1")
	b.account(t, ksa, -1, linked)
	if _, err := b.Token(t.Context(), ksa); err == nil {
		t.Error("a token without the grant")
	}
	s.GrantAudience(provider)
	if _, err := b.Token(t.Context(), ksa); err != nil {
		t.Error(err)
	}
	families, err := b.gather.Gather()
	if err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprint(families)
	for _, want := range []string{
		`name:"code" value:"200"} label:{name:"resource" value:"pods"} label:{name:"verb" value:"watch"}`,
		`name:"code" value:"200"} label:{name:"resource" value:"serviceaccounts"} label:{name:"verb" value:"get"}`,
		`name:"code" value:"403"} label:{name:"resource" value:"serviceaccounts/token"} label:{name:"verb" value:"create"}`,
		`name:"code" value:"201"} label:{name:"resource" value:"serviceaccounts/token"} label:{name:"verb" value:"create"}`,
		`gke_metadata_emulator_pods"`, `gke_metadata_emulator_pod_watch_age_seconds"`,
	} {
		if !strings.Contains(strings.ReplaceAll(text, "  ", " "), want) {
			t.Errorf("no %s in\n%s", want, text)
		}
	}
	for _, name := range []string{"p1", "ksa", "10.1.0.11", "node1"} {
		if strings.Contains(text, `"`+name+`"`) {
			t.Errorf("a label is %q", name)
		}
	}
}

// Client-go's own lines go where ours go, at debug, and the fine levels, which hold headers and
// bodies, nowhere.
func TestRouteKlog(t *testing.T) {
	to := new(buffer)
	l := logrus.New()
	l.SetOutput(to)
	l.SetLevel(logrus.TraceLevel)
	RouteKlog(l)
	defer klog.ClearLogger()
	klog.Background().WithName("part").WithValues("a", 1).Info("a line", "b", 2)
	klog.Background().Error(errors.New("broken"), "an error")
	klog.Background().V(8).Info("Request Body")
	log := to.String()
	for _, want := range []string{`level=debug msg="a line" a=1 b=2 logger=part`,
		`level=debug msg="an error" error=broken`} {
		if !strings.Contains(log, want) {
			t.Errorf("no %q in:\n%s", want, log)
		}
	}
	if strings.Contains(log, "Request Body") {
		t.Error("bodies are logged")
	}
}

// Before Run there is an answer too.
func TestBeforeRun(t *testing.T) {
	c := New(Options{})
	var away *AwayError
	if _, _, err := c.At(netip.MustParseAddr("10.0.0.1")); !errors.As(err, &away) {
		t.Errorf("At: %v", err)
	}
	if _, err := c.Token(t.Context(), ksa); !errors.As(err, &away) {
		t.Errorf("Token: %v", err)
	}
	if st := c.Status(); st.Synced || st.Pods == nil || st.LastContact != nil {
		t.Errorf("status %+v", st)
	}
}

func BenchmarkAt(b *testing.B) {
	c := New(Options{})
	c.pods.synced = true
	c.pods.watching.Store(true)
	c.pods.live = map[types.NamespacedName]*pod{}
	for i := range 110 {
		p := &pod{addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 1, 0, byte(i)})}}
		p.caller.PodName = string(rune('a' + i))
		c.pods.live[types.NamespacedName{Name: p.caller.PodName}] = p
	}
	c.pods.publish()
	a := netip.MustParseAddr("10.1.0.11")
	b.ReportAllocs()
	for b.Loop() {
		if cs, _, err := c.At(a); err != nil || len(cs) != 1 {
			b.Fatal(err)
		}
	}
}
