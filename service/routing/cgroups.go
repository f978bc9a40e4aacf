package routing

import (
	"bufio"
	"bytes"
	"os"
	"path/filepath"
	"strings"
)

// HostCgroups are the cgroups in which a host's own processes live, from the root of the cgroup v2
// hierarchy. What is not in one of them is a pod on the host network.
func HostCgroups() []string {
	return []string{"system.slice", "user.slice", "runtime.slice", "init.scope"}
}

// existing are those of the cgroups that exist: iptables refuses a path that does not (EINVAL), and
// a rule for one that went away makes other people's restores of the whole table fail.
func existing(root string, cgroups []string) (found []string) {
	if root == "" {
		return nil
	}
	for _, c := range cgroups {
		if info, err := os.Stat(filepath.Join(root, c)); err == nil && info.IsDir() {
			found = append(found, c)
		}
	}
	return found
}

// cgroup2 is where the cgroup v2 hierarchy is mounted, "" if it is not. On a hybrid set-up that is
// /sys/fs/cgroup/unified.
func cgroup2() string {
	mounts, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return ""
	}
	lines := bufio.NewScanner(bytes.NewReader(mounts))
	for lines.Scan() {
		// 30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw: root and mount point are
		// the 4th and 5th field
		before, after, ok := strings.Cut(lines.Text(), " - ")
		fields := strings.Fields(before)
		if ok && strings.HasPrefix(after, "cgroup2 ") && len(fields) > 4 && fields[3] == "/" {
			return fields[4]
		}
	}
	return ""
}
