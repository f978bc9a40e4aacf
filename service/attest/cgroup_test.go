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
		path string
		want place
		err  error
	}{
		"cgroupfs, burstable":   {path: "/kubepods/burstable/pod" + uidA + "/" + idC, want: place{uidA, idC, "/kubepods/burstable/pod" + uidA}},
		"cgroupfs, best effort": {path: "/kubepods/besteffort/pod" + uidA + "/" + idC, want: place{uidA, idC, "/kubepods/besteffort/pod" + uidA}},
		"cgroupfs, guaranteed":  {path: "/kubepods/pod" + uidA + "/" + idC, want: place{uidA, idC, "/kubepods/pod" + uidA}},
		"cgroupfs, crio":        {path: "/kubepods/pod" + uidA + "/crio-" + idC, want: place{uidA, idC, "/kubepods/pod" + uidA}},
		"the pod itself":        {path: "/kubepods/pod" + uidA, want: place{uidA, "", "/kubepods/pod" + uidA}},
		"a static pod":          {path: "/kubepods/burstable/pod" + static + "/" + idC, want: place{static, idC, "/kubepods/burstable/pod" + static}},
		"systemd, burstable": {path: "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + under + ".slice/cri-containerd-" + idC + ".scope",
			want: place{uidA, idC, "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + under + ".slice"}},
		"systemd, guaranteed": {path: "/kubepods.slice/kubepods-pod" + under + ".slice/docker-" + idC + ".scope",
			want: place{uidA, idC, "/kubepods.slice/kubepods-pod" + under + ".slice"}},
		"crio with crun, which makes a cgroup of its own": {path: "/kubepods.slice/kubepods-pod" + under + ".slice/crio-" + idC + ".scope/container",
			want: place{uidA, idC, "/kubepods.slice/kubepods-pod" + under + ".slice"}},
		"crio's monitor": {path: "/kubepods.slice/kubepods-pod" + under + ".slice/crio-conmon-" + idC + ".scope",
			want: place{uidA, "", "/kubepods.slice/kubepods-pod" + under + ".slice"}},
		"systemd's path, cgroupfs runtime": {path: "/system.slice/containerd.service/kubepods-burstable-pod" + under + ".slice:cri-containerd:" + idC,
			want: place{uidA, idC, "/system.slice/containerd.service/kubepods-burstable-pod" + under + ".slice:cri-containerd:" + idC}},
		"kind": {path: "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod" + under + ".slice/cri-containerd-" + idC + ".scope",
			want: place{uidA, idC, "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod" + under + ".slice"}},
		"kind, seen from its host": {path: "/docker/" + idC + "/kubelet/kubepods/burstable/pod" + uidA + "/" + idC,
			want: place{uidA, idC, "/docker/" + idC + "/kubelet/kubepods/burstable/pod" + uidA}},
		"a workload's own cgroups":                {path: "/kubepods/pod" + uidA + "/" + idC + "/init.scope/x", want: place{uidA, idC, "/kubepods/pod" + uidA}},
		"A-17: another pod below":                 {path: "/kubepods/pod" + uidA + "/" + idC + "/kubepods/pod" + uidB + "/" + idC, err: ErrPods},
		"A-17: another pod below, systemd's form": {path: "/kubepods/pod" + uidB + "/" + idC + "/kubepods.slice/kubepods-pod" + under + ".slice", err: ErrPods},
		"the same pod below":                      {path: "/kubepods/pod" + uidA + "/" + idC + "/kubepods/pod" + uidA, want: place{uidA, idC, "/kubepods/pod" + uidA}},
		"A-17: no root of kubelet's above":        {path: "/user.slice/pod" + uidA + "/" + idC},
		"A-17: one segment between":               {path: "/kubepods/burstable/x/pod" + uidA + "/" + idC},
		"A-17: a slice out of its place":          {path: "/user.slice/kubepods-pod" + under + ".slice/" + idC},
		"a service":                               {path: "/system.slice/kubelet.service"},
		"kubelet's root":                          {path: "/kubepods.slice"},
		"no UID":                                  {path: "/kubepods/pod/" + idC},
		"no UID of any kind":                      {path: "/kubepods/pod..%2f/" + idC},
		"the root":                                {path: "/"},
		"nothing":                                 {path: ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parsePath(tt.path)
			if got != tt.want || !errors.Is(err, tt.err) {
				t.Errorf("parsePath(%s) =\n%+v, %v, want\n%+v, %v", tt.path, got, err, tt.want, tt.err)
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

// Whoever owns a cgroup may make others below it, under any name: that never makes another pod of it.
func FuzzParsePath(f *testing.F) {
	f.Fuzz(func(t *testing.T, path, below string) {
		above, err := parsePath(path)
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
			return
		}
		got, err := parsePath(path + "/" + below)
		if err == nil && (got.pod != above.pod || got.podPath != above.podPath || above.container != "" && got.container != above.container) {
			t.Errorf("%q below %q makes %+v of %+v", below, path, got, above)
		}
	})
}
