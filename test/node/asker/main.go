// Command asker is the only program in the pods of test-node. It requests tokens, and reports each
// answer to `conductor world`.
//
//	asker pause        is PID 1 of a sandbox
//	asker ask FLAGS    sends requests; its environment has the pod's identity, see pods.go of conductor
//	asker serve ADDR   answers with the pod's name, for a Service
//	asker get URL      prints the answer of a URL
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/test/node/report"
)

func main() {
	args := append(os.Args[1:], "", "")
	switch args[0] {
	case "ask":
		os.Exit(ask(os.Args[2:]))
	case "serve":
		fatal(http.ListenAndServe(args[1], http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = fmt.Fprint(w, os.Getenv("POD")) // an error: the client has left
		})))
	case "get":
		resp, err := (&http.Client{Timeout: 5 * time.Second}).Get(args[1])
		if err == nil {
			_, err = io.Copy(os.Stdout, resp.Body)
		}
		if err != nil {
			fatal(err)
		}
	default:
		pause()
	}
}

func fatal(err error) {
	fmt.Fprintln(os.Stderr, "asker:", err)
	os.Exit(1)
}

// pause is PID 1 of a sandbox that may have other processes in it.
func pause() {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGCHLD)
	for s := range signals {
		if s != syscall.SIGCHLD {
			return
		}
		for {
			if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	}
}

func ask(args []string) int {
	f := flag.NewFlagSet("ask", flag.ExitOnError)
	var (
		tag     = f.String("tag", "", "`tag` of the reports")
		n       = f.Int("n", 1, "`number` of requests")
		every   = f.Duration("every", time.Second, "`time` between two requests")
		timeout = f.Duration("timeout", 30*time.Second, "`time` limit of each request")
		fresh   = f.Bool("fresh", false, "request a scope that is in no cache")
		hold    = f.Bool("hold", false, "wait for SIGTERM at the end")
		ending  = f.Duration("ending", 0, "send requests for this `time` after SIGTERM, with the tag TAG-ending")
		status  = f.Int("exit", 0, "exit `status`")
	)
	_ = f.Parse(args) // exits on an error
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	i := 0
	for ; i < *n; i++ {
		if i > 0 {
			time.Sleep(*every)
		}
		send(request(*tag, i, *timeout, *fresh))
	}
	if *hold || *ending > 0 {
		<-stop
	}
	for begin := time.Now(); time.Since(begin) < *ending; i++ {
		send(request(*tag+"-ending", i, *timeout, true))
		time.Sleep(200 * time.Millisecond)
	}
	return *status
}

const token = "http://169.254.169.254/computeMetadata/v1/instance/service-accounts/default/token"

func request(tag string, n int, timeout time.Duration, fresh bool) (r report.Report) {
	r = report.Report{Tag: tag, N: n, At: time.Now(), Namespace: os.Getenv("NAMESPACE"), Pod: os.Getenv("POD"),
		Account: os.Getenv("ACCOUNT"), Email: os.Getenv("EMAIL")}
	defer func() { r.Took = time.Since(r.At) }()
	url := token
	if fresh {
		url += fmt.Sprintf("?scopes=https://www.googleapis.com/auth/fresh%d", r.At.UnixNano())
	}
	t := &http.Transport{DisableKeepAlives: true}
	t.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, network, address)
		if err == nil {
			r.Address, _, _ = net.SplitHostPort(c.LocalAddr().String())
		}
		return c, err
	}
	q, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		r.Text = err.Error()
		return r
	}
	q.Header.Set("Metadata-Flavor", "Google")
	resp, err := (&http.Client{Transport: t, Timeout: timeout}).Do(q)
	if err != nil {
		r.Text = err.Error()
		return r
	}
	b, err := io.ReadAll(resp.Body)
	if err = errors.Join(err, resp.Body.Close()); err != nil {
		r.Text = err.Error()
		return r
	}
	r.Status = resp.StatusCode
	var answer struct {
		Token string `json:"access_token"`
	}
	if r.Status == http.StatusOK && json.Unmarshal(b, &answer) == nil {
		r.Token = answer.Token
	} else {
		r.Text = strings.TrimSpace(string(b))
	}
	return r
}

// send sends the report, with retries: a lost report would be a request that is not judged.
func send(r report.Report) {
	b, err := json.Marshal(r)
	if err != nil {
		fatal(err)
	}
	for range 20 {
		resp, err := (&http.Client{Timeout: 5 * time.Second}).Post(os.Getenv("WORLD"), "application/json", bytes.NewReader(b))
		if err == nil {
			_ = resp.Body.Close() // only the status counts
			if resp.StatusCode == http.StatusOK {
				return
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
}
