package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/probe"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/status"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// nodeReport is what was seen of a node and of what it depends on. It holds no secret.
type nodeReport struct {
	root    bool
	now     time.Time
	file    string
	flags   string // the file with the units' flags
	version string

	config config.Config // where it is broken: the defaults
	broken error
	plan   routing.Plan
	ports  [2]uint16 // the ephemeral range

	status    *status.Status // of the running service
	statusErr error
	notReady  string      // as /readyz says, where status may not be asked for; "": it is ready, or not known
	unit      status.Unit // what systemd says of the service,
	watcher   string      // and of the watcher: active, failed, …; "" = it could not be asked
	install   *routing.Failure
	state     routing.State
	stateErr  error
	node      routing.Examination
	health    routing.ListenedBy // who listens on healthListen
	cloud     answered           // from the node itself
	probe     probed
	probe6    probed       // by IPv6, where its requests are redirected
	direct    probed       // of the node itself, to the listen address
	podProbe  probed       // from the network namespace of a pod
	names     []netip.Addr // metadata.google.internal as this node resolves it
	namesErr  error

	cluster  kube.Attempt
	sts, iam token.Reached
	exchange *exchanged // nil: there was no token to try it with
}

// observes says whether mode observe is what stands: it leaves all as it was, and guards nothing.
func (r *nodeReport) observes() bool {
	return r.state.Desired == routing.Installed && r.state.Mode == routing.ModeObserve
}

// answered is what GET / came to.
type answered struct {
	err    error
	status int
	server string // the Server header
	ours   bool   // it is the answer of GKE's metadata server, or an emulator's
}

// probed is what came of a connection from a throw-away namespace.
type probed struct {
	answered
	impossible error    // the namespace could not be made
	dropped    []string // who dropped what was sent
	traceErr   error    // why that is not known
	from       string   // address and interface
	attested   attested
}

// exchanged is a pod's token that was taken to Google.
type exchanged struct {
	email string // whose token it was to become; "" = the ServiceAccount's own
	err   error
}

// examine looks at everything, most of it at once.
func examine(ctx context.Context, o Options) *nodeReport {
	r := newReport(ctx, o)
	var all sync.WaitGroup
	all.Go(func() { r.askCluster(ctx, o) })
	all.Go(func() { r.watcher = o.Unit(ctx, "gke-metadata-emulator-routing.service").Active })
	all.Go(func() { r.unit = o.Unit(ctx, "gke-metadata-emulator.service") })
	all.Go(func() { r.names, r.namesErr = resolve4(ctx, "metadata.google.internal") })
	r.askNode(ctx)
	all.Wait()
	return r
}

// newReport reads what was configured, what was installed, and what the service says.
func newReport(ctx context.Context, o Options) *nodeReport {
	r := &nodeReport{root: os.Geteuid() == 0, now: time.Now(), file: o.File, flags: o.FlagFile, version: o.Version,
		ports: ephemeralPorts()}
	if r.config, r.broken = o.Load(); r.broken != nil {
		r.config = config.Default()
	}
	r.plan = o.Plan(r.config, r.broken)
	r.state, r.stateErr = routing.ReadState(o.RunDir)
	r.install, _ = routing.ReadFailure(o.RunDir) // one that cannot be read tells nothing
	if text, err := status.Fetch(ctx, o.StatusSocket); errors.Is(err, fs.ErrPermission) {
		r.statusErr = err
		r.notReady, _ = status.FetchReadiness(ctx, r.config.HealthListen)
	} else if err != nil {
		r.statusErr = err
	} else if err := json.Unmarshal(text, &r.status); err != nil {
		r.status, r.statusErr = nil, fmt.Errorf("the answer of %s cannot be read: %w: restart the service if it has "+
			"another version",
			o.StatusSocket, err)
	}
	return r
}

// askNode looks at the node's network, and connects as a pod would after the counter of connections
// was read.
func (r *nodeReport) askNode(ctx context.Context) {
	r.node = routing.Examine(ctx, r.plan, r.state)
	r.health = routing.Listener(r.config.HealthListen)
	r.cloud = askRoot(ctx, routing.MetadataServer(), time.Second, nil)
	if r.node.Local && !r.plan.Closed && r.plan.Mode != routing.ModeLoopback && !r.plan.Listen.Addr().IsUnspecified() {
		r.direct = tryDirectly(ctx, r.plan.Listen, nil)
	}
	if !r.plan.Closed {
		r.probe, r.probe6 = tryConnections(ctx, r.entry(), r.plan.Listen6.IsValid() && r.notIPv6() == "",
			r.noEvidence() == "")
		r.podProbe = tryFromPod(ctx, r.status, r.entry())
	}
}

// notIPv6 is why requests by IPv6 are not redirected though they should be; "": they are.
func (r *nodeReport) notIPv6() string {
	if !r.node.IPv6 {
		return "this node has no IPv6"
	}
	return r.state.IPv6
}

// entry is where pods ask: by its own address the emulator is asked only where nothing is routed.
func (r *nodeReport) entry() netip.AddrPort {
	if r.plan.Mode == routing.ModeNone {
		return r.plan.Listen
	}
	return routing.MetadataServer()
}

// askCluster tries the steps to a pod's token, and from there to Google's.
func (r *nodeReport) askCluster(ctx context.Context, o Options) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var all sync.WaitGroup
	defer all.Wait()
	google := token.GoogleOptions{Audience: r.config.WorkloadIdentity.Audience,
		PoolName: r.config.WorkloadIdentity.PoolName,
		STSURL:   r.config.Google.STSURL, IAMCredentialsURL: r.config.Google.IAMCredentialsURL,
		QuotaProject: r.config.Google.QuotaProject, CAFile: r.config.Google.CAFile}
	all.Go(func() {
		g, err := token.NewGoogle(google)
		if err != nil {
			r.sts.Err, r.iam.Err = err, err
			return
		}
		r.sts, r.iam = g.Reach(ctx)
	})
	var jwt string
	r.cluster, jwt = kube.Try(ctx, kube.Options{Kubeconfig: r.config.Kubeconfig, NodeName: r.config.NodeName,
		Audience: r.config.TokenAudience,
		Copied:   o.CredentialCopy, UserAgent: "gke-metadata-emulator-doctor/" + o.Version})
	if jwt == "" {
		return
	}
	account := r.cluster.Account
	if !account.Linked() {
		account.GoogleEmail = r.config.ImpersonateUnlinked
	}
	mint := google // the other one is read by Reach
	mint.Kubernetes = oneToken{account, jwt}
	g, err := token.NewGoogle(mint)
	if err == nil {
		_, err = g.Token(ctx, token.AccessToken(r.cluster.ServiceAccount, account, nil)) // nobody needs the token
	}
	r.exchange = &exchanged{email: account.GoogleEmail, err: err}
}

// oneToken is a Kubernetes that gave a token already.
type oneToken struct {
	account workload.Account
	jwt     string
}

func (o oneToken) Account(context.Context, workload.ServiceAccount, time.Duration) (workload.Account, error) {
	return o.account, nil
}

func (o oneToken) Token(context.Context, workload.ServiceAccount) (string, error) { return o.jwt, nil }

// askRoot asks the metadata server for what clients probe. dial is nil for a process of the node.
func askRoot(ctx context.Context, at netip.AddrPort, timeout time.Duration,
	dial func(ctx context.Context, network, address string) (net.Conn, error)) (a answered) {
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	client := http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}, // and never by a proxy
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+strings.TrimSuffix(at.String(), ":80")+"/", nil)
	if err != nil {
		return answered{err: err}
	}
	res, err := client.Do(req)
	if err != nil {
		return answered{err: err}
	}
	_ = res.Body.Close()
	return answered{status: res.StatusCode, server: status.Bounded(res.Header.Get("Server")),
		ours: res.Header.Get("Server") == "GKE Metadata Server" && res.Header.Get("Metadata-Flavor") == "Google"}
}

// tryConnections connects as a pod would, and if that is wanted by IPv6 after that, and has
// the connections attested.
func tryConnections(ctx context.Context, at netip.AddrPort, ipv6, evidence bool) (t, t6 probed) {
	pod, err := probe.NewPod()
	if err != nil {
		return probed{impossible: err}, probed{impossible: err}
	}
	defer func() {
		if err := pod.Close(); err != nil && t.impossible == nil {
			t.impossible = fmt.Errorf("the temporary namespace cannot be removed: %w", err)
		}
	}()
	var inhabited error
	if evidence {
		inhabited = pod.Inhabit()
	}
	if t = tryConnection(ctx, pod, pod.Addr, at); evidence {
		t.attest(ctx, pod, at, inhabited)
	}
	if !ipv6 {
		return t, t6
	}
	if err := pod.AddIPv6(); err != nil {
		return t, probed{impossible: err}
	}
	if t6 = tryConnection(ctx, pod, pod.Addr6, routing.MetadataServer6()); evidence {
		t6.attest(ctx, pod, routing.MetadataServer6(), inhabited)
	}
	return t, t6
}

// tryFromPod connects from the network namespace of a pod that the service knows, to meet the rules
// for pods' own addresses and interfaces.
func tryFromPod(ctx context.Context, s *status.Status, at netip.AddrPort) (t probed) {
	names := map[netip.Addr]string{}
	if s != nil && s.Cluster != nil {
		for _, q := range s.Cluster.Pods {
			for _, a := range q.Addresses {
				if !q.HostNetwork {
					names[a] = q.Namespace + "/" + q.Name
				}
			}
		}
	}
	if len(names) == 0 {
		return probed{impossible: probe.ErrNoPod}
	}
	pod, err := probe.JoinPod(slices.Collect(maps.Keys(names)))
	if err != nil {
		return probed{impossible: err}
	}
	defer func() { _ = pod.Close() }()
	t.from = fmt.Sprintf("%s, %s", names[pod.Addr], pod.Addr)
	t.answered = askRoot(ctx, at, 3*time.Second, pod.Dial)
	return t
}

// tryConnection connects from that address of the pod's. What fails is done once more while it is
// looked at who drops it.
func tryConnection(ctx context.Context, pod *probe.Pod, from netip.Addr, at netip.AddrPort) (t probed) {
	t.from = fmt.Sprintf("%s by interface %s", from, pod.Link)
	const timeout = 3 * time.Second // a client's
	if t.answered = askRoot(ctx, at, timeout, pod.Dial); t.err != nil {
		t.dropped, t.traceErr = pod.Dropped(ctx, from, func() { t.answered = askRoot(ctx, at, time.Second, pod.Dial) })
	}
	return t
}

// tryDirectly connects as a process of the node does that the rules spare (hostIdentities), and as
// the service's own probe. dial is askRoot's.
func tryDirectly(ctx context.Context, at netip.AddrPort,
	dial func(ctx context.Context, network, address string) (net.Conn, error)) (t probed) {
	if t.answered = askRoot(ctx, at, 2*time.Second, dial); t.err != nil {
		t.dropped, t.traceErr = probe.DroppedHere(ctx, at.Addr(),
			func() { t.answered = askRoot(ctx, at, time.Second, dial) })
	}
	return t
}

func resolve4(ctx context.Context, name string) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	return net.DefaultResolver.LookupNetIP(ctx, "ip4", name)
}

// ephemeralPorts are those that the kernel gives to connections.
func ephemeralPorts() [2]uint16 {
	text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	f := strings.Fields(string(text))
	if err != nil || len(f) != 2 {
		return [2]uint16{32768, 60999} // the kernel's default
	}
	low, errLow := strconv.ParseUint(f[0], 10, 16)
	high, errHigh := strconv.ParseUint(f[1], 10, 16)
	if errLow != nil || errHigh != nil {
		return [2]uint16{32768, 60999}
	}
	return [2]uint16{uint16(low), uint16(high)}
}
