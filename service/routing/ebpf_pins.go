package routing

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
)

// Programs stand as rules do, without the process that put them up: the link that attaches a
// program to the cgroup is pinned in the bpf file system, and beside it the program, so that
// another process can compare what stands with what is wanted.
//
//	/sys/fs/bpf/gke-metadata-emulator/ebpf/
//		connect4_link  connect4_program  connect6_link  …  getpeername6_program
//
// Names have no dots: this file system keeps them to itself. Links (Linux 5.7) leave other people's
// programs at the same cgroup alone, and theirs leave ours.
type pins struct {
	dir   string // below a directory in a bpf file system
	root  string // the root of the cgroup v2 hierarchy
	hooks []hook

	verified [][]ebpf.ProgramID // by hook, what was attached when verify last found no fault; nil: there was one
}

// pins of one mode. What another has pinned is not theirs.
func (p Plan) pins(mode string, hooks []hook) pins {
	return pins{dir: filepath.Join(p.BPFDir, mode), root: p.CgroupRoot, hooks: hooks}
}

// DefaultBPFDir is where programs are pinned, in a directory for each mode.
const DefaultBPFDir = "/sys/fs/bpf/gke-metadata-emulator"

func (p pins) link(h hook) string    { return filepath.Join(p.dir, h.name+"_link") }
func (p pins) program(h hook) string { return filepath.Join(p.dir, h.name+"_program") }

// install makes the programs of r stand. One that stands already as it should is not touched;
// another is replaced at once, so that each connect() sees the old or the new one.
func (p pins) install(r rewriting) error {
	if err := p.usable(); err != nil {
		return err
	}
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return fmt.Errorf("make the directory for eBPF programs: %w", fault.Permission(err))
	}
	for _, h := range p.hooks {
		if err := p.installHook(h, r); err != nil {
			return fmt.Errorf("eBPF program %s: %w", h.name, bpfPermission(err))
		}
	}
	return nil
}

// usable says what is missing for eBPF programs at all, and the remedy.
func (p pins) usable() error {
	if p.root == "" {
		return errors.New(
			"programs are attached to the root of the cgroup v2 hierarchy, which is not mounted here: boot with systemd.unified_cgroup_hierarchy=1, or use routing mode iptables",
		)
	}
	parent := filepath.Dir(filepath.Dir(p.dir))
	var s unix.Statfs_t
	if err := unix.Statfs(parent, &s); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("look at %s: %w", parent, fault.Permission(err))
	} else if err != nil || s.Type != unix.BPF_FS_MAGIC {
		return fmt.Errorf("programs are pinned in a bpf file system, and %s is none: `mount -t bpf bpf %[1]s`, or use routing mode iptables", parent)
	}
	return nil
}

func (p pins) installHook(h hook, r rewriting) error {
	if p.checkHook(h, r) == nil {
		return nil
	}
	spec, err := r.spec(h)
	if err != nil {
		return err
	}
	program, err := ebpf.NewProgram(spec)
	if err != nil {
		return err
	}
	defer program.Close()
	if err := p.attach(h, program); err != nil {
		return err
	}
	// The pin of the program may lag behind its link for a moment, or for good after a crash: then
	// checkHook finds two programs where one should be.
	next := p.program(h) + "_next"
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := program.Pin(next); err != nil {
		return err
	}
	return os.Rename(next, p.program(h))
}

// attach has the pinned link lead to the program, or makes one where there is none, or none that
// leads anywhere.
func (p pins) attach(h hook, program *ebpf.Program) error {
	l, err := link.LoadPinnedLink(p.link(h), nil)
	if err == nil {
		defer l.Close()
		if id, err := cgroupOf(l); err == nil && id == cgroupID(p.root) && id != 0 {
			return l.Update(program)
		}
	}
	if err := os.Remove(p.link(h)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	cgroup, err := os.Open(p.root)
	if err != nil {
		return err
	}
	defer cgroup.Close()
	made, err := link.AttachRawLink(link.RawLinkOptions{Target: int(cgroup.Fd()), Program: program, Attach: h.attach})
	if errors.Is(err, unix.EPERM) {
		if others, err := p.attached(h); err == nil && len(others[0]) > 0 {
			return fmt.Errorf(
				"%s %w, who lets no other program of this kind be attached there (`bpftool cgroup show %[1]s` names it)",
				p.root,
				fault.ErrForeign,
			)
		}
	}
	if err != nil {
		return fmt.Errorf("attach to %s: %w", p.root, err)
	}
	defer made.Close()
	return made.Pin(p.link(h))
}

// check names every program that is not there, or not as it should be.
func (p pins) check(r rewriting) (errs []error) {
	if err := p.usable(); err != nil {
		return []error{err}
	}
	for _, h := range p.hooks {
		if err := p.checkHook(h, r); err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

// verify is check, and remembers for changed what is attached if nothing is missing.
func (p *pins) verify(r rewriting) []error {
	p.verified = nil
	before, err := p.attached(p.hooks...)
	if err != nil {
		return []error{err}
	}
	errs := p.check(r)
	if len(errs) == 0 {
		p.verified = before
	}
	return errs
}

// changed asks what is attached, since the kernel tells nobody: it takes less than 0.1 ms.
func (p *pins) changed() bool {
	now, err := p.attached(p.hooks...)
	return err != nil || p.verified == nil || !slices.EqualFunc(now, p.verified, slices.Equal)
}

func (p pins) checkHook(h hook, r rewriting) error {
	l, err := link.LoadPinnedLink(p.link(h), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return fault.Missing(fault.EBPF, "eBPF program %s at %s, pinned as %s", h.name, p.root, p.link(h))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", p.link(h), bpfPermission(err))
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return fmt.Errorf("%s: %w", p.link(h), err)
	}
	at := info.Cgroup()
	if at == nil || ebpf.AttachType(at.AttachType) != h.attach || at.CgroupId != cgroupID(p.root) || at.CgroupId == 0 {
		return fault.Missing(
			fault.EBPF,
			"eBPF program %s at %s: %s leads nowhere, it was detached by force",
			h.name,
			p.root,
			p.link(h),
		)
	}
	program, err := ebpf.LoadPinnedProgram(p.program(h), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return fault.Missing(fault.EBPF, "eBPF program %s: its pin %s", h.name, p.program(h))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", p.program(h), bpfPermission(err))
	}
	defer program.Close()
	is, err := program.Info()
	if err != nil {
		return fmt.Errorf("%s: %w", p.program(h), bpfPermission(err))
	}
	if id, _ := is.ID(); id != info.Program {
		return fault.Missing(
			fault.EBPF,
			"eBPF program %s at %s: number %d is attached, and %s is number %d",
			h.name,
			p.root,
			info.Program,
			p.program(h),
			id,
		)
	}
	spec, err := r.spec(h)
	if err != nil {
		return err
	}
	if err := spec.Compatible(is); errors.Is(err, ebpf.ErrProgIncompatible) {
		return fault.Missing(fault.EBPF, "eBPF program %s at %s: it is another one, of tag %s", h.name, p.root, is.Tag)
	} else if err != nil {
		return err
	}
	if r.counts != nil {
		table, err := r.counts.Info()
		if err != nil {
			return err
		}
		id, _ := table.ID()
		if uses, _ := is.MapIDs(); !slices.Contains(uses, id) {
			return fault.Missing(fault.EBPF, "eBPF program %s at %s: it counts into another table than number %d", h.name, p.root, id)
		}
	}
	return nil
}

// remove detaches whatever is pinned in our directory, the redirecting programs first, and takes
// the directory away.
func (p pins) remove() error {
	if _, err := os.Stat(filepath.Dir(p.dir)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var errs []error
	for _, h := range slices.Backward(p.hooks) {
		l, err := link.LoadPinnedLink(p.link(h), nil)
		if err == nil {
			// To remove the pin alone would leave the program running for some moments more.
			err = errors.Join(l.Detach(), l.Close())
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("detach eBPF program %s: %w", h.name, bpfPermission(err)))
		}
	}
	if err := errors.Join(append(errs, os.RemoveAll(p.dir))...); err != nil {
		return err
	}
	if err := os.Remove(filepath.Dir(p.dir)); err != nil && !errors.Is(err, fs.ErrNotExist) &&
		!errors.Is(err, unix.ENOTEMPTY) {
		return err // ENOTEMPTY: there is another mode's
	}
	return nil
}

// attached are the numbers of all programs at each of the hooks, ours and others', in the order in
// which they run.
func (p pins) attached(hooks ...hook) (all [][]ebpf.ProgramID, err error) {
	cgroup, err := unix.Open(p.root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", p.root, err)
	}
	defer unix.Close(cgroup)
	for _, h := range hooks {
		found, err := link.QueryPrograms(link.QueryOptions{Target: cgroup, Attach: h.attach})
		if err != nil {
			return nil, fmt.Errorf("what is attached to %s at %s: %w", h.name, p.root, bpfPermission(err))
		}
		ids := []ebpf.ProgramID{}
		for _, a := range found.Programs {
			ids = append(ids, a.ID)
		}
		all = append(all, ids)
	}
	return all, nil
}

// order says where ours stand among others' programs, "" where there are none of others.
func (p pins) order() string {
	attached, err := p.attached(p.hooks...)
	if err != nil {
		return "" // which check says better
	}
	var all []string
	for i, h := range p.hooks {
		program, err := ebpf.LoadPinnedProgram(p.program(h), nil)
		if err != nil {
			continue
		}
		if info, err := program.Info(); err == nil && len(attached[i]) > 1 {
			id, _ := info.ID()
			all = append(all, fmt.Sprintf("%s %d of %d", h.name, slices.Index(attached[i], id)+1, len(attached[i])))
		}
		_ = program.Close()
	}
	return strings.Join(all, ", ")
}

// cgroupOf is the id of the cgroup that the link attaches to, 0 if it was detached.
func cgroupOf(l link.Link) (uint64, error) {
	info, err := l.Info()
	if err != nil {
		return 0, err
	}
	if c := info.Cgroup(); c != nil {
		return c.CgroupId, nil
	}
	return 0, nil
}

// cgroupID is the id of the cgroup, by which the kernel and programs call it: the inode of its
// directory. 0 if it is not there.
func cgroupID(path string) uint64 {
	var s unix.Stat_t
	if unix.Stat(path, &s) != nil {
		return 0
	}
	return s.Ino
}

// cgroupIDs are those of the cgroups below the root that are there.
func cgroupIDs(root string, cgroups []string) (ids []uint64) {
	for _, c := range cgroups {
		if id := cgroupID(filepath.Join(root, c)); id != 0 { // which is what programs get for a level that is not there
			ids = append(ids, id)
		}
	}
	return ids
}

// bpfPermission makes plain what the kernel's refusal means.
func bpfPermission(err error) error {
	var verifier *ebpf.VerifierError
	if errors.As(err, &verifier) || !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) {
		return err // the verifier says EACCES too: the program is at fault, which is ours
	}
	return &deniedError{err}
}

// deniedError is ErrPermission in the words of mode ebpf.
type deniedError struct{ error }

func (e *deniedError) Is(target error) bool { return target == fault.ErrPermission }
func (e *deniedError) Unwrap() error        { return e.error }
func (e *deniedError) Error() string {
	return "needs root with CAP_BPF and CAP_NET_ADMIN (a security module or a sandbox may deny it even then: use another routing mode): " + e.error.Error()
}

// hostNetwork is the cookie of the calling thread's network namespace.
func hostNetwork() (uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if errors.Is(err, unix.ENOPROTOOPT) {
		return 0, errors.New("programs at connect() need Linux 5.14 or newer: use routing mode iptables")
	}
	return cookie, err
}
