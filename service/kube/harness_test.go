package kube

import (
	"bytes"
	"context"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"k8s.io/apimachinery/pkg/util/wait"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

const (
	waitLimit = 20 * time.Second // for what takes milliseconds; the machine may be busy
	provider  = kubetest.CaseAudience
)

var ksa = workload.ServiceAccount{Namespace: "ns1", Name: "ksa"}

// testNode is a Cluster that runs against a server of its own.
type testNode struct {
	*Cluster
	server *kubetest.Server
	dir    string // of the kubelet's files
	logs   *buffer
	gather prometheus.Gatherer
	stop   func() // ends Run and waits for it
}

// newServer has node1 with pod ns1/p1 at 10.1.0.11, of ServiceAccount ns1/ksa that is linked to
// ksa@p.iam.gserviceaccount.com.
func newServer(t *testing.T, o kubetest.Options) *kubetest.Server {
	t.Helper()
	s, err := kubetest.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	s.SetServiceAccount("ns1", "ksa", map[string]string{AnnotationEmail: "ksa@p.iam.gserviceaccount.com"})
	s.SetPod(kubetest.Pod{Namespace: "ns1", Name: "p1", Node: "node1", ServiceAccount: "ksa",
		Addresses: []string{"10.1.0.11"}})
	return s
}

// run starts a Cluster with node1's kubelet credential; adjust may change anything before Run.
func run(t *testing.T, s *kubetest.Server, adjust func(*testNode, *Options), inside ...func(*testNode)) *testNode {
	t.Helper()
	b := &testNode{server: s, dir: t.TempDir(), logs: new(buffer)}
	conf, err := s.WriteKubelet(b.dir, "node1")
	if err != nil {
		t.Fatal(err)
	}
	log := logrus.New()
	log.SetOutput(b.logs)
	log.SetLevel(logrus.TraceLevel)
	r := prometheus.NewRegistry()
	b.gather = r
	o := Options{Kubeconfig: conf, Audience: provider, Poll: 10 * time.Millisecond, Log: log, Metrics: NewMetrics(r),
		UserAgent: "gke-metadata-emulator/test"}
	if adjust != nil {
		adjust(b, &o)
	}
	b.Cluster = New(o)
	r.MustRegister(b.Cluster)
	b.backoff = wait.Backoff{
		Duration: 5 * time.Millisecond,
		Factor:   1.5,
		Jitter:   0.2,
		Cap:      50 * time.Millisecond,
		Steps:    10,
	}
	for _, f := range inside {
		f(b)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	b.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(func() {
		b.stop()
		if t.Failed() {
			t.Logf("log:\n%s", b.logs)
		}
		b.noSecrets(t)
	})
	return b
}

// until polls; what it waits for has no channel.
func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	deadline := time.NewTimer(waitLimit)
	defer deadline.Stop()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !is() {
		select {
		case <-tick.C:
		case <-deadline.C:
			buf := make([]byte, 1<<16)
			t.Fatalf("waited %s for: %s\n%s", waitLimit, what, buf[:runtime.Stack(buf, true)])
		}
	}
}

// at waits until the address belongs to exactly these pods, and returns them. It waits on the
// channel that At hands out.
func (b *testNode) at(t *testing.T, address string, pods ...string) []workload.Caller {
	t.Helper()
	deadline := time.NewTimer(waitLimit)
	defer deadline.Stop()
	for {
		got, changed, err := b.At(netip.MustParseAddr(address))
		if err == nil && strings.Join(names(got), " ") == strings.Join(pods, " ") {
			return got
		}
		select {
		case <-changed:
		case <-deadline.C:
			t.Fatalf("At(%s) = %v, %v; want %v", address, names(got), err, pods)
		}
	}
}

// of waits until the UID is the caller's; the zero caller is nobody.
func (b *testNode) of(t *testing.T, uid string, want workload.Caller) {
	t.Helper()
	deadline := time.NewTimer(waitLimit)
	defer deadline.Stop()
	for {
		got, known, changed, err := b.Of(uid)
		if err == nil && got == want && known == (want != workload.Caller{}) {
			return
		}
		select {
		case <-changed:
		case <-deadline.C:
			t.Fatalf("Of(%s) = %+v, %v; want %+v", uid, got, err, want)
		}
	}
}

func names(cs []workload.Caller) []string {
	out := []string{}
	for _, c := range cs {
		out = append(out, c.PodName)
	}
	return out
}

// account waits for an answer of Account.
func (b *testNode) account(t *testing.T, sa workload.ServiceAccount, maxAge time.Duration, want workload.Account) {
	t.Helper()
	until(t, "account "+want.GoogleEmail, func() bool {
		got, err := b.Account(t.Context(), sa, maxAge)
		return err == nil && got == want
	})
}

// noSecrets looks for tokens and keys where everybody can read.
func (b *testNode) noSecrets(t *testing.T) {
	t.Helper()
	status, err := json.Marshal(b.Status())
	if err != nil {
		t.Fatal(err)
	}
	all := b.logs.String() + string(status)
	secrets := append(b.server.IssuedTokens(), "PRIVATE KEY", "Authorization:", "Bearer ")
	err = filepath.WalkDir(b.dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".token") {
			raw, err := os.ReadFile(path)
			secrets = append(secrets, strings.TrimSpace(string(raw)))
			return err
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range secrets {
		if s != "" && strings.Contains(all, s) {
			t.Error("a secret is in the log or the status")
		}
	}
}

// buffer is a log that many goroutines write.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
