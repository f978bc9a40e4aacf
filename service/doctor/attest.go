package doctor

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/status"
)

// attestationCheck: who asks is what the kernel says, and in namespaces that are not the node's the
// helper lets the service ask it. All of this is the service's own word.
func attestationCheck(r *nodeReport) Finding {
	const helper = "gke-metadata-emulator-attest"
	switch {
	case r.status == nil:
		return skip("the service does not answer: see check service")
	case r.status.Cluster == nil:
		return skip(notServing)
	}
	a, pods := r.status.Attestation, knownPods(r.status)
	k := a.Kernel
	switch {
	case k == nil:
		return warn("set attestation.mode: kernel", "mode %s: the source address identifies a pod, and a dead pod shares it "+
			"with the address's next owner; %s", a.Mode, pods)
	case k.Hierarchy == "":
		return fail("journalctl -u gke-metadata-emulator", "mode %s, but the kernel cannot be queried: %s", a.Mode,
			cmp.Or(strings.Join(k.Lacks, "; "), "the service is starting"))
	case !k.Helper:
		return fail("systemctl restart "+helper+"; journalctl -u "+helper,
			"mode %s, but %s.service is not connected, and new pods are refused: %s; %s", a.Mode, helper, k.Problem, pods)
	}
	var wrong, remedies []string
	if k.Problem != "" {
		wrong, remedies = append(wrong, k.Problem), append(remedies, "journalctl -u "+helper)
	}
	if len(k.Lacks) > 0 {
		remedy := "boot with cgroup v2 and Linux 5.9 or later"
		if k.Evidence == attest.ByCgroup { // then it is a limit
			remedy = "raise the named limit, or find the program that makes so many cgroups"
		}
		wrong, remedies = append(wrong, "limited: "+strings.Join(k.Lacks, "; ")), append(remedies, remedy)
	}
	for _, c := range k.Conflicts {
		wrong = append(wrong, fmt.Sprintf("%s and %s have sockets with address %s: %d connections were refused",
			r.status.PodName(c.Between[0]), r.status.PodName(c.Between[1]), c.Address, c.Refused))
		remedies = append(remedies, fmt.Sprintf("remove %s from the one that does not own it", c.Address))
	}
	if classes, refused := sandboxes(r.status.Cluster.Pods); len(classes) > 0 {
		wrong = append(wrong, fmt.Sprintf("RuntimeClass %s may be a sandbox with its own network stack, whose pods are "+
			"refused: %s", strings.Join(classes, ", "), some(refused)))
		remedies = append(remedies, fmt.Sprintf("if so, set attestation.byAddress: [%s]", strings.Join(classes, ", ")))
	}
	if len(wrong) > 0 {
		return warn(strings.Join(remedies, "; "), "mode %s: %s; %s", a.Mode, strings.Join(wrong, "; "), pods)
	}
	return good("mode %s, by %s; %s.service is connected; %s", a.Mode, k.Evidence, helper, pods)
}

// knownPods says by what how many pods are known, and which of them by no more than their address,
// or by nothing, and why.
func knownPods(s *status.Status) string {
	type kind struct{ evidence, why string }
	pods := map[kind][]string{}
	for _, q := range s.Cluster.Pods {
		k := kind{evidence: q.Evidence}
		switch {
		case q.ServiceAccount == "":
			k = kind{"nothing", "static pod, no ServiceAccount"}
		case q.Evidence == "":
			k = kind{"nothing", "on the host network, which needs cgroup v2: refused"}
		case q.Evidence != attest.ByAddress:
		case s.Attestation.Kernel == nil:
			k.why = "attestation.mode is " + s.Attestation.Mode
		default:
			k.why = "RuntimeClass " + q.RuntimeClass + " is in attestation.byAddress"
		}
		pods[k] = append(pods[k], q.Namespace+"/"+q.Name)
	}
	var texts []string
	for _, k := range slices.SortedFunc(maps.Keys(pods), func(a, b kind) int {
		return cmp.Or(cmp.Compare(a.evidence, b.evidence), cmp.Compare(a.why, b.why))
	}) {
		text := fmt.Sprintf("%d by %s", len(pods[k]), k.evidence)
		if k.why != "" {
			text += fmt.Sprintf(" (%s: %s)", some(pods[k]), k.why)
		}
		texts = append(texts, text)
	}
	return "evidence of pods: " + cmp.Or(strings.Join(texts, ", "), "none")
}

// sandboxes returns the RuntimeClasses that have the name of a sandbox whose sockets the node's
// kernel does not have and are not in attestation.byAddress, and their pods.
func sandboxes(all []kube.PodStatus) (classes, pods []string) {
	for _, q := range all {
		c := strings.ToLower(q.RuntimeClass)
		if q.HostNetwork || q.Evidence == attest.ByAddress || !strings.Contains(c, "gvisor") &&
			!strings.Contains(c, "runsc") && !strings.HasPrefix(c, "kata") {
			continue
		}
		if !slices.Contains(classes, q.RuntimeClass) {
			classes = append(classes, q.RuntimeClass)
		}
		pods = append(pods, q.Namespace+"/"+q.Name)
	}
	slices.Sort(classes)
	return classes, pods
}
