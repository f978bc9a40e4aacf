package service

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// sizing has BenchmarkSizing measure; `make sizing` sets it.
const sizing = "GME_SIZING"

// idleTime is how long the idle processes are looked at, three times. The median is printed, since
// what else runs on the machine makes a time longer. The watcher reads all rules each half minute,
// so most of the times have one such round.
const idleTime = 20 * time.Second

// sizes are the numbers of pods of the tables in docs/sizing.md.
var sizes = []int{10, 110, 500}

// sizingNode is a node with the real program: its three processes, each in the cgroup of its unit.
type sizingNode struct {
	*kernelNode
	b       *testing.B
	program string
	pods    []*podNode
	units   []sizingUnit
}

type sizingUnit struct {
	name string // of the unit
	cmd  *exec.Cmd
}

// BenchmarkSizing prints the first table of docs/sizing.md. Each pod has a ServiceAccount of its
// own that is linked to a Google service account, which is the most that a pod can cost.
func BenchmarkSizing(b *testing.B) {
	if os.Getenv(sizing) == "" {
		b.Skip("it takes minutes, and starts 500 pods: run `make sizing` as root")
	}
	netnstest.Needs(b, "bash", "curl", "go")
	s := newSizingNode(b)
	fmt.Println("| Pods | Connections | Service | Helper | Watcher | Together | CPU in an idle hour |" +
		" CPU for 1,000 answers |")
	fmt.Println("|---|---|---|---|---|---|---|---|")
	for _, n := range sizes {
		s.addPods(n)
		answers := s.answers(10_000)
		memory := s.memory()
		fmt.Printf("| %d | 0 | %s | %.0f s | %.0f ms |\n", n, memory, s.idle()*float64(time.Hour/idleTime), answers*1e6)
	}
	s.connect(10_000)
	fmt.Printf("| %d | 10,000 | %s | | |\n", sizes[len(sizes)-1], s.memory())
}

// newSizingNode builds the program as packages have it, and starts it as the units do.
func newSizingNode(b *testing.B) *sizingNode {
	s := &sizingNode{kernelNode: newKernelNode(b), b: b, program: filepath.Join(b.TempDir(), "gke-metadata-emulator")}
	s.kill(s.server) // the test node's own processes are this test's binary
	s.kill(s.helper)
	for _, p := range []string{"reader", "plain", "principal", "hostile", "denied", "missing"} {
		s.kube.DeletePod("default", p)
	}
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", s.program, "../cmd/gke-metadata-emulator")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	config := "--config=" + filepath.Join(s.dir, "config.yaml")
	s.unit("gke-metadata-emulator-attest.service", "attest")
	s.unit("gke-metadata-emulator-routing.service", "routing", "watch", config)
	s.unit("gke-metadata-emulator.service", "serve", config)
	s.eventually(b, "the service has its helper and watches pods", func() bool {
		st := statusOf(b, filepath.Join(s.dir, "serve"))
		return st.Cluster != nil && st.Cluster.Watching && st.Attestation.Kernel != nil && st.Attestation.Kernel.Helper
	})
	return s
}

// unit starts the program in the cgroup of the unit. /sys/fs/cgroup shows it the node's cgroups.
func (s *sizingNode) unit(name string, args ...string) {
	s.b.Helper()
	const script = `umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup
unit=/sys/fs/cgroup/system.slice/$0; mkdir -p "$unit"; echo $$ >"$unit/cgroup.procs"; exec "$@"`
	cmd := exec.Command("unshare", append([]string{"--cgroup", "--mount", "sh", "-ec", script, name, s.program},
		args...)...)
	cmd.Env = append(os.Environ(), "GKE_METADATA_EMULATOR_RUN="+s.dir, "GOMEMLIMIT=320MiB")
	cmd.Stdout, cmd.Stderr = s.log, s.log
	if err := s.cgroups.Start(s.node.NS, "", cmd); err != nil {
		s.b.Fatal(err)
	}
	s.b.Cleanup(func() { s.kill(cmd) })
	s.units = append(s.units, sizingUnit{name, cmd})
}

// addPods adds pods until there are n. Each asks at its start as clients do: whether this is
// Google's metadata server, the project, the account, and a token.
func (s *sizingNode) addPods(n int) {
	s.b.Helper()
	first := len(s.pods)
	for i := first; i < n; i++ {
		name := fmt.Sprintf("size%d", i)
		email := name + "@my-project.iam.gserviceaccount.com"
		ns, err := s.node.AddPod(name)
		if err != nil {
			s.b.Fatal(err)
		}
		p := s.newPod(name, ns)
		s.kube.SetServiceAccount("default", name, map[string]string{"iam.gke.io/gcp-service-account": email})
		s.google.Allow("system:serviceaccount:default:"+name, email)
		p.tell()
		p.cmd = exec.Command("sleep", "infinity")
		if err := s.cgroups.Start(ns, p.cgroup, p.cmd); err != nil {
			s.b.Fatal(err)
		}
		s.b.Cleanup(func() { s.kill(p.cmd) })
		s.pods = append(s.pods, p)
	}
	s.ask(s.pods[first:], "/", "/computeMetadata/v1/project/project-id", accts+"default/email", accts+"default/token")
}

// ask has each of the pods ask for the paths, a few pods at a time. Each request is on a connection
// of its own. A new pod is known a moment later, so a pod asks again after a 503.
func (s *sizingNode) ask(pods []*podNode, paths ...string) {
	s.b.Helper()
	var urls bytes.Buffer
	for _, path := range paths {
		fmt.Fprintf(&urls, "url = http://169.254.169.254%s\noutput = /dev/null\n", path)
	}
	var all sync.WaitGroup
	slots := make(chan struct{}, 4)
	for _, p := range pods {
		cmd := exec.Command("curl", "-sS", "--fail", "--fail-early", "--retry", "20",
			"--retry-all-errors", "--retry-delay", "1",
			"-H", "Metadata-Flavor: Google", "-H", "Connection: close", "-K", "-")
		var stderr bytes.Buffer
		cmd.Stdin, cmd.Stderr = bytes.NewReader(urls.Bytes()), &stderr
		slots <- struct{}{}
		if err := s.cgroups.Start(p.ns, p.cgroup, cmd); err != nil {
			s.b.Fatal(err)
		}
		all.Go(func() {
			defer func() { <-slots }()
			if err := cmd.Wait(); err != nil {
				s.b.Errorf("%s: %v: %.300s", p.Name, err, &stderr)
			}
		})
	}
	all.Wait()
	if s.b.Failed() {
		s.b.FailNow()
	}
}

// answers has ten pods ask for n tokens, and returns the seconds of the three processes for each
// answer.
func (s *sizingNode) answers(n int) float64 {
	s.b.Helper()
	paths := make([]string, n/10)
	for i := range paths {
		paths[i] = accts + "default/token"
	}
	before := s.cpu()
	s.ask(s.pods[:10], paths...)
	return (s.cpu() - before) / float64(n)
}

// connect has the pods hold n connections, on each of which a request was answered.
func (s *sizingNode) connect(n int) {
	s.b.Helper()
	const script = `for i in $(seq $0); do
	exec {c}<>/dev/tcp/169.254.169.254/80
	printf 'GET /computeMetadata/v1/project/project-id HTTP/1.1\r\nHost: metadata\r\nMetadata-Flavor: Google\r\n\r\n' >&$c
	read -r line <&$c
	[[ $line == *" 200 "* ]] || { echo "$line" >&2; exit 1; }
done
read -r`
	for _, p := range s.pods {
		cmd := exec.Command("bash", "-ec", script, strconv.Itoa(n/len(s.pods)))
		cmd.Stderr = os.Stderr
		if _, err := cmd.StdinPipe(); err != nil { // held open as long as cmd is
			s.b.Fatal(err)
		}
		if err := s.cgroups.Start(p.ns, p.cgroup, cmd); err != nil {
			s.b.Fatal(err)
		}
		s.b.Cleanup(func() { s.kill(cmd) })
	}
	s.eventually(s.b, "the connections are open", func() bool {
		return statusOf(s.b, filepath.Join(s.dir, "serve")).Connections >= n
	})
}

// memory is the PSS of service, helper and watcher, and their sum: what they share counts once.
func (s *sizingNode) memory() string {
	s.b.Helper()
	sum, of := 0., map[string]float64{}
	for _, u := range s.units {
		of[u.name] = pss(s.b, u.cmd.Process.Pid)
		sum += of[u.name]
	}
	return fmt.Sprintf("%.0f MB | %.0f MB | %.0f MB | %.0f MB", of["gke-metadata-emulator.service"],
		of["gke-metadata-emulator-attest.service"], of["gke-metadata-emulator-routing.service"], sum)
}

// cpu is the seconds that the three units have used, with the commands that they ran.
func (s *sizingNode) cpu() (seconds float64) {
	s.b.Helper()
	for _, u := range s.units {
		text, err := os.ReadFile(filepath.Join(s.cgroups.Path, "system.slice", u.name, "cpu.stat"))
		if err != nil {
			s.b.Fatal(err)
		}
		m := regexp.MustCompile(`usage_usec (\d+)`).FindSubmatch(text)
		if m == nil {
			s.b.Fatalf("%s: %s", u.name, text)
		}
		usec, _ := strconv.ParseFloat(string(m[1]), 64)
		seconds += usec / 1e6
	}
	return seconds
}

// idle is the seconds of the three units in idleTime.
func (s *sizingNode) idle() float64 {
	s.b.Helper()
	var all []float64
	for range 3 {
		before := s.cpu()
		<-time.After(idleTime)
		all = append(all, s.cpu()-before)
	}
	s.b.Logf("idle, in %s: %.2f s", idleTime, all)
	return median(all)
}

// TestSizingCalls holds the second table of docs/sizing.md, the calls of a node in an hour. The
// cache shows in two days of fake time how often a token is minted. The stand-ins of Kubernetes and
// Google count the calls of one mint. The constants of package kube say how often ServiceAccounts
// are read; the library of Kubernetes' clients has a watch of pods last five to ten minutes.
func TestSizingCalls(t *testing.T) {
	mints := mintsAnHour(t)
	toGoogle, toKubernetes := callsOfAMint(t)
	reads := 60 / sourceConstant(t, "refreshEvery", "Minute")
	node := 60/7.5 + 3600/sourceConstant(t, "watchAgain", "Second")
	doc := read(t, "../docs/sizing.md")
	for _, n := range sizes {
		accounts := float64(n)
		for column, want := range []float64{accounts * mints * toGoogle, accounts*(mints*toKubernetes+reads) + node} {
			m := regexp.MustCompile(fmt.Sprintf(`(?m)^\| %d \| ([\d,]+) \| ([\d,]+) \|$`, n)).FindStringSubmatch(doc)
			if m == nil {
				t.Fatalf("docs/sizing.md has no calls of %d pods", n)
			}
			says, _ := strconv.ParseFloat(strings.ReplaceAll(m[1+column], ",", ""), 64)
			if math.Abs(says-want) > want/20 {
				t.Errorf("docs/sizing.md: %d pods: column %d is %.0f, want %.0f", n, column, says, want)
			}
		}
	}
}

// mintsAnHour counts the mints of an account whose pod asks each 55 minutes.
func mintsAnHour(t *testing.T) float64 {
	const accounts, hours = 20, 48
	var mu sync.Mutex
	mints := 0
	synctest.Test(t, func(t *testing.T) {
		mint := func(context.Context, token.Request) (token.Token, error) {
			mu.Lock()
			defer mu.Unlock()
			mints++
			return token.Token{Value: "x", Minted: time.Now(), Expires: time.Now().Add(time.Hour)}, nil
		}
		cache := token.NewCache(token.CacheOptions{Source: sourceFunc(mint)})
		var requests []token.Request
		var all []workload.ServiceAccount
		for i := range accounts {
			sa := workload.ServiceAccount{Namespace: "default", Name: strconv.Itoa(i)}
			all = append(all, sa)
			requests = append(requests, token.AccessToken(sa, workload.Account{}, nil))
		}
		cache.Use(all)
		cache.Prefetch(requests...)
		ctx, stop := context.WithTimeout(t.Context(), hours*time.Hour)
		defer stop()
		var wait sync.WaitGroup
		wait.Go(func() { _ = cache.Run(ctx) })
		for ctx.Err() == nil {
			for _, r := range requests {
				if _, err := cache.Token(t.Context(), r); err != nil {
					t.Error(err)
				}
			}
			select {
			case <-time.After(55 * time.Minute):
			case <-ctx.Done():
			}
		}
		wait.Wait()
	})
	return float64(mints) / accounts / hours
}

type sourceFunc func(context.Context, token.Request) (token.Token, error)

func (f sourceFunc) Token(ctx context.Context, r token.Request) (token.Token, error) {
	return f(ctx, r)
}

// callsOfAMint has a service mint the token of one linked pod.
func callsOfAMint(t *testing.T) (toGoogle, toKubernetes float64) {
	b := newWorld(t)
	for _, p := range []string{"plain", "principal", "hostile", "denied", "missing"} {
		b.kube.DeletePod("default", p)
	}
	b.configure(t)
	b.start(t)
	b.ready(t)
	b.eventually(t, "the token is there", func() bool { return b.google.Calls(googletest.GenerateAccessToken) == 1 })
	google, kubernetes := b.google.Calls(googletest.Exchange)+b.google.Calls(googletest.GenerateAccessToken), 0
	for call, n := range b.kube.AllCalls() {
		if strings.HasPrefix(call, "create serviceaccounts/token") || strings.HasPrefix(call, "get serviceaccounts") {
			kubernetes += n
		}
	}
	return float64(google), float64(kubernetes)
}

// sourceConstant reads a constant of package kube, which does not export it.
func sourceConstant(t *testing.T, name, unit string) float64 {
	m := regexp.MustCompile(`\b` + name + ` += (\d+) \* time\.` + unit + `\b`).
		FindStringSubmatch(read(t, "kube/accounts.go"))
	if m == nil {
		t.Fatalf("service/kube/accounts.go has no constant %s in time.%s", name, unit)
	}
	n, _ := strconv.ParseFloat(m[1], 64)
	return n
}
