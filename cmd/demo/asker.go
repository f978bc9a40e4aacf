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

// asPod is the environment variable that makes this binary run as a pod's process.
const asPod = "GKE_METADATA_EMULATOR_DEMO_POD"

// Asker runs in a pod. It receives requests to send by net/rpc on descriptor 3, until that is
// closed.
type Asker struct {
	mu   sync.Mutex
	load *load
	kept http.Client // for questions with Keep
}

// isPod reports whether this process is a pod's. If so, it serves the parent, and returns when the
// parent closes the connection.
func isPod() bool {
	if os.Getenv(asPod) == "" {
		return false
	}
	// The parent ends this process. A signal of the terminal or of a shutdown must not.
	signal.Ignore(os.Interrupt, syscall.SIGTERM)
	f := os.NewFile(3, "parent")
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
	As         string // the source address; "": the pod's own
	Keep       bool   // reuses the connection of the last question with Keep
}

// Answer is a response.
type Answer struct {
	Status int
	Body   string
}

// Ask sends a request as client libraries send it.
func (a *Asker) Ask(q Question, answer *Answer) (err error) {
	if q.Keep {
		*answer, err = askBy(&a.kept, q)
		return err
	}
	*answer, err = askOnce(q.dial, q)
	return err
}

// dial connects from q.As, which must be an address of the namespace.
func (q Question) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	d := net.Dialer{}
	if q.As != "" {
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(q.As)}
	}
	return d.DialContext(ctx, network, addr)
}

// askOnce sends a request on a new connection, made by dial.
func askOnce(dial func(ctx context.Context, network, addr string) (net.Conn, error), q Question) (Answer, error) {
	return askBy(&http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: dial}}, q)
}

// askBy sends a request as client libraries send it.
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

// Begin starts a load of continuous requests.
func (a *Asker) Begin(t Task, _ *struct{}) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.load = beginLoad(t)
	return nil
}

// Counts returns the outcomes of the load so far, with the errors since the last call as examples.
func (a *Asker) Counts(_ struct{}, c *Counts) error {
	*c = a.current().counts()
	return nil
}

// End stops the load, waits for requests in flight, and returns its Counts.
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
