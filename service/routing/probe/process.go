package probe

import (
	"errors"
	"fmt"
	"io"
	"os/exec"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
)

// inhabitant is a process that lives in the pod's network namespace, and does nothing.
type inhabitant struct {
	cmd   *exec.Cmd
	stdin io.Closer // its end is the process's
}

// Inhabit has a process live in the pod: a network namespace without one is found by nobody who
// looks for those of processes. It ends with Close, or with this process.
func (t *Pod) Inhabit() error {
	cmd := exec.Command("cat")
	stdin, err := cmd.StdinPipe()
	if err == nil {
		err = t.in(t.pod, cmd.Start) // from this thread, so into its namespace
	}
	if err != nil {
		return fmt.Errorf("start a process in the throw-away network namespace: %w", fault.Permission(err))
	}
	t.inhabitant = &inhabitant{cmd, stdin}
	return nil
}

func (i *inhabitant) end() error {
	if i == nil {
		return nil
	}
	return errors.Join(i.stdin.Close(), i.cmd.Wait())
}
