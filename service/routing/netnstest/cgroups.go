package netnstest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNoCgroups is what NewCgroups returns where there is no cgroup v2 hierarchy to make a part of.
var ErrNoCgroups = errors.New("no cgroups can be made here")

// Cgroups is a part of the cgroup v2 hierarchy, in which processes are born as a container runtime
// has a pod's born.
type Cgroups struct {
	Path  string   // of the directory
	Mount *os.File // of the hierarchy, where that is nowhere in the file system; Path is below its descriptor then
}

// NewCgroups makes a part of the hierarchy that is mounted at root. Where root is "" it mounts the
// hierarchy where nobody else sees it, which works on nodes of cgroup v1 too.
func NewCgroups(root, name string) (*Cgroups, error) {
	c := &Cgroups{}
	if root == "" {
		mount, err := mountCgroups()
		if err != nil {
			return nil, fmt.Errorf("%w: mount cgroup2: %w", ErrNoCgroups, err)
		}
		c.Mount = os.NewFile(uintptr(mount), "cgroup2")
		root = fmt.Sprintf("/proc/self/fd/%d", mount)
	}
	c.Path = filepath.Join(root, name)
	var fs unix.Statfs_t
	err := unix.Statfs(root, &fs)
	switch {
	case err != nil:
	case fs.Type != unix.CGROUP2_SUPER_MAGIC:
		err = errors.New("it is not cgroup v2")
	default:
		err = c.make()
	}
	if err != nil {
		if c.Mount != nil {
			_ = c.Mount.Close()
		}
		return nil, fmt.Errorf("%w: %s: %w", ErrNoCgroups, c.Path, err)
	}
	return c, nil
}

func mountCgroups() (int, error) {
	fs, err := unix.Fsopen("cgroup2", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, err
	}
	defer func() { _ = unix.Close(fs) }()
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, err
	}
	return unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
}

// make makes the directory. What one of that name left behind that was killed has no processes any
// more.
func (c *Cgroups) make() error {
	removeCgroups(c.Path)
	return os.Mkdir(c.Path, 0o755)
}

// Start starts the command as a process of the cgroup with that path below Path, and in the
// namespace.
func (c *Cgroups) Start(ns *NS, cgroup string, cmd *exec.Cmd) error {
	dir := filepath.Join(c.Path, cgroup)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &unix.SysProcAttr{}
	}
	cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(f.Fd())
	return ns.Do(cmd.Start)
}

// Remove removes a cgroup and all below it, once none of their processes is left.
func (c *Cgroups) Remove(cgroup string) { removeCgroups(filepath.Join(c.Path, cgroup)) }

// Close kills the processes that are left, and removes all that Start made.
func (c *Cgroups) Close() error {
	_ = os.WriteFile(filepath.Join(c.Path, "cgroup.kill"), []byte("1"), 0) // Linux 5.14
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	var err error
	for deadline := time.After(5 * time.Second); ; {
		removeCgroups(c.Path)
		if _, there := os.Stat(c.Path); errors.Is(there, os.ErrNotExist) {
			break
		}
		select {
		case <-tick.C:
			continue
		case <-deadline:
			err = fmt.Errorf("cgroup %s has processes still", c.Path)
		}
		break
	}
	if c.Mount != nil {
		err = errors.Join(err, c.Mount.Close())
	}
	return err
}

func removeCgroups(path string) {
	kids, _ := os.ReadDir(path)
	for _, kid := range kids {
		if kid.IsDir() {
			removeCgroups(filepath.Join(path, kid.Name()))
		}
	}
	_ = unix.Rmdir(path)
}
