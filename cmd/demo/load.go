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

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// load is what two pods ask without pause: two askers of each with a connection for each request, two that keep theirs.
// They speak HTTP over connections of their own, since net/http's client asks again by itself where a connection was lost.
type load struct {
	world *world
	stop  context.CancelFunc
	wait  sync.WaitGroup

	mu       sync.Mutex
	count    map[string]int
	longest  time.Duration
	examples []string
}

// What can come of a request. Each has a number in the end, also when that is 0.
const (
	ok          = "answered"    // 200, and the asker's own email or a token of its own
	leaked      = "leaked"      // the cloud's own metadata server answered
	wrong       = "wrong"       // 200, and somebody else's
	unavailable = "unavailable" // another status
	refused     = "refused"     // the connection was refused
	reset       = "reset"       // the connection was reset or closed before the answer
	raced       = "raced"       // a kept connection was closed while the request was on its way: clients ask again
	unreachable = "unreachable" // no connection, or no answer in time
)

// patience is for machines that are emulated too, where a restart takes 15 s.
const patience = 40 * time.Second

func (w *world) beginLoad() *load {
	ctx, stop := context.WithCancel(context.Background())
	l := &load{world: w, stop: stop, count: map[string]int{}}
	for _, p := range []struct {
		pod   *netnstest.NS
		email string
	}{{w.reader, readerEmail}, {w.writer, writerEmail}} {
		for range 2 {
			l.wait.Go(func() { l.askOn(ctx, p.pod, p.email, false, 5*time.Millisecond) })
			l.wait.Go(func() { l.askOn(ctx, p.pod, p.email, true, time.Millisecond) })
		}
	}
	return l
}

// sinceThen is how many requests came to what so far, and examples of errors since it was last asked.
func (l *load) sinceThen() (count map[string]int, examples []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	examples, l.examples = l.examples, nil
	return maps.Clone(l.count), examples
}

// end lets what is in flight come to its end.
func (l *load) end() string {
	l.stop()
	l.wait.Wait()
	var b strings.Builder
	for _, what := range []string{ok, leaked, wrong, unavailable, refused, reset, raced, unreachable} {
		fmt.Fprintf(&b, "%s=%d ", what, l.count[what])
	}
	fmt.Fprintf(&b, "longest_ms=%d", l.longest.Milliseconds())
	for _, e := range l.examples {
		b.WriteString("\n# " + e)
	}
	return b.String()
}

// askOn asks, one request after the other.
func (l *load) askOn(ctx context.Context, pod *netnstest.NS, email string, keep bool, pause time.Duration) {
	var c *connection
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for i := 0; ctx.Err() == nil; i++ {
		began := time.Now()
		what, err := "", error(nil)
		if c == nil {
			c, what, err = dial(pod)
		}
		if c != nil {
			what, err = l.ask(c, email, i%2 == 0)
			if what != ok || !keep || c.last {
				_ = c.Close()
				c = nil
			}
		}
		l.note(what, err, time.Since(began))
		<-tick.C
	}
	if c != nil {
		_ = c.Close()
	}
}

func (l *load) note(what string, err error, took time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.count[what]++
	l.longest = max(l.longest, took)
	if err != nil && len(l.examples) < 5 {
		l.examples = append(l.examples, fmt.Sprintf("%s %s: %v", time.Now().Format("15:04:05.000"), what, err))
	}
}

type connection struct {
	net.Conn
	in   *bufio.Reader
	used bool // a request was answered on it
	last bool // the server said Connection: close
}

func dial(pod *netnstest.NS) (*connection, string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c, err := pod.Dial(ctx, "tcp4", "169.254.169.254:80")
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return nil, refused, err
	case err != nil:
		return nil, unreachable, err
	}
	return &connection{Conn: c, in: bufio.NewReader(c)}, "", nil
}

// ask sends one request and says what came of it.
func (l *load) ask(c *connection, email string, token bool) (string, error) {
	path := emailPath
	if token {
		path = tokenPath
	}
	_ = c.SetDeadline(time.Now().Add(patience))
	_, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: 169.254.169.254\r\nMetadata-Flavor: Google\r\n\r\n", path)
	if err == nil {
		_, err = c.in.Peek(1)
	}
	switch {
	case err == nil:
	case isTimeout(err):
		return unreachable, err
	case c.used && (errors.Is(err, io.EOF) || errors.Is(err, syscall.EPIPE)):
		return raced, err
	default:
		return reset, err
	}
	res, err := http.ReadResponse(c.in, nil)
	if err != nil {
		return reset, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return reset, err
	}
	c.used, c.last = true, res.Close
	text := strings.TrimSpace(string(body))
	switch {
	case text == nodeSecret:
		return leaked, errors.New("the cloud's own metadata server answered")
	case res.StatusCode != http.StatusOK:
		return unavailable, fmt.Errorf("%s: %s", res.Status, text)
	case token && l.tokenOf(body) != email, !token && text != email:
		return wrong, fmt.Errorf("%s got what is not its own", email)
	}
	return ok, nil
}

// tokenOf is the account that a token is of, "" if it is none that was issued.
func (l *load) tokenOf(body []byte) string {
	var got struct {
		AccessToken string `json:"access_token"`
	}
	if json.Unmarshal(body, &got) != nil {
		return ""
	}
	issued, _ := l.world.google.Lookup(got.AccessToken)
	return issued.Email
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}
