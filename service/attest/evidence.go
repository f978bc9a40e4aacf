package attest

import (
	"errors"
	"fmt"
	"sync/atomic"
)

// What Look says when it has no evidence. Those in the list immediate do not change while the
// connection lasts. The others may change in a moment: [Kernel.Changes] tells when to look again.
var (
	// ErrNoNamespace says that no network namespace that we know holds the client's address. The
	// helper was asked to look for new ones.
	ErrNoNamespace = errors.New("no known network namespace has the address")
	// ErrHelperAway is ErrNoNamespace while gke-metadata-emulator-attest.service does not run: nobody
	// looks for new namespaces.
	ErrHelperAway = errors.New("no known network namespace has the address, and gke-metadata-emulator-attest.service, " +
		"which finds them, is not connected")
	// ErrNoSocket says that nobody has a socket that is this connection's other end: the client is
	// gone, or forged its address, or is behind a NAT of the pod's own, or in a sandbox
	// with a network stack of its own; or the address is another pod's already, whose namespace
	// is not known yet.
	ErrNoSocket = errors.New("the kernel knows no socket at the other end")
	// ErrUnknownCgroup says that the socket's cgroup is none that we know. It was removed, or
	// it is looked for now.
	ErrUnknownCgroup = errors.New("the cgroup of the client's socket is not known")
	// ErrNamespaceOwner says that no process of a pod was found yet in the network namespace that a
	// pod's process made the socket in. The helper was asked to look again.
	ErrNamespaceOwner = errors.New("the owner of the network namespace of the client's socket is not known yet")
	// ErrOtherNamespace says that the socket was made by a process of one pod in the network namespace
	// of another.
	ErrOtherNamespace = errors.New("the client's socket is in another pod's network namespace than the process that " +
		"created it")
	// ErrNotRead says that the kernel reported more changes of cgroups than could be taken, and that
	// all are read anew.
	ErrNotRead = errors.New("the cgroups of the node are being read again")
	// ErrSockets says that there are two sockets that could be the other end. Others can bring
	// that about: KernelStatus names them.
	ErrSockets = errors.New("two sockets match the other end of the connection")
	// ErrNoCgroup says that the kernel's record of the socket names no cgroup: a kernel without it, or
	// a node with cgroup v1.
	ErrNoCgroup = errors.New("the kernel reports no cgroup for the client's socket")
	// ErrSpared says that the connection was redirected, and that the socket it seems to come from is
	// of a process of the node that nobody redirects. Conntrack gives a connection another port where
	// two of one port come to the same address, and at that one the process has a connection to the
	// real metadata server.
	ErrSpared = errors.New("the connection was redirected, but the client's socket belongs to a process of the node " +
		"that is not redirected")
	// ErrEmptyCgroup says that no process is left where the socket was made.
	ErrEmptyCgroup = errors.New("no process is left in the cgroup of the client's socket")
	// ErrOwner says that a cgroup has a pod's name and is not root's, as kubelet's are.
	ErrOwner = errors.New("the cgroup has a pod's name and was not created by kubelet")
	// ErrPods says that the evidence names two pods: one below the other in a cgroup's path, or
	// two in one namespace (cgroup v1).
	ErrPods = errors.New("the evidence names two pods")
)

// NoSocketError is [ErrNoSocket], with what is known all the same.
type NoSocketError struct {
	Conn   Conn
	Holder string // UID of the one pod whose network namespace has the client's address; "" where there is none, or two
	Others bool   // only namespaces of no pod have it
}

func (e *NoSocketError) Error() string {
	return fmt.Sprintf("%s: from %s to %s", ErrNoSocket, e.Conn.Client, e.Conn.Original)
}

// Is has it be ErrNoSocket.
func (e *NoSocketError) Is(target error) bool { return target == ErrNoSocket }

// OtherNamespaceError is [ErrOtherNamespace], with what is known all the same.
type OtherNamespaceError struct {
	Cgroup    *Evidence // what the socket's cgroup says
	Pod       string    // UID of the one other pod whose processes are in the namespace; "" where there are several
	namespace string
	life      *atomic.Bool // the namespace's
}

func (e *OtherNamespaceError) Error() string {
	return fmt.Sprintf("%s: a process of %s created it in %s: for a mesh's node proxy, set attestation.proxies",
		ErrOtherNamespace, e.Cgroup.Cgroup, e.namespace)
}

// Is has it be ErrOtherNamespace.
func (e *OtherNamespaceError) Is(target error) bool { return target == ErrOtherNamespace }

// Kinds of evidence.
const (
	ByCgroup = "cgroup" // the cgroup of the client's socket
	// the network namespace of the client's socket, which is one pod's; where the node has cgroup v1
	ByNamespace = "netns"
	ByProxy     = "proxy" // that network namespace, where a proxy of the operator's made the socket
)

// Evidence is what the kernel's record of the client's socket says. It does not change, but that it
// may die.
type Evidence struct {
	Kind      string // ByCgroup, ByNamespace or ByProxy
	PodUID    string // as Kubernetes writes it; "" for a process that is no pod's
	Container string // the container's id, "" where the path names none
	Cgroup    string // from the root of the hierarchy: /system.slice/kubelet.service; "" for the others
	OnHost    bool   // the socket is in the node's network namespace
	node      nodeRoot
	life      *atomic.Bool
	doubt     *atomic.Bool // whether life is up to date cannot be told; nil: it is
	proxy     *Evidence    // for ByProxy: of whose cgroup the socket is
}

// Alive reports whether the cgroup, or the namespace, still has a process. What died stays dead,
// also when another process comes to live in the same cgroup. It costs no system call: the kernel
// tells of its last process in some 10 ms, more where we are not scheduled.
func (e *Evidence) Alive() bool { return e.life.Load() && (e.proxy == nil || e.proxy.Alive()) }

// inDoubt reports whether Alive may be wrong, since the kernel's news is not all taken.
func (e *Evidence) inDoubt() bool {
	return e.doubt != nil && e.doubt.Load() || e.proxy != nil && e.proxy.inDoubt()
}
