package attest

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// KernelOptions are what a Kernel needs to know.
type KernelOptions struct {
	CgroupRoot string // where the cgroups are mounted; "": /sys/fs/cgroup
	Socket     string // where the helper listens
	// cgroups, from the root: what their processes send from the node's network namespace nobody
	// redirects
	Spared     []string
	Redirected []netip.AddrPort // what clients dial whose connections are redirected to us, of each family
	Log        logrus.FieldLogger
	Registerer prometheus.Registerer // nil: nothing is counted
}

// maxAskedOfOne bounds how many network namespaces of one pod, and how many of no pod, are asked
// for one address.
const maxAskedOfOne = 8

// DefaultCgroupRoot is where systemd mounts the cgroups.
const DefaultCgroupRoot = "/sys/fs/cgroup"

// Kernel asks the kernel which process made the socket at the other end of a connection.
//
// It has no privilege. Of our own network namespace it may ask; sockets that ask in others are
// handed over by a [Helper].
//
// What it knows is as old as the kernel's news of it. A new pod's cgroup and namespace are known
// some ms after they are there: until then Look says that it does not know. The death of a cgroup's
// last process is reported in some 10 ms (at most once in ten, and then we have to be scheduled);
// what is written in between goes to a socket that this process made, and that nobody else has but
// by having been given it. The removal of a cgroup is reported at once, and its id is never
// used again.
type Kernel struct {
	options KernelOptions
	lookups *prometheus.CounterVec
	scan    chan struct{} // holds one when the helper is to look for namespaces
	walk    chan struct{} // holds one when a cgroup is not known
	begun   atomic.Int64  // searches that the helper was asked for,
	done    atomic.Int64  // and the last of them that came to its end

	poller *poller
	node   nodeRoot

	routing sync.Mutex // of the namespaces' route sockets and the buffer; taken before mu
	buffer  []byte

	mu         sync.RWMutex
	cgroups    *cgroups   // nil with cgroup v1
	unified    bool       // the kernel names cgroups, and pods are in them
	own        *namespace // nil: not running
	namespaces map[uint64]*namespace
	byAddr     map[netip.Addr][]holder // the slices are not written to
	generation int                     // of the helper's connections
	status     KernelStatus
	conflicts  map[netip.Addr]Conflict
	changes    chan struct{} // nil: nobody waits
}

// holder is a namespace that has an address, on the interface.
type holder struct {
	*namespace
	device uint32
}

// NewKernel returns a Kernel that knows nothing until it runs.
func NewKernel(o KernelOptions) *Kernel {
	if o.CgroupRoot == "" {
		o.CgroupRoot = DefaultCgroupRoot
	}
	k := &Kernel{
		options: o, scan: make(chan struct{}, 1), walk: make(chan struct{}, 1), buffer: make([]byte, 32<<10),
		namespaces: map[uint64]*namespace{}, byAddr: map[netip.Addr][]holder{}, conflicts: map[netip.Addr]Conflict{},
	}
	k.register(o.Registerer)
	return k
}

// Look asks the kernel now, and waits half a second at most, where a packet of the client is under
// way. It is to be called at accept, before a byte is read. Errors: those of
// evidence.go, wrapped with what was found, and the kernel's.
func (k *Kernel) Look(c Conn) (*Evidence, error) {
	e, err := k.look(c)
	k.lookups.WithLabelValues(outcome(err)).Inc()
	return e, err
}

func (k *Kernel) look(c Conn) (*Evidence, error) {
	k.mu.RLock()
	own, holders, helper, unified, cgroups := k.own, k.byAddr[c.Client.Addr()], k.status.Helper, k.unified, k.cgroups
	k.mu.RUnlock()
	asked := askable(holders)
	if own == nil {
		return nil, fmt.Errorf("%w: the service is starting", ErrNoNamespace)
	}
	n, f, redirected, err := k.client(c, own, asked)
	switch {
	case err != nil:
		return nil, err
	case n == nil:
		signal(k.scan)
		if len(holders) > 0 || c.Client.Addr().IsLoopback() {
			holder, others := podOf(holders)
			return nil, &NoSocketError{Conn: c, Holder: holder, Others: others}
		}
		if !helper {
			return nil, fmt.Errorf("%w: %s", ErrHelperAway, c.Client.Addr())
		}
		return nil, fmt.Errorf("%w: %s", ErrNoNamespace, c.Client.Addr())
	case !unified && n == own:
		return nil, fmt.Errorf(
			"%w: the client is on the host network, and the node has no cgroup v2",
			ErrNoCgroup,
		)
	case !unified:
		if n.fault != nil {
			signal(k.scan) // a process that made it ambiguous may be gone
		}
		return n.evidence, n.fault
	case f.cgroup == 0:
		return nil, fmt.Errorf("%w: the socket is in state %d", ErrNoCgroup, f.state)
	}
	e, err := cgroups.lookup(f.cgroup)
	switch {
	case errors.Is(err, ErrUnknownCgroup):
		signal(k.walk)
	case err == nil && n == own && redirected && k.spares(e.Cgroup):
		return nil, fmt.Errorf("%w: it is in %s", ErrSpared, e.Cgroup)
	case err == nil && n != own && e.PodUID != "":
		return k.within(n, e)
	case err == nil && n == own: // a cgroup has sockets of more than one namespace
		onHost := *e
		onHost.OnHost = true
		e = &onHost
	}
	return e, err
}

// within refuses what the cgroup of a socket says of a pod, unless the socket is in that pod's
// network namespace and in no other pod's.
func (k *Kernel) within(n *namespace, e *Evidence) (*Evidence, error) {
	var others []string
	for uid := range n.uids {
		if uid != e.PodUID {
			others = append(others, uid)
		}
	}
	switch {
	case len(n.uids) == 0:
		signal(k.scan)
		return nil, fmt.Errorf("%w: a process of %s created it in %s", ErrNamespaceOwner, e.Cgroup, n)
	case len(others) == 0:
		return e, nil
	}
	other := &OtherNamespaceError{Cgroup: e, namespace: n.String(), life: n.life}
	if len(others) == 1 {
		other.Pod = others[0]
	}
	return nil, other
}

// spares reports whether the cgroup is one of those that are not redirected, or below one.
func (k *Kernel) spares(path string) bool {
	return slices.ContainsFunc(k.options.Spared, func(s string) bool { return strings.HasPrefix(path+"/", "/"+s+"/") })
}

// askable returns those of the namespaces with an address that are asked: each costs some µs, and
// users of the node and pods may be allowed to make hundreds, with any address. They are all of the
// pods' but for what one has beyond [maxAskedOfOne], and as many that are no pod's. Of these, those
// of users who log in come last.
func askable(holders []holder) []holder {
	if len(holders) <= maxAskedOfOne {
		return holders
	}
	rank := func(h holder) int {
		switch {
		case !h.ofNode:
			return 0
		case !slices.ContainsFunc(h.cgroups, func(c string) bool { return strings.HasPrefix(c, "/user.slice/") }):
			return 1
		}
		return 2
	}
	asked := make([]holder, 0, 4*maxAskedOfOne)
	of := map[string]int{} // how many of each pod; "" is nobody's, or several pods'
	for r := range 3 {
		for _, h := range holders {
			if rank(h) == r && of[h.pod] < maxAskedOfOne {
				of[h.pod]++
				asked = append(asked, h)
			}
		}
	}
	return asked
}

// find asks every namespace that has the client's address, and our own, where any address can be
// used, who has the client's socket to the address it dialled. n is nil where none has it. A
// namespace that cannot be asked leaves it open whether there is one.
func (k *Kernel) find(
	c Conn,
	dialled netip.AddrPort,
	own *namespace,
	holders []holder,
) (n *namespace, f socketFound, err error) {
	ask := func(h holder) error {
		found, ok, err := h.opener(c, dialled)
		switch {
		case errors.Is(err, errClosed) || err == nil && !ok:
			return nil
		case err != nil:
			return err
		case n != nil && n.inode == h.inode: // by the sockets of two helpers, of which one goes
			return nil
		case n != nil:
			return k.conflict(c, n, h.namespace)
		}
		n, f = h.namespace, found
		return nil
	}
	asked := false
	for _, h := range holders {
		asked = asked || h.namespace == own
		if err := ask(h); err != nil {
			return nil, f, err
		}
	}
	if !asked {
		if err := ask(holder{own, 0}); err != nil {
			return nil, f, err
		}
	}
	return n, f, nil
}

// podOf returns the one pod whose namespace has an address, "" where that is not so. others says
// that it is in namespaces of no pod alone.
func podOf(holders []holder) (uid string, others bool) {
	pods := slices.DeleteFunc(slices.Clone(holders), func(h holder) bool { return h.ofNode })
	switch {
	case len(pods) == 0:
		return "", len(holders) > 0
	case len(pods) > 1:
		return "", false
	}
	return pods[0].pod, false
}

// Search returns the number of the next search for namespaces. The helper is asked for one by a
// Look that finds none.
func (k *Kernel) Search() int64 { return k.begun.Load() + 1 }

// Searched reports whether that search, or a later one, has come to its end.
func (k *Kernel) Searched(number int64) bool { return k.done.Load() >= number }

// Changes returns a channel that is closed when another Look may say more. Take it before the Look
// that it follows.
func (k *Kernel) Changes() <-chan struct{} {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.changes == nil {
		k.changes = make(chan struct{})
	}
	return k.changes
}

func (k *Kernel) changed() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.changes != nil {
		close(k.changes)
		k.changes = nil
	}
}

// KernelStatus is what `status` shows of a Kernel.
type KernelStatus struct {
	Hierarchy  string    `json:"hierarchy"`         // cgroup2 or cgroup1; "" until Run found out
	Evidence   string    `json:"evidence"`          // ByCgroup or ByNamespace: the most that this kernel says
	Cgroups    int       `json:"cgroups"`           // known
	Namespaces int       `json:"namespaces"`        // whose sockets can be asked for, beside our own
	Helper     bool      `json:"helper"`            // connected
	Since      time.Time `json:"since,omitzero"`    // when the helper came, or went
	Problem    string    `json:"problem,omitempty"` // why the helper is not connected, or what it cannot do
	Lacks      []string  `json:"lacks,omitempty"`   // what this kernel has not, and what follows from that

	Conflicts []Conflict `json:"conflicts,omitempty"` // sorted by Address
}

// Status tells what is known now.
func (k *Kernel) Status() KernelStatus {
	k.mu.RLock()
	s := k.status
	if !s.Helper && s.Problem == "" {
		s.Problem = "the first connection to it was not tried yet"
	}
	s.Namespaces = len(k.namespaces)
	s.Conflicts = k.recentConflicts()
	crowded := 0
	for _, holders := range k.byAddr {
		if len(askable(holders)) < len(holders) {
			crowded++
		}
	}
	cgroups := k.cgroups
	k.mu.RUnlock()
	s.Lacks = append([]string(nil), s.Lacks...)
	if crowded > 0 {
		s.Lacks = append(
			s.Lacks,
			fmt.Sprintf(
				"%d addresses are in more than %d network namespaces of no pod, or of one pod: clients in the others are refused",
				crowded,
				maxAskedOfOne,
			),
		)
	}
	if cgroups != nil {
		var problem error
		if s.Cgroups, problem = cgroups.known(); problem != nil {
			s.Lacks = append(s.Lacks, problem.Error())
		}
	}
	return s
}

// helperIs notes whether the helper is there.
func (k *Kernel) helperIs(connected bool, problem string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.status.Helper != connected || k.status.Since.IsZero() {
		k.status.Since = time.Now()
	}
	k.status.Helper, k.status.Problem = connected, problem
}

// signal leaves one for whoever waits.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// outcomes are the values of the metric's label.
var outcomes = []struct {
	err  error
	name string
}{
	{nil, "ok"},
	{ErrNoNamespace, "no-namespace"},
	{ErrHelperAway, "helper-away"},
	{ErrNoSocket, "no-socket"},
	{ErrSockets, "sockets"},
	{ErrUnknownCgroup, "unknown-cgroup"},
	{ErrNoCgroup, "no-cgroup"},
	{ErrEmptyCgroup, "empty-cgroup"},
	{ErrOwner, "owner"},
	{ErrSpared, "spared"},
	{ErrPods, "pods"},
	{ErrNamespaceOwner, "namespace-owner"},
	{ErrOtherNamespace, "other-namespace"},
}

func outcome(err error) string {
	for _, o := range outcomes {
		if errors.Is(err, o.err) {
			return o.name
		}
	}
	return outcomeOther
}

const outcomeOther = "error"

func (k *Kernel) register(r prometheus.Registerer) {
	k.lookups = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "gke_metadata_emulator_attest_lookups_total",
		Help: "Connections whose client's socket the kernel was asked for, by outcome.",
	}, []string{"outcome"})
	for _, o := range outcomes {
		k.lookups.WithLabelValues(o.name)
	}
	k.lookups.WithLabelValues(outcomeOther)
	if r == nil {
		return
	}
	gauge := func(name, help string, value func(KernelStatus) float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(
			prometheus.GaugeOpts{Name: "gke_metadata_emulator_attest_" + name, Help: help},
			func() float64 { return value(k.Status()) },
		)
	}
	r.MustRegister(
		k.lookups,
		gauge(
			"namespaces",
			"Network namespaces, beside our own, whose sockets can be asked for.",
			func(s KernelStatus) float64 { return float64(s.Namespaces) },
		),
		gauge("cgroups", "Cgroups that are known.", func(s KernelStatus) float64 { return float64(s.Cgroups) }),
		helperGauge{k},
	)
}

// helperGauge is absent where nobody asks the kernel, because attestation.mode is source-ip or
// there is no configuration: no helper is missed then.
type helperGauge struct{ *Kernel }

var helperDesc = prometheus.NewDesc("gke_metadata_emulator_attest_helper_connected",
	"1 if gke-metadata-emulator-attest.service hands over what it finds, else 0; absent where the kernel is not asked.",
	nil, nil)

// Describe and Collect make it a prometheus.Collector.
func (helperGauge) Describe(to chan<- *prometheus.Desc) { to <- helperDesc }

// Collect sends what Describe announces.
func (g helperGauge) Collect(to chan<- prometheus.Metric) {
	s := g.Status()
	if s.Hierarchy == "" {
		return
	}
	connected := 0.0
	if s.Helper {
		connected = 1
	}
	to <- prometheus.MustNewConstMetric(helperDesc, prometheus.GaugeValue, connected)
}

// unifiedHierarchy reports whether a cgroup v2 hierarchy is mounted there.
func unifiedHierarchy(root string) (bool, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(root, &s); err != nil {
		return false, fmt.Errorf("cgroups at %s: %w", root, err)
	}
	return s.Type == unix.CGROUP2_SUPER_MAGIC, nil
}
