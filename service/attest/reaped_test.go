package attest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"testing"
)

// A process that is reaped while its namespace is read has ended. The kernel says EACCES of it,
// which is no missing capability.
func TestReapedProcess(t *testing.T) {
	cgroup := t.TempDir()
	for range 500 {
		c := exec.Command("/bin/true")
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		number := strconv.Itoa(c.Process.Pid)
		if err := os.WriteFile(filepath.Join(cgroup, "cgroup.procs"), []byte(number+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		var reaped atomic.Bool
		go func() { _ = c.Wait(); reaped.Store(true) }()
		for !reaped.Load() {
			p, err := openProcess(cgroup, number)
			if err != nil {
				t.Fatal(err)
			}
			p.close()
		}
	}
}
