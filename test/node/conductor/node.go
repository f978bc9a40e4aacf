package main

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/test/node/report"
)

// services: kube-proxy's rules and ours work beside each other, in both of its modes.
func services(r *ring) {
	const ns = "services"
	if !r.do("namespace", r.namespace(r.ctx, ns)) {
		return
	}
	backend := newPod(ns, "backend", linked(0), "services-backend")
	backend.Labels = map[string]string{"app": "backend"}
	backend.Spec.Containers[0].Command = []string{"/asker", "serve", ":8080"}
	service := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "backend"}, Spec: corev1.ServiceSpec{
		Type: corev1.ServiceTypeNodePort, ClusterIP: "10.96.0.80", Selector: backend.Labels,
		Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(8080), NodePort: 30080}}}}
	r.do("create a Service", errors.Join(r.create(r.ctx, backend),
		r.Post(r.ctx, "/api/v1/namespaces/"+ns+"/services", service, nil)))
	for _, mode := range []string{"nftables", "iptables"} {
		r.do("set kube-proxy's mode", r.proxyMode(mode))
		nodePort := "http://" + nodeAddress + ":30080/"
		for _, u := range []string{"http://10.96.0.80/", nodePort} {
			err := eventually(r.ctx, waitLimit, "GET", func() error { return getsBackend(u) })
			r.must("kube-proxy "+mode+": "+u+" from the node", err)
		}
		out, err := r.command("ip", "netns", "exec", "lan", "/opt/node/asker", "get", nodePort)
		r.check("kube-proxy "+mode+": "+nodePort+" from another host", err == nil && out == "backend", "%v %s", err, out)
		tag := "services-" + mode
		r.batch(ns, tag, 3, func(i int) string { return linked(i + 1) }, nil, "-hold")
		r.batch(ns, tag+"-host", 2, func(i int) string { return linked(i + 4) }, onHost, "-hold")
		r.served("pods", tag, 3, waitLimit)
		r.served("pods on the host network", tag+"-host", 2, waitLimit)
		_, err = r.command("gke-metadata-emulator", "routing", "check")
		r.must("kube-proxy "+mode+": routing check succeeds", err)
	}
	r.do("remove the pods", r.empty(r.ctx, ns))
}

func getsBackend(url string) error {
	resp, err := (&http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}).Get(url)
	if err != nil {
		return err
	}
	b, err := io.ReadAll(resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return err
	}
	if string(b) != "backend" {
		return fmt.Errorf("the answer is %q, want backend", b)
	}
	return nil
}

// proxyMode restarts kube-proxy in a mode, after it removed the rules of its other mode.
func (r *ring) proxyMode(mode string) error {
	const file = "/etc/kubernetes/proxy.yaml"
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	lines := strings.Split(string(b), "\n")
	for i, l := range lines {
		if strings.HasPrefix(l, "mode: ") {
			lines[i] = "mode: " + mode
		}
	}
	err = r.systemctl("stop", "node-proxy")
	_, cleanup := r.command("/opt/node/node", "kube-proxy", "--config="+file, "--cleanup")
	return errors.Join(err, cleanup, os.WriteFile(file, []byte(strings.Join(lines, "\n")), 0o644),
		r.systemctl("start", "node-proxy"))
}

// nftables and ebpf run kinds, starts and churn in these routing modes.
func nftables(r *ring) { runMode(r, "nftables") }

func ebpf(r *ring) {
	const dropIn = "/etc/systemd/system/gke-metadata-emulator-routing.service.d/10-ebpf.conf"
	_, err := r.command("install", "-D", "-m", "644", "/opt/node/routing-ebpf.conf", dropIn)
	r.do("install the drop-in of mode ebpf", errors.Join(err, r.systemctl("daemon-reload"),
		r.systemctl("restart", "gke-metadata-emulator-routing")))
	runMode(r, "ebpf")
}

func runMode(r *ring, mode string) {
	before, err := os.ReadFile(config)
	r.do("read the configuration", err)
	set := func(text string) error {
		return errors.Join(os.WriteFile(config, []byte(text), 0o644), r.systemctl("reload", "gke-metadata-emulator"))
	}
	checks := func() error {
		_, err := r.command("gke-metadata-emulator", "routing", "check")
		return err
	}
	r.do("set routing.mode", set(string(before)+"routing: {mode: "+mode+"}\n"))
	if r.must("mode "+mode+": routing check succeeds", eventually(r.ctx, waitLimit, "routing check", checks)) {
		runKinds(r, mode+"-kinds")
		runStarts(r, mode+"-starts", 12)
		runChurn(r, mode+"-churn", 2, 2)
	}
	r.do("restore routing.mode", set(string(before)))
	r.must("default mode: routing check succeeds", eventually(r.ctx, waitLimit, "routing check", checks))
}

const kubeletCertificate = "/var/lib/kubelet/pki/kubelet-client-current.pem"

// rotation: kubelet's certificate was replaced since the start of the run, and the API server
// issues tokens for the new one.
func rotation(r *ring) {
	const ns = "rotation"
	if !r.do("namespace", r.namespace(r.ctx, ns)) {
		return
	}
	var now string
	err := eventually(r.ctx, 5*time.Minute, "a new certificate", func() (err error) {
		if now, err = filepath.EvalSymlinks(kubeletCertificate); err == nil && now == r.certificate {
			err = errors.New("the certificate is still " + filepath.Base(now))
		}
		return err
	})
	r.must("kubelet's certificate was replaced", err)
	copied := func() error {
		want, err := os.ReadFile(now)
		if err != nil {
			return err
		}
		have, err := os.ReadFile("/run/gke-metadata-emulator/credential/kubeconfig")
		if err == nil && !bytes.Contains(have, []byte(base64.StdEncoding.EncodeToString(want))) {
			err = errors.New("the service's copy has another certificate")
		}
		return err
	}
	r.must("the service's copy has the new certificate", eventually(r.ctx, waitLimit, "compare", copied))
	r.batch(ns, "rotation", 6, func(i int) string { return []string{linked(i), plain(i)}[i%2] }, nil,
		"-fresh", "-n", "5", "-every", "200ms", "-hold")
	r.served("pods that request new tokens afterwards", "rotation", 30, waitLimit)
	r.do("remove the pods", r.empty(r.ctx, ns))
}

var ours = regexp.MustCompile(`(?i)169\.254\.169|gke[-_]metadata`)

// purge: nothing of the package is left, and pods get no answer.
func purge(r *ring) {
	const name = "gke-metadata-emulator"
	if !r.do("namespace", r.namespace(r.ctx, "purge")) {
		return
	}
	_, err := r.command("dpkg", "--purge", name)
	r.must("dpkg --purge", err)
	for _, c := range []struct {
		what string
		args []string
	}{
		{"rules of iptables", []string{"iptables-save"}}, {"rules of ip6tables", []string{"ip6tables-save"}},
		{"tables of nftables", []string{"nft", "list", "ruleset"}}, {"policy rules", []string{"ip", "rule"}},
		{"addresses", []string{"ip", "address"}}, {"units", []string{"systemctl", "list-unit-files", "--no-legend"}},
		{"users", []string{"getent", "passwd"}},
	} {
		out, err := r.command(c.args[0], c.args[1:]...)
		left := ""
		for line := range strings.Lines(out) {
			if ours.MatchString(line) {
				left += line
			}
		}
		r.check("nothing is left: "+c.what, err == nil && left == "", "%v\n%s", err, left)
	}
	for _, dir := range []string{"/etc", "/run", "/var/lib", "/sys/fs/bpf"} {
		_, err := os.Stat(filepath.Join(dir, name))
		r.check("nothing is left: "+filepath.Join(dir, name), errors.Is(err, os.ErrNotExist), "%v", err)
	}
	r.batch("purge", "purge", 1, linked, nil, "-timeout", "3s")
	for _, p := range r.wait("purge", 1, waitLimit) {
		r.check("a pod gets no answer", p.Outcome == report.Lost, "%s %d %s", p.Outcome, p.Status, p.Text)
	}
}
