// Package kube_test holds the project's stand-in for the Kubernetes API server
// (service/kube/kubetest) and the shipped RBAC against a real etcd and kube-apiserver. `make
// test-kube` builds them and runs it.
package kube_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/test/api"
)

// The credentials that the real server knows, beside the administrator's.
const (
	nodeCredential      = "node1"
	dedicatedCredential = "dedicated"
	dedicatedUser       = "gke-metadata-emulator"
)

// waitLimit bounds what takes milliseconds; the machine may be busy.
const waitLimit = 30 * time.Second

// cluster is the real server, with the pods and ServiceAccounts that the table of cases speaks of.
type cluster struct {
	api.Server
	admin *api.Caller
	uids  map[string]string // by the name of the pod
}

var theCluster *cluster

func TestMain(m *testing.M) {
	status, err := withCluster(m.Run)
	if err != nil {
		fmt.Fprintln(os.Stderr, "test-kube:", err)
		status = 1
	}
	os.Exit(status)
}

// withCluster runs f while there is a cluster. The control plane ends, and removes its state, when
// its standard input does: also when this process is killed.
func withCluster(f func() int) (status int, err error) {
	binary := os.Getenv("GME_TEST_CONTROLPLANE")
	if binary == "" {
		return 0, errors.New("GME_TEST_CONTROLPLANE does not name the built control plane: run `make test-kube`")
	}
	cmd := exec.Command(binary,
		"--user", nodeCredential+"=system:node:node1,system:nodes", "--user", dedicatedCredential+"="+dedicatedUser)
	cmd.Stderr = new(bytes.Buffer) // hundreds of lines, of interest if it fails
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return 0, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, stdin.Close(), cmd.Wait()) }()
	line, err := bufio.NewReader(stdout).ReadBytes('\n')
	if err != nil {
		return 0, fmt.Errorf("the control plane did not start: %w:\n%s", err, cmd.Stderr)
	}
	theCluster = &cluster{uids: map[string]string{}}
	if err := json.Unmarshal(line, &theCluster.Server); err != nil {
		return 0, fmt.Errorf("the control plane: %w", err)
	}
	fmt.Printf("test-kube: etcd and kube-apiserver started in %s\n", time.Since(start).Round(100*time.Millisecond))
	if err := theCluster.populate(context.Background()); err != nil {
		return 0, fmt.Errorf("make the pods of the cases: %w", err)
	}
	return f(), nil
}

// populate makes the world of the cases: see kubetest.Server.Populate.
func (c *cluster) populate(ctx context.Context) (err error) {
	if c.admin, err = c.Caller(api.Admin); err != nil {
		return err
	}
	for _, o := range []struct{ path, name string }{{"nodes", "node1"}, {"nodes", "node2"}, {"namespaces", "ns1"}} {
		if err := c.admin.Post(ctx, "/api/v1/"+o.path, map[string]any{"metadata": map[string]any{"name": o.name}},
			nil); err != nil {
			return err
		}
	}
	for _, sa := range kubetest.CaseServiceAccounts() {
		if err := c.admin.Post(ctx, "/api/v1/namespaces/"+sa.Namespace+"/serviceaccounts", sa, nil); err != nil {
			return err
		}
	}
	for _, p := range kubetest.CasePods() {
		if err := c.createPod(ctx, p); err != nil {
			return err
		}
	}
	return nil
}

// createPod makes a pod as a scheduler does, and writes its status as kubelet does.
func (c *cluster) createPod(ctx context.Context, p kubetest.Pod) error {
	o := p.Object(time.Now())
	made := new(corev1.Pod)
	path := "/api/v1/namespaces/" + p.Namespace + "/pods"
	if err := c.admin.Post(ctx, path, o, made); err != nil {
		return err
	}
	c.uids[p.Name] = string(made.UID)
	return c.admin.Patch(ctx, path+"/"+p.Name+"/status", api.Merge, map[string]any{"status": o.Status})
}

// deletePod does what kubelet does at the end of a pod.
func (c *cluster) deletePod(ctx context.Context, name string) error {
	delete(c.uids, name)
	return c.admin.Delete(ctx, "/api/v1/namespaces/ns1/pods/"+name, map[string]any{"gracePeriodSeconds": 0})
}
