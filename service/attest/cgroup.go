package attest

import "strings"

// Unit returns the systemd unit that the cgroup is of: kubelet.service; "" where the path names none.
func (e *Evidence) Unit() string {
	var unit string
	for segment := range strings.SplitSeq(e.Cgroup, "/") {
		for _, suffix := range []string{".service", ".scope", ".mount", ".socket", ".swap"} {
			if strings.HasSuffix(segment, suffix) && len(segment) > len(suffix) {
				return segment
			}
		}
		if strings.HasSuffix(segment, ".slice") {
			unit = segment
		}
	}
	return unit
}
