package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"time"
)

// load sends a pod's requests continuously: two senders with a new connection per request, and two
// that keep theirs. They speak HTTP on their own connections, because net/http's client repeats a
// request after a lost connection.
type load struct {
	Task
	stop context.CancelFunc
	wait sync.WaitGroup

	mu    sync.Mutex
	count Counts
}

// Task describes a load.
type Task struct {
	Email string // the expected email of the pod
	At    string // metadataAddr or metadataAddr6
}

// Counts holds the outcomes of requests.
type Counts struct {
	Of       map[string]int // outcome
	Tokens   map[string]int // answers by access token; the stand-in for Google knows the owner
	Longest  time.Duration
	Examples []string // of errors
}

// The outcomes of a request. Counts.String prints each, even with the number 0.
const (
	ok          = "answered"    // 200, and the pod's own email, or an access token; see pod.counted
	leaked      = "leaked"      // the cloud's metadata server answered
	wrong       = "wrong"       // 200, and the email or token of another pod
	unavailable = "unavailable" // another status
	refused     = "refused"     // the connection was refused
	reset       = "reset"       // the connection was reset or closed before the answer
	raced       = "raced"       // a kept connection was closed while the request was in transit: clients retry
	unreachable = "unreachable" // no connection, or no answer in time
)

const (
	// requestTimeout suits emulated machines, where a restart takes 15 s.
	requestTimeout = 40 * time.Second
	maxExamples    = 5
)

func beginLoad(t Task) *load {
	ctx, stop := context.WithCancel(context.Background())
	l := &load{Task: t, stop: stop, count: Counts{Of: map[string]int{}, Tokens: map[string]int{}}}
	for range 2 {
		l.wait.Go(func() { l.ask(ctx, false, 5*time.Millisecond) })
		l.wait.Go(func() { l.ask(ctx, true, time.Millisecond) })
	}
	return l
}

func (l *load) counts() Counts {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.count
	c.Of, c.Tokens = maps.Clone(c.Of), maps.Clone(c.Tokens)
	l.count.Examples = nil
	return c
}

func (l *load) end() {
	l.stop()
	l.wait.Wait()
}

// ask sends requests one after the other.
func (l *load) ask(ctx context.Context, keep bool, pause time.Duration) {
	var c *connection
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for i := 0; ctx.Err() == nil; i++ {
		began := time.Now()
		what, token, err := "", "", error(nil)
		if c == nil {
			c, what, err = dial(l.At)
		}
		if c != nil {
			what, token, err = c.ask(l.Email, i%2 == 0)
			if what != ok || !keep || c.last {
				_ = c.Close()
				c = nil
			}
		}
		l.note(what, token, err, time.Since(began))
		<-tick.C
	}
	if c != nil {
		_ = c.Close()
	}
}

func (l *load) note(what, token string, err error, took time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.count.Of[what]++
	if token != "" {
		l.count.Tokens[token]++
	}
	l.count.Longest = max(l.count.Longest, took)
	if err != nil && len(l.count.Examples) < maxExamples {
		l.count.Examples = append(l.count.Examples, fmt.Sprintf("%s %s: %v", time.Now().Format("15:04:05.000"), what, err))
	}
}

type connection struct {
	net.Conn
	in   *bufio.Reader
	host string
	used bool // a request was answered on it
	last bool // the server said Connection: close
}

func dial(host string) (*connection, string, error) {
	c, err := net.DialTimeout("tcp", host+":80", requestTimeout)
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return nil, refused, err
	case err != nil:
		return nil, unreachable, err
	}
	return &connection{Conn: c, host: host, in: bufio.NewReader(c)}, "", nil
}

// ask sends one request, for an access token or for the email, and returns its outcome and the
// token.
func (c *connection) ask(email string, forToken bool) (what, token string, err error) {
	path := emailPath
	if forToken {
		path = tokenPath
	}
	_ = c.SetDeadline(time.Now().Add(requestTimeout))
	_, err = fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: %s\r\nMetadata-Flavor: Google\r\n\r\n", path, c.host)
	if err == nil {
		_, err = c.in.Peek(1)
	}
	switch {
	case err == nil:
	case isTimeout(err):
		return unreachable, "", err
	case c.used && (errors.Is(err, io.EOF) || errors.Is(err, syscall.EPIPE)):
		return raced, "", err
	default:
		return reset, "", err
	}
	res, err := http.ReadResponse(c.in, nil)
	if err != nil {
		return reset, "", err
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return reset, "", err
	}
	c.used, c.last = true, res.Close
	text := strings.TrimSpace(string(body))
	switch {
	case text == nodeSecret:
		return leaked, "", errors.New("the cloud's metadata server answered")
	case res.StatusCode != http.StatusOK:
		return unavailable, "", fmt.Errorf("%s: %s", res.Status, text)
	case !forToken && text == email:
		return ok, "", nil
	case forToken:
		if token := accessToken(text); token != "" {
			return ok, token, nil
		}
	}
	return wrong, "", fmt.Errorf("%s got the identity of another pod, or neither email nor token", email)
}

// accessToken returns the token of an answer, or "".
func accessToken(body string) string {
	var got struct {
		AccessToken string `json:"access_token"`
	}
	_ = json.Unmarshal([]byte(body), &got)
	return got.AccessToken
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}
