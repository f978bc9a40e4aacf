package attest

import (
	"os"
	"slices"
	"strings"
)

// nodeRoot is the path of the cgroup that is the node's own root, "" for the root of the hierarchy.
// The two differ where the node is a container that sees the cgroups of its host, as some of kind's
// and of Docker in Docker are.
type nodeRoot string

// below returns the path of a cgroup from the node's root. ok is false for a cgroup that is not the
// node's.
func (n nodeRoot) below(path string) (rest string, ok bool) {
	rest, ok = strings.CutPrefix(path, string(n))
	return rest, ok && (rest == "" || rest[0] == '/')
}

// findNode finds our node in the hierarchy of cgroups that is mounted at root. It goes by where the
// node's systemd has put us, which no container has a say in. A root that is no mount's is the
// node's.
func findNode(root string) nodeRoot {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	cgroups, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return ""
	}
	return nodeOf(ownCgroup(string(mounts), string(cgroups), root))
}

// ownCgroup returns the path of our cgroup from root, by /proc/self/mountinfo and
// /proc/self/cgroup; "/" where root is no mount's.
func ownCgroup(mounts, cgroups, root string) string {
	top, options := "", []string(nil)
	for line := range strings.Lines(mounts) {
		fields, kind, _ := strings.Cut(line, " - ")
		f, k := strings.Fields(fields), strings.Fields(kind)
		if len(f) > 4 && f[4] == root && len(k) > 2 && strings.HasPrefix(k[0], "cgroup") {
			top, options = f[3], strings.Split(k[2], ",") // the last one covers those before
			if k[0] == "cgroup2" {
				options = []string{""} // by what /proc/self/cgroup calls it
			}
		}
	}
	for line := range strings.Lines(cgroups) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) < 3 || top == "" || !slices.Contains(options, strings.Split(f[1], ",")[0]) {
			continue
		}
		if path, ok := nodeRoot(strings.TrimSuffix(top, "/")).below(f[2]); ok {
			return path
		}
	}
	return "/"
}

// nodeOf returns where the node is that we are a unit of: above our unit and the slices that it is
// in.
func nodeOf(own string) nodeRoot {
	segments := strings.Split(own, "/")
	n := len(segments) - 1
	if last := segments[n]; !strings.HasSuffix(last, ".service") && !strings.HasSuffix(last, ".scope") {
		return "" // systemd did not start us
	}
	for n > 1 && strings.HasSuffix(segments[n-1], ".slice") {
		n--
	}
	return nodeRoot(strings.Join(segments[:n], "/"))
}
