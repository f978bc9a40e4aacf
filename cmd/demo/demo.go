package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
)

const (
	tokenPath = "/computeMetadata/v1/instance/service-accounts/default/token"
	emailPath = "/computeMetadata/v1/instance/service-accounts/default/email"
	idPath    = "/computeMetadata/v1/instance/service-accounts/default/identity?audience=https://run.example.com"
)

// run is the whole demonstration. An error names the step that failed.
func run(ctx context.Context, out io.Writer, binary string, keep bool) (err error) {
	binary, err = filepath.Abs(binary)
	if err != nil {
		return err
	}
	if _, err := os.Stat(binary); err != nil {
		return fmt.Errorf("%w: run `make build`, or name the binary with --emulator", err)
	}
	if err := needs(capabilities(), keep); err != nil {
		return err
	}
	d := &demo{out: out, began: time.Now()}

	d.say("1. A node, three pods, a pod that Kubernetes does not know (stranger), and a cloud's metadata server")
	w, err := newWorld(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	d.done("namespaces %s, reader %s, writer %s, stranger %s", w.node.Name, w.reader.ns.Addr, w.writer.ns.Addr,
		w.stranger.ns.Addr)
	switch {
	case w.cgroups == nil:
		d.done("each pod is a process in a network namespace without a cgroup of its own, so it is attested by address: "+
			"%v", w.noCgroups)
	case w.cgroups.Mount != nil:
		d.done("each pod is a process that starts in a network namespace and a cgroup of its own, in a cgroup v2 hierarchy " +
			"that is mounted for this demo alone")
	default:
		d.done("each pod is a process that starts in a network namespace and a cgroup of its own, below %s", w.cgroups.Path)
	}
	before, err := w.node.Ruleset()
	if err != nil {
		return err
	}
	leak, err := w.reader.ask(ctx, tokenPath)
	if err != nil || leak.Status != 200 || !strings.Contains(leak.Body, nodeSecret) {
		return fmt.Errorf("without rules the cloud's metadata server must answer a pod: got %v %v", leak, err)
	}
	d.done("without the emulator a pod gets the node's cloud credentials from 169.254.169.254")
	w.cloudAsked.Store(0)

	d.say("2. systemctl start: ExecStartPre, then the service")
	e := &emulator{binary: binary, world: w}
	if err := e.command(ctx, "routing", "install"); err != nil {
		return err
	}
	d.done("gke-metadata-emulator routing install")
	closed, err := w.reader.ask(ctx, tokenPath)
	if err == nil {
		return fmt.Errorf("with rules and without the service no pod may get an answer: got %v", closed)
	}
	d.done("before the service starts a pod's connection is refused, and does not reach the cloud's metadata server")
	if err := e.start(ctx); err != nil {
		return err
	}
	stopped := false
	defer func() {
		if !stopped {
			err = errors.Join(err, e.stop(), e.command(context.WithoutCancel(ctx), "routing", "remove"))
		}
	}()
	if e.helper != nil {
		d.done("gke-metadata-emulator attest, the only process that may enter pods' network namespaces: READY=1 after %s",
			e.helper.readyAfter.Round(time.Millisecond))
	}
	d.done("gke-metadata-emulator serve: READY=1 after %s", e.serve.readyAfter.Round(time.Millisecond))

	d.say("3. Each pod requests http://169.254.169.254%s", tokenPath)
	pods := []*pod{w.reader, w.writer}
	if w.host != nil {
		pods = append(pods, w.host)
	}
	for _, p := range pods {
		if err := d.pod(ctx, p); err != nil {
			return err
		}
	}
	if err := d.stranger(ctx, w, len(pods)); err != nil {
		return err
	}

	d.say("4. gke-metadata-emulator status")
	var status bytes.Buffer
	if err := e.commandTo(ctx, &status, "status"); err != nil {
		return err
	}
	d.quote(status.String())

	if keep {
		d.keep(w, binary)
		<-ctx.Done()
		ctx = context.WithoutCancel(ctx)
	}

	d.say("5. systemctl stop: the service, then ExecStopPost")
	stopped = true
	if err := errors.Join(e.stop(), e.command(ctx, "routing", "remove")); err != nil {
		return err
	}
	after, err := w.node.Ruleset()
	if err != nil {
		return err
	}
	if after != before {
		return fmt.Errorf("routing remove left rules, or removed foreign ones; before:\n%s\nafter:\n%s", before, after)
	}
	d.done("iptables (both backends, both families), nftables, ip rule, ip route and ip address of the node: as before, " +
		"byte for byte")
	if n := w.cloudAsked.Load(); n != 0 {
		return fmt.Errorf("%d requests of pods reached the cloud's metadata server, want 0", n)
	}
	d.done("requests of pods that reached the cloud's metadata server: 0")
	for _, secret := range w.secrets() {
		if strings.Contains(e.said(), secret) || strings.Contains(status.String(), secret) {
			return errors.New("the log or the status contains a token")
		}
	}
	d.done("tokens in the log or in the status: 0 of %d", len(w.secrets()))
	d.say("Done in %s. Everything that the demo made is removed.", time.Since(d.began).Round(10*time.Millisecond))
	return nil
}

// demo prints the steps with their times.
type demo struct {
	out   io.Writer
	began time.Time
	last  time.Time
}

func (d *demo) say(format string, args ...any) {
	_, _ = fmt.Fprintf(d.out, "\n"+format+"\n", args...)
	d.last = time.Now()
}

func (d *demo) done(format string, args ...any) {
	_, _ = fmt.Fprintf(d.out, "   %6.0f ms  %s\n", float64(time.Since(d.last).Microseconds())/1000,
		fmt.Sprintf(format, args...))
	d.last = time.Now()
}

func (d *demo) quote(text string) {
	for line := range strings.Lines(text) {
		_, _ = fmt.Fprint(d.out, "   | ", line)
	}
	d.last = time.Now()
}

// pod sends a pod's requests and checks at the stand-in that the tokens are the pod's. A pod on the
// node's network uses the listen address, since its requests to the metadata server's address are
// not redirected (routing.interceptHostPods).
func (d *demo) pod(ctx context.Context, p *pod) error {
	host, name := metadataAddr, p.Name
	if p.HostNetwork {
		host, name = listenAddr, p.Name+" (a pod on the node's network, at "+listenAddr+")"
	}
	a, err := p.askAt(ctx, host, tokenPath)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	var got struct {
		AccessToken string `json:"access_token"`
		ExpiresIn   int    `json:"expires_in"`
	}
	if err := json.Unmarshal([]byte(a.Body), &got); err != nil || a.Status != 200 {
		return fmt.Errorf("%s got %d %s, want 200 with an access token", name, a.Status, a.Body)
	}
	issued, ok := p.world.google.Lookup(got.AccessToken)
	if !ok || issued.Email != p.email {
		return fmt.Errorf("%s got a token of %q, want one of %s", name, issued.Email, p.email)
	}
	d.done("%s → 200, an access token of %s for %s, valid for %d s", name, issued.Email, issued.Subject, got.ExpiresIn)
	id, err := p.askAt(ctx, host, idPath)
	if err != nil || id.Status != 200 {
		return fmt.Errorf("%s: identity: %v %w", name, id, err)
	}
	if err := p.world.verifyIDToken(id.Body, p.email); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	d.done("%s → 200, an ID token for https://run.example.com with a valid signature", p.Name)
	if again, err := p.askAt(ctx, host, emailPath); err != nil || again.Body != p.email {
		return fmt.Errorf("%s: email: %v %w", name, again, err)
	}
	d.done("%s → 200, email: %s", p.Name, p.email)
	return nil
}

// stranger sends requests as a pod that Kubernetes does not know, and as another host on the LAN.
func (d *demo) stranger(ctx context.Context, w *world, served int) error {
	a, err := w.stranger.ask(ctx, tokenPath)
	if err != nil || a.Status != 503 {
		return fmt.Errorf("the stranger got %v, want 503: %w", a, err)
	}
	d.done("stranger → 503 after the hold: %s", strings.TrimSpace(a.Body))
	for _, host := range []string{metadataAddr, listenAddr} {
		if a, err := askOnce(w.neighbour.Dial, Question{Host: host, Path: tokenPath}); err == nil {
			return fmt.Errorf("another host that routes %s through the node got %v, want no answer", host, a)
		}
		d.done("another host that routes %s through the node → no answer", host)
	}
	if n, m := w.google.Calls(googletest.Exchange), w.google.Calls(googletest.GenerateAccessToken); n != served ||
		m != served {
		return fmt.Errorf("calls to Google: %d exchanges and %d access tokens, want %d of each", n, m, served)
	}
	d.done("calls to Google: %[1]d exchanges, %[1]d access tokens, %[1]d ID tokens: one exchange per ServiceAccount",
		served)
	return nil
}

func (d *demo) keep(w *world, binary string) {
	d.say("Node, pods and service keep running. Commands to try in another terminal, as root:")
	for _, p := range []*pod{w.reader, w.writer, w.stranger} {
		enterCgroup := ""
		if w.cgroups != nil {
			path := strings.Replace(w.cgroups.Path, "/proc/self/", fmt.Sprintf("/proc/%d/", os.Getpid()), 1)
			enterCgroup = "echo $$ >" + path + "/" + p.cgroup + "/cgroup.procs; "
		}
		_, _ = fmt.Fprintf(d.out, "   sh -c '%sexec nsenter --net=%s curl -H \"Metadata-Flavor: Google\" http://%s%s'\n",
			enterCgroup, p.ns.Path(), metadataAddr, tokenPath)
	}
	_, _ = fmt.Fprintf(d.out, "   GKE_METADATA_EMULATOR_RUN=%s %s status\n   nsenter --net=%s iptables-save\nCtrl-C "+
		"ends the demo and removes everything.\n", w.dir, binary, w.node.Path())
}
