package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf/link"
	systemd "github.com/coreos/go-systemd/v22/daemon"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
)

// kubeletDir is the directory of a kubelet's certificate, here with its kubeconfig.
const kubeletDir = "/var/lib/kubelet"

// surround makes this machine the node of a world. It writes an operator's config.yaml into dir and
// a kubelet's root-only credential to its usual path, and takes commands until ctx is done. A
// script in a booted machine sends them by `curl --unix-socket DIR/control.sock
// http://world/COMMAND`:
//
//	ask?from=reader&at=169.254.169.254
//		sends one request from a pod (reader, writer, host, stranger, or a started one) or from
//		another host (neighbour); the result is "200 text", or the error; &as=writer: from that
//		pod's address; &keep=yes: on the connection of the last such request, if it is open
//	start?name=late
//		starts a pod with a ServiceAccount of its name; &as=other: with the address of that
//		killed pod; &routed=yes: on a link of its own and not on the bridge
//	kill?name=late
//		kills the pod; its address is free afterwards
//	delete?name=late
//		deletes the pod in Kubernetes; kill does not
//	churn?pods=20
//		runs this number of pods one after the other at one address
//	begin
//		starts a load from two pods; &host=yes: also from the pod on the node's network;
//		&ipv6=yes: by IPv6 instead of IPv4
//	end
//		stops the load; the result is name=number, and host_name=number
//	cloud
//		counts the pods' requests at the cloud's metadata server since the last call
//	calls
//		counts the calls of Google's STS and IAM, as method=number
//	rules
//		prints the node's firewall, policy rules, routes and addresses, normalised (R-31, ruleset as before)
//	detach?pin=/sys/fs/bpf/some/link
//		detaches the program whose link is pinned there, by force
//	rotate
//		gives kubelet a new certificate
//
// beside names a link of the machine that is not changed, or is "". probed names a file for the
// outcomes of a load from start to end, or is "".
func surround(ctx context.Context, dir, beside, probed string) (err error) {
	w := &world{dir: dir}
	defer func() { err = errors.Join(err, w.close()) }()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if w.node, err = netnstest.NewHere("world", beside); err != nil {
		return err
	}
	if err := w.makeKubepods(); err != nil {
		return err
	}
	if err := w.populate(ctx); err != nil {
		return err
	}
	if _, err := w.kube.WriteKubelet(kubeletDir, nodeName); err != nil {
		return err
	}
	if err := w.configure(""); err != nil {
		return err
	}
	if probed != "" {
		if w.probe, err = w.beginProbe(probed); err != nil {
			return err
		}
	}
	l, err := new(net.ListenConfig).Listen(ctx, "unix", filepath.Join(dir, "control.sock"))
	if err != nil {
		return err
	}
	commands := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: w.commands()}
	stop := context.AfterFunc(ctx, func() { _ = commands.Close() })
	defer stop()
	if _, err := systemd.SdNotify(false, systemd.SdNotifyReady); err != nil {
		return err
	}
	if err := commands.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// makeKubepods makes what kubelet makes at the root of the machine's cgroups, beside systemd's own
// slices.
func (w *world) makeKubepods() (err error) {
	w.cgroups, err = netnstest.NewCgroups(cgroupRoot, "kubepods.slice")
	if errors.Is(err, netnstest.ErrNoCgroups) {
		w.noCgroups = err
		fmt.Fprintf(os.Stderr, "demo: pods have no cgroups, so they are attested by address: %v\n", err)
		return nil
	}
	if err != nil {
		return err
	}
	// Load of pods must not take the CPU from the service. Without the controller there is no
	// such file.
	_ = os.WriteFile(filepath.Join(w.cgroups.Path, "cpu.weight"), []byte("20"), 0)
	return nil
}

// commands serves the commands of surround.
func (w *world) commands() http.Handler {
	var mu sync.Mutex
	var running, onHost loaded
	pods := map[string]*pod{"reader": w.reader, "writer": w.writer, "stranger": w.stranger}
	if w.host != nil {
		pods["host"] = w.host
	}
	var reported int32
	command := func(do func(r *http.Request) (string, error)) http.HandlerFunc {
		return func(rw http.ResponseWriter, r *http.Request) {
			mu.Lock()
			defer mu.Unlock()
			text, err := do(r)
			if err != nil {
				rw.WriteHeader(http.StatusConflict)
				text = err.Error()
			}
			_, _ = io.WriteString(rw, text+"\n")
		}
	}
	mux := http.NewServeMux()
	mux.Handle("/ask", command(func(r *http.Request) (string, error) {
		from, as := r.FormValue("from"), r.FormValue("as")
		q := Question{Host: r.FormValue("at"), Path: emailPath, Keep: r.FormValue("keep") != ""}
		p, ns := pods[from], w.neighbour
		if p != nil {
			ns = p.ns
		} else if from != "neighbour" {
			return "", fmt.Errorf("unknown sender %q: name a pod, or neighbour", from)
		}
		if as != "" {
			if pods[as] == nil {
				return "", fmt.Errorf("as: unknown pod %q", as)
			}
			q.As = pods[as].ns.Addr.String()
			undo, err := addAddress(r.Context(), ns, q.As)
			if err != nil {
				return "", err
			}
			defer undo()
		}
		var a Answer
		var err error
		if p != nil {
			a, err = p.put(r.Context(), q)
		} else {
			a, err = askOnce(func(ctx context.Context, network, addr string) (c net.Conn, err error) {
				err = ns.Do(func() error { c, err = q.dial(ctx, network, addr); return err })
				return c, err
			}, q)
		}
		if err != nil {
			return "", err
		}
		return fmt.Sprint(a.Status, " ", a.Body), nil
	}))
	mux.Handle("/start", command(func(r *http.Request) (string, error) {
		name, as := r.FormValue("name"), pods[r.FormValue("as")]
		if pods[name] != nil {
			return "", fmt.Errorf("pod %s exists", name)
		}
		ns, err := w.network(name, as, r.FormValue("routed") != "")
		if err != nil {
			return "", err
		}
		pods[name], err = w.startPod(name, ns, true)
		return fmt.Sprint(name, " at ", ns.Addr), err
	}))
	mux.Handle("/kill", command(func(r *http.Request) (string, error) {
		p := pods[r.FormValue("name")]
		if p == nil {
			return "", fmt.Errorf("unknown pod %q", r.FormValue("name"))
		}
		p.die()
		if p.HostNetwork {
			return "killed", nil
		}
		return "killed", errors.Join(p.ns.Unplug(), p.ns.Close())
	}))
	mux.Handle("/delete", command(func(r *http.Request) (string, error) {
		if !w.kube.DeletePod("default", r.FormValue("name")) {
			return "", fmt.Errorf("no pod default/%s in Kubernetes", r.FormValue("name"))
		}
		return "deleted", nil
	}))
	mux.Handle("/churn", command(func(r *http.Request) (string, error) {
		n, err := strconv.Atoi(r.FormValue("pods"))
		if err != nil {
			return "", err
		}
		c, err := w.churn(r.Context(), n)
		return c.String(), err
	}))
	mux.Handle("/begin", command(func(r *http.Request) (string, error) {
		if running != nil {
			return "", errors.New("a load runs already: end it first")
		}
		var err error
		at := metadataAddr
		if r.FormValue("ipv6") != "" {
			at = metadataAddr6
		}
		if running, err = beginLoads(at, w.reader, w.writer); err == nil && r.FormValue("host") != "" {
			if w.host == nil {
				return "", w.noCgroups
			}
			onHost, err = beginLoads(at, w.host)
		}
		return "load", err
	}))
	mux.Handle("/end", command(func(*http.Request) (string, error) {
		if running == nil {
			return "", errors.New("no load runs: begin one first")
		}
		h, err1 := onHost.end()
		c, err2 := running.end()
		running, onHost = nil, nil
		var line strings.Builder
		for what, n := range h.Of {
			fmt.Fprintf(&line, "host_%s=%d ", what, n)
		}
		return line.String() + c.String(), errors.Join(err1, err2)
	}))
	mux.Handle("/cloud", command(func(*http.Request) (string, error) {
		since := w.cloudAsked.Load() - reported
		reported += since
		return fmt.Sprint(since), nil
	}))
	mux.Handle("/calls", command(func(*http.Request) (string, error) {
		var calls []string
		for _, m := range googletest.Methods {
			calls = append(calls, fmt.Sprintf("%s=%d", m, w.google.Calls(m)))
		}
		return strings.Join(calls, " "), nil
	}))
	mux.Handle("/rules", command(func(*http.Request) (string, error) { return w.node.Ruleset() }))
	mux.Handle("/detach", command(func(r *http.Request) (string, error) {
		l, err := link.LoadPinnedLink(r.FormValue("pin"), nil)
		if err != nil {
			return "", err
		}
		return "detached", errors.Join(l.Detach(), l.Close())
	}))
	mux.Handle("/rotate", command(func(*http.Request) (string, error) {
		if _, err := w.kube.RotateNodeCert(nodeName); err != nil {
			return "", err
		}
		return w.kube.WriteKubelet(kubeletDir, nodeName)
	}))
	return mux
}

// addAddress gives a namespace the address of another pod, so that it can receive the replies,
// until undo.
func addAddress(ctx context.Context, ns *netnstest.NS, addr string) (undo func(), err error) {
	out, err := ns.Command(ctx, "ip", "address", "add", addr+"/32", "dev", "lo").CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("ip address add %s: %w: %s", addr, err, out)
	}
	return func() {
		_ = ns.Command(context.WithoutCancel(ctx), "ip", "address", "del", addr+"/32", "dev", "lo").Run()
	}, nil
}
