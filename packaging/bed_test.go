package packaging

import (
	"bufio"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// A booted machine ends when its bed/boot is killed, and when whoever started bed/boot is. The next
// one removes what was left.
func TestBootKilled(t *testing.T) {
	rootfs := os.Getenv("GME_TEST_ROOTFS")
	switch info, err := os.Stat(rootfs); {
	case os.Geteuid() != 0:
		lacking(t, "a machine is booted by root")
	case err != nil || !info.IsDir():
		lacking(t, "GME_TEST_ROOTFS names no folder with a Debian: `make test` makes one with packaging/bed/rootfs")
	}
	need(t, "unshare", "setpriv", "pgrep")
	boot := []string{"bed/boot", rootfs, t.TempDir(), t.TempDir()}
	for name, command := range map[string][]string{
		"boot": boot, "its parent": append([]string{"sh", "-c", `"$@"; exit`, "sh"}, boot...),
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command(command[0], append(command[1:], "sh", "-c", "echo up; exec sleep infinity")...)
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			line, err := bufio.NewReader(stdout).ReadString('\n')
			if err != nil || line != "up\n" {
				_ = cmd.Process.Kill() // it has not booted
				t.Fatalf("the machine says %q: %v, %v", line, err, cmd.Wait())
			}
			pid := strconv.Itoa(cmd.Process.Pid)
			if name != "boot" {
				pid = strings.TrimSpace(output(t, "pgrep", "-P", pid))
			}
			cgroups := left(t, pid)
			if len(cgroups) != 2 {
				t.Errorf("a machine has a cgroup and a directory, this one %v", cgroups)
			}
			t.Cleanup(func() {
				for _, dir := range cgroups {
					_ = os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0) // the test failed
				}
			})
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait() // it was killed
			for deadline := time.Now().Add(time.Minute); ; {
				alive := slices.DeleteFunc(left(t, pid), func(dir string) bool {
					events, err := os.ReadFile(filepath.Join(dir, "cgroup.events"))
					return err != nil || strings.Contains(string(events), "populated 0")
				})
				if _, err := os.Stat("/proc/" + pid); err != nil && len(alive) == 0 {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("processes are left in %v", alive)
				}
				time.Sleep(50 * time.Millisecond)
			}
			if out, err := exec.Command(boot[0], append(boot[1:], "true")...).CombinedOutput(); err != nil {
				t.Fatalf("the next machine: %v\n%s", err, out)
			}
			if dirs := left(t, pid); len(dirs) > 0 {
				t.Errorf("left: %v", dirs)
			}
		})
	}
}

// left is what there is of a machine outside of it.
func left(t *testing.T, pid string) (dirs []string) {
	t.Helper()
	for _, pattern := range []string{
		"/sys/fs/cgroup/gme-bed-" + pid, "/sys/fs/cgroup/unified/gme-bed-" + pid,
		"/var/tmp/gke-metadata-emulator-scratch-0/" + pid + ".*",
	} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		dirs = append(dirs, found...)
	}
	return dirs
}
