package service

import (
	"bufio"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
)

// hangUp is `systemctl reload`.
func (b *testNode) hangUp() { b.reload <- syscall.SIGHUP }

// a configuration that is missing or broken is a state; a change of the file ends it.
func TestNotConfigured(t *testing.T) {
	b := newWorld(t)
	b.start(t) // there is no config.yaml
	for _, tt := range []struct {
		path, body string
		status     int
	}{
		{"/", "computeMetadata/\n", 200}, // E-02
		{accts + "default/token", "there is no such file", 503},
		{v1 + "project/project-id", "there is no such file", 503},
	} {
		res := b.ask(t, linked, "GET", tt.path, "")
		if res.StatusCode != tt.status || !strings.Contains(res.body, tt.body) ||
			res.Header.Get("Metadata-Flavor") != "Google" {
			t.Errorf("%s: %d %q, want %d %q", tt.path, res.StatusCode, res.body, tt.status, tt.body)
		}
	}
	if st := b.Status(); st.State != "not configured" || st.Reason == "" {
		t.Errorf("status: %q, %q", st.State, st.Reason)
	}
	b.write(t, "config.yaml", "projectID: my-project\nroutign: {}\n")
	b.eventually(t, "the new faults are reported", func() bool {
		body := b.ask(t, linked, "GET", accts+"default/token", "").body
		return strings.Contains(body, "config.yaml:2: there is no such key: write routing") &&
			strings.Contains(body, "workloadIdentityProvider")
	})
	b.configure(t)
	b.eventually(t, "the mended file is in force", func() bool { return b.active().Broken == nil })
	b.ready(t)
	if res := b.ask(t, linked, "GET", accts+"default/token", ""); res.StatusCode != 200 {
		t.Errorf("%d %s", res.StatusCode, res.body)
	}
}

func TestReload(t *testing.T) {
	b := newTestNode(t)
	b.ready(t)
	first := b.ask(t, linked, "GET", accts+"default/token", "").body
	before := b.active().backend

	// What does not concern the backend keeps it: watch, cache, connections.
	b.replace(t, "config.yaml", "machineTypes/n2-standard-4", "machineTypes/e2-micro")
	b.hangUp()
	b.eventually(t, "the change is in force", func() bool {
		return b.ask(t, linked, "GET", v1+"instance/machine-type", "").body == "projects/1/machineTypes/e2-micro"
	})
	if b.active().backend != before {
		t.Error("another machine type made another backend")
	}
	if again := b.ask(t, linked, "GET", accts+"default/token", "").body; tokenIn(t, again) != tokenIn(t, first) {
		t.Error("a reload threw the cached token away")
	}

	// What does not load changes nothing, and says so.
	good, err := os.ReadFile(filepath.Join(b.dir, "config.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	b.write(t, "config.yaml", string(good)+"prefetch: sometimes\n")
	b.hangUp()
	b.eventually(t, "the fault is logged",
		func() bool { return strings.Contains(b.log.String(), "the previous configuration stays in force") })
	if b.active().backend != before || b.ask(t, linked, "GET", accts+"default/token", "").StatusCode != 200 {
		t.Error("a broken configuration changed something")
	}

	// What concerns the backend replaces it, without a request lost.
	b.write(t, "config.yaml", string(good)+"prefetch: all\n")
	stop, lost := make(chan struct{}), make(chan string, 1000)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				if res := b.ask(t, linked, "GET", accts+"default/token", ""); res.StatusCode != 200 {
					lost <- res.body
				}
			}
		}
	})
	b.hangUp()
	b.eventually(t, "another backend serves", func() bool { return b.active().backend != before })
	close(stop)
	wg.Wait()
	select {
	case body := <-lost:
		t.Errorf("a request was refused during the reload: %s", body)
	default:
	}
}

func tokenIn(t *testing.T, body string) string {
	t.Helper()
	var answer struct {
		AccessToken string `json:"access_token"`
	}
	if err := json.Unmarshal([]byte(body), &answer); err != nil {
		t.Fatalf("%v: %s", err, body)
	}
	return answer.AccessToken
}

// A request that is held, and a mint in flight, when a reload brings another backend.
func TestReloadLosesNothing(t *testing.T) {
	b := newTestNode(t, "prefetch: none")
	b.ready(t)
	b.google.Break(googletest.Exchange, googletest.Fault{Latency: time.Second})
	minted, held := make(chan response, 1), make(chan response, 1)
	go func() { minted <- b.ask(t, linked, "GET", accts+"default/token", "") }()
	b.eventually(t, "it is being minted", func() bool { return b.google.Calls(googletest.Exchange) > 0 })
	const latecomer = "127.0.0.42"
	// 127.0.0.42 is the node's own, and so refused at once; a pod that has the address twice is held
	// like one that is not known.
	b.addPod("one", latecomer, nil)
	b.addPod("two", latecomer, nil)
	b.eventually(t, "two pods have the address", func() bool {
		callers, _, _ := b.active().cluster.At(netip.MustParseAddr(latecomer))
		return len(callers) == 2
	})
	go func() { held <- b.ask(t, latecomer, "GET", accts+"default/email", "") }()
	before := b.active().backend
	b.replace(t, "config.yaml", "prefetch: none", "prefetch: none\nlimits: {keysPerPod: 32}")
	b.hangUp()
	b.eventually(t, "another backend serves", func() bool { return b.active().backend != before })
	b.kube.DeletePod("default", "two")
	if res := receive(t, held); res.StatusCode != 200 {
		t.Errorf("held: %d %s", res.StatusCode, res.body)
	}
	if res := receive(t, minted); res.StatusCode != 200 {
		t.Errorf("in flight: %d %s", res.StatusCode, res.body)
	}
}

// A listen address that a reload changes is followed, or the reload is refused; what the rules lead
// to decides readiness.
func TestListenChanges(t *testing.T) {
	b := newTestNode(t)
	b.ready(t)
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b.replace(t, "config.yaml", "listen: 127.0.0.1:0\n", "listen: "+other.Addr().String()+"\n")
	b.hangUp()
	b.eventually(t, "the reload is refused",
		func() bool { return strings.Contains(b.log.String(), "the previous configuration stays in force") })
	b.write(t, "routing.json", `{"desired":"installed","mode":"iptables","listen":"`+other.Addr().String()+`"}`)
	if err := b.readiness(t.Context()); err == nil || !strings.Contains(err.Error(), other.Addr().String()) {
		t.Errorf("the rules lead elsewhere, and readiness is %v", err)
	}
	other.Close()
	b.hangUp()
	b.eventually(t, "the new address is served", func() bool { return b.readiness(t.Context()) == nil })
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(linked)}}
	c, err := d.DialContext(t.Context(), "tcp", other.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if a := exchangeOn(c, bufio.NewReader(c), accts+"default/email"); a.Body != gsa {
		t.Errorf("%+v", a)
	}
}

// A reload to attestation by the kernel has it asked from then on, and ends what connections had by
// their address.
func TestReloadToKernel(t *testing.T) {
	b := newTestNode(t)
	b.ready(t)
	kept := b.dial(t, linked)
	defer kept.Close()
	r := bufio.NewReader(kept)
	if a := exchangeOn(kept, r, accts+"default/email"); a.Status != 200 {
		t.Fatalf("by address: %+v", a)
	}
	if st := b.Status().Attestation; st.Mode != "source-ip" || st.Kernel != nil {
		t.Errorf("%+v", st)
	}
	b.replace(t, "config.yaml", "attestation: {mode: source-ip}", "attestation: {mode: kernel}")
	b.hangUp()
	b.eventually(t, "the kernel is asked", func() bool {
		k := b.Status().Attestation.Kernel
		return k != nil &&
			k.Hierarchy != ""
	})
	if a := exchangeOn(kept, r, accts+"default/email"); a.Status != 503 || !a.Close ||
		!strings.Contains(a.Body, "connect again") {
		t.Errorf("the connection that was known by its address: %+v", a)
	}
	if res := b.ask(t, linked, "GET", accts+"default/email", ""); res.StatusCode == 200 {
		t.Errorf("an address is believed: %s", res.body)
	}
	b.replace(t, "config.yaml", "attestation: {mode: kernel}", "attestation: {mode: source-ip}")
	b.hangUp()
	b.eventually(t, "pods are served by address again",
		func() bool { return b.ask(t, linked, "GET", accts+"default/email", "").StatusCode == 200 })
}

// A file that was edited into something broken is reported while the service runs on what it read
// before: not only by the next restart, and without a reload.
func TestBrokenFileIsReported(t *testing.T) {
	t.Parallel()
	b := newTestNode(t)
	b.ready(t)
	metric := func() string {
		all, err := b.registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range all {
			if f.GetName() == "gke_metadata_emulator_config_file_valid" {
				return strconv.FormatFloat(f.Metric[0].GetGauge().GetValue(), 'f', -1, 64)
			}
		}
		return "absent"
	}
	if m := metric(); m != "1" || b.Status().ConfigFile != "" {
		t.Errorf("%s, %q", m, b.Status().ConfigFile)
	}
	good, err := os.ReadFile(filepath.Join(b.dir, "config.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	b.write(t, "config.yaml", string(good)+"newerKey: 1\n")
	b.eventually(t, "it is reported", func() bool { return metric() == "0" })
	var text strings.Builder
	st := b.Status()
	if err := st.Text(&text, time.Now()); err != nil {
		t.Fatal(err)
	}
	for _, said := range []string{text.String(), b.summary(), b.log.String()} {
		if !strings.Contains(said, "does not load") || !strings.Contains(said, "there is no such key") {
			t.Errorf("%s", said)
		}
	}
	if res := b.ask(t, linked, "GET", accts+"default/token", ""); st.State != "serving" || res.StatusCode != 200 {
		t.Errorf("%s, %d", st.State, res.StatusCode)
	}
	b.write(t, "config.yaml", string(good))
	b.eventually(t, "it loads again", func() bool { return metric() == "1" })
	if st := b.Status(); st.ConfigFile != "" || !strings.Contains(b.log.String(), "loads again") {
		t.Errorf("%q", st.ConfigFile)
	}

	// A file that the configuration names counts too.
	if err := os.Remove(filepath.Join(b.dir, "ca.pem")); err != nil {
		t.Fatal(err)
	}
	b.eventually(t, "the file that is gone is reported",
		func() bool { return strings.Contains(b.Status().ConfigFile, "google.caFile: name a file") })
}

// A reload keeps what it does not change, and no counter falls: watch and cache stay where the
// number of connections changes, and where they are replaced the next ones count on.
func TestReloadKeepsCounters(t *testing.T) {
	b := newTestNode(t)
	b.ready(t)
	counters := func() map[string]float64 {
		t.Helper()
		families, err := b.gather().Gather()
		if err != nil {
			t.Fatal(err)
		}
		all := map[string]float64{}
		for _, f := range families {
			for _, m := range f.Metric {
				if name := fmt.Sprint(f.GetName(), m.GetLabel()); m.Counter != nil {
					all[name] = m.GetCounter().GetValue()
				} else if m.Histogram != nil {
					all[name] = float64(m.GetHistogram().GetSampleCount())
				}
			}
		}
		return all
	}
	b.ask(t, linked, "GET", accts+"default/token", "")
	counted := counters()
	for _, want := range []string{"attestations_total", "kube_requests_total", "token_cache_requests_total",
		"mint_steps_total"} {
		if !slices.ContainsFunc(slices.Collect(maps.Keys(counted)), func(name string) bool {
			return strings.HasPrefix(name, "gke_metadata_emulator_"+want) && counted[name] > 0
		}) {
			t.Errorf("nothing is counted as %s", want)
		}
	}
	notFallen := func() {
		t.Helper()
		now := counters()
		for name, before := range counted {
			if now[name] < before {
				t.Errorf("%s fell from %v to %v", name, before, now[name])
			}
		}
		counted = now
	}

	backend := b.active().backend
	b.replace(t, "config.yaml", "listen: 127.0.0.1:0", "limits: {connectionsPerPod: 300, "+
		"requestsPerPod: 500}\nlisten: 127.0.0.1:0")
	b.hangUp()
	b.eventually(t, "the limits are in force",
		func() bool { return b.active().ConnectionsPerPod == 300 && b.active().RequestsPerPod == 500 })
	if b.active().backend != backend {
		t.Error("another number of connections made another backend")
	}
	notFallen()

	b.replace(t, "config.yaml", "connectionsPerPod: 300,", "connectionsPerPod: 300, mintsPerPod: 3,")
	b.hangUp()
	b.eventually(t, "another backend serves", func() bool { return b.active().backend != backend })
	b.ask(t, linked, "GET", accts+"default/token", "")
	notFallen()
}
