package service

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
)

// What doctor sees of a service that runs, of a Kubernetes and of a Google is what they say; no token is in what it reports.
func TestDoctorExamines(t *testing.T) {
	b := newBed(t)
	b.ready(t)
	b.eventually(t, "the hostile annotation was read", func() bool {
		return slices.ContainsFunc(b.Status().Cluster.Pods, func(p kube.PodStatus) bool { return p.AccountError != "" })
	})
	examined := func() (*patient, map[string]Finding) {
		t.Helper()
		o := DoctorOptions{Load: b.read, File: "config.yaml", RunDir: b.dir, StatusSocket: filepath.Join(b.dir, "status.sock"),
			Version: b.Status().Version, Plan: func(config.Config, error) routing.Plan { return routing.Plan{} }}
		p := newPatient(t.Context(), o)
		p.askCluster(t.Context(), o)
		found := map[string]Finding{}
		r := diagnose(p)
		for _, f := range r.Checks {
			found[f.Check] = f
		}
		shown, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		for _, secret := range slices.Concat(b.kube.IssuedTokens(), b.google.Secrets()) {
			if strings.Contains(string(shown), secret) {
				t.Error("a token is in the report")
			}
		}
		return p, found
	}
	is := func(found map[string]Finding, want map[string]Verdict) {
		t.Helper()
		for check, verdict := range want {
			if found[check].Verdict != verdict {
				t.Errorf("%+v, want %s", found[check], verdict)
			}
		}
	}

	// What everybody's probes ask for is no word of pods.
	b.ask(t, linked, http.MethodGet, "/", "")
	if n := b.Status().Requests; n != 0 {
		t.Errorf("%d requests", n)
	}
	b.ask(t, linked, http.MethodGet, "/computeMetadata/v1/project/project-id", "Metadata-Flavor: Google\r\n")
	b.eventually(t, "it is counted", func() bool { return b.Status().Requests == 1 })

	p, found := examined()
	is(found, map[string]Verdict{"service": OK, "credential": OK, "pods": Warn, "serviceaccounts": OK, "tokenrequest": OK, "sts": OK, "iam": OK, "clock": OK})
	if p.cluster.Pods != 6 || !p.cluster.Account.Linked() || p.exchange == nil {
		t.Errorf("%+v, %+v", p.cluster, p.exchange)
	}

	b.google.Break(googletest.Exchange, googletest.Fault{Status: http.StatusBadRequest, Body: `{"error":"invalid_target","error_description":"no such provider, said %TOKEN%"}`})
	_, found = examined()
	is(found, map[string]Verdict{"sts": OK, "tokenrequest": OK, "exchange": Fail})
	if !strings.Contains(found["exchange"].Finding, "no such provider") {
		t.Errorf("%+v", found["exchange"])
	}
	b.google.Heal()

	b.kube.RevokeAudience(audience)
	p, found = examined()
	is(found, map[string]Verdict{"tokenrequest": Fail, "exchange": Skip})
	if p.exchange != nil || !strings.Contains(found["tokenrequest"].Manifest, audience) {
		t.Errorf("%+v", found["tokenrequest"])
	}

	b.google.Close()
	b.kube.Refuse()
	_, found = examined()
	is(found, map[string]Verdict{"sts": Fail, "iam": Fail, "serviceaccounts": Skip, "clock": Skip})

	b.end(t)
	_, found = examined()
	is(found, map[string]Verdict{"service": Fail, "credential": Fail, "tokens": Skip})
}

// Whoever answers at the metadata server's address is told by its header; redirects are not followed, and nobody is waited for for long.
func TestAskRoot(t *testing.T) {
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Host != "169.254.169.254" || r.URL.Path != "/" {
			t.Errorf("asked %s for %s", r.Host, r.URL.Path)
		}
		w.Header().Set("Server", "EC2ws")
		http.Redirect(w, r, "/latest/", http.StatusFound)
	}))
	defer web.Close()
	a := askRoot(t.Context(), routing.MetadataServer(), 10*time.Second, dialer(web.Listener.Addr().String()))
	if a.err != nil || a.status != http.StatusFound || a.ours || answeredBy(a) != "AWS's metadata server" {
		t.Errorf("%+v", a)
	}
	web.Close()
	if a := askRoot(t.Context(), routing.MetadataServer(), 10*time.Second, dialer(web.Listener.Addr().String())); a.err == nil || !isRefused(a.err) {
		t.Errorf("%+v", a)
	}
}

// dialer connects to one address, whatever is asked for.
func dialer(to string) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, to)
	}
}

func TestEphemeralPorts(t *testing.T) {
	if p := ephemeralPorts(); p[0] == 0 || p[1] < p[0] {
		t.Error(p)
	}
}
