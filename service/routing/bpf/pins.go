// Package bpf answers: which of our programs see connect() on this node, and are they those that
// are wanted?
package bpf

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
type Pins struct {
	Dir   string // below a directory in a bpf file system
	Root  string // the root of the cgroup v2 hierarchy
	Hooks []Hook

	Verified [][]ebpf.ProgramID // by hook, what was attached when verify last found no fault; nil: there was one
}

func (p Pins) LinkPath(h Hook) string    { return filepath.Join(p.Dir, h.Name+"_link") }
func (p Pins) ProgramPath(h Hook) string { return filepath.Join(p.Dir, h.Name+"_program") }

// Install makes the programs of r stand. One that stands already as it should is not touched;
// another is replaced at once, so that each connect() sees the old or the new one.
func (p Pins) Install(r Rewriting) error {
	if err := p.Usable(); err != nil {
		return err
	}
	if err := os.MkdirAll(p.Dir, 0o700); err != nil {
		return fmt.Errorf("make the directory for eBPF programs: %w", fault.Permission(err))
	}
	for _, h := range p.Hooks {
		if err := p.installHook(h, r); err != nil {
			return fmt.Errorf("eBPF program %s: %w", h.Name, remedied(Permission(err)))
		}
	}
	return nil
}

// Usable says what is missing for eBPF programs at all, and the remedy.
func (p Pins) Usable() error {
	if p.Root == "" {
		return errors.New(
			"programs are attached to the root of the cgroup v2 hierarchy, which is not mounted here: boot with " +
				"systemd.unified_cgroup_hierarchy=1, or use routing mode iptables",
		)
	}
	parent := filepath.Dir(filepath.Dir(p.Dir))
	var s unix.Statfs_t
	if err := unix.Statfs(parent, &s); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("look at %s: %w", parent, fault.Permission(err))
	} else if err != nil || s.Type != unix.BPF_FS_MAGIC {
		return fmt.Errorf("programs are pinned in a bpf file system, and %s is none: `mount -t bpf bpf %[1]s`, or use "+
			"routing mode iptables", parent)
	}
	return nil
}

func (p Pins) installHook(h Hook, r Rewriting) error {
	if p.checkHook(h, r) == nil {
		return nil
	}
	spec, err := r.Spec(h)
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
	next := p.ProgramPath(h) + "_next"
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := program.Pin(next); err != nil {
		return err
	}
	return os.Rename(next, p.ProgramPath(h))
}

// attach has the pinned link lead to the program, or makes one where there is none, or none that
// leads anywhere.
func (p Pins) attach(h Hook, program *ebpf.Program) error {
	l, err := link.LoadPinnedLink(p.LinkPath(h), nil)
	if err == nil {
		defer l.Close()
		if id, err := cgroupOf(l); err == nil && id == CgroupID(p.Root) && id != 0 {
			return l.Update(program)
		}
	}
	if err := os.Remove(p.LinkPath(h)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	cgroup, err := os.Open(p.Root)
	if err != nil {
		return err
	}
	defer cgroup.Close()
	made, err := link.AttachRawLink(link.RawLinkOptions{Target: int(cgroup.Fd()), Program: program, Attach: h.attach})
	if errors.Is(err, unix.EPERM) {
		if others, err := p.Attached(h); err == nil && len(others[0]) > 0 {
			return fmt.Errorf(
				"%s %w, who lets no other program of this kind be attached there (`bpftool cgroup show %[1]s` names it)",
				p.Root,
				fault.ErrForeign,
			)
		}
	}
	if err != nil {
		return fmt.Errorf("attach to %s: %w", p.Root, err)
	}
	defer made.Close()
	return made.Pin(p.LinkPath(h))
}

// Check names every program that is not there, or not as it should be.
func (p Pins) Check(r Rewriting) (errs []error) {
	if err := p.Usable(); err != nil {
		return []error{err}
	}
	for _, h := range p.Hooks {
		if err := p.checkHook(h, r); err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

// Verify is check, and remembers for changed what is attached if nothing is missing.
func (p *Pins) Verify(r Rewriting) []error {
	p.Verified = nil
	before, err := p.Attached(p.Hooks...)
	if err != nil {
		return []error{err}
	}
	errs := p.Check(r)
	if len(errs) == 0 {
		p.Verified = before
	}
	return errs
}

// Changed asks what is attached, since the kernel tells nobody: it takes less than 0.1 ms.
func (p *Pins) Changed() bool {
	now, err := p.Attached(p.Hooks...)
	return err != nil || p.Verified == nil || !slices.EqualFunc(now, p.Verified, slices.Equal)
}

func (p Pins) checkHook(h Hook, r Rewriting) error {
	l, err := link.LoadPinnedLink(p.LinkPath(h), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return fault.Missing(fault.EBPF, "eBPF program %s at %s, pinned as %s", h.Name, p.Root, p.LinkPath(h))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", p.LinkPath(h), Permission(err))
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return fmt.Errorf("%s: %w", p.LinkPath(h), err)
	}
	at := info.Cgroup()
	if at == nil || ebpf.AttachType(at.AttachType) != h.attach || at.CgroupId != CgroupID(p.Root) || at.CgroupId == 0 {
		return fault.Missing(
			fault.EBPF,
			"eBPF program %s at %s: %s leads nowhere, it was detached by force",
			h.Name,
			p.Root,
			p.LinkPath(h),
		)
	}
	program, err := ebpf.LoadPinnedProgram(p.ProgramPath(h), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return fault.Missing(fault.EBPF, "eBPF program %s: its pin %s", h.Name, p.ProgramPath(h))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", p.ProgramPath(h), Permission(err))
	}
	defer program.Close()
	is, err := program.Info()
	if err != nil {
		return fmt.Errorf("%s: %w", p.ProgramPath(h), Permission(err))
	}
	if id, _ := is.ID(); id != info.Program {
		return fault.Missing(
			fault.EBPF,
			"eBPF program %s at %s: number %d is attached, and %s is number %d",
			h.Name,
			p.Root,
			info.Program,
			p.ProgramPath(h),
			id,
		)
	}
	spec, err := r.Spec(h)
	if err != nil {
		return err
	}
	if err := spec.Compatible(is); errors.Is(err, ebpf.ErrProgIncompatible) {
		return fault.Missing(fault.EBPF, "eBPF program %s at %s: it is another one, of tag %s", h.Name, p.Root, is.Tag)
	} else if err != nil {
		return err
	}
	if r.Counts != nil {
		table, err := r.Counts.Info()
		if err != nil {
			return err
		}
		id, _ := table.ID()
		if uses, _ := is.MapIDs(); !slices.Contains(uses, id) {
			return fault.Missing(fault.EBPF, "eBPF program %s at %s: it counts into another table than number %d", h.Name,
				p.Root, id)
		}
	}
	return nil
}

// Remove detaches whatever is pinned in our directory, the redirecting programs first, and takes
// the directory away.
func (p Pins) Remove() error {
	if _, err := os.Stat(filepath.Dir(p.Dir)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var errs []error
	for _, h := range slices.Backward(p.Hooks) {
		l, err := link.LoadPinnedLink(p.LinkPath(h), nil)
		if err == nil {
			// To remove the pin alone would leave the program running for some moments more.
			err = errors.Join(l.Detach(), l.Close())
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("detach eBPF program %s: %w", h.Name, Permission(err)))
		}
	}
	if err := errors.Join(append(errs, os.RemoveAll(p.Dir))...); err != nil {
		return err
	}
	if err := os.Remove(filepath.Dir(p.Dir)); err != nil && !errors.Is(err, fs.ErrNotExist) &&
		!errors.Is(err, unix.ENOTEMPTY) {
		return err // ENOTEMPTY: there is another mode's
	}
	return nil
}

// Attached are the numbers of all programs at each of the hooks, ours and others', in the order in
// which they run.
func (p Pins) Attached(hooks ...Hook) (all [][]ebpf.ProgramID, err error) {
	cgroup, err := unix.Open(p.Root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", p.Root, err)
	}
	defer unix.Close(cgroup)
	for _, h := range hooks {
		found, err := link.QueryPrograms(link.QueryOptions{Target: cgroup, Attach: h.attach})
		if err != nil {
			return nil, fmt.Errorf("what is attached to %s at %s: %w", h.Name, p.Root, Permission(err))
		}
		ids := []ebpf.ProgramID{}
		for _, a := range found.Programs {
			ids = append(ids, a.ID)
		}
		all = append(all, ids)
	}
	return all, nil
}

// Order says where ours stand among others' programs, "" where there are none of others.
func (p Pins) Order() string {
	attached, err := p.Attached(p.Hooks...)
	if err != nil {
		return "" // which check says better
	}
	var all []string
	for i, h := range p.Hooks {
		program, err := ebpf.LoadPinnedProgram(p.ProgramPath(h), nil)
		if err != nil {
			continue
		}
		if info, err := program.Info(); err == nil && len(attached[i]) > 1 {
			id, _ := info.ID()
			all = append(all, fmt.Sprintf("%s %d of %d", h.Name, slices.Index(attached[i], id)+1, len(attached[i])))
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

// CgroupID is the id of the cgroup, by which the kernel and programs call it: the inode of its
// directory. 0 if it is not there.
func CgroupID(path string) uint64 {
	var s unix.Stat_t
	if unix.Stat(path, &s) != nil {
		return 0
	}
	return s.Ino
}

// CgroupIDs are those of the cgroups below the root that are there.
func CgroupIDs(root string, cgroups []string) (ids []uint64) {
	for _, c := range cgroups {
		if id := CgroupID(filepath.Join(root, c)); id != 0 { // which is what programs get for a level that is not there
			ids = append(ids, id)
		}
	}
	return ids
}

// Permission makes plain what the kernel's refusal means.
func Permission(err error) error {
	var verifier *ebpf.VerifierError
	if errors.As(err, &verifier) || !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) {
		return err // the verifier says EACCES too: the program is at fault, which is ours
	}
	return &deniedError{err}
}

// remedied adds what to do about a program that cannot be installed, for another reason than a
// missing right.
func remedied(err error) error {
	if errors.Is(err, fault.ErrPermission) {
		return err // which has its own remedy
	}
	return fmt.Errorf("%w: mode ebpf needs Linux 5.14 or later: set routing.mode: iptables", err)
}

// deniedError is ErrPermission in the words of mode ebpf.
type deniedError struct{ error }

func (e *deniedError) Is(target error) bool { return target == fault.ErrPermission }
func (e *deniedError) Unwrap() error        { return e.error }
func (e *deniedError) Error() string {
	return e.error.Error() + ": needs root with CAP_BPF and CAP_NET_ADMIN: install /usr/share/doc/gke-metadata-emulator/" +
		"examples/routing-ebpf.conf as a drop-in of gke-metadata-emulator-routing.service; where a security module or a " +
		"sandbox denies eBPF, set routing.mode: iptables"
}

// HostNetwork is the cookie of the calling thread's network namespace.
func HostNetwork() (uint64, error) {
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
