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

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
)

const (
	tokenPath = "/computeMetadata/v1/instance/service-accounts/default/token"
	emailPath = "/computeMetadata/v1/instance/service-accounts/default/email"
	idPath    = "/computeMetadata/v1/instance/service-accounts/default/identity?audience=https://run.example.com"
)

// run is the whole demonstration. An error says which step did not do what it must.
func run(ctx context.Context, out io.Writer, binary string, keep bool) (err error) {
	binary, err = filepath.Abs(binary)
	if err != nil {
		return err
	}
	if _, err := os.Stat(binary); err != nil {
		return fmt.Errorf("%w: make it by `make build`, or name it with --emulator", err)
	}
	d := &demo{out: out, began: time.Now()}

	d.say("1. A node with two pods and a stranger, and around it the cloud")
	w, err := newWorld(ctx)
	if err != nil {
		if errors.Is(err, netnstest.ErrNeedsRoot) {
			return fmt.Errorf("%w: run it by `make demo`, which asks for root by sudo", err)
		}
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	d.done("namespaces %s, reader %s, writer %s, stranger %s", w.node.Name, w.reader.Addr, w.writer.Addr, w.stranger.Addr)
	before, err := w.node.Ruleset()
	if err != nil {
		return err
	}
	leak, err := ask(ctx, w.reader, tokenPath)
	if err != nil || leak.status != 200 || !strings.Contains(leak.body, nodeSecret) {
		return fmt.Errorf("the cloud's own metadata server should answer before there are rules: %v %v", leak, err)
	}
	d.done("without the emulator, a pod that asks 169.254.169.254 gets the node's own cloud credentials")
	w.cloudAsked.Store(0)

	d.say("2. systemctl start: ExecStartPre, then the service")
	e := &emulator{binary: binary, world: w}
	if err := e.command(ctx, "routing", "install"); err != nil {
		return err
	}
	d.done("gke-metadata-emulator routing install")
	closed, err := ask(ctx, w.reader, tokenPath)
	if err == nil {
		return fmt.Errorf("there are rules and nobody serves, and still a pod was answered: %v", closed)
	}
	d.done("nobody serves yet: a pod's connection is refused, and the cloud's own server is out of its reach")
	if err := e.start(ctx); err != nil {
		return err
	}
	stopped := false
	defer func() {
		if !stopped {
			err = errors.Join(err, e.stop(), e.command(context.WithoutCancel(ctx), "routing", "remove"))
		}
	}()
	d.done("gke-metadata-emulator serve: READY=1 to systemd after %s", e.readyAfter.Round(time.Millisecond))

	d.say("3. Each pod asks http://169.254.169.254%s", tokenPath)
	for _, p := range []struct {
		pod  *netnstest.NS
		name string
		want string
	}{{w.reader, "reader", readerEmail}, {w.writer, "writer", writerEmail}} {
		if err := d.pod(ctx, w, p.pod, p.name, p.want); err != nil {
			return err
		}
	}
	if err := d.stranger(ctx, w); err != nil {
		return err
	}

	d.say("4. gke-metadata-emulator status (these pods are namespaces without processes of their own, and so are known by address)")
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
		return fmt.Errorf("the node's rules are not as they were; before:\n%s\nafter:\n%s", before, after)
	}
	d.done("iptables (both backends, both families), nftables, ip rule, ip route and ip address of the node: as before, byte for byte")
	if n := w.cloudAsked.Load(); n != 0 {
		return fmt.Errorf("%d requests of pods reached the cloud's own metadata server", n)
	}
	d.done("requests of pods that reached the cloud's own metadata server: 0")
	for _, secret := range w.secrets() {
		if strings.Contains(e.log.String(), secret) || strings.Contains(status.String(), secret) {
			return errors.New("a token is in the log or in the status")
		}
	}
	d.done("tokens, of %d issued, that are in the log or in the status: 0", len(w.secrets()))
	d.say("Done in %s. The namespaces are gone too.", time.Since(d.began).Round(10*time.Millisecond))
	return nil
}

// demo prints.
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
	_, _ = fmt.Fprintf(d.out, "   %6.0f ms  %s\n", float64(time.Since(d.last).Microseconds())/1000, fmt.Sprintf(format, args...))
	d.last = time.Now()
}

func (d *demo) quote(text string) {
	for line := range strings.Lines(text) {
		_, _ = fmt.Fprint(d.out, "   | ", line)
	}
	d.last = time.Now()
}

// pod asks as a pod does, and looks at the stand-in whose the tokens are that it got.
func (d *demo) pod(ctx context.Context, w *world, pod *netnstest.NS, name, email string) error {
	var got struct {
		AccessToken string `json:"access_token"`
		ExpiresIn   int    `json:"expires_in"`
	}
	a, err := ask(ctx, pod, tokenPath)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if err := json.Unmarshal([]byte(a.body), &got); err != nil || a.status != 200 {
		return fmt.Errorf("%s was answered %d %s", name, a.status, a.body)
	}
	issued, ok := w.google.Lookup(got.AccessToken)
	if !ok || issued.Email != email {
		return fmt.Errorf("%s got a token of %q, and not of %s", name, issued.Email, email)
	}
	d.done("%s → 200, the access token of %s for %s, good for %d s", name, issued.Email, issued.Subject, got.ExpiresIn)
	id, err := ask(ctx, pod, idPath)
	if err != nil || id.status != 200 {
		return fmt.Errorf("%s: identity: %v %w", name, id, err)
	}
	if err := w.verifyIDToken(id.body, email); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	d.done("%s → 200, an ID token for https://run.example.com, its signature verified", name)
	if again, err := ask(ctx, pod, emailPath); err != nil || again.body != email {
		return fmt.Errorf("%s: email: %v %w", name, again, err)
	}
	d.done("%s → 200, email: %s", name, email)
	return nil
}

// stranger asks as something on the pod network that is no pod, and as another host on the LAN.
func (d *demo) stranger(ctx context.Context, w *world) error {
	a, err := ask(ctx, w.stranger, tokenPath)
	if err != nil || a.status != 503 {
		return fmt.Errorf("the stranger was answered %v %w", a, err)
	}
	d.done("stranger → 503 after the hold: %s", strings.TrimSpace(a.body))
	for _, host := range []string{"169.254.169.254", "169.254.169.252:988"} {
		if a, err := askAt(ctx, w.neighbour, host, tokenPath); err == nil {
			return fmt.Errorf("a neighbour that sends to %s by way of the node was answered %v", host, a)
		}
		d.done("a neighbour host that sends to %s by way of the node → nothing", host)
	}
	if n, m := w.google.Calls(googletest.Exchange), w.google.Calls(googletest.GenerateAccessToken); n != 2 || m != 2 {
		return fmt.Errorf("%d exchanges and %d access tokens were asked for at Google, and not 2 and 2", n, m)
	}
	d.done("calls to Google: 2 exchanges, 2 access tokens, 2 ID tokens: one exchange a ServiceAccount")
	return nil
}

func (d *demo) keep(w *world, binary string) {
	d.say("Left standing. In another terminal, as root:")
	for _, pod := range []*netnstest.NS{w.reader, w.writer, w.stranger} {
		_, _ = fmt.Fprintf(d.out, "   ip netns exec %s curl -H 'Metadata-Flavor: Google' http://169.254.169.254%s\n", pod.Name, tokenPath)
	}
	_, _ = fmt.Fprintf(d.out, "   GKE_METADATA_EMULATOR_RUN=%s %s status\n   ip netns exec %s iptables-save\nCtrl-C ends it.\n", w.dir, binary, w.node.Name)
}
