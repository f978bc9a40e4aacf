package attest

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// podHierarchy returns where the cgroups are that tell of pods: the one hierarchy of cgroup v2, or
// one of v1's, in all of which pods are.
func podHierarchy(root string) (string, error) {
	unified, err := unifiedHierarchy(root)
	if unified || err != nil {
		return root, err
	}
	for _, controller := range []string{"memory", "cpu,cpuacct", "cpu", "pids", "systemd"} {
		if _, err := os.Stat(filepath.Join(root, controller, "cgroup.procs")); err == nil {
			return filepath.Join(root, controller), nil
		}
	}
	return "", fmt.Errorf("%s has neither a cgroup v2 hierarchy nor one of v1 with the memory, cpu or pids "+
		"controller", root)
}

// process is one that lives in a network namespace.
type process struct {
	pid       int
	pidfd     int
	namespace uint64 // the inode of its network namespace; 0: there is no process
}

func (p process) close() {
	if p.namespace != 0 {
		_ = unix.Close(p.pidfd)
	}
}

// there reports whether the process lives and is in its namespace still, of which the inode is not
// another one's then.
func (p process) there() bool {
	now, err := networkNamespace(strconv.Itoa(p.pid))
	return err == nil && now == p.namespace && !ended(p.pidfd)
}

// firstProcess returns a process of the cgroup.
func firstProcess(cgroup string) (process, error) {
	for range 3 {
		procs, err := os.ReadFile(cgroup + "/cgroup.procs")
		if err != nil || len(procs) == 0 {
			return process{}, nil // gone, empty, or a cgroup of threads
		}
		line, _, _ := bytes.Cut(procs, []byte("\n"))
		if p, err := openProcess(cgroup, string(line)); err != nil || p.namespace != 0 {
			return p, err
		}
	}
	return process{}, nil
}

// openProcess returns a process of the cgroup, or none if it is not there any more. Between two
// looks its number may become another process's: it is of the cgroup if it is listed after the
// pidfd was made, and its namespace is what was read if it lives after that.
func openProcess(cgroup, number string) (process, error) {
	pid, err := strconv.Atoi(number)
	if err != nil || pid <= 0 {
		return process{}, nil // 0: of another pid namespace than ours
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return process{}, nil
	}
	if err != nil {
		return process{}, fmt.Errorf("pidfd_open: %w", err)
	}
	p := process{pid: pid, pidfd: fd}
	p.namespace, err = networkNamespace(number)
	procs, _ := os.ReadFile(cgroup + "/cgroup.procs")
	listed := bytes.HasPrefix(procs, []byte(number+"\n")) || bytes.Contains(procs, []byte("\n"+number+"\n"))
	dead := ended(fd) // looked at last: of a process that is being reaped the kernel says EACCES
	if err == nil && listed && !dead {
		return p, nil
	}
	_ = unix.Close(fd)
	if err != nil && !dead && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ESRCH) {
		return process{}, err
	}
	return process{}, nil
}

// networkNamespace returns the inode of a process's.
func networkNamespace(pid string) (uint64, error) {
	var s unix.Stat_t
	if err := unix.Stat("/proc/"+pid+"/ns/net", &s); err != nil {
		return 0, &fs.PathError{Op: "stat", Path: "/proc/" + pid + "/ns/net", Err: err}
	}
	return s.Ino, nil
}

// opened are the sockets that were made in a namespace.
type opened struct {
	*anchor
	diag, route int
	err         error
}

// openIn makes them in all of the namespaces. The thread that goes there ends with it: one that
// waits somewhere would keep that alive. The first thread of a process cannot end, so it is kept
// busy meanwhile.
func openIn(anchors []*anchor) []opened {
	done := make(chan []opened)
	go func() {
		runtime.LockOSThread() // and never unlocked
		if unix.Gettid() == unix.Getpid() {
			done <- openIn(anchors)
			runtime.UnlockOSThread()
			return
		}
		all := make([]opened, 0, len(anchors))
		for _, a := range anchors {
			all = append(all, open(a))
		}
		done <- all
	}()
	return <-done
}

// open makes them with the calling thread, and leaves it there.
func open(a *anchor) opened {
	o := opened{anchor: a}
	if o.err = unix.Setns(a.pidfd, unix.CLONE_NEWNET); o.err != nil {
		o.err = fmt.Errorf("setns: %w", o.err)
		return o
	}
	var here uint64
	if here, o.err = networkNamespace("thread-self"); o.err != nil || here != a.namespace {
		o.err = errors.Join(o.err, unix.ESRCH)
		return o
	}
	if o.diag, o.err = openNetlink(unix.NETLINK_SOCK_DIAG); o.err != nil {
		return o
	}
	if o.route, o.err = openNetlink(unix.NETLINK_ROUTE); o.err != nil {
		_ = unix.Close(o.diag)
	}
	return o
}

// handOver hands over what the server has not got yet.
func (h *Helper) handOver(s *server) {
	var fresh []*anchor
	for inode, a := range h.found {
		if s.sent[inode] != a {
			fresh = append(fresh, a)
		}
	}
	if len(fresh) == 0 {
		return
	}
	for _, o := range openIn(fresh) {
		if o.err != nil {
			h.cannot(o.err)
			continue
		}
		if h.send(s, helperMessage{Namespace: o.namespace, Cgroups: o.messagePaths()}, o.pidfd, o.diag, o.route) {
			s.sent[o.namespace] = o.anchor
		}
		_ = unix.Close(o.diag)
		_ = unix.Close(o.route)
	}
}

// complete tells a server that all was looked at.
func (h *Helper) complete(s *server) {
	h.send(s, helperMessage{Complete: true, Problem: h.problem})
}

// send reports whether the server has the message. One that does not take it is let go.
func (h *Helper) send(s *server, m helperMessage, fds ...int) bool {
	if !h.servers[s] {
		return false
	}
	_ = s.conn.SetWriteDeadline(time.Now().Add(sendTimeout))
	err := sendMessage(s.conn, m, fds...)
	if err != nil {
		h.options.Log.WithError(err).Info("attest: the service disconnected")
		delete(h.servers, s)
		_ = s.conn.Close()
	}
	return err == nil
}

// cannot notes what fails for want of a right or of a newer kernel. That a process ends meanwhile
// is no news.
func (h *Helper) cannot(err error) {
	var problem string
	switch {
	case err == nil:
		return
	case errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES):
		problem = "network namespaces cannot be entered: CAP_SYS_ADMIN and CAP_SYS_PTRACE are needed, and a security " +
			"module may forbid it"
	case errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL):
		problem = "network namespaces cannot be entered: setns(2) by pidfd needs Linux 5.8"
	case errors.Is(err, unix.ESRCH) || errors.Is(err, fs.ErrNotExist):
		return
	default:
		problem = "network namespaces cannot be entered"
	}
	h.problemIs(problem + ": " + err.Error())
}

func (h *Helper) problemIs(problem string) {
	if h.problem = problem; problem != h.warned {
		h.warned = problem
		h.options.Log.Error("attest: " + problem)
	}
}
