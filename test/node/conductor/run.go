package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/test/node/report"
)

// ring is one run of test-node: the reports so far, and the results of the checks.
type ring struct {
	cluster
	ctx            context.Context
	file           *os.File
	partial        []byte
	reports        []report.Report
	certificate    string // kubelet's at the start of the run
	passed, failed int
}

// tally is the result of a part, or of the run.
type tally struct {
	passed, failed int
	outcomes       map[report.Outcome]int
}

// since returns the checks after an earlier tally, and the outcomes of the reports after the first
// n.
func (r *ring) since(before tally, n int) tally {
	t := tally{r.passed - before.passed, r.failed - before.failed, map[report.Outcome]int{}}
	for _, p := range r.reports[n:] {
		t.outcomes[p.Outcome]++
	}
	return t
}

func (t tally) String() string {
	answers := 0
	for _, n := range t.outcomes {
		answers += n
	}
	return fmt.Sprintf("%d checks passed, %d failed; %d requests: %d ok, %d wrong, %d refused, %d lost",
		t.passed, t.failed, answers,
		t.outcomes[report.OK], t.outcomes[report.Wrong], t.outcomes[report.Refused], t.outcomes[report.Lost])
}

type part struct {
	name string
	run  func(*ring)
}

// parts are run in this order.
var parts = []part{
	{name: "first", run: first},
	{name: "firsthost", run: firstHost},
	{name: "kinds", run: kinds},
	{name: "starts", run: starts},
	{name: "roll", run: roll},
	{name: "churn", run: churn},
	{name: "completed", run: completed},
	{name: "rbac", run: rbac},
	{name: "restarts", run: restarts},
	{name: "apikill", run: apiKill},
	{name: "apistop", run: apiStop},
	{name: "services", run: services},
	{name: "nftables", run: nftables},
	{name: "ebpf", run: ebpf},
	{name: "rotation", run: rotation},
	{name: "purge", run: purge},
}

func run(ctx context.Context, names []string) error {
	for _, n := range names {
		if !slices.ContainsFunc(parts, func(p part) bool { return p.name == n }) {
			return fmt.Errorf("unknown part %s: test/README.md lists the parts", n)
		}
	}
	c, err := newCluster()
	if err != nil {
		return err
	}
	r := &ring{cluster: c, ctx: ctx}
	if r.file, err = os.Open(reportsFile); err != nil {
		return err
	}
	if err := eventually(ctx, time.Minute, "kubelet joins", func() (err error) {
		r.certificate, err = filepath.EvalSymlinks(kubeletCertificate)
		return err
	}); err != nil {
		return err
	}
	begin := time.Now()
	judged(r)
	counted := 0 // reports
	for _, p := range parts {
		if len(names) > 0 && !slices.Contains(names, p.name) {
			continue
		}
		fmt.Printf("== %s\n", p.name)
		start, before := time.Now(), r.since(tally{}, 0)
		p.run(r)
		r.read()
		fmt.Printf("== %s: %s; %s\n", p.name, r.since(before, counted), time.Since(start).Round(time.Second))
		counted = len(r.reports)
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	r.read()
	wrong := 0
	for _, p := range r.reports {
		if p.Outcome == report.Wrong {
			fmt.Printf("WRONG %+v\n", p)
			wrong++
		}
	}
	r.check("every token was the pod's own", wrong == 0, "%d of %d reports were not", wrong, len(r.reports))
	fmt.Printf("test-node: %s; %s\n", r.since(tally{}, 0), time.Since(begin).Round(time.Second))
	if r.failed > 0 {
		return fmt.Errorf("%d checks failed: see the lines with FAIL", r.failed)
	}
	return nil
}

// check prints and counts the result of one check.
func (r *ring) check(what string, ok bool, otherwise string, args ...any) bool {
	if ok {
		fmt.Println("ok   ", what)
		r.passed++
	} else {
		fmt.Printf("FAIL  %s: %s\n", what, strings.TrimSpace(fmt.Sprintf(otherwise, args...)))
		r.failed++
	}
	return ok
}

func (r *ring) must(what string, err error) bool { return r.check(what, err == nil, "%v", err) }

// do is for steps that are not counted when they succeed: it prints failures only.
func (r *ring) do(what string, err error) bool {
	return err == nil || r.check(what, false, "%v", err)
}

// read reads the reports that were written since the last call.
func (r *ring) read() {
	b, err := io.ReadAll(r.file)
	if err != nil {
		r.do("read the reports", err)
		return
	}
	r.partial = append(r.partial, b...)
	for {
		line, rest, whole := bytes.Cut(r.partial, []byte{'\n'})
		if !whole {
			return
		}
		var p report.Report
		if err := json.Unmarshal(line, &p); err != nil {
			r.do("read a report", err)
		}
		r.reports, r.partial = append(r.reports, p), rest
	}
}

// of returns the reports with the tag.
func (r *ring) of(tag string) (ps []report.Report) {
	r.read()
	for _, p := range r.reports {
		if p.Tag == tag {
			ps = append(ps, p)
		}
	}
	return ps
}

// wait waits until n reports have the tag, and returns all with the tag.
func (r *ring) wait(tag string, n int, waitLimit time.Duration) []report.Report {
	err := eventually(r.ctx, waitLimit, tag, func() error {
		if got := len(r.of(tag)); got < n {
			return fmt.Errorf("%d of %d reports", got, n)
		}
		return nil
	})
	r.do("wait for reports", err)
	return r.of(tag)
}

// served checks that n requests or more were reported and all were answered with the pod's own
// token.
func (r *ring) served(what, tag string, n int, waitLimit time.Duration) {
	r.allOK(what, r.wait(tag, n, waitLimit))
}

func (r *ring) allOK(what string, ps []report.Report) {
	bad := slices.DeleteFunc(slices.Clone(ps), func(p report.Report) bool { return p.Outcome == report.OK })
	text := ""
	for _, p := range bad[:min(len(bad), 3)] {
		text += fmt.Sprintf(
			"\n      %s %s/%s request %d from %s: %s %d after %s: %.300s",
			p.At.Format(
				"15:04:05.000",
			),
			p.Namespace,
			p.Pod,
			p.N,
			p.Address,
			p.Outcome,
			p.Status,
			p.Took.Round(time.Millisecond),
			p.Text,
		)
	}
	r.check(fmt.Sprintf("%s: %d answered, each with the pod's own token; %s", what, len(ps)-len(bad), spread(ps)),
		len(bad) == 0 && len(ps) > 0, "%d of %d were not%s", len(bad), len(ps), text)
}

// spread returns percentiles of the duration of requests.
func spread(ps []report.Report) string {
	if len(ps) == 0 {
		return "none"
	}
	var took []time.Duration
	for _, p := range ps {
		took = append(took, p.Took)
	}
	slices.Sort(took)
	at := func(share int) time.Duration { return took[len(took)*share/100].Round(100 * time.Microsecond) }
	return fmt.Sprintf("p50 %s, p99 %s, longest %s", at(50), at(99), took[len(took)-1].Round(100*time.Microsecond))
}

// eventually polls until f succeeds. After waitLimit it returns f's last error.
func eventually(ctx context.Context, waitLimit time.Duration, what string, f func() error) error {
	for deadline := time.Now().Add(waitLimit); ; {
		err := f()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: not within %s: %w", what, waitLimit, err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// command runs a program on the node.
func (r *ring) command(name string, args ...string) (string, error) {
	b, err := exec.CommandContext(r.ctx, name, args...).CombinedOutput()
	if err != nil {
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		last := strings.Join(lines[max(0, len(lines)-4):], " | ")
		err = fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, last)
	}
	return string(b), err
}

func (r *ring) systemctl(args ...string) error {
	_, err := r.command("systemctl", args...)
	return err
}
