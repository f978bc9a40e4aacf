package main

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/rpc"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

// asPod is in the environment of this binary where it is a pod's process.
const asPod = "GKE_METADATA_EMULATOR_DEMO_POD"

// Asker is what runs in a pod: it asks for what it is told to ask, by net/rpc over its third descriptor, until that is closed.
type Asker struct {
	mu   sync.Mutex
	load *load
	kept http.Client // with the connections of questions to be kept
}

// isPod reports whether this process is a pod's, and then was one until it was not needed any more.
func isPod() bool {
	if os.Getenv(asPod) == "" {
		return false
	}
	// Whoever started it ends it: signals to all processes, from a terminal or from a machine that goes down, are not for it.
	signal.Ignore(os.Interrupt, syscall.SIGTERM)
	f := os.NewFile(3, "orders")
	if c, err := net.FileConn(f); err == nil {
		_ = f.Close()
		s := rpc.NewServer()
		_ = s.Register(&Asker{kept: http.Client{Timeout: 3 * time.Second}})
		s.ServeConn(c)
	}
	return true
}

// Question is one request.
type Question struct {
	Host, Path string
	As         string // the sender's address; "": the asker's own
	Keep       bool   // the connection for the next such question, which goes by it if it is open still
}

// Answer is what somebody got.
type Answer struct {
	Status int
	Body   string
}

// Ask sends what a client library sends.
func (a *Asker) Ask(q Question, answer *Answer) (err error) {
	if q.Keep {
		*answer, err = askBy(&a.kept, q)
		return err
	}
	*answer, err = askOnce(q.dial, q)
	return err
}

// dial connects as the one whose address it is, which has to be the asker's too.
func (q Question) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	d := net.Dialer{}
	if q.As != "" {
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(q.As)}
	}
	return d.DialContext(ctx, network, addr)
}

// askOnce asks on a connection that dial makes.
func askOnce(dial func(ctx context.Context, network, addr string) (net.Conn, error), q Question) (Answer, error) {
	return askBy(&http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: dial}}, q)
}

// askBy sends what a client library sends.
func askBy(client *http.Client, q Question) (Answer, error) {
	req, err := http.NewRequest(http.MethodGet, "http://"+q.Host+q.Path, nil)
	if err != nil {
		return Answer{}, err
	}
	req.Header.Set("Metadata-Flavor", "Google")
	res, err := client.Do(req)
	if err != nil {
		return Answer{}, err
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	return Answer{res.StatusCode, string(body)}, err
}

// Begin begins to ask without pause.
func (a *Asker) Begin(t Task, _ *struct{}) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.load = beginLoad(t)
	return nil
}

// Counts says what came of the load so far, with examples of errors since it was last asked.
func (a *Asker) Counts(_ struct{}, c *Counts) error {
	*c = a.current().counts()
	return nil
}

// End lets what is in flight come to its end, and is Counts then.
func (a *Asker) End(_ struct{}, c *Counts) error {
	l := a.current()
	l.end()
	*c = l.counts()
	return nil
}

func (a *Asker) current() *load {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.load
}
