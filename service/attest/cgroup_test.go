package attest

import (
	"errors"
	"strings"
	"testing"
)

const (
	uidA   = "0f1c2d3e-4a5b-6c7d-8e9f-0a1b2c3d4e5f"
	uidB   = "11111111-2222-3333-4444-555555555555"
	under  = "0f1c2d3e_4a5b_6c7d_8e9f_0a1b2c3d4e5f" // uidA for systemd
	static = "d41d8cd98f00b204e9800998ecf8427e"     // a static pod's
	idC    = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
)

func TestParsePath(t *testing.T) {
	for name, tt := range map[string]struct {
		node nodeRoot
		path string
		want place
		err  error
	}{
		"cgroupfs, burstable": {path: "/kubepods/burstable/pod" + uidA + "/" + idC,
			want: place{uidA, idC, "/kubepods/burstable/pod" + uidA}},
		"cgroupfs, best effort": {path: "/kubepods/besteffort/pod" + uidA + "/" + idC,
			want: place{uidA, idC, "/kubepods/besteffort/pod" + uidA}},
		"cgroupfs, guaranteed": {path: "/kubepods/pod" + uidA + "/" + idC, want: place{uidA, idC, "/kubepods/pod" + uidA}},
		"cgroupfs, crio": {path: "/kubepods/pod" + uidA + "/crio-" + idC,
			want: place{uidA, idC, "/kubepods/pod" + uidA}},
		"the pod itself": {path: "/kubepods/pod" + uidA, want: place{uidA, "", "/kubepods/pod" + uidA}},
		"a static pod": {path: "/kubepods/burstable/pod" + static + "/" + idC,
			want: place{static, idC, "/kubepods/burstable/pod" + static}},
		"systemd, burstable": {path: "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + under +
			".slice/cri-containerd-" + idC + ".scope",
			want: place{uidA, idC, "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + under + ".slice"}},
		"systemd, guaranteed": {path: "/kubepods.slice/kubepods-pod" + under + ".slice/docker-" + idC + ".scope",
			want: place{uidA, idC, "/kubepods.slice/kubepods-pod" + under + ".slice"}},
		"crio with crun, which makes a cgroup of its own": {path: "/kubepods.slice/kubepods-pod" + under + ".slice/crio-" +
			idC + ".scope/container",
			want: place{uidA, idC, "/kubepods.slice/kubepods-pod" + under + ".slice"}},
		"crio's monitor": {path: "/kubepods.slice/kubepods-pod" + under + ".slice/crio-conmon-" + idC + ".scope",
			want: place{uidA, "", "/kubepods.slice/kubepods-pod" + under + ".slice"}},
		"systemd's path, cgroupfs runtime": {path: "/system.slice/containerd.service/kubepods-burstable-pod" + under +
			".slice:cri-containerd:" + idC,
			want: place{uidA, idC, "/system.slice/containerd.service/kubepods-burstable-pod" + under +
				".slice:cri-containerd:" + idC}},
		"kind": {path: "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod" + under + ".slice/cri-containerd-" + idC + ".scope",
			want: place{uidA, idC, "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod" + under + ".slice"}},
		"kind, cgroupfs": {path: "/kubelet/kubepods/burstable/pod" + uidA + "/" + idC,
			want: place{uidA, idC, "/kubelet/kubepods/burstable/pod" + uidA}},
		"kind, whose node is a container": {node: "/docker/" + idC, path: "/docker/" + idC +
			"/kubelet/kubepods/burstable/pod" + uidA + "/" + idC,
			want: place{uidA, idC, "/docker/" + idC + "/kubelet/kubepods/burstable/pod" + uidA}},
		"a node in a container's scope": {node: "/system.slice/docker-" + idC + ".scope",
			path: "/system.slice/docker-" + idC + ".scope/kubepods.slice/kubepods-pod" + under + ".slice",
			want: place{uidA, "", "/system.slice/docker-" + idC + ".scope/kubepods.slice/kubepods-pod" + under + ".slice"}},
		"A-19: the host of a node that is a container": {node: "/docker/" + idC,
			path: "/kubepods/burstable/pod" + uidA + "/" + idC},
		"A-19: another container than the node's": {node: "/docker/" + idC,
			path: "/docker/" + idC + "0/kubepods/pod" + uidA},
		"A-19: a node of kind, seen from its host": {path: "/docker/" + idC + "/kubelet/kubepods/burstable/pod" +
			uidA + "/" + idC},
		"A-19: in a scope of Docker's": {path: "/system.slice/docker-" + idC + ".scope/kubepods/pod" +
			uidA + "/x"},
		"A-19: slices in a scope of Docker's": {path: "/system.slice/docker-" + idC +
			".scope/kubepods.slice/kubepods-pod" + under + ".slice/x"},
		"A-19: in a cgroup of Docker's": {path: "/docker/" + idC + "/kubepods/burstable/pod" + uidA +
			"/x"},
		"A-19: in a machine": {path: "/machine.slice/machine-x.scope/payload/kubepods/pod" +
			uidA},
		"A-19: beside machines": {path: "/machine.slice/machine-kubepods.slice/machine-kubepods-pod" + under + ".slice"},
		"A-19: in a container of LXC": {path: "/lxc.payload.x/kubepods.slice/kubepods-pod" + under +
			".slice"},
		"A-19: in a user's session":                 {path: "/user.slice/user-1000.slice/user@1000.service/kubepods.slice/kubepods-pod" + under + ".slice"},
		"A-19: kubelet's directory elsewhere":       {path: "/x/kubepods/pod" + uidA},
		"A-19: kubelet's other directory elsewhere": {path: "/kubelet/x/kubepods/pod" + uidA},
		"A-19: a slice in another than its own": {path: "/system.slice/kubepods.slice/kubepods-pod" + under +
			".slice"},
		"A-19: in a container below containerd": {path: "/system.slice/containerd.service/" + idC +
			"/kubepods-pod" + under + ".slice:cri-containerd:" + idC},
		"A-19: in a container that a relative path befell": {path: "/system.slice/containerd.service/system.slice:docker:" +
			idC + "/kubepods-pod" + under + ".slice:cri-containerd:" + idC},
		"A-19: cgroupfs below such a container": {path: "/system.slice/containerd.service/system.slice:docker:" +
			idC + "/kubepods/pod" + uidA},
		"A-19: cgroupfs below containerd": {path: "/system.slice/containerd.service/kubepods/pod" + uidA},
		"A-19: another service that a cgroup was given": {path: "/system.slice/mine.service/kubepods-pod" + under +
			".slice:cri-containerd:" + idC},
		"A-19: a service of containerd's name, elsewhere": {path: "/user.slice/containerd.service/kubepods-pod" + under +
			".slice:cri-containerd:" + idC},
		"A-19: a pod below such a pod is not another's": {path: "/system.slice/containerd.service/kubepods-pod" + under +
			".slice:cri-containerd:" + idC + "/kubepods/pod" + uidB, err: ErrPods},
		"a workload's own cgroups": {path: "/kubepods/pod" + uidA + "/" + idC + "/init.scope/x",
			want: place{uidA, idC, "/kubepods/pod" + uidA}},
		"A-17: another pod below": {path: "/kubepods/pod" + uidA + "/" + idC + "/kubepods/pod" +
			uidB + "/" + idC, err: ErrPods},
		"A-17: another pod below, systemd's form": {path: "/kubepods/pod" + uidB + "/" + idC +
			"/kubepods.slice/kubepods-pod" + under + ".slice", err: ErrPods},
		"the same pod below": {path: "/kubepods/pod" + uidA + "/" + idC + "/kubepods/pod" +
			uidA, want: place{uidA, idC, "/kubepods/pod" + uidA}},
		"A-17: no root of kubelet's above": {path: "/user.slice/pod" + uidA + "/" + idC},
		"A-17: one segment between":        {path: "/kubepods/burstable/x/pod" + uidA + "/" + idC},
		"A-17: a slice out of its place":   {path: "/user.slice/kubepods-pod" + under + ".slice/" + idC},
		"a service":                        {path: "/system.slice/kubelet.service"},
		"kubelet's root":                   {path: "/kubepods.slice"},
		"no UID":                           {path: "/kubepods/pod/" + idC},
		"no UID of any kind":               {path: "/kubepods/pod..%2f/" + idC},
		"the root":                         {path: "/"},
		"nothing":                          {path: ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := tt.node.parse(tt.path)
			if got != tt.want || !errors.Is(err, tt.err) {
				t.Errorf("parse(%s) =\n%+v, %v, want\n%+v, %v", tt.path, got, err, tt.want, tt.err)
			}
		})
	}
}

func TestUnit(t *testing.T) {
	for path, want := range map[string]string{
		"/system.slice/kubelet.service":                                        "kubelet.service",
		"/system.slice/system-getty.slice/getty@tty1.service":                  "getty@tty1.service",
		"/system.slice/docker-" + idC + ".scope/kubelet.service":               "docker-" + idC + ".scope",
		"/user.slice/user-1000.slice/user@1000.service/app.slice/mine.service": "user@1000.service",
		"/init.scope":     "init.scope",
		"/system.slice":   "system.slice",
		"/kubepods.slice": "kubepods.slice",
		"/docker/" + idC + "/system.slice/kubelet.service": "", // a container's own
		"/.service": "",
		"/":         "",
		"":          "",
	} {
		if got := (&Evidence{Cgroup: path}).Unit(); got != want {
			t.Errorf("Unit of %s = %q, want %q", path, got, want)
		}
	}
}

// Whoever owns a cgroup may make others below it, under any name: that never makes another pod of
// it.
func FuzzParsePath(f *testing.F) {
	f.Fuzz(func(t *testing.T, path, below string) {
		above, err := nodeRoot("").parse(path)
		if err != nil {
			if above != (place{}) {
				t.Errorf("%q: an error and %+v", path, above)
			}
			return
		}
		if above.pod == "" && (above.container != "" || above.podPath != "") || !strings.HasPrefix(path, above.podPath) {
			t.Errorf("%q: %+v", path, above)
		}
		if above.pod != "" && !strings.Contains(strings.ReplaceAll(path, "_", "-"), "pod"+above.pod) {
			t.Errorf("%q: the UID %s is not in it", path, above.pod)
		}
		if above.pod == "" {
			if isContainer(path) { // its own segment says so, whatever it makes below
				if got, err := nodeRoot("").parse(path + "/" + below); err != nil || got != (place{}) {
					t.Errorf("%q below %q makes %+v, %v", below, path, got, err)
				}
			}
			return
		}
		got, err := nodeRoot("").parse(path + "/" + below)
		if err == nil && (got.pod != above.pod || got.podPath != above.podPath ||
			above.container != "" && got.container != above.container) {
			t.Errorf("%q below %q makes %+v of %+v", below, path, got, above)
		}
	})
}

// isContainer reports whether the path's first segment that is no slice is another manager's.
func isContainer(path string) bool {
	for segment := range strings.SplitSeq(strings.TrimPrefix(path, "/"), "/") {
		if !strings.HasSuffix(segment, ".slice") {
			return segment == "docker" || strings.HasSuffix(segment, ".scope") ||
				strings.HasSuffix(segment, ".service") && segment != "containerd.service"
		}
	}
	return false
}

// Where our node is in the cgroups that we see, by where we are.
func TestFindNode(t *testing.T) {
	const v2 = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
	const v1 = "31 24 0:27 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n32 24 0:28 / " +
		"/sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n"
	for name, tt := range map[string]struct {
		mounts, cgroups, root string
		own                   string
		node                  nodeRoot
	}{
		"a node": {v2, "0::/system.slice/gke-metadata-emulator.service\n", "/sys/fs/cgroup",
			"/system.slice/gke-metadata-emulator.service", ""},
		"started by hand": {v2, "0::/user.slice/user-0.slice/session-3.scope\n", "/sys/fs/cgroup",
			"/user.slice/user-0.slice/session-3.scope", ""},
		"without systemd": {v2, "0::/docker/abc\n", "/sys/fs/cgroup", "/docker/abc", ""},
		"a node in a container": {v2, "0::/docker/abc/system.slice/gke-metadata-emulator.service\n",
			"/sys/fs/cgroup", "/docker/abc/system.slice/gke-metadata-emulator.service", "/docker/abc"},
		"a node in a container's scope": {v2, "0::/system.slice/docker-abc.scope/system.slice/x.service\n",
			"/sys/fs/cgroup", "/system.slice/docker-abc.scope/system.slice/x.service", "/system.slice/docker-abc.scope"},
		"v1, whose mount is a container's": {v1, "4:memory:/docker/abc/system.slice/x.service\n1:name=systemd:/y\n",
			"/sys/fs/cgroup/memory", "/system.slice/x.service", ""},
		"v1, by name": {v1, "4:memory:/x\n1:name=systemd:/docker/abc/system.slice/x.service\n",
			"/sys/fs/cgroup/systemd", "/docker/abc/system.slice/x.service", "/docker/abc"},
		"a directory that is no mount": {v2, "0::/system.slice/x.service\n", "/sys/fs/cgroup/test", "/", ""},
		"the root":                     {v2, "0::/\n", "/sys/fs/cgroup", "/", ""},
		"nothing":                      {},
	} {
		if tt.root == "" {
			tt.own = "/"
		}
		own := ownCgroup(tt.mounts, tt.cgroups, tt.root)
		if node := nodeOf(own); own != tt.own || node != tt.node {
			t.Errorf("%s: %q, %q; want %q, %q", name, own, node, tt.own, tt.node)
		}
	}
	e := &Evidence{Cgroup: "/docker/abc/system.slice/kubelet.service", node: "/docker/abc"}
	if unit := e.Unit(); unit != "kubelet.service" {
		t.Errorf("a unit of a node in a container is %q", unit)
	}
	if e.node = "/docker/def"; e.Unit() != "" {
		t.Errorf("a unit of another container's is %q of ours", e.Unit())
	}
}
