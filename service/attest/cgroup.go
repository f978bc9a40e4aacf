package attest

import (
	"fmt"
	"slices"
	"strings"
)

// place is what a cgroup's path says of whose it is.
type place struct {
	pod       string // UID; "" for a path that is no pod's
	container string // id
	podPath   string // the path up to the pod's own segment
}

// parse finds the pod in the path of a cgroup: a pod segment directly under kubelet's own root,
// which is where nobody but the root of the node makes cgroups. What a container, a service
// or a user names like a pod below itself is no pod: it is that container, service or user. Another
// pod's segment below a pod is ErrPods. Paths below the node's root cgroup:
//
//	/kubepods/burstable/pod<UID>/<ID>
//	/kubelet/kubepods/burstable/pod<UID>/<ID>
//	/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<UID>.slice/cri-containerd-<ID>.scope
//	/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod<UID>.slice/crio-<ID>.scope/container
//	/system.slice/containerd.service/kubepods-burstable-pod<UID>.slice:cri-containerd:<ID>
func (n nodeRoot) parse(path string) (place, error) {
	below, ok := n.below(path)
	if !ok {
		return place{}, nil
	}
	var found place
	segments := strings.Split(below, "/")
	end := len(n) // of the segment in path
	for i, segment := range segments {
		end += len(segment)
		uid, container := podSegment(segments[:i], segment)
		switch {
		case uid == "":
		case found.pod == "" && !kubeletsOwn(segments[1:i], segment):
			return place{}, nil
		case found.pod == "":
			found = place{pod: uid, podPath: path[:end], container: container}
			if container == "" && i+1 < len(segments) {
				found.container = containerID(segments[i+1])
			}
		case found.pod != uid:
			return place{}, fmt.Errorf("%w: the cgroup %s", ErrPods, path)
		}
		end++ // the slash
	}
	return found, nil
}

// isPods reports whether the path of a cgroup is a pod's, or of one below it.
func (n nodeRoot) isPods(path string) bool {
	p, err := n.parse(path)
	return err != nil || p.pod != ""
}

// kubeletsOwn reports whether above, the segments from the node's root down to a pod's, are a place
// where kubelet has its pods.
func kubeletsOwn(above []string, segment string) bool {
	switch {
	case strings.HasPrefix(segment, "pod"): // kubelet itself makes these
		return above[0] == "kubepods" && len(above) <= 2 || above[0] == "kubelet" && above[1] == "kubepods" && len(above) <= 3
	case !strings.HasSuffix(segment, ".slice"):
		// The runtime puts a path that is relative below its own cgroup. A container of Docker's that
		// this befalls too has its own segment there, so its root can make nothing beside that.
		return slices.Equal(above, []string{"system.slice", "containerd.service"})
	}
	// Slices are systemd's, which makes x-y.slice in x.slice alone, for root.
	for i, s := range append(above[:len(above):len(above)], segment) {
		name, ok := strings.CutSuffix(s, ".slice")
		if ok && i > 0 {
			name, ok = strings.CutPrefix(name, strings.TrimSuffix(above[i-1], ".slice")+"-")
		}
		if !ok || name == "" || strings.Contains(name, "-") {
			return false
		}
	}
	return above[0] != "user.slice" && above[0] != "machine.slice"
}

// podSegment returns the UID if the segment is a pod's, and the container's id if the segment names
// that too.
func podSegment(above []string, segment string) (uid, container string) {
	if uid, ok := strings.CutPrefix(segment, "pod"); ok && underKubepods(above) {
		return validUID(uid), ""
	}
	slice, name, colon := strings.Cut(segment, ".slice")
	parent, escaped, ok := cutLast(slice, "-pod")
	if slice == segment || !ok || !kubepodsSlice(parent) {
		return "", ""
	}
	switch {
	case !colon:
	case name == "":
		if len(above) == 0 || above[len(above)-1] != parent+".slice" {
			return "", ""
		}
	case name[0] == ':': // a runtime with cgroupfs that was given a path for systemd
		if container = containerID(name[strings.LastIndexByte(name, ':')+1:]); container == "" {
			return "", ""
		}
	default:
		return "", ""
	}
	return validUID(strings.ReplaceAll(escaped, "_", "-")), container
}

// underKubepods reports whether segments end in kubepods, or in one of its classes.
func underKubepods(segments []string) bool {
	n := len(segments)
	if n > 1 && (segments[n-1] == "burstable" || segments[n-1] == "besteffort") {
		n--
	}
	return n > 0 && segments[n-1] == "kubepods"
}

// kubepodsSlice is underKubepods for systemd, where a slice's name has those of all above it.
func kubepodsSlice(name string) bool {
	name = strings.TrimSuffix(strings.TrimSuffix(name, "-burstable"), "-besteffort")
	return name == "kubepods" || strings.HasSuffix(name, "-kubepods")
}

// validUID returns uid, or "" for what cannot be one. Those of static pods are no UUIDs.
func validUID(uid string) string {
	for _, c := range []byte(uid) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && c != '-' {
			return ""
		}
	}
	return uid
}

// containerID returns the id in a container's segment, of 32 hexadecimal digits or more: <ID>,
// cri-containerd-<ID>.scope. CRI-O's monitor of a container is no part of it.
func containerID(segment string) string {
	name := strings.TrimSuffix(segment, ".scope")
	prefix, id, ok := cutLast(name, "-")
	if !ok {
		id = name
	}
	if len(id) < 32 || strings.HasSuffix(prefix, "-conmon") || strings.Trim(id, "0123456789abcdef") != "" {
		return ""
	}
	return id
}

func cutLast(s, separator string) (before, after string, found bool) {
	if i := strings.LastIndex(s, separator); i >= 0 {
		return s[:i], s[i+len(separator):], true
	}
	return "", s, false
}

// Unit returns the systemd unit that the cgroup is of: kubelet.service; a slice where it lies in no
// other unit; "" where the node's systemd made none of it. A unit's own processes may make cgroups
// below it and name them as they like, so nothing below a unit counts.
func (e *Evidence) Unit() string {
	path, _ := e.node.below(e.Cgroup)
	unit := ""
	for segment := range strings.SplitSeq(strings.TrimPrefix(path, "/"), "/") {
		switch name, kind, _ := cutLast(segment, "."); {
		case name == "":
			return unit
		case kind == "slice":
			unit = segment
		case kind == "service" || kind == "scope":
			return segment
		default:
			return unit
		}
	}
	return unit
}
