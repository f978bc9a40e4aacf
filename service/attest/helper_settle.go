package attest

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"os"
	"slices"
)

// paths returns the cgroups that processes in the namespace are of.
func (a *anchor) paths() []string { return slices.AppendSeq(slices.Clone(a.pods), maps.Keys(a.others)) }

// messagePaths returns the paths for a message to a server: those of pods, and one of no pod if
// there is any.
func (a *anchor) messagePaths() []string {
	paths := slices.Clone(a.pods)
	for path := range a.others {
		return append(paths, cmp.Or(path, "/"))
	}
	return paths
}

// without forgets that processes of the cgroup are in the namespace.
func (h *Helper) without(a *anchor, path string) {
	pods := slices.DeleteFunc(slices.Clone(a.pods), func(p string) bool { return p == path })
	other := a.others[path]
	delete(a.others, path)
	switch {
	case len(pods)+len(a.others) == 0:
		h.lose(a)
	case len(pods) < len(a.pods), other && len(a.others) == 0:
		h.keep(&anchor{process: a.process, key: a.key, pods: pods, others: a.others})
	}
}

// settlePod finds the namespaces of a pod, and reports whether that is all: it has one, or is gone.
func (h *Helper) settlePod(pod string) bool {
	cgroups := h.cgroups.inPod(pod, 64)
	if len(cgroups) == 0 {
		for _, a := range slices.Collect(maps.Values(h.found)) {
			if slices.Contains(a.pods, pod) {
				h.without(a, pod)
			}
		}
		return true
	}
	settled := false
	for _, c := range cgroups {
		p, err := firstProcess(h.cgroups.root + c)
		if err != nil {
			h.cannot(err)
			continue
		}
		if p.namespace == 0 || p.namespace == h.home {
			p.close()
			continue
		}
		settled = true
		a := h.found[p.namespace]
		if a != nil && !a.there() {
			h.reanchor(a)
			a = nil
		}
		switch {
		case a == nil:
			h.keep(&anchor{process: p, pods: []string{pod}})
			continue
		case !slices.Contains(a.pods, pod):
			h.keep(&anchor{process: a.process, key: a.key, pods: append(slices.Clone(a.pods), pod), others: a.others})
		}
		p.close()
	}
	return settled
}

// settleOther finds the namespaces that processes of a cgroup of no pod live in, and reports
// whether there is one, or the cgroup is gone. Any process of a unit may have one of its own, so
// all are looked at: one on the node's network, as nearly all are, costs a system call.
func (h *Helper) settleOther(path string) bool {
	here := map[uint64]bool{}
	cgroup := h.cgroups.root + path
	procs, gone := os.ReadFile(cgroup + "/cgroup.procs") // or a cgroup of threads
	for line := range bytes.Lines(procs) {
		pid := string(bytes.TrimSpace(line))
		inode, err := networkNamespace(pid)
		if err != nil || inode == h.home || here[inode] {
			h.cannot(err)
			continue
		}
		a := h.found[inode]
		if a != nil && !a.there() {
			h.reanchor(a)
			a = nil
		}
		if a != nil && a.others[path] {
			here[inode] = true
			continue
		}
		if a == nil && !h.room() {
			continue
		}
		p, err := openProcess(cgroup, pid)
		h.cannot(err)
		switch {
		case p.namespace != inode: // it is another's number, or went elsewhere
			p.close()
			continue
		case a == nil:
			h.keep(&anchor{process: p, others: map[string]bool{path: true}})
		case len(a.others) == 0:
			p.close()
			h.keep(&anchor{process: a.process, key: a.key, pods: a.pods, others: map[string]bool{path: true}})
		default:
			p.close()
			a.others[path] = true
		}
		here[inode] = true
	}
	for inode, a := range h.found {
		if a.others[path] && !here[inode] {
			h.without(a, path)
		}
	}
	return gone != nil || len(here) > 0
}

// room reports whether one more namespace of no pod may be handed over.
func (h *Helper) room() bool {
	n := 0
	for _, a := range h.found {
		if len(a.pods) == 0 {
			n++
		}
	}
	if n >= maxOthers {
		h.problemIs(fmt.Sprintf("more than %d network namespaces belong to no pod: clients in the others are refused",
			maxOthers))
	}
	return n < maxOthers
}
