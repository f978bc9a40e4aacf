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
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
)

// kubeletDir is where a kubelet keeps its certificate, and so does ours, with its kubeconfig.
const kubeletDir = "/var/lib/kubelet"

// surround makes this machine the node of a world, writes config.yaml, an operator's, into dir and a kubelet's root-only
// credential where it belongs, and takes orders until ctx is done. A script inside a booted machine gives them, by
// `curl --unix-socket DIR/control.sock http://world/ORDER`:
//
//	ask?from=reader&at=169.254.169.254   one request of a pod (reader, writer, stranger) or the neighbour: "200 text", or the error
//	begin                                load from two pods
//	end                                  no more of it: what came of it, as name=number
//	cloud                                how many requests the cloud's own metadata server has had since the last time
//	calls                                how many there have been of Google's STS and IAM, as method=number
//	rules                                the node's firewall, policy rules, routes and addresses, normalised
//	rotate                               a new certificate for kubelet
//
// Where beside is the name of a link, that is the machine's own and is left alone. Where probed is the name of a file, there
// is load all the while, and it gets what came of it.
func surround(ctx context.Context, dir, beside, probed string) (err error) {
	w := &world{dir: dir}
	defer func() { err = errors.Join(err, w.close()) }()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if w.node, err = netnstest.NewHere("world", beside); err != nil {
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
	orders := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: w.orders()}
	stop := context.AfterFunc(ctx, func() { _ = orders.Close() })
	defer stop()
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		return err
	}
	if err := orders.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func (w *world) orders() http.Handler {
	var mu sync.Mutex
	var running *load
	var told int32
	order := func(do func(r *http.Request) (string, error)) http.HandlerFunc {
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
	mux.Handle("/ask", order(func(r *http.Request) (string, error) {
		from := map[string]*netnstest.NS{"reader": w.reader, "writer": w.writer, "stranger": w.stranger, "neighbour": w.neighbour}[r.FormValue("from")]
		if from == nil {
			return "", fmt.Errorf("there is nobody called %q", r.FormValue("from"))
		}
		a, err := askAt(r.Context(), from, r.FormValue("at"), emailPath)
		if err != nil {
			return "", err
		}
		return fmt.Sprint(a.status, " ", a.body), nil
	}))
	mux.Handle("/begin", order(func(*http.Request) (string, error) {
		if running != nil {
			return "", errors.New("there is load already")
		}
		running = w.beginLoad()
		return "load", nil
	}))
	mux.Handle("/end", order(func(*http.Request) (string, error) {
		if running == nil {
			return "", errors.New("there is no load")
		}
		text := running.end()
		running = nil
		return text, nil
	}))
	mux.Handle("/cloud", order(func(*http.Request) (string, error) {
		since := w.cloudAsked.Load() - told
		told += since
		return fmt.Sprint(since), nil
	}))
	mux.Handle("/calls", order(func(*http.Request) (string, error) {
		var calls []string
		for _, m := range googletest.Methods {
			calls = append(calls, fmt.Sprintf("%s=%d", m, w.google.Calls(m)))
		}
		return strings.Join(calls, " "), nil
	}))
	mux.Handle("/rules", order(func(*http.Request) (string, error) { return w.node.Ruleset() }))
	mux.Handle("/rotate", order(func(*http.Request) (string, error) {
		if _, err := w.kube.RotateNodeCert(nodeName); err != nil {
			return "", err
		}
		return w.kube.WriteKubelet(kubeletDir, nodeName)
	}))
	return mux
}
