package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/test/api"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/test/node/report"
)

// waitLimit bounds what takes a few seconds; the machine may be busy.
const waitLimit = 90 * time.Second

// judged shows that a wrong token is detected: a pod that claims another ServiceAccount or another
// Google service account than its own must be judged wrong. Its reports are not counted.
func judged(r *ring) {
	const ns = "judged"
	if !r.do("namespace", r.namespace(r.ctx, ns)) {
		return
	}
	for name, lie := range map[string]corev1.EnvVar{
		"judged-account": {Name: "ACCOUNT", Value: plain(1)}, "judged-email": {Name: "EMAIL", Value: emailOf(ns, linked(1))},
	} {
		p := newPod(ns, name, linked(0), name)
		env := p.Spec.Containers[0].Env
		env[slices.IndexFunc(env, func(e corev1.EnvVar) bool { return e.Name == lie.Name })] = lie
		r.do("create a pod", r.create(r.ctx, p))
		for _, p := range r.wait(name, 1, waitLimit) {
			r.check("a token of another "+lie.Name+" is detected", p.Outcome == report.Wrong, "%s: %s", p.Outcome, p.Identity)
		}
	}
	r.reports = slices.DeleteFunc(r.reports, func(p report.Report) bool { return p.Namespace == ns })
	r.do("remove the pods", r.empty(r.ctx, ns))
}

// first: the pods that were created before kubelet started: the first request of each is answered.
func first(r *ring) {
	r.served("pods that were created before kubelet started", "first", firstPods, waitLimit)
	_, err := r.command("gke-metadata-emulator", "routing", "check")
	r.must("routing check succeeds", err)
	out, err := r.command("gke-metadata-emulator", "doctor")
	r.check("doctor reports no failure", err == nil, "%v\n%s", err, out)
	out, err = r.command("journalctl", "--boot", "--no-pager", "--output=cat", "--unit=gke-metadata-emulator*")
	r.do("read the journal", err)
	r.check("no unit of ours has failed since the boot", !strings.Contains(out, "Failed with result"), "%s", out)
}

// firstHost: the same on the host network. The service must know by then whether the node has a
// cloud's metadata server.
func firstHost(r *ring) {
	r.served("pods on the host network, right after the boot", "first-host", firstPods, waitLimit)
	r.do("remove the pods", r.empty(r.ctx, "first"))
}

// kind is a pod of one kind, with the tags of its reports.
type kind struct {
	pod  *corev1.Pod
	tags []string
}

func kindsOf(ns string) (ks []kind) {
	add := func(name, account string, change func(p *corev1.Pod, tag string) []string) {
		tag := ns + "-" + name
		p := newPod(ns, name, account, tag, "-hold")
		tags := []string{tag}
		if change != nil {
			tags = append(tags, change(p, tag)...)
		}
		ks = append(ks, kind{p, tags})
	}
	little := corev1.ResourceList{
		corev1.ResourceCPU: resource.MustParse("20m"), corev1.ResourceMemory: resource.MustParse("32Mi"),
	}
	yes, no := true, false
	always := corev1.ContainerRestartPolicyAlways
	add("besteffort", linked(0), nil)
	add("burstable", linked(1), func(p *corev1.Pod, _ string) []string {
		p.Spec.Containers[0].Resources.Requests = little
		return nil
	})
	add("guaranteed", linked(2), func(p *corev1.Pod, _ string) []string {
		p.Spec.Containers[0].Resources.Limits = little
		return nil
	})
	for i, account := range []string{linked(3), plain(3)} {
		add([]string{"hostnetwork", "hostnetwork-unlinked"}[i], account, func(p *corev1.Pod, _ string) []string {
			p.Spec.HostNetwork = true
			return nil
		})
	}
	add("init", linked(4), func(p *corev1.Pod, tag string) []string {
		side := container("side", p, tag+"-side", "-hold")
		side.RestartPolicy = &always
		p.Spec.InitContainers = []corev1.Container{container("i", p, tag+"-init"), side}
		return []string{tag + "-init", tag + "-side"}
	})
	for i, shared := range []*bool{&no, &yes} {
		add([]string{"two-containers", "shared-pids"}[i], linked(5+i), func(p *corev1.Pod, tag string) []string {
			p.Spec.ShareProcessNamespace = shared
			p.Spec.Containers = append(p.Spec.Containers, container("d", p, tag+"-second", "-hold"))
			return []string{tag + "-second"}
		})
	}
	add("restarting", linked(7), func(p *corev1.Pod, tag string) []string {
		p.Spec.RestartPolicy = corev1.RestartPolicyAlways
		p.Spec.Containers[0] = container("c", p, tag, "-exit", "1")
		return nil
	})
	add("no-automount", linked(8), func(p *corev1.Pod, _ string) []string {
		p.Spec.AutomountServiceAccountToken = &no
		return nil
	})
	add("unlinked", plain(0), nil)
	add("default-account", "default", nil)
	add("host-pids", linked(9), func(p *corev1.Pod, _ string) []string {
		p.Spec.HostPID, p.Spec.HostIPC = true, true
		return nil
	})
	for i, host := range []bool{false, true} {
		add([]string{"ending", "ending-hostnetwork"}[i], linked(10+i), func(p *corev1.Pod, tag string) []string {
			p.Spec.HostNetwork = host
			*p.Spec.TerminationGracePeriodSeconds = 20
			c := container("c", p, tag, "-ending", "1500ms")
			hook := container("h", p, tag+"-hook", "-n", "3", "-every", "300ms", "-fresh")
			c.Lifecycle = &corev1.Lifecycle{PreStop: &corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: hook.Command}}}
			p.Spec.Containers[0] = c
			return nil
		})
	}
	return ks
}

// kinds: a pod of each kind that kubelet knows gets its own token, also in its init containers, its
// preStop hook and while it ends.
func kinds(r *ring) { runKinds(r, "kinds") }

func runKinds(r *ring, ns string) {
	if !r.do("namespace", r.namespace(r.ctx, ns)) {
		return
	}
	ks := kindsOf(ns)
	for _, k := range ks {
		r.do("create pod "+k.pod.Name, r.create(r.ctx, k.pod))
	}
	var all []report.Report
	for _, k := range ks {
		for _, tag := range k.tags {
			all = append(all, r.wait(tag, 1, waitLimit)...)
		}
	}
	r.allOK(fmt.Sprintf("%d kinds of pods", len(ks)), all)
	r.served("a container that is restarted", ns+"-restarting", 2, waitLimit)
	var ending []*corev1.Pod
	for _, k := range ks {
		if strings.HasPrefix(k.pod.Name, "ending") {
			ending = append(ending, k.pod)
		}
	}
	r.do("delete pods", r.remove(r.ctx, false, ending...))
	for _, p := range ending {
		r.served("the preStop hook of "+p.Name, ns+"-"+p.Name+"-hook", 3, waitLimit)
		r.served("requests of "+p.Name+" after SIGTERM", ns+"-"+p.Name+"-ending", 3, waitLimit)
	}
	static(r, ns)
	r.do("remove the pods", r.empty(r.ctx, ns))
}

// static: a static pod has no ServiceAccount, so it gets no token.
func static(r *ring, ns string) {
	const manifests = "/etc/kubernetes/manifests"
	p := newPod(ns, "static", "", ns+"-static", "-hold")
	p.Spec.NodeName = ""
	file := manifests + "/" + ns + ".json"
	r.do("write a static pod", errors.Join(os.MkdirAll(manifests, 0o755), writeJSON(file, p)))
	defer func() { r.do("remove the static pod", os.Remove(file)) }()
	for _, p := range r.wait(ns+"-static", 1, waitLimit) {
		r.check("a static pod is refused", p.Outcome == report.Refused, "%s: %s %s", p.Outcome, p.Identity, p.Text)
	}
}

// batch creates n pods.
func (r *ring) batch(
	ns, prefix string, n int, account func(int) string, change func(*corev1.Pod), flags ...string,
) (pods []*corev1.Pod) {
	for i := range n {
		p := newPod(ns, fmt.Sprintf("%s-%d", prefix, i), account(i), prefix, flags...)
		if change != nil {
			change(p)
		}
		pods = append(pods, p)
	}
	r.do("create pods "+prefix, r.create(r.ctx, pods...))
	return pods
}

func onHost(p *corev1.Pod) { p.Spec.HostNetwork = true }

// starts: the first request of pods whose token is in no cache is answered.
func starts(r *ring) { runStarts(r, "starts", 30) }

// runStarts starts n linked pods, and 12 of the others.
func runStarts(r *ring, ns string, n int) {
	if !r.do("namespace", r.namespace(r.ctx, ns)) {
		return
	}
	for _, s := range []struct {
		name    string
		n       int
		account func(int) string
		change  func(*corev1.Pod)
	}{
		{"linked", n, linked, nil}, {"unlinked", 12, plain, nil},
		{"host", 12, func(i int) string { return plain(i + 12) }, onHost},
	} {
		tag := ns + "-" + s.name
		r.batch(ns, tag, s.n, s.account, s.change, "-hold")
		r.served(fmt.Sprintf("%d cold starts, %s", s.n, s.name), tag, s.n, waitLimit)
	}
	r.do("remove the pods", r.empty(r.ctx, ns))
}

// roll: a ServiceAccount is linked to another Google service account, and its pods are replaced
// while the old ones still run: the new ones have the new identity at their first request.
func roll(r *ring) {
	const ns, n = "roll", 20
	if !r.do("namespace", r.namespace(r.ctx, ns)) {
		return
	}
	r.batch(ns, "roll-old", n, linked, nil, "-hold")
	r.served("pods before the change", "roll-old", n, waitLimit)
	for i := range n {
		account := linked(i)
		email := "new-" + emailOf(ns, account)
		o := map[string]any{"metadata": map[string]any{"annotations": map[string]any{annotation: email}}}
		r.do("allow the new Google service account", allow(r.ctx, ns, account, email))
		r.do("annotate the ServiceAccount",
			r.Patch(r.ctx, "/api/v1/namespaces/"+ns+"/serviceaccounts/"+account, api.Merge, o))
		p := newPod(ns, fmt.Sprintf("roll-new-%d", i), account, "roll-new", "-hold")
		for j := range p.Spec.Containers[0].Env {
			if e := &p.Spec.Containers[0].Env[j]; e.Name == "EMAIL" {
				e.Value = email
			}
		}
		r.do("create a pod", r.create(r.ctx, p))
	}
	r.wait("roll-new", n, waitLimit)
	old := 0
	for i, p := range r.reports {
		// The previous link is the pod's own, so a token of it is no leak: this part counts it as a
		// failure, and not as a wrong token.
		if p.Tag == "roll-new" && p.Outcome == report.Wrong &&
			p.Identity == subject(ns, p.Account)+" "+emailOf(ns, p.Account) {
			r.reports[i].Outcome = report.Refused
			old++
		}
	}
	r.allOK(fmt.Sprintf("new pods have the new identity at their first request (%d had the old one)", old),
		r.of("roll-new"))
	r.do("remove the pods", r.empty(r.ctx, ns))
}
