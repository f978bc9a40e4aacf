package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/test/node/report"
)

func writeJSON(file string, o any) error {
	b, err := json.Marshal(o)
	if err != nil {
		return err
	}
	return os.WriteFile(file, b, 0o644)
}

// fewAddresses limits pods to 16 addresses, from first on, until undo is called.
func (r *ring) fewAddresses(first int) (undo func()) {
	before, err := os.ReadFile(cni)
	r.do("read the network's configuration", err)
	const subnet = `"subnet": "10.88.0.0/24"`
	ranged := fmt.Sprintf(`%s, "rangeStart": "10.88.0.%d", "rangeEnd": "10.88.0.%d"`, subnet, first, first+15)
	few := strings.Replace(string(before), subnet, ranged, 1)
	if few == string(before) {
		r.check("limit pods to 16 addresses", false, "%s does not contain %s", cni, subnet)
	}
	r.do("limit pods to 16 addresses", os.WriteFile(cni, []byte(few), 0o644))
	return func() { r.do("remove the limit of 16 addresses", os.WriteFile(cni, before, 0o644)) }
}

// churn: 104 pods use 16 addresses, and are deleted gracefully and by force. The next eight start
// while the last eight end.
func churn(r *ring) { runChurn(r, "churn", 8, 5) }

func runChurn(r *ring, ns string, graceful, forced int) {
	if !r.do("namespace", r.namespace(r.ctx, ns)) {
		return
	}
	defer r.fewAddresses(200)()
	const n, requests = 8, 5
	var all []report.Report
	for b := range graceful + forced {
		tag := fmt.Sprintf("%s-%d", ns, b)
		account := func(i int) string {
			if i%5 == 4 {
				return plain(b*n + i)
			}
			return linked((b*n + i) * 7)
		}
		pods := r.batch(ns, tag, n, account, nil, "-n", fmt.Sprint(requests), "-every", "100ms", "-hold")
		all = append(all, r.wait(tag, n*requests, waitLimit)...)
		r.do("remove pods", r.remove(r.ctx, b >= graceful, pods...))
	}
	r.allOK(fmt.Sprintf("%d pods on 16 addresses, %d of them removed by force", (graceful+forced)*n, forced*n), all)
	r.shared("pods", all)
	r.do("wait for the end of the last pods", r.gone(r.ctx, ns)) // they use addresses of the limit
}

// shared checks that addresses had several owners; otherwise the part shows nothing.
func (r *ring) shared(what string, ps []report.Report) {
	owners := map[string]map[string]bool{}
	most := 0
	for _, p := range ps {
		if owners[p.Address] == nil {
			owners[p.Address] = map[string]bool{}
		}
		owners[p.Address][p.Pod] = true
		most = max(most, len(owners[p.Address]))
	}
	r.check(fmt.Sprintf("%s had %d addresses with up to %d owners each", what, len(owners), most),
		len(owners) <= 16 && most > 1, "want at most 16 addresses, and one with several owners")
}

// completed: completed pods keep their address in their status, and other pods get the same
// address.
func completed(r *ring) {
	const ns, n, batches = "completed", 8, 5
	if !r.do("namespace", r.namespace(r.ctx, ns)) {
		return
	}
	defer r.fewAddresses(220)()
	var all []report.Report
	for b := range batches {
		tag := fmt.Sprintf("%s-%d", ns, b)
		r.batch(ns, tag, n, func(i int) string { return linked((b*n + i) * 7) }, nil, "-n", "2", "-every", "100ms")
		all = append(all, r.wait(tag, 2*n, waitLimit)...)
	}
	r.allOK(fmt.Sprintf("%d pods that complete", batches*n), all)
	r.shared("pods that completed", all)
	r.do("remove the pods", r.empty(r.ctx, ns))
}

// rbac: without the shipped grants no pod gets a token, and the answer to the pod and doctor name
// the missing grant. With the grants pods are served.
func rbac(r *ring) {
	const ns, missing = "rbac", "request-serviceaccounts-token-audience"
	manifest, err := shippedRBAC()
	if !r.do("namespace", errors.Join(err, r.namespace(r.ctx, ns))) {
		return
	}
	r.do("delete the grants", r.unapply(r.ctx, manifest))
	r.batch(ns, "rbac-without", 2, linked, nil, "-hold")
	for _, p := range r.wait("rbac-without", 2, waitLimit) {
		r.check("without the grants a pod is refused, and the answer names the missing grant",
			p.Outcome == report.Refused && strings.Contains(p.Text, missing), "%s %d %s", p.Outcome, p.Status, p.Text)
	}
	out, err := r.command("gke-metadata-emulator", "doctor")
	r.check("without the grants doctor fails, and names the missing grant",
		err != nil && strings.Contains(out, missing), "%v\n%s", err, out)
	r.do("apply the grants", r.apply(r.ctx, manifest))
	start, tries := time.Now(), 0
	err = eventually(r.ctx, waitLimit, "a pod is served", func() error {
		tries++
		tag := fmt.Sprintf("rbac-with-%d", tries)
		r.batch(ns, tag, 1, func(int) string { return linked(0) }, nil)
		for _, p := range r.wait(tag, 1, waitLimit) {
			if p.Outcome != report.OK {
				return fmt.Errorf("%s %d %s", p.Outcome, p.Status, p.Text)
			}
		}
		return nil
	})
	r.must(fmt.Sprintf("with the grants pods are served, after %s", time.Since(start).Round(time.Second)), err)
	r.do("remove the pods", r.empty(r.ctx, ns))
}

// restarts: no request is lost while containerd and the product's processes are restarted and
// killed, except those that the service had accepted when it was killed.
func restarts(r *ring) {
	const ns, unit = "restarts", "gke-metadata-emulator"
	if !r.do("namespace", r.namespace(r.ctx, ns)) {
		return
	}
	flags := []string{"-n", "1000000", "-every", "50ms"}
	r.batch(ns, "restarts-bridge", 4, linked, nil, flags...)
	r.batch(ns, "restarts-host", 2, func(i int) string { return linked(i + 4) }, onHost, flags...)
	r.wait("restarts-bridge", 4*10, waitLimit)
	r.wait("restarts-host", 2*10, waitLimit)
	kill := []string{"kill", "-s", "KILL", unit}
	var killed time.Time
	for i, args := range [][]string{
		{"restart", "containerd"}, {"restart", unit}, kill, {"restart", unit + "-attest"},
		{"kill", "-s", "KILL", unit + "-attest"}, {"restart", unit + "-routing"}, {"reload", unit},
	} {
		if slices.Equal(args, kill) {
			killed = time.Now()
		}
		r.do(strings.Join(args, " "), r.systemctl(args...))
		tag := fmt.Sprintf("restarts-new-%d", i)
		r.batch(ns, tag, 2, func(j int) string { return linked(10 + i*2 + j) }, nil, "-n", "3", "-every", "100ms")
		r.served("new pods after "+strings.Join(args, " "), tag, 6, waitLimit)
	}
	r.do("remove the pods", r.empty(r.ctx, ns))
	r.do("wait for the end of the pods", r.gone(r.ctx, ns))
	for _, where := range []string{"bridge", "host"} {
		ps := r.of("restarts-" + where)
		n := len(ps)
		ps = slices.DeleteFunc(ps, func(p report.Report) bool {
			end := p.At.Add(p.Took)
			cut := strings.Contains(p.Text, "connection reset by peer") || strings.Contains(p.Text, "EOF")
			return p.Outcome == report.Lost && cut && end.After(killed) && end.Before(killed.Add(time.Second))
		})
		r.allOK(fmt.Sprintf("pods on the %s network, every 50 ms (the kill ended %d requests)", where, n-len(ps)), ps)
	}
}

// apiKill stops the API server, apiStop makes it hang. Pods whose token is cached are served.
func apiKill(r *ring) {
	apiAway(r, "apikill", []string{"stop", "node-controlplane"}, []string{"start", "node-controlplane"})
}

func apiStop(r *ring) {
	kill := func(signal string) []string { return []string{"kill", "-s", signal, "node-controlplane"} }
	apiAway(r, "apistop", kill("STOP"), kill("CONT"))
}

func apiAway(r *ring, ns string, away, back []string) {
	if !r.do("namespace", r.namespace(r.ctx, ns)) {
		return
	}
	const seconds = 10
	r.batch(ns, ns+"-cached", 3, linked, nil, "-every", "250ms", "-n", "1000000")
	r.batch(ns, ns+"-cached-host", 1, func(int) string { return linked(3) }, onHost, "-every", "250ms", "-n", "1000000")
	r.batch(ns, ns+"-fresh", 1, func(int) string { return linked(4) }, nil,
		"-fresh", "-n", "1000000", "-every", "1s", "-timeout", "5s")
	r.wait(ns+"-cached", 3*4, waitLimit)
	r.wait(ns+"-cached-host", 4, waitLimit)
	r.do(strings.Join(away, " "), r.systemctl(away...))
	before := len(r.of(ns + "-cached"))
	r.wait(ns+"-cached", before+3*4*seconds, waitLimit) // the API server is away for this time
	r.do(strings.Join(back, " "), r.systemctl(back...))
	r.must("the API server is ready again", eventually(r.ctx, waitLimit, "GET /readyz", func() error {
		return r.Call(r.ctx, http.MethodGet, "/readyz", "text/plain", nil, nil)
	}))
	r.batch(ns, ns+"-new", 5, func(i int) string { return linked(10 + i) }, nil, "-hold")
	r.served("pods that are created when the API server is ready again", ns+"-new", 5, waitLimit)
	r.do("remove the pods", r.empty(r.ctx, ns))
	r.do("wait for the end of the pods", r.gone(r.ctx, ns))
	r.allOK("pods on the pod network with a cached token", r.of(ns+"-cached"))
	r.allOK("pods on the host network with a cached token", r.of(ns+"-cached-host"))
	fresh := r.of(ns + "-fresh")
	ok := 0
	for _, p := range fresh {
		if p.Outcome == report.OK {
			ok++
		}
	}
	fmt.Printf("      requests for tokens that are not cached: %d of %d served\n", ok, len(fresh))
}
