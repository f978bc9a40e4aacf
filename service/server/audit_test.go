package server

import (
	"bytes"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

const reader = "reader@my-project.iam.gserviceaccount.com"

func TestRefusalLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l logLimits
		logged := 0
		for range 100 {
			if _, ok := l.allow("pod"); ok {
				logged++
			}
		}
		if logged != 5 {
			t.Errorf("%d of 100 were logged, want 5", logged)
		}
		if _, ok := l.allow("another"); !ok {
			t.Error("another pod pays")
		}
		<-time.After(10 * time.Second)
		if suppressed, ok := l.allow("pod"); !ok || suppressed != 95 {
			t.Errorf("after ten seconds: %v, %d suppressed, want 95", ok, suppressed)
		}
		for i := range 3 * maxLogLimits {
			l.allow(fmt.Sprint(i))
		}
		if len(l.limits) > maxLogLimits {
			t.Errorf("%d pods are remembered", len(l.limits))
		}
	})
}

// A token that is issued is a line; the same one again is counted.
func TestAudit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out syncBuffer
		log := logrus.New()
		log.SetOutput(&out)
		a := newAudit(log)
		done := make(chan error, 1)
		go func() { done <- a.run(t.Context()) }()
		lines := func() string { synctest.Wait(); return out.take() }

		caller := asker{caller: workload.Caller{PodUID: "1", PodName: "p",
			ServiceAccount: workload.ServiceAccount{Namespace: "ns", Name: "sa"}}, evidence: "cgroup", container: "c0ffee"}
		access := token.AccessToken(caller.caller.ServiceAccount, workload.Account{GoogleEmail: reader}, nil)
		id := token.IDToken(caller.caller.ServiceAccount, workload.Account{GoogleEmail: reader}, "https://a")
		expires := time.Now().Add(90 * time.Second)
		for range 1000 {
			a.issue(caller, issued{access, expires})
		}
		a.issue(caller, issued{id, expires})
		got := lines()
		if strings.Count(got, "\n") != 2 {
			t.Errorf("want two lines:\n%s", got)
		}
		for _, want := range []string{"token issued", "pod=ns/p", "pod_uid=1", "container=c0ffee", "evidence=cgroup",
			"service_account=ns/sa", "google_service_account=" + reader, "scopes=", "audience=", "expires=" + `"` +
				expires.UTC().Format(time.RFC3339)} {
			if !strings.Contains(got, want) {
				t.Errorf("no %q in:\n%s", want, got)
			}
		}
		<-time.After(auditInterval + time.Second)
		if got := lines(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "times=999") {
			t.Errorf("after a minute: %s", got)
		}
		a.issue(caller, issued{access, expires.Add(time.Hour)})
		if got := lines(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "token issued") {
			t.Errorf("a newer token: %s", got)
		}
		puller := asker{caller: workload.Caller{Unit: "kubelet.service",
			ServiceAccount: workload.ServiceAccount{Namespace: "kube-system", Name: "image-puller"}}, evidence: "cgroup"}
		a.issue(puller, issued{access, expires.Add(time.Hour)})
		if got := lines(); !strings.Contains(got, "unit=kubelet.service") ||
			!strings.Contains(got, "service_account=kube-system/image-puller") || strings.Contains(got, "pod") {
			t.Errorf("a process of the node: %s", got)
		}
		<-time.After(2 * time.Hour)
		if len(a.audited) != 0 {
			t.Errorf("%d expired tokens are remembered", len(a.audited))
		}
	})
}

// A pod that makes up audiences does not have all of them remembered until the tokens expire.
// What was counted and not logged is logged first.
func TestAuditIsBounded(t *testing.T) {
	var out syncBuffer
	log := logrus.New()
	log.SetOutput(&out)
	a := newAudit(log)
	of := func(audience string) issued {
		return issued{token.IDToken(workload.ServiceAccount{Namespace: "ns", Name: "sa"},
			workload.Account{GoogleEmail: reader}, audience), time.Now().Add(time.Hour)}
	}
	first := of("https://first")
	kept := a.issue(asker{}, first) // by a connection
	for range 7 {
		a.issue(asker{}, first)
	}
	for i := range 3 * maxAudited {
		a.issue(asker{}, of(fmt.Sprint("https://", i)))
	}
	if n := len(a.audited); n > maxAudited {
		t.Errorf("%d tokens are remembered", n)
	}
	if !kept.over.Load() {
		t.Error("a connection counts where nobody reads it")
	}
	if got := out.take(); strings.Count(got, "token issued\"") != 3*maxAudited+1 || strings.Count(got, "times=7") != 1 {
		t.Error("a line is missing")
	}
}

// syncBuffer is a bytes.Buffer for what is written while it is read.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

// take returns what was written since the last time.
func (s *syncBuffer) take() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.b.Reset()
	return s.b.String()
}
