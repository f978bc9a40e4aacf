package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	atOnce   = 4  // clients that run side by side: Java and R need a processor each
	maxTries = 5  // of a client with a short timeout
	maxRaces = 12 // processes that are started until a race has had both results
)

// ring is one run of all clients.
type ring struct {
	binary, root, drivers, npm, page, dir string

	world *world
	log   *os.File // standard error of the drivers
	begun time.Time

	mu      sync.Mutex
	table   table
	answers int
	wrong   []string // identities that are not the pod's
}

func (r *ring) run(ctx context.Context, clients []client) (err error) {
	r.begun, r.table = time.Now(), table{}
	if len(clients) == 0 {
		return errors.New("unknown clients: test/clients/ring/clients.go has their names")
	}
	if r.log, err = os.Create(filepath.Join(r.dir, "clients.log")); err != nil {
		return err
	}
	defer func() { _ = r.log.Close() }()
	if r.world, err = newWorld(ctx, r.binary, r.dir); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.world.close()) }()
	pods := map[resolver]*pod{}
	for _, name := range []resolver{hasRecord, refuses, noName} {
		if pods[name], err = r.world.addPod(string(name), true); err != nil {
			return err
		}
	}
	federated, err := r.world.addPod("federated", false)
	if err != nil {
		return err
	}
	if err := r.serve(ctx, "iptables", "off"); err != nil {
		return err
	}
	if err := r.detectsWrong(ctx, pods[hasRecord], pods[noName]); err != nil {
		return err
	}
	r.each(clients, func(c client) { r.abilities(ctx, c, pods[hasRecord]) })
	if err := r.refreshes(ctx, clients, federated); err != nil {
		return err
	}
	for _, s := range redirected {
		r.each(clients, func(c client) { r.detects(ctx, c, pods[s.dns], s) })
	}
	if err := r.world.service.close(); err != nil {
		return err
	}
	if err := r.serve(ctx, "iptables", "answer"); err != nil {
		return err
	}
	for _, s := range named {
		r.each(clients, func(c client) { r.detects(ctx, c, pods[s.dns], s) })
	}
	if err := r.world.service.close(); err != nil {
		return err
	}
	if err := r.serve(ctx, "none", "off"); err != nil {
		return err
	}
	for _, s := range notRedirected {
		r.each(clients, func(c client) { r.detects(ctx, c, pods[s.dns], s) })
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return r.compare(clients)
}

// serve installs the rules of a mode and starts the service. dns is off or answer.
func (r *ring) serve(ctx context.Context, mode, dns string) error {
	if err := r.world.configure(mode, dns); err != nil {
		return err
	}
	if err := r.world.service.routing(ctx, "install"); err != nil {
		return err
	}
	return r.world.service.start(ctx)
}

// detectsWrong shows that the run can fail: the token of one pod is checked as another pod's.
func (r *ring) detectsWrong(ctx context.Context, asks, other *pod) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet,
		"http://169.254.169.254/computeMetadata/v1/instance/service-accounts/default/token", nil)
	if err != nil {
		return err
	}
	request.Header.Set("Metadata-Flavor", "Google")
	transport := &http.Transport{DialContext: asks.Dial, DisableKeepAlives: true}
	response, err := (&http.Client{Transport: transport}).Do(request)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }()
	var got struct {
		AccessToken string `json:"access_token"`
	}
	if err := json.NewDecoder(response.Body).Decode(&got); err != nil {
		return fmt.Errorf("pod %s: %s: %w", asks.subject, response.Status, err)
	}
	var wrong *wrongError
	if err := r.check(askToken, answer{Value: got.AccessToken}, other); !errors.As(err, &wrong) {
		return fmt.Errorf("the check accepts a token of %s as one of %s: %v", asks.subject, other.subject, err)
	}
	return r.check(askToken, answer{Value: got.AccessToken}, asks)
}

// each calls do for each client, atOnce at a time.
func (r *ring) each(clients []client, do func(client)) {
	var all sync.WaitGroup
	slots := make(chan struct{}, atOnce)
	for _, c := range clients {
		slots <- struct{}{}
		all.Go(func() { defer func() { <-slots }(); do(c) })
	}
	all.Wait()
}

// note puts a cell into the table and prints it. why is the error, or nil.
func (r *ring) note(c client, column, cell string, why error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.table.set(c.name, column, cell)
	var wrong *wrongError
	if errors.As(why, &wrong) {
		r.wrong = append(r.wrong, fmt.Sprintf("%s, %s: %v", c.name, column, wrong))
	}
	text := fmt.Sprintf("%5.1f s  %-42s %-36s %s", time.Since(r.begun).Seconds(), c.name, column, cell)
	if why != nil {
		text += ": " + strings.Join(strings.Fields(why.Error()), " ")
	}
	fmt.Println(text[:min(len(text), 400)])
}

// abilities sends all questions to a client in a pod whose DNS has the record.
func (r *ring) abilities(ctx context.Context, c client, p *pod) {
	k, err := r.start(ctx, c, p, situation{dns: hasRecord})
	if err != nil {
		r.note(c, columnVersion, no, err)
		return
	}
	defer k.end()
	a := k.ask(askVersion)
	r.note(c, columnVersion, a.Value, a.err())
	for _, q := range questions {
		a := k.ask(q.ask)
		if a.None {
			r.note(c, q.column, none, nil)
			continue
		}
		r.result(c, q.column, r.check(q.ask, a, p))
	}
}

// result notes yes, or no with the error.
func (r *ring) result(c client, column string, err error) {
	cell := yes
	if err != nil {
		cell = no
	}
	r.note(c, column, cell, err)
}

// check compares an answer with the pod's identity.
func (r *ring) check(question string, a answer, p *pod) error {
	r.mu.Lock()
	r.answers++
	r.mu.Unlock()
	if err := a.err(); err != nil {
		return err
	}
	want := map[string]string{askDetect: "true", askEmail: p.email, askProject: projectID, askUniverse: universe}
	switch question {
	case askToken, askScoped:
		issued, err := r.world.verifyAccessToken(a.Value, p)
		if err == nil && question == askScoped && (len(issued.Scopes) != 1 || issued.Scopes[0] != tokenScope) {
			err = fmt.Errorf("the token has the scopes %q, want %s", issued.Scopes, tokenScope)
		}
		return err
	case askID:
		return r.world.verifyIDToken(a.Value, p)
	case askEmail:
		if a.Value != p.email && strings.HasSuffix(a.Value, ".iam.gserviceaccount.com") {
			return &wrongError{fmt.Sprintf("the email %s, want %s", a.Value, p.email)}
		}
	}
	if a.Value != want[question] {
		return fmt.Errorf("%q, want %q", a.Value, want[question])
	}
	return nil
}

func (a answer) err() error {
	switch {
	case a.Error != "":
		return errors.New(a.Error)
	case a.None:
		return errors.New("the library has no such thing")
	}
	return nil
}

// holder is a client that keeps running in a pod whose tokens are valid for seconds.
type holder struct {
	client
	*process
	token string
	dead  bool
}

// refreshes has clients fetch a second token when theirs has expired, and a third one while the
// service is stopped.
func (r *ring) refreshes(ctx context.Context, clients []client, p *pod) (err error) {
	var mu sync.Mutex
	var all []*holder
	defer func() {
		for _, l := range all {
			l.end()
		}
	}()
	r.each(clients, func(c client) {
		k, err := r.start(ctx, c, p, situation{dns: hasRecord})
		if err != nil {
			r.note(c, columnRefresh, no, err)
			return
		}
		l := &holder{client: c, process: k}
		switch a := k.ask(askToken); {
		case a.None:
			r.note(c, columnRefresh, none, nil)
			r.note(c, columnRestart, none, nil)
			l.dead = true
		default:
			err := r.check(askToken, a, p)
			l.token = a.Value
			if err != nil {
				r.note(c, columnRefresh, no, fmt.Errorf("the first token: %w", err))
				r.note(c, columnRestart, no, nil)
				l.dead = true
			}
		}
		mu.Lock()
		all = append(all, l)
		mu.Unlock()
	})
	if err := r.renew(ctx, all, p, columnRefresh, nil, nil); err != nil {
		return err
	}
	return r.renew(ctx, all, p, columnRestart, r.world.service.stop, func() error { return r.world.service.start(ctx) })
}

// renew waits until each client's token has expired, and has all of them request another one
// between before and after.
func (r *ring) renew(ctx context.Context, all []*holder, p *pod, column string, before, after func() error) error {
	for _, l := range all {
		if issued, _ := r.world.google.Lookup(l.token); !l.dead {
			select {
			case <-time.After(time.Until(issued.Expires)):
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
	if before != nil {
		if err := before(); err != nil {
			return err
		}
	}
	for _, l := range all {
		if !l.dead {
			_ = l.send(askToken) // a driver that ended gives no answer
		}
	}
	if after != nil {
		if err := after(); err != nil {
			return err
		}
	}
	for _, l := range all {
		if l.dead {
			continue
		}
		a := l.receive()
		err := r.check(askToken, a, p)
		if err == nil && a.Value == l.token {
			err = errors.New("the client returned the same token again")
		}
		l.token = a.Value
		if column == columnRefresh && l.keepsNone && err == nil {
			r.note(l.client, column, none, nil)
			continue
		}
		r.result(l.client, column, err)
	}
	return nil
}

// detects notes whether a client detects Google Cloud and gets a token in a situation.
func (r *ring) detects(ctx context.Context, c client, p *pod, s situation) {
	err := r.detect(ctx, c, p, s)
	if err != nil && c.variable != "" && s.host != "" {
		s.env = append(slices.Clone(s.env), c.variable+"="+s.host)
		if r.detect(ctx, c, p, s) == nil {
			r.note(c, s.title, "`"+c.variable+"` does", err)
			return
		}
	}
	if c.race > 0 && (s.race || s.alias && c.finalDot) {
		r.races(ctx, c, p, s, err)
		return
	}
	for n := 1; n < maxTries && c.shortTimeout && err != nil; n++ {
		err = r.detect(ctx, c, p, s)
	}
	for n := 1; n < c.race && err == nil; n++ {
		err = r.detect(ctx, c, p, s)
	}
	r.result(c, s.title, err)
}

// races notes that a detection is a race, and prints how many processes detected Google Cloud.
func (r *ring) races(ctx context.Context, c client, p *pod, s situation, first error) {
	found, last := 0, first
	n := 1
	for ; ; n++ {
		if last == nil {
			found++
		}
		var wrong *wrongError
		if errors.As(last, &wrong) || n == min(c.race, maxRaces) || found > 0 && found < n {
			break
		}
		last = r.detect(ctx, c, p, s)
	}
	r.note(c, s.title, chance, errors.Join(last, fmt.Errorf("detected by %d of %d processes", found, n)))
}

func (r *ring) detect(ctx context.Context, c client, p *pod, s situation) error {
	k, err := r.start(ctx, c, p, s)
	if err != nil {
		return err
	}
	defer k.end()
	answered := 0
	for _, q := range []string{askDetect, askToken} {
		a := k.ask(q)
		if a.None {
			continue
		}
		answered++
		if err := r.check(q, a, p); err != nil {
			return fmt.Errorf("%s: %w", q, err)
		}
	}
	if answered == 0 {
		return errors.New("the driver answered no question")
	}
	return nil
}
