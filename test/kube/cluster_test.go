// Package kube_test compares the project's stand-in for the Kubernetes API server
// (service/kube/kubetest) with a real etcd and kube-apiserver, and tests the shipped RBAC. `make
// test-kube` builds the servers and runs the tests.
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

// The credentials of the real server, beside the administrator's.
const (
	nodeCredential      = "node1"
	dedicatedCredential = "dedicated"
	dedicatedUser       = "gke-metadata-emulator"
)

// waitLimit bounds a wait that usually takes milliseconds; the machine may be busy.
const waitLimit = 30 * time.Second

// cluster is the real server, with the pods and ServiceAccounts of the table of cases.
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

// withCluster runs f with a cluster. The control plane ends, and removes its state, when its
// standard input ends, even if this process is killed.
func withCluster(f func() int) (status int, err error) {
	binary := os.Getenv("GME_TEST_CONTROLPLANE")
	if binary == "" {
		return 0, errors.New("GME_TEST_CONTROLPLANE does not name the built control plane: run `make test-kube`")
	}
	cmd := exec.Command(binary,
		"--user", nodeCredential+"=system:node:node1,system:nodes", "--user", dedicatedCredential+"="+dedicatedUser)
	cmd.Stderr = new(bytes.Buffer) // hundreds of lines, printed on a failure
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
		return 0, fmt.Errorf("the control plane's first line is no JSON: %w", err)
	}
	fmt.Printf("test-kube: etcd and kube-apiserver started in %s\n", time.Since(start).Round(100*time.Millisecond))
	if err := theCluster.populate(context.Background()); err != nil {
		return 0, fmt.Errorf("create the pods of the cases: %w", err)
	}
	return f(), nil
}

// populate creates the objects of the cases: see kubetest.Server.Populate.
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

// createPod creates a pod that is bound to its node, and writes its status as kubelet does.
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

// deletePod deletes a pod as kubelet does when the pod has ended.
func (c *cluster) deletePod(ctx context.Context, name string) error {
	delete(c.uids, name)
	return c.admin.Delete(ctx, "/api/v1/namespaces/ns1/pods/"+name, map[string]any{"gracePeriodSeconds": 0})
}
