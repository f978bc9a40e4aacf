package attest

import (
	"cmp"
	"path"
	"strings"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// Host gives the processes of a systemd unit of the node, or those in a cgroup and below it, the
// identity of a ServiceAccount, whatever network namespace they are in. In both patterns * and ?
// stand for what [path.Match] takes them for, and so never for a /. One of the two is "".
type Host struct {
	Unit           string // kubelet.service
	Cgroup         string // from the root of the hierarchy: /system.slice/docker-*.scope
	ServiceAccount workload.ServiceAccount
}

// fits reports whether the evidence is of such a process. Whoever owns a cgroup can make any below
// it, so only the beginning of a path says who that is: [Evidence.Unit] is the outermost unit, and
// a pattern begins at the root.
func (h Host) fits(e *Evidence) bool {
	if h.Unit != "" {
		ok, err := path.Match(h.Unit, e.Unit())
		return ok && err == nil
	}
	segments := strings.Split(e.Cgroup, "/")
	ok, err := path.Match(h.Cgroup, strings.Join(segments[:min(len(segments), 1+strings.Count(h.Cgroup, "/"))], "/"))
	return ok && err == nil
}

// host returns the identity of a process of the node; the first that fits counts.
func (a *Attestor) host(e *Evidence) (workload.Caller, bool) {
	for _, h := range a.Hosts {
		if h.fits(e) {
			return workload.Caller{Unit: unitOf(e), ServiceAccount: h.ServiceAccount}, true
		}
	}
	return workload.Caller{}, false
}

// placeOf names both the unit and the cgroup, for the log: the unit is the outermost one, and a
// container's cgroup is below it.
func placeOf(e *Evidence) string {
	unit := unitOf(e)
	if e.Cgroup == "" || e.Cgroup == unit {
		return unit
	}
	return unit + " (cgroup " + e.Cgroup + ")"
}

// unitOf names where a process of the node lives.
func unitOf(e *Evidence) string { return cmp.Or(e.Unit(), e.Cgroup, "a namespace of no pod") }
