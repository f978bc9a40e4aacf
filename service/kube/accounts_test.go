package kube

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

var linked = workload.Account{GoogleEmail: "ksa@p.iam.gserviceaccount.com"}

// K-01: annotations are known when the first pod appears, and read again when an age is asked for.
func TestAccount(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	b := run(t, s, nil)
	b.at(t, "10.1.0.11", "p1")
	b.account(t, ksa, -1, linked)
	s.SetServiceAccount("ns1", "ksa", map[string]string{AnnotationEmail: "new@p.iam.gserviceaccount.com",
		AnnotationPrincipal: "true", AnnotationQuota: "quota-project"})
	if a, err := b.Account(t.Context(), ksa, time.Hour); err != nil || a != linked {
		t.Errorf("young enough: %+v, %v", a, err)
	}
	want := workload.Account{GoogleEmail: "new@p.iam.gserviceaccount.com", PrincipalAsEmail: true,
		QuotaProject: "quota-project"}
	changes := b.Changes()
	if a, err := b.Account(t.Context(), ksa, 0); err != nil || a != want {
		t.Errorf("read again: %+v, %v", a, err)
	}
	select {
	case <-changes:
	default:
		t.Error("Changes is not closed")
	}
	if a, err := b.Account(t.Context(), ksa, -1); err != nil || a != want {
		t.Errorf("remembered: %+v, %v", a, err)
	}
	changes = b.Changes()
	if _, err := b.Account(t.Context(), ksa, 0); err != nil {
		t.Error(err)
	}
	select {
	case <-changes:
		t.Error("Changes is closed and nothing changed")
	default:
	}
}

// K-00: a bad annotation is an answer too, and so is a ServiceAccount that does not exist.
func TestAccountThatCannotBeUsed(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	s.SetServiceAccount("ns1", "bad", map[string]string{AnnotationEmail: "x:signBlob?"})
	s.SetPod(kubetest.Pod{Namespace: "ns1", Name: "bad", Node: "node1", ServiceAccount: "bad",
		Addresses: []string{"10.1.0.21"}})
	s.SetPod(kubetest.Pod{Namespace: "ns1", Name: "none", Node: "node1", ServiceAccount: "none",
		Addresses: []string{"10.1.0.22"}})
	b := run(t, s, nil)
	b.at(t, "10.1.0.22", "none")
	var bad *AnnotationError
	if _, err := b.Account(t.Context(), workload.ServiceAccount{Namespace: "ns1", Name: "bad"}, -1); !errors.As(err,
		&bad) || bad.Key != AnnotationEmail {
		t.Errorf("bad: %v", err)
	}
	if _, err := b.Account(t.Context(), workload.ServiceAccount{Namespace: "ns1", Name: "none"}, -1); !errors.Is(err,
		ErrNotFound) {
		t.Errorf("none: %v", err)
	}
	if _, err := b.Account(t.Context(), workload.ServiceAccount{Namespace: "ns1", Name: "nobody-uses"},
		-1); !errors.Is(err, ErrNoPod) {
		t.Errorf("unused: %v", err)
	}
	until(t, "the status", func() bool {
		n := 0
		for _, p := range b.Status().Pods {
			if strings.Contains(p.AccountError, "gcp-service-account") || strings.Contains(p.AccountError,
				"no such ServiceAccount") {
				n++
			}
		}
		return n == 2
	})
	// Mended.
	s.SetServiceAccount("ns1", "bad", map[string]string{AnnotationEmail: "good@p.iam.gserviceaccount.com"})
	if a, err := b.Account(t.Context(), workload.ServiceAccount{Namespace: "ns1", Name: "bad"}, 0); err != nil ||
		a.GoogleEmail != "good@p.iam.gserviceaccount.com" {
		t.Errorf("mended: %+v, %v", a, err)
	}
}

// K-04: what no live pod uses any more is forgotten.
func TestAccountsAreForgotten_K04(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	b := run(t, s, nil)
	count := func() int { b.accounts.mu.Lock(); defer b.accounts.mu.Unlock(); return len(b.accounts.known) }
	for i := range 30 {
		sa := fmt.Sprintf("sa-%d", i)
		s.SetServiceAccount("ns1", sa, nil)
		s.SetPod(kubetest.Pod{Namespace: "ns1", Name: sa, Node: "node1", ServiceAccount: sa})
	}
	until(t, "31 accounts", func() bool { return count() == 31 })
	for i := range 30 {
		s.DeletePod("ns1", fmt.Sprintf("sa-%d", i))
	}
	until(t, "one account", func() bool { return count() == 1 })
}

// While the API is away the last known value stands for those who take any age; a mint needs a
// fresh one.
func TestAccountWhileAway(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	b := run(t, s, nil)
	b.at(t, "10.1.0.11", "p1")
	b.account(t, ksa, -1, linked)
	s.Refuse()
	defer s.Accept()
	var away *AwayError
	until(t, "the API to be away", func() bool { _, err := b.Account(t.Context(), ksa, 0); return errors.As(err, &away) })
	if a, err := b.Account(t.Context(), ksa, -1); err != nil || a != linked {
		t.Errorf("last known: %+v, %v", a, err)
	}
}

// Many mints at once read once, and one that leaves does not take the others' read with it.
func TestAccountReadsCoalesce(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	b := run(t, s, nil)
	b.at(t, "10.1.0.11", "p1")
	b.account(t, ksa, -1, linked)
	until(t, "the watch to be refused", func() bool { return s.Calls("watch", "serviceaccounts") == 1 })
	before := s.Calls("get", "serviceaccounts")
	hold := make(chan struct{})
	t.Cleanup(s.Inject(kubetest.Fault{Verb: "get", Resource: "serviceaccounts", Hold: hold}))
	leaving, leave := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := b.Account(leaving, ksa, 0); !errors.Is(err, context.Canceled) {
			t.Errorf("the one that left: %v", err)
		}
	})
	until(t, "the read", func() bool { return s.Calls("get", "serviceaccounts") == before+1 })
	for range 20 {
		wg.Go(func() {
			if a, err := b.Account(t.Context(), ksa, 0); err != nil || a != linked {
				t.Errorf("%+v, %v", a, err)
			}
		})
	}
	leave()
	close(hold)
	wg.Wait()
	// A goroutine that came after the answer reads again, so more than one is possible; 21 are not.
	if n := s.Calls("get", "serviceaccounts") - before; n > 10 {
		t.Errorf("%d reads", n)
	}
}

// N-03: one refusal is enough to stop trying to watch, for all ServiceAccounts.
func TestServiceAccountWatchRefused(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	for i := range 20 {
		sa := fmt.Sprintf("sa-%d", i)
		s.SetServiceAccount("ns1", sa, nil)
		s.SetPod(kubetest.Pod{Namespace: "ns1", Name: sa, Node: "node1", ServiceAccount: sa})
	}
	b := run(t, s, nil)
	b.at(t, "10.1.0.11", "p1")
	until(t, "all reads", func() bool { return s.Calls("get", "serviceaccounts") >= 21 })
	b.stop()
	if n := s.Calls("watch", "serviceaccounts"); n != 1 {
		t.Errorf("%d attempts", n)
	}
	if g := b.Status().MissingGrants; len(g) != 0 {
		t.Errorf("an optional grant is called missing: %v", g)
	}
}

// Where RBAC lets us watch, a change is seen at once.
func TestServiceAccountWatchGranted(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	s.GrantServiceAccountWatch()
	b := run(t, s, nil)
	b.at(t, "10.1.0.11", "p1")
	b.account(t, ksa, -1, linked)
	until(t, "the watch", func() bool { return s.Calls("watch", "serviceaccounts") > 0 })
	for i := range 3 {
		changes := b.Changes()
		want := workload.Account{GoogleEmail: fmt.Sprintf("v%d@p.iam.gserviceaccount.com", i)}
		s.SetServiceAccount("ns1", "ksa", map[string]string{AnnotationEmail: want.GoogleEmail})
		<-changes
		b.account(t, ksa, -1, want)
	}
	changes := b.Changes()
	s.DeleteServiceAccount("ns1", "ksa")
	<-changes
	if _, err := b.Account(t.Context(), ksa, -1); !errors.Is(err, ErrNotFound) {
		t.Errorf("deleted: %v", err)
	}
}

// The poll takes the API server's memory, which may be behind: it never undoes what a fresh read
// said.
func TestStaleReadIsNotBelieved(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	b := run(t, s, nil)
	b.at(t, "10.1.0.11", "p1")
	b.account(t, ksa, 0, linked)
	stale := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: "ns1", Name: "ksa", ResourceVersion: "7"}}
	if a := b.store(ksa, stale, false, time.Time{}); a.value != linked {
		t.Errorf("a stale read is believed: %+v", a)
	}
	b.account(t, ksa, -1, linked)
	// After a restore from a backup versions fall: a consistent read is believed whatever its version.
	if a := b.store(ksa, stale, true, time.Now()); a.value != (workload.Account{}) {
		t.Errorf("a fresh read is not believed: %+v", a)
	}
	if !older("9", "10") || older("10", "9") || older("x", "10") || older("9", "") {
		t.Error("versions are compared as text")
	}
}

// The poll repeats, and finds what nobody told us.
func TestAccountsArePolled(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	c := run(t, s, nil, func(b *testNode) { b.refresh = 5 * time.Millisecond })
	until(t, "the account", func() bool { a, err := c.Account(t.Context(), ksa, -1); return err == nil && a == linked })
	s.SetServiceAccount("ns1", "ksa", nil)
	until(t, "the annotation to be gone", func() bool {
		a, err := c.Account(t.Context(), ksa, -1)
		return err == nil &&
			a == workload.Account{}
	})
}

// The Node authorizer may learn of a pod later than we do: that is waited for, and is no missing
// grant.
func TestNodeAuthorizerIsBehind_N02(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	s.Inject(kubetest.Fault{Verb: "get", Resource: "serviceaccounts", Code: 403, Times: 2,
		Message: `serviceaccounts "ksa" is forbidden: User "system:node:node1" cannot get resource "serviceaccounts" in ` +
			`API group "" in the namespace "ns1": node: no relationship found between node 'node1' and this object`})
	b := run(t, s, nil)
	b.at(t, "10.1.0.11", "p1")
	if a, err := b.Account(t.Context(), ksa, -1); err != nil || a != linked {
		t.Errorf("%+v, %v", a, err)
	}
	if g := b.Status().MissingGrants; len(g) != 0 {
		t.Errorf("missing: %+v", g)
	}
}

func TestAround(t *testing.T) {
	for range 1000 {
		if d := jitter(10 * time.Minute); d < 8*time.Minute || d > 12*time.Minute {
			t.Fatal(d)
		}
	}
}

// A new pod has its ServiceAccount read anew, though another one has it remembered: after an
// annotation and a rollout, each new pod has the new identity at its first request.
func TestNewPodReadsAnew(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	b := run(t, s, nil)
	b.at(t, "10.1.0.11", "p1")
	b.account(t, ksa, -1, linked)
	until(t, "the watch to be refused", func() bool { return s.Calls("watch", "serviceaccounts") == 1 })
	for i := range 20 {
		want := workload.Account{GoogleEmail: fmt.Sprintf("v%d@p.iam.gserviceaccount.com", i)}
		s.SetServiceAccount("ns1", "ksa", map[string]string{AnnotationEmail: want.GoogleEmail})
		name, address := fmt.Sprintf("new-%d", i), fmt.Sprintf("10.1.0.%d", 100+i)
		s.SetPod(
			kubetest.Pod{Namespace: "ns1", Name: name, Node: "node1", ServiceAccount: "ksa", Addresses: []string{address}},
		)
		b.at(t, address, name)
		before := s.Calls("get", "serviceaccounts")
		for range 10 {
			if got, err := b.Account(t.Context(), ksa, -1); err != nil || got != want {
				t.Fatalf("pod %d: %+v, %v", i, got, err)
			}
		}
		if n := s.Calls("get", "serviceaccounts") - before; n != 1 {
			t.Errorf("pod %d: %d reads", i, n)
		}
	}
	// A list that is read anew brings no new pod.
	before := s.Calls("get", "serviceaccounts")
	s.Compact()
	s.DropWatches()
	until(t, "another list", func() bool { return strings.Count(b.logs.String(), "21 live pods") > 0 })
	if got, err := b.Account(t.Context(), ksa, -1); err != nil || got.GoogleEmail != "v19@p.iam.gserviceaccount.com" {
		t.Errorf("%+v, %v", got, err)
	}
	if n := s.Calls("get", "serviceaccounts") - before; n != 0 {
		t.Errorf("%d reads", n)
	}
}

// A read that began before the pod appeared does not count for it.
func TestNewPodJoinsAnOlderRead(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	b := run(t, s, nil)
	b.at(t, "10.1.0.11", "p1")
	b.account(t, ksa, -1, linked)
	hold := make(chan struct{})
	clear := s.Inject(kubetest.Fault{Verb: "get", Resource: "serviceaccounts", Hold: hold, Times: 1})
	defer clear()
	before := s.Calls("get", "serviceaccounts")
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = b.Account(t.Context(), ksa, 0) })
	until(t, "the older read", func() bool { return s.Calls("get", "serviceaccounts") == before+1 })
	s.SetPod(
		kubetest.Pod{Namespace: "ns1", Name: "new", Node: "node1", ServiceAccount: "ksa", Addresses: []string{"10.1.0.12"}},
	)
	b.at(t, "10.1.0.12", "new")
	wg.Go(func() {
		if got, err := b.Account(t.Context(), ksa, -1); err != nil || got != linked {
			t.Errorf("%+v, %v", got, err)
		}
	})
	close(hold)
	wg.Wait()
	if n := s.Calls("get", "serviceaccounts") - before; n != 2 {
		t.Errorf("%d reads, one of them for the new pod", n)
	}
}

// While the API server cannot be asked, a new pod has what is known of its ServiceAccount.
func TestNewPodWhileAway(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	b := run(t, s, nil)
	b.at(t, "10.1.0.11", "p1")
	b.account(t, ksa, -1, linked)
	defer s.Inject(kubetest.Fault{Verb: "get", Resource: "serviceaccounts", Code: 500})()
	s.SetPod(
		kubetest.Pod{Namespace: "ns1", Name: "new", Node: "node1", ServiceAccount: "ksa", Addresses: []string{"10.1.0.12"}},
	)
	b.at(t, "10.1.0.12", "new")
	if got, err := b.Account(t.Context(), ksa, -1); err != nil || got != linked {
		t.Errorf("%+v, %v", got, err)
	}
}

// A grant to watch that comes later is used.
func TestServiceAccountWatchGrantedLater(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	b := run(t, s, nil, func(b *testNode) { b.watchAgain = 20 * time.Millisecond })
	b.at(t, "10.1.0.11", "p1")
	b.account(t, ksa, -1, linked)
	until(t, "refusals", func() bool { return s.Calls("watch", "serviceaccounts") > 1 })
	s.GrantServiceAccountWatch()
	n := s.Calls("watch", "serviceaccounts")
	until(t, "the watch", func() bool { return s.Calls("watch", "serviceaccounts") > n })
	want := workload.Account{GoogleEmail: "new@p.iam.gserviceaccount.com"}
	s.SetServiceAccount("ns1", "ksa", map[string]string{AnnotationEmail: want.GoogleEmail})
	b.account(t, ksa, -1, want)
}
