package kubetest

import (
	"cmp"
	"crypto/rand"
	"fmt"
	"slices"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
)

// world is what the server stores. Guarded by Server.mu. Stored objects are never written to again.
type world struct {
	version           uint64
	compacted         uint64                               // versions below are gone
	objects           map[string]map[string]runtime.Object // resource, namespace/name
	log               []event
	changed           chan struct{} // closed when something is appended to the log, or watches are to end
	bookmarks         uint64        // rises when every watch is to send one
	drops             uint64        // rises when every watch is to end
	oldNodeAuthorizer bool
}

// event is one write. Before is nil for a creation, after for a deletion.
type event struct {
	version       uint64
	resource      string
	before, after runtime.Object
}

func newWorld() world {
	return world{version: 1000, compacted: 1, changed: make(chan struct{}), objects: map[string]map[string]runtime.Object{
		"pods": {}, "serviceaccounts": {}, "nodes": {}}}
}

// maxLog bounds what a long demo remembers.
const maxLog = 10000

func key(o metav1.Object) string { return o.GetNamespace() + "/" + o.GetName() }

func accessor(o runtime.Object) metav1.Object {
	m, err := meta.Accessor(o)
	if err != nil {
		panic(fmt.Sprintf("kubetest: %v", err)) // only types with metadata are stored
	}
	return m
}

// put stores an object under the next version.
func (w *world) put(resource string, o runtime.Object) {
	m := accessor(o)
	before := w.objects[resource][key(m)]
	w.version++
	m.SetResourceVersion(strconv.FormatUint(w.version, 10))
	if before != nil {
		b := accessor(before)
		m.SetUID(cmp.Or(m.GetUID(), b.GetUID()))
		m.SetCreationTimestamp(b.GetCreationTimestamp())
	}
	if m.GetUID() == "" {
		m.SetUID(newUID())
	}
	w.objects[resource][key(m)] = o
	w.append(event{w.version, resource, before, o})
}

// remove deletes an object; its last state carries the version of the deletion.
func (w *world) remove(resource, namespace, name string) bool {
	k := namespace + "/" + name
	o := w.objects[resource][k]
	if o == nil {
		return false
	}
	delete(w.objects[resource], k)
	w.version++
	last := o.DeepCopyObject()
	accessor(last).SetResourceVersion(strconv.FormatUint(w.version, 10))
	w.append(event{w.version, resource, last, nil})
	return true
}

func (w *world) append(e event) {
	w.log = append(w.log, e)
	if len(w.log) > maxLog {
		w.compacted = w.log[len(w.log)-maxLog/2].version
		w.log = slices.Clone(w.log[len(w.log)-maxLog/2:])
	}
	w.wake()
}

func (w *world) wake() {
	close(w.changed)
	w.changed = make(chan struct{})
}

// list returns the objects that a request asks for, sorted by key.
func (w *world) list(q *request) []runtime.Object {
	var keys []string
	for k, o := range w.objects[q.resource] {
		if q.matches(o) {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	out := make([]runtime.Object, len(keys))
	for i, k := range keys {
		out[i] = w.objects[q.resource][k]
	}
	return out
}

// seen translates a write into what a watcher with q's selector sees of it: an object that ceases
// to match is a deletion.
func (e event) seen(q *request) (watch.EventType, runtime.Object, bool) {
	if e.resource != q.resource {
		return "", nil, false
	}
	was, is := e.before != nil && q.matches(e.before), e.after != nil && q.matches(e.after)
	switch {
	case is && !was:
		return watch.Added, e.after, true
	case is:
		return watch.Modified, e.after, true
	case was:
		last := e.before.DeepCopyObject()
		accessor(last).SetResourceVersion(strconv.FormatUint(e.version, 10))
		return watch.Deleted, last, true
	}
	return "", nil, false
}

// fieldsOf are the fields that the real server lets one select by.
func fieldsOf(o runtime.Object) fields.Set {
	m := accessor(o)
	f := fields.Set{"metadata.name": m.GetName(), "metadata.namespace": m.GetNamespace()}
	if p, is := o.(*corev1.Pod); is {
		f["spec.nodeName"] = p.Spec.NodeName
		f["spec.serviceAccountName"] = p.Spec.ServiceAccountName
		f["spec.hostNetwork"] = strconv.FormatBool(p.Spec.HostNetwork)
		f["status.phase"] = string(p.Status.Phase)
		f["status.podIP"] = p.Status.PodIP
	}
	return f
}

func (w *world) pod(namespace, name string) *corev1.Pod {
	p, _ := w.objects["pods"][namespace+"/"+name].(*corev1.Pod)
	return p
}

func (w *world) serviceAccount(namespace, name string) *corev1.ServiceAccount {
	a, _ := w.objects["serviceaccounts"][namespace+"/"+name].(*corev1.ServiceAccount)
	return a
}

func (w *world) node(name string) *corev1.Node {
	n, _ := w.objects["nodes"]["/"+name].(*corev1.Node)
	return n
}

func (w *world) addNode(name string) {
	if w.node(name) == nil {
		w.put("nodes", &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}})
	}
}

// uses reports whether a pod of the node, live or ended, runs as the ServiceAccount.
func (w *world) uses(node, namespace, account string) bool {
	for _, o := range w.objects["pods"] {
		p := o.(*corev1.Pod)
		if p.Spec.NodeName == node && p.Namespace == namespace && p.Spec.ServiceAccountName == account {
			return true
		}
	}
	return false
}

// newUID is a random UUID, version 4.
func newUID() types.UID {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails, says its documentation
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return types.UID(fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:]))
}

// Pod describes a pod in plain words.
type Pod struct {
	Namespace, Name string
	UID             string // "" = keep that of the existing pod, else make one
	Node            string
	ServiceAccount  string
	Phase           string   // "" = Running
	Addresses       []string // status.podIPs
	HostNetwork     bool
	RuntimeClass    string
	MirrorOf        string   // the UID that kubelet gave the static pod of which this is the mirror
	Terminating     bool     // has a deletionTimestamp
	Ended           bool     // all its containers have terminated
	Audiences       []string // of projected ServiceAccount tokens in its spec
}

// Object returns the pod as the API server has it.
func (p Pod) Object(now time.Time) *corev1.Pod {
	o := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name, UID: types.UID(p.UID),
			CreationTimestamp: metav1.NewTime(now.Truncate(time.Second))},
		Spec: corev1.PodSpec{NodeName: p.Node, ServiceAccountName: p.ServiceAccount, HostNetwork: p.HostNetwork,
			Containers: []corev1.Container{{Name: "c", Image: "x"}}},
		Status: corev1.PodStatus{Phase: corev1.PodPhase(cmp.Or(p.Phase, "Running"))},
	}
	if p.RuntimeClass != "" {
		o.Spec.RuntimeClassName = &p.RuntimeClass
	}
	if p.MirrorOf != "" {
		o.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: p.MirrorOf}
	}
	for i, a := range p.Addresses {
		if i == 0 {
			o.Status.PodIP = a
		}
		o.Status.PodIPs = append(o.Status.PodIPs, corev1.PodIP{IP: a})
	}
	if p.Terminating {
		t := metav1.NewTime(now.Truncate(time.Second))
		o.DeletionTimestamp = &t
	}
	state := corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}
	if p.Ended {
		state = corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}}
	}
	o.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "c", State: state}}
	for i, a := range p.Audiences {
		o.Spec.Volumes = append(o.Spec.Volumes, corev1.Volume{Name: fmt.Sprintf("token%d", i),
			VolumeSource: corev1.VolumeSource{
				Projected: &corev1.ProjectedVolumeSource{
					Sources: []corev1.VolumeProjection{
						{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Audience: a, Path: "t"}},
					},
				}}})
	}
	return o
}

// SetPod creates or changes a pod and returns its UID.
func (s *Server) SetPod(p Pod) string {
	o := p.Object(s.now())
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.Node != "" {
		s.world.addNode(p.Node)
	}
	s.world.put("pods", o)
	return string(o.UID)
}

// DeletePod removes a pod. A pod that is made with the same name later is another one.
func (s *Server) DeletePod(namespace, name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.world.remove("pods", namespace, name)
}

// SetServiceAccount creates or changes a ServiceAccount.
func (s *Server) SetServiceAccount(namespace, name string, annotations map[string]string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.world.put("serviceaccounts", &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{
		Namespace: namespace, Name: name, Annotations: annotations,
		CreationTimestamp: metav1.NewTime(s.now().Truncate(time.Second))}})
}

// DeleteServiceAccount removes one.
func (s *Server) DeleteServiceAccount(namespace, name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.world.remove("serviceaccounts", namespace, name)
}
