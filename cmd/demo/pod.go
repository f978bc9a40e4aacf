package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/rpc"
	"os"
	"os/exec"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// pod is a pod: one process, which starts in its cgroup and its network namespace, as by a
// container runtime with systemd's cgroups.
type pod struct {
	kubetest.Pod
	email  string // of the Google service account that its ServiceAccount is linked to
	ns     *netnstest.NS
	cgroup string // below the world's

	world *world
	cmd   *exec.Cmd
	rpc   *rpc.Client
}

// newPod prepares a pod with the ServiceAccount of its name. It is on the node's network if ns is
// the node's.
func (w *world) newPod(name string, ns *netnstest.NS) *pod {
	uid, container := make([]byte, 16), make([]byte, 32)
	_, _ = rand.Read(uid) // never fails: see its documentation
	_, _ = rand.Read(container)
	uid[6], uid[8] = uid[6]&0x0f|0x40, uid[8]&0x3f|0x80
	p := &pod{world: w, ns: ns, email: name + "@my-project.iam.gserviceaccount.com",
		Pod: kubetest.Pod{Namespace: "default", Name: name,
			ServiceAccount: name, Node: nodeName, UID: fmt.Sprintf("%x-%x-%x-%x-%x", uid[:4], uid[4:6], uid[6:8], uid[8:10],
				uid[10:])}}
	if ns == w.node.NS {
		p.HostNetwork = true
	} else {
		p.Addresses = []string{ns.Addr.String()}
	}
	p.cgroup = fmt.Sprintf("%skubepods-burstable.slice/kubepods-burstable-pod%s.slice/cri-containerd-%x.scope",
		w.kubepods, strings.ReplaceAll(p.UID, "-", "_"), container)
	return p
}

// register adds the pod to Kubernetes, and its ServiceAccount to Google.
func (p *pod) register() {
	p.world.google.Allow("system:serviceaccount:default:"+p.ServiceAccount, p.email)
	p.world.kube.SetServiceAccount("default", p.ServiceAccount,
		map[string]string{"iam.gke.io/gcp-service-account": p.email})
	p.world.kube.SetPod(p.Pod)
}

// start starts the pod's process.
func (p *pod) start() error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "ours"), os.NewFile(uintptr(pair[1]), "theirs")
	defer func() { _, _ = ours.Close(), theirs.Close() }()
	c, err := net.FileConn(ours)
	if err != nil {
		return err
	}
	p.cmd = exec.Command("/proc/self/exe")
	p.cmd.Args = []string{"pod " + p.Name}
	p.cmd.Env = append(os.Environ(), asPod+"="+p.Name)
	p.cmd.Stderr = os.Stderr
	p.cmd.ExtraFiles = []*os.File{theirs}
	if g := p.world.cgroups; g != nil {
		err = g.Start(p.ns, p.cgroup, p.cmd)
	} else {
		err = p.ns.Do(p.cmd.Start)
	}
	if err != nil {
		_ = c.Close()
		p.cmd = nil
		return fmt.Errorf("start pod %s: %w", p.Name, err)
	}
	p.rpc = rpc.NewClient(c)
	return nil
}

// die kills the pod's process, and removes the pod's cgroups as kubelet does.
func (p *pod) die() {
	if p.cmd == nil {
		return
	}
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
	_ = p.rpc.Close()
	p.cmd = nil
	if g := p.world.cgroups; g != nil {
		g.Remove(path.Dir(p.cgroup))
	}
}

// call runs a method in the pod's process, until ctx is done.
func (p *pod) call(ctx context.Context, method string, args, reply any) error {
	c := p.rpc.Go("Asker."+method, args, reply, make(chan *rpc.Call, 1))
	select {
	case <-c.Done:
		return c.Error
	case <-ctx.Done():
		return ctx.Err()
	}
}

// ask sends a request to 169.254.169.254 from the pod, and askAt to another host.
func (p *pod) ask(ctx context.Context, path string) (Answer, error) {
	return p.askAt(ctx, metadataAddr, path)
}

func (p *pod) askAt(ctx context.Context, host, path string) (Answer, error) {
	return p.put(ctx, Question{Host: host, Path: path})
}

// put sends the question from the pod.
func (p *pod) put(ctx context.Context, q Question) (Answer, error) {
	a := new(Answer)
	if err := p.call(ctx, "Ask", q, a); err != nil {
		return Answer{}, err
	}
	return *a, nil
}

// counted returns the outcomes of the pod's load, by Counts or End. Tokens of other pods count as
// wrong.
func (p *pod) counted(method string) (Counts, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*requestTimeout)
	defer cancel()
	c := new(Counts)
	if err := p.call(ctx, method, struct{}{}, c); err != nil {
		return Counts{}, fmt.Errorf("pod %s: %w", p.Name, err)
	}
	for token, n := range c.Tokens {
		if issued, _ := p.world.google.Lookup(token); issued.Email != p.email {
			c.Of[ok] -= n
			c.Of[wrong] += n
			c.Examples = append(c.Examples, fmt.Sprintf("%s got tokens of %q", p.email, issued.Email))
		}
	}
	return *c, nil
}

// loaded are pods that send a load.
type loaded []*pod

// beginLoads starts loads to metadataAddr or metadataAddr6.
func beginLoads(at string, l ...*pod) (loaded, error) {
	for _, p := range l {
		if err := p.call(context.Background(), "Begin", Task{p.email, at}, new(struct{})); err != nil {
			return nil, fmt.Errorf("pod %s: %w", p.Name, err)
		}
	}
	return l, nil
}

// counts returns the outcomes of all pods so far, and the examples since the last call.
func (l loaded) counts() (Counts, error) { return l.sum("Counts") }

// end stops the loads and waits for requests in flight.
func (l loaded) end() (Counts, error) { return l.sum("End") }

func (l loaded) sum(method string) (Counts, error) {
	type result struct {
		Counts
		err error
	}
	results := make(chan result, len(l))
	for _, p := range l {
		go func() {
			c, err := p.counted(method)
			results <- result{c, err}
		}()
	}
	all := Counts{Of: map[string]int{}}
	var errs []error
	for range l {
		r := <-results
		all.add(r.Counts)
		errs = append(errs, r.err)
	}
	return all, errors.Join(errs...)
}

func (c *Counts) add(other Counts) {
	for what, n := range other.Of {
		c.Of[what] += n
	}
	c.Longest = max(c.Longest, other.Longest)
	c.Examples = append(c.Examples, other.Examples...)
}

// String returns one line of name=number, and one line for each example.
func (c Counts) String() string {
	var b strings.Builder
	for _, what := range []string{ok, leaked, wrong, unavailable, refused, reset, raced, unreachable} {
		fmt.Fprintf(&b, "%s=%d ", what, c.Of[what])
	}
	fmt.Fprintf(&b, "longest_ms=%d", c.Longest/time.Millisecond)
	for _, e := range c.Examples[:min(len(c.Examples), maxExamples)] {
		b.WriteString("\n# " + e)
	}
	return b.String()
}
