package service

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

func TestLogFormat(t *testing.T) {
	for format, want := range map[string]string{
		"text": `level=info msg=hello pod=a/b`,
		"json": `"pod":"a/b"`,
		"auto": `"msg":"hello"`, // a buffer is no terminal
	} {
		var out bytes.Buffer
		log := logrus.New()
		configureLog(log, config.Log{Level: "info", Format: format}, &out)
		log.WithField("pod", "a/b").Info("hello")
		log.Debug("not at this level")
		if !strings.Contains(out.String(), want) || strings.Contains(out.String(), "not at") {
			t.Errorf("%s: %s", format, &out)
		}
		// A reload may ask for another one.
		out.Reset()
		configureLog(log, config.Log{Level: "debug", Format: "text"}, &out)
		log.Debug("now it is")
		if !strings.Contains(out.String(), "now it is") {
			t.Errorf("%s, after a reload: %s", format, &out)
		}
	}
	if terminal, err := os.Open("/dev/null"); err != nil {
		t.Fatal(err)
	} else if got := format("auto", terminal); got != "json" {
		t.Errorf("/dev/null: %s", got)
	}
}

func TestJournalName(t *testing.T) {
	for name, want := range map[string]string{"pod": "POD", "service_account": "SERVICE_ACCOUNT", "_pid": "PID", "a.b-c": "A_B_C", "é1": "1"} {
		if got := journalName(name); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
}

func TestRefusalLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l askerLog
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
		for i := range 3 * maxAskers {
			l.allow(fmt.Sprint(i))
		}
		if len(l.askers) > maxAskers {
			t.Errorf("%d askers in the books", len(l.askers))
		}
	})
}

// A token that is handed out is a line; the same one again is counted.
func TestAudit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out syncBuffer
		log := logrus.New()
		configureLog(log, config.Log{Level: "info", Format: "text"}, &out)
		a := newAudit(log)
		done := make(chan error, 1)
		go func() { done <- a.run(t.Context()) }()
		lines := func() string { synctest.Wait(); return out.take() }

		caller := asker{caller: workload.Caller{PodUID: "1", PodName: "p", ServiceAccount: workload.ServiceAccount{Namespace: "ns", Name: "sa"}}, evidence: "cgroup", container: "c0ffee"}
		access := token.AccessToken(caller.caller.ServiceAccount, workload.Account{GoogleEmail: gsa}, nil)
		id := token.IDToken(caller.caller.ServiceAccount, workload.Account{GoogleEmail: gsa}, "https://a")
		expires := time.Now().Add(90 * time.Second)
		for range 1000 {
			a.handedOut(caller, access, expires)
		}
		a.handedOut(caller, id, expires)
		got := lines()
		if strings.Count(got, "\n") != 2 {
			t.Errorf("want two lines:\n%s", got)
		}
		for _, want := range []string{"token handed out", "pod=ns/p", "pod_uid=1", "container=c0ffee", "evidence=cgroup", "service_account=ns/sa", "google_service_account=" + gsa, "scopes=", "audience=", "expires=" + `"` + expires.UTC().Format(time.RFC3339)} {
			if !strings.Contains(got, want) {
				t.Errorf("no %q in:\n%s", want, got)
			}
		}
		<-time.After(tellEvery + time.Second)
		if got := lines(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "times=999") {
			t.Errorf("after a minute: %s", got)
		}
		a.handedOut(caller, access, expires.Add(time.Hour))
		if got := lines(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "token handed out") {
			t.Errorf("a newer token: %s", got)
		}
		puller := asker{caller: workload.Caller{Unit: "kubelet.service", ServiceAccount: workload.ServiceAccount{Namespace: "kube-system", Name: "image-puller"}}, evidence: "cgroup"}
		a.handedOut(puller, access, expires.Add(time.Hour))
		if got := lines(); !strings.Contains(got, "unit=kubelet.service") || !strings.Contains(got, "service_account=kube-system/image-puller") || strings.Contains(got, "pod") {
			t.Errorf("a process of the node: %s", got)
		}
		<-time.After(2 * time.Hour)
		if len(a.told) != 0 {
			t.Errorf("%d expired tokens are remembered", len(a.told))
		}
	})
}
