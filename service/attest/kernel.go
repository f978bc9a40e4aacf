package attest

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
)

// KernelOptions are what a Kernel needs to know.
type KernelOptions struct {
	CgroupRoot string // where the cgroups are mounted; "": /sys/fs/cgroup
	Socket     string // where the helper listens
	Log        logrus.FieldLogger
	Registerer prometheus.Registerer // nil: nothing is counted
}

// Kernel asks the kernel which process made the socket at the other end of a connection.
type Kernel struct{ options KernelOptions }

// NewKernel returns a Kernel that knows nothing until it runs.
func NewKernel(o KernelOptions) *Kernel { return &Kernel{options: o} }

// Run follows the cgroups, our own network namespace, and what the helper hands over, until ctx is done. It gives nothing up: what fails is
// logged, shown by Status, and tried again.
func (k *Kernel) Run(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

// Look asks the kernel now, and waits for nothing. It is to be called at accept, before a byte is read.
// Errors: those of this file's table, wrapped with what was found.
func (k *Kernel) Look(c Conn) (*Evidence, error) { return nil, ErrNoNamespace }

// Changes returns a channel that is closed when another Look may say more. Take it before the Look that it follows.
func (k *Kernel) Changes() <-chan struct{} { return nil }

// KernelStatus is what `status` shows of a Kernel.
type KernelStatus struct {
	Hierarchy  string    `json:"hierarchy"`         // cgroup2 or cgroup1; "" until Run found out
	Cgroups    int       `json:"cgroups"`           // known
	Namespaces int       `json:"namespaces"`        // of pods, whose sockets can be asked for
	Helper     bool      `json:"helper"`            // connected
	Since      time.Time `json:"since,omitzero"`    // when the helper came, or went
	Problem    string    `json:"problem,omitempty"` // why the helper is not connected
	Lacks      []string  `json:"lacks,omitempty"`   // what this kernel has not, and what follows from that
}

// Status tells what is known now.
func (k *Kernel) Status() KernelStatus { return KernelStatus{} }
