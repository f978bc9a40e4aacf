package server

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/metadata"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// Where pods on the host network are redirected, some of them need the server that would have
// answered: a cloud's network plugin, disk driver or controller (U-02). What they ask that is not
// Google's is asked there for them, one request at a time, if the operator named their
// ServiceAccount. For a pod on the pod network that is never done: it would go around the hop limit
// that keeps the node's credentials from it.

// clouds are what the metadata servers of others are asked. A path is matched when it has been
// cleaned (H-18), and goes there as it was matched: no encoding is left in it, so nobody can read
// another one out of it.
var clouds = []struct {
	path   *regexp.Regexp
	header func(http.Header) bool // nil: none is needed
	method []string
}{
	// AWS: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html.
	// Versions are 1.0, dates, and latest.
	{regexp.MustCompile(`^/latest/api/token$`), has("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", ""), []string{http.MethodPut}},
	{regexp.MustCompile(`^/(latest|1\.0|\d{4}-\d\d-\d\d)(/[\w.,:@+=-]*)*$`), nil,
		[]string{http.MethodGet, http.MethodHead}},
	// Azure: https://learn.microsoft.com/azure/virtual-machines/instance-metadata-service. A
	// scheduled event is approved by POST.
	{regexp.MustCompile(`^/metadata(/[\w.,:@+=-]*)*$`), has("Metadata", "true"),
		[]string{http.MethodGet, http.MethodHead}},
	{regexp.MustCompile(`^/metadata/scheduledevents$`), has("Metadata", "true"), []string{http.MethodPost}},
	// OpenStack: https://docs.openstack.org/nova/latest/user/metadata.html
	{regexp.MustCompile(`^/openstack(/[\w.,:@+=-]*)*$`), nil, []string{http.MethodGet, http.MethodHead}},
}

// has matches a header with that value, or with any.
func has(name, value string) func(http.Header) bool {
	return func(h http.Header) bool {
		v := h[name]
		return len(v) == 1 && (value == "" || strings.EqualFold(v[0], value))
	}
}

// foreign reports whether a request is for the server of another cloud.
func foreign(method, path string, h http.Header) bool {
	for _, c := range clouds {
		if slices.Contains(c.method, method) && c.path.MatchString(path) && (c.header == nil || c.header(h)) {
			return true
		}
	}
	return false
}

// passThrough answers a request for another cloud's server, which may be a host pod's. Whoever
// turns out to be somebody else gets what he would have got.
func (s *Server) passThrough(ctx context.Context, req *request) (metadata.Answer, error) {
	active, err := s.attest(ctx, req)
	if err != nil {
		return metadata.Answer{}, err
	}
	if !req.peer.HostPod() {
		req.foreign = false
		return metadata.Answer{}, cmp.Or(refusedBy(req), metadata.ErrNotFound)
	}
	if by := req.caller.ServiceAccount; !slices.Contains(active.Passthrough, by.String()) {
		s.skipped.count(by)
		return metadata.Answer{}, refusal{Status: http.StatusNotFound, Text: fmt.Sprintf(
			"this is not the cloud's metadata server: to let ServiceAccount %s use that one, add it to passthrough, or "+
				"set routing.interceptHostPods to off", by)}
	}
	req.place.Node = passthroughPath
	if req.ContentLength != 0 { // net/http takes a client that ends its half after a body for one that left
		ctx = context.WithoutCancel(ctx)
	}
	if req.passed, err = s.cloud.ask(ctx, req.Request, req.place.Path, req.party); err == nil {
		err = s.recheck(ctx, req.peer)
	}
	return metadata.Answer{}, err
}

// attest finds out who asks, by the configuration that is in force when that is known.
func (s *Server) attest(ctx context.Context, req *request) (active *Active, err error) {
	for {
		if active = s.active.Load(); active.Broken != nil {
			return nil, active.Broken
		}
		if req.caller, err = active.Attestor.Attest(ctx, req.peer); !errors.Is(err, attest.ErrReplaced) {
			return active, err
		}
	}
}

// Bounds of what is passed. A body is held in memory, so that nothing of it is written before all
// of it is there.
const (
	maxRequestBytes     = 64 << 10
	maxResponseBytes    = 1 << 20          // OpenStack's vendor data; AWS's user data is 16 KiB
	maxConcurrent       = 16               // of all
	maxConcurrentPerPod = 4                // of one pod
	cloudTimeout        = 10 * time.Second // Azure makes its tokens when they are asked for
)

// cloud is the cloud's own metadata server. We live in a slice of the host's, which the rules spare
// who connects there gets there.
type cloud struct {
	http.Transport
	at    string
	turns turns
}

// passed is what it answered.
type passed struct {
	status int
	header http.Header
	body   []byte
}

func newCloud() *cloud {
	c := &cloud{at: strings.TrimSuffix(routing.MetadataServer().String(), ":80"),
		turns: newTurns(maxConcurrent, maxConcurrentPerPod)}
	c.DialContext = (&net.Dialer{Timeout: 2 * time.Second}).DialContext // and never by a proxy
	// A connection that is kept may be closed there as it is used again, and then a PUT is lost.
	c.DisableCompression, c.DisableKeepAlives, c.MaxResponseHeaderBytes = true, true, 64<<10
	return c
}

// ask asks for the path what r asks, for a pod. A redirect is an answer like any other.
func (c *cloud) ask(ctx context.Context, r *http.Request, path string, by attest.Party) (*passed, error) {
	ctx, cancel := context.WithTimeout(ctx, cloudTimeout)
	defer cancel()
	body, err := atMost(r.Body, maxRequestBytes)
	switch {
	case errors.Is(err, errTooLong):
		return nil, refusal{Status: http.StatusRequestEntityTooLarge, Close: true,
			Text: fmt.Sprintf("the request has more than %d bytes", maxRequestBytes)}
	case err != nil:
		return nil, refusal{Status: http.StatusBadRequest, Close: true, Text: "the request is incomplete"}
	}
	done, ok := c.turns.wait(ctx, by)
	if !ok {
		return nil, cmp.Or(r.Context().Err(),
			error(refusal{Status: http.StatusServiceUnavailable, Retry: true, Text: "the cloud's metadata server is " +
				"slow, and too many requests wait for it"}))
	}
	defer done()
	to := &http.Request{Method: r.Method, URL: &url.URL{Scheme: "http", Host: c.at, Path: path,
		RawQuery: r.URL.RawQuery}, Host: c.at,
		Header: endToEnd(r.Header), Body: http.NoBody, ContentLength: int64(len(body))}
	if len(body) > 0 {
		to.Body = io.NopCloser(bytes.NewReader(body))
	}
	delete(to.Header, "Expect") // we have all of it
	if to.Header["User-Agent"] == nil {
		to.Header["User-Agent"] = nil // and not Go's
	}
	res, err := c.RoundTrip(to.WithContext(ctx))
	if err != nil {
		return nil, cmp.Or(r.Context().Err(), unanswered(err))
	}
	defer func() { _ = res.Body.Close() }()
	if res.Header.Get("Server") == serverName[0] {
		return nil, refusal{Status: http.StatusBadGateway, Text: "loop: the service's own request to the cloud's " +
			"metadata server was redirected back to it: start the service by its unit: systemctl start gke-metadata-emulator"}
	}
	a := &passed{status: res.StatusCode, header: endToEnd(res.Header)}
	if res.StatusCode < http.StatusOK {
		err = errors.New("the answer changes the protocol")
	} else {
		a.body, err = atMost(res.Body, maxResponseBytes)
	}
	if err != nil {
		return nil, cmp.Or(r.Context().Err(), unanswered(err))
	}
	return a, nil
}

// unanswered says why there is no answer. An error of net/http's may quote what was read.
func unanswered(err error) error {
	reason := "the answer is invalid"
	var op *net.OpError
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		reason = "no answer"
	case errors.Is(err, errTooLong):
		reason = fmt.Sprintf("the answer has more than %d bytes", maxResponseBytes)
	case errors.As(err, &op):
		reason = op.Err.Error()
	}
	return refusal{Status: http.StatusBadGateway, Text: "the cloud's metadata server: " + reason}
}

var errTooLong = errors.New("too long")

func atMost(r io.Reader, n int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, n+1))
	if err == nil && int64(len(b)) > n {
		err = errTooLong
	}
	return b, err
}

// endToEnd is a copy without the headers that are of one connection (RFC 9110, 7.6.1), nor
// Google's, which nobody has there.
func endToEnd(h http.Header) http.Header {
	out := maps.Clone(h)
	for _, named := range h["Connection"] {
		for name := range strings.SplitSeq(named, ",") {
			out.Del(strings.TrimSpace(name))
		}
	}
	for _, name := range []string{"Connection", "Proxy-Connection", "Keep-Alive", "Proxy-Authenticate",
		"Proxy-Authorization", "Te", "Trailer", "Transfer-Encoding", "Upgrade", "Metadata-Flavor"} {
		delete(out, name)
	}
	return out
}

// skippedHostPods counts, for each ServiceAccount, what its host pods asked of another cloud's
// server without being named in passthrough.
type skippedHostPods struct {
	mu    sync.Mutex
	asked map[workload.ServiceAccount]uint64
}

func (k *skippedHostPods) count(by workload.ServiceAccount) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.asked == nil {
		k.asked = map[workload.ServiceAccount]uint64{}
	}
	if _, known := k.asked[by]; known || len(k.asked) < maxLogLimits {
		k.asked[by]++
	}
}

func (k *skippedHostPods) all() map[workload.ServiceAccount]uint64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return maps.Clone(k.asked)
}
