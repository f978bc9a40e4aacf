package service

import (
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// cgroupLayouts make /sys/fs/cgroup what distributions have there: the cgroup v2 hierarchy, or one
// beside those of v1, in the directory unified.
var cgroupLayouts = map[string]string{
	"unified": `mount -t cgroup2 cgroup2 /sys/fs/cgroup`,
	"hybrid": `mount -t tmpfs tmpfs /sys/fs/cgroup; mkdir /sys/fs/cgroup/unified
		mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified`,
}

// TestCgroupLayouts runs the tests that need cgroups where /sys/fs/cgroup has the layout that this
// machine has not, in a mount namespace of their own. TestKernelChurn needs no more of it than
// TestKernel.
func TestCgroupLayouts(t *testing.T) {
	t.Parallel()
	netnstest.Needs(t, "unshare", "mount", "umount")
	if os.Geteuid() != 0 {
		netnstest.Lacks(t, netnstest.ErrNeedsRoot)
	}
	layout := "unified"
	var fs unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &fs); err != nil {
		t.Fatal(err)
	}
	if fs.Type == unix.CGROUP2_SUPER_MAGIC {
		layout = "hybrid"
	}
	t.Run(layout, func(t *testing.T) {
		cmd := exec.CommandContext(t.Context(), "unshare", "--mount", "--propagation", "private", "sh", "-ec",
			"umount -R /sys/fs/cgroup; "+cgroupLayouts[layout]+`; exec "$@"`, "sh", os.Args[0],
			"-test.run=^(TestKernel|TestOutcomes|TestPassthrough)$", "-test.v", "-test.parallel=2")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		t.Logf("%s", out)
	})
}
