package service

import (
	"context"
	"net"
	"net/http"
	"path/filepath"
	"testing"
)

// nodeHealth is healthListen of a kernelNode that is scraped.
const nodeHealth = "127.0.0.1:16322"

// scraped starts the service of k anew, with healthListen at nodeHealth.
func (k *kernelNode) scraped(t *testing.T) {
	t.Helper()
	k.kill(k.server)
	k.replace(t, "config.yaml", "healthListen: 127.0.0.1:0", "healthListen: "+nodeHealth)
	k.serve(t)
}

// serve starts the service, and waits until it knows pods, has the helper and is scraped.
func (k *kernelNode) serve(t *testing.T) {
	t.Helper()
	k.server = k.process(filepath.Join(k.dir, "config.yaml"), "/system.slice/gke-metadata-emulator.service")
	k.eventually(t, "it serves", func() bool {
		st := statusOf(t, k.dir)
		return st.Cluster != nil && st.Cluster.Watching && st.Attestation.Kernel.Helper
	})
	k.eventually(t, "it answers Prometheus", func() bool {
		res, err := k.getHealth("/metrics")
		return err == nil && res.Body.Close() == nil
	})
}

// getHealth asks nodeHealth from the node, as Prometheus does.
func (k *kernelNode) getHealth(path string) (*http.Response, error) {
	client := http.Client{Timeout: testTimeout, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, to string) (net.Conn, error) {
			return k.node.NS.Dial(ctx, network, to)
		}}}
	return client.Get("http://" + nodeHealth + path)
}

// newAsker starts a pod of its own that asks.
func (k *kernelNode) newAsker(t *testing.T) *podNode {
	t.Helper()
	ns, err := k.node.AddPod("asker")
	if err != nil {
		t.Fatal(err)
	}
	asker := k.newPod("asker", ns)
	asker.tell()
	if err := asker.start(); err != nil {
		t.Fatal(err)
	}
	return asker
}
