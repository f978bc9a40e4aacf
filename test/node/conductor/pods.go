package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/test/api"
)

const annotation = "iam.gke.io/gcp-service-account"

// accounts is the number in each namespace: a-N is linked to a Google service account, plain-N to
// none.
const accounts = 30

func linked(i int) string { return fmt.Sprintf("a-%d", i%accounts) }

func plain(i int) string { return fmt.Sprintf("plain-%d", i%accounts) }

// emailOf is the Google service account that a namespace's ServiceAccount is linked to.
func emailOf(namespace, account string) string {
	if !strings.HasPrefix(account, "a-") {
		return ""
	}
	return fmt.Sprintf("%s-%s@my-project.iam.gserviceaccount.com", namespace, account)
}

// cluster calls the API server as the administrator.
type cluster struct{ *api.Caller }

func newCluster() (cluster, error) {
	c, err := server().Caller(api.Admin)
	return cluster{c}, err
}

// allow lets the stand-in for Google issue tokens of the Google service account to the
// ServiceAccount.
func allow(ctx context.Context, namespace, account, email string) error {
	form := url.Values{"subject": {subject(namespace, account)}, "email": {email}}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, worldURL+"/allow", strings.NewReader(form.Encode()))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// namespace creates a namespace with its ServiceAccounts.
func (c cluster) namespace(ctx context.Context, name string) error {
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if err := c.Post(ctx, "/api/v1/namespaces", ns, nil); err != nil {
		return err
	}
	names := []string{"default"}
	for i := range accounts {
		names = append(names, linked(i), plain(i))
	}
	for _, n := range names {
		sa := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: n}}
		if email := emailOf(name, n); email != "" {
			sa.Annotations = map[string]string{annotation: email}
			if err := allow(ctx, name, n, email); err != nil {
				return err
			}
		}
		err := c.Post(ctx, "/api/v1/namespaces/"+name+"/serviceaccounts", sa, nil)
		var status *api.StatusError
		if errors.As(err, &status) && status.Code == http.StatusConflict {
			err = nil // the controller has created default
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// container returns a container that sends requests.
func container(name string, pod *corev1.Pod, tag string, flags ...string) corev1.Container {
	field := func(path string) *corev1.EnvVarSource {
		return &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: path}}
	}
	account := pod.Spec.ServiceAccountName
	return corev1.Container{Name: name, Image: podImage, ImagePullPolicy: corev1.PullNever,
		Command: append([]string{"/asker", "ask", "-tag", tag}, flags...),
		Env: []corev1.EnvVar{
			{Name: "NAMESPACE", ValueFrom: field("metadata.namespace")}, {Name: "POD", ValueFrom: field("metadata.name")},
			{Name: "ACCOUNT", Value: account}, {Name: "EMAIL", Value: emailOf(pod.Namespace, account)},
			{Name: "WORLD", Value: worldURL},
		}}
}

// newPod returns a pod of this node with one container, c, that sends requests.
func newPod(namespace, name, account, tag string, flags ...string) *corev1.Pod {
	second := int64(1)
	p := &corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec: corev1.PodSpec{NodeName: "node1", ServiceAccountName: account, RestartPolicy: corev1.RestartPolicyNever,
			TerminationGracePeriodSeconds: &second},
	}
	p.Spec.Containers = []corev1.Container{container("c", p, tag, flags...)}
	return p
}

func podPath(p *corev1.Pod) string { return "/api/v1/namespaces/" + p.Namespace + "/pods" }

func (c cluster) create(ctx context.Context, pods ...*corev1.Pod) error {
	for _, p := range pods {
		if err := c.Post(ctx, podPath(p), p, nil); err != nil {
			return err
		}
	}
	return nil
}

// remove deletes pods; force is kubectl's --force, which does not wait for kubelet.
func (c cluster) remove(ctx context.Context, force bool, pods ...*corev1.Pod) error {
	var options any
	if force {
		options = map[string]any{"gracePeriodSeconds": 0}
	}
	for _, p := range pods {
		if err := c.Delete(ctx, podPath(p)+"/"+p.Name, options); err != nil {
			return err
		}
	}
	return nil
}

// empty deletes every pod of a namespace.
func (c cluster) empty(ctx context.Context, namespace string) error {
	return c.Delete(ctx, "/api/v1/namespaces/"+namespace+"/pods", nil)
}

// gone waits until a namespace has no pods.
func (c cluster) gone(ctx context.Context, namespace string) error {
	path := "/api/v1/namespaces/" + namespace + "/pods"
	return eventually(ctx, 60*time.Second, "wait until namespace "+namespace+" has no pods", func() error {
		var list corev1.PodList
		if err := c.Get(ctx, path, &list); err != nil {
			return err
		}
		if n := len(list.Items); n > 0 {
			return fmt.Errorf("%d are left", n)
		}
		return nil
	})
}

// apply is `kubectl apply --server-side -f`, for objects without a namespace.
func (c cluster) apply(ctx context.Context, manifest []byte) error {
	return each(manifest, func(path string, o map[string]any) error {
		return c.Patch(ctx, path+"?fieldManager=conductor&force=true", api.Apply, o)
	})
}

// unapply deletes the objects of a manifest.
func (c cluster) unapply(ctx context.Context, manifest []byte) error {
	return each(manifest, func(path string, _ map[string]any) error { return c.Delete(ctx, path, nil) })
}

func each(manifest []byte, do func(path string, o map[string]any) error) error {
	for d := yaml.NewDecoder(bytes.NewReader(manifest)); ; {
		var o map[string]any
		if err := d.Decode(&o); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		name, _ := o["metadata"].(map[string]any)["name"].(string)
		path := fmt.Sprintf("/apis/%s/%ss/%s", o["apiVersion"], strings.ToLower(fmt.Sprint(o["kind"])), name)
		if err := do(path, o); err != nil {
			return err
		}
	}
}

// shippedRBAC returns the package's manifest, with this cluster's provider.
func shippedRBAC() ([]byte, error) {
	b, err := os.ReadFile("/opt/node/rbac.yaml")
	const placeholder = "//iam.googleapis.com/projects/NUMBER/locations/global/workloadIdentityPools/POOL/providers/PROVIDER"
	if err == nil && !bytes.Contains(b, []byte(placeholder)) {
		err = fmt.Errorf("rbac.yaml does not contain %s", placeholder)
	}
	return bytes.ReplaceAll(b, []byte(placeholder), []byte(audience)), err
}

// joining has kubeadm's grants by which kubelet gets its certificate, and renews it.
const joining = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: "node-ring:request"}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "system:node-bootstrapper"}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: "system:bootstrappers"}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: "node-ring:approve"}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "system:certificates.k8s.io:certificatesigningrequests:nodeclient"}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: "system:bootstrappers"}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: "node-ring:renew"}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "system:certificates.k8s.io:certificatesigningrequests:selfnodeclient"}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: "system:nodes"}]
`

const firstPods = 30 // on each network

// join waits for the API server. Then it creates the grants, and pods that send requests at their
// start, before kubelet starts.
func join(ctx context.Context) error {
	var c cluster
	err := eventually(ctx, time.Minute, "the API server is ready", func() (err error) {
		if c, err = newCluster(); err != nil {
			return err
		}
		return c.Call(ctx, http.MethodGet, "/readyz", "text/plain", nil, nil)
	})
	if err != nil {
		return err
	}
	var there json.RawMessage
	if c.Get(ctx, "/api/v1/namespaces/first", &there) == nil {
		return nil // the API server was restarted
	}
	rbac, err := shippedRBAC()
	if err != nil {
		return err
	}
	if err := errors.Join(c.apply(ctx, []byte(joining)), c.apply(ctx, rbac), c.namespace(ctx, "first")); err != nil {
		return err
	}
	for i := range firstPods {
		b := newPod("first", fmt.Sprintf("first-%d", i), linked(i), "first", "-hold")
		h := newPod("first", fmt.Sprintf("first-host-%d", i), linked(i), "first-host", "-hold", "-timeout", "5s")
		h.Spec.HostNetwork = true
		if err := c.create(ctx, b, h); err != nil {
			return err
		}
	}
	return nil
}
