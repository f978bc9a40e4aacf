// Package server answers one question: what does a pod get for its request?
//
// It is the HTTP server: connections and their bounds (admission.go), what is refused for its
// header alone (headers.go), what an error becomes (refusal.go), what goes to another cloud's
// server (passthrough.go), the metadata tree as one literal (tree.go), and one audit line for each
// token (audit.go). No other package sees a ResponseWriter. Which configuration is in force is the
// caller's to say, by Activate.
package server

import (
	"context"
	"errors"
	"maps"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/messageid"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/metadata"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// Options are what a Server needs for its whole life.
type Options struct {
	Listener   net.Listener          // the first that is served; Alive asks it
	Log        *logrus.Logger        // refusals, audit lines, and what net/http says
	Registerer prometheus.Registerer // gets the metrics of requests and connections
}

// Active is what follows from the configuration in force, or from having none: what requests are
// answered by. It is immutable; Activate puts another one in its place.
type Active struct {
	Tree *metadata.Tree
	// why there is no configuration: the refusal of all but `/`; nil: there is one
	Broken            error
	HostCheck         bool             // refuse requests whose Host header names another server (H-16)
	Passthrough       []string         // ServiceAccounts, NAMESPACE/NAME, whose host pods may ask another cloud's server
	ConnectionsPerPod int              // that one pod, unit or address may have open
	RequestsPerPod    int              // a second that one of these is answered
	Attestor          *attest.Attestor // nil where Broken is not

	// Changes returns a channel that is closed when answers may have changed (H-12). It is not
	// called where Broken is not nil.
	Changes func() <-chan struct{}
	// Superseded is closed when another Active has taken the place of this one.
	Superseded <-chan struct{}
}

// Unconfigured returns the Active while there is no configuration, for that reason. `/` is
// answered, so that clients which probe once and remember it for life (C-GO-1) find a metadata
// server; the rest says what is missing.
func Unconfigured(reason error, l config.Limits) Active {
	tree, err := metadata.New(unconfigured())
	if err != nil {
		panic(err) // a constant
	}
	return Active{Tree: tree, ConnectionsPerPod: l.ConnectionsPerPod, RequestsPerPod: l.RequestsPerPod,
		Broken: refusal{Status: http.StatusServiceUnavailable,
			Text: "gke-metadata-emulator is " + config.NotConfigured(reason), Label: reasonUnconfigured}}
}

// Server answers pods. Its package is the only one that sees a ResponseWriter.
type Server struct {
	active      atomic.Pointer[Active] // never nil
	web         *http.Server
	listener    net.Listener
	probe       *probe
	connections *connections
	draining    chan struct{} // closed by Drain: connections end after their answer, long polls at once
	metrics     *metrics
	log         *logrus.Logger
	audit       *audit
	refused     logLimits // of refusals, for each pod
	cloud       *cloud    // the metadata server of the cloud we run in,
	passed      logLimits // of requests that were passed to it,
	skipped     skippedHostPods

	unreachable atomic.Pointer[string] // why the node's own connections to the listener fail; nil: they do not
}

// New returns a Server that answers by first, once Serve is called.
func New(o Options, first *Active) *Server {
	s := &Server{listener: o.Listener, probe: newProbe(o.Listener), draining: make(chan struct{}), log: o.Log,
		audit: newAudit(o.Log), cloud: newCloud()}
	s.active.Store(first)
	s.connections = newConnections(s.limit, s.probe.is, s.look)
	s.connections.vouched, s.connections.requests = s.vouched, s.requestLimit
	s.metrics = newMetrics(o.Registerer, &s.connections.admission)
	s.metrics.expect(first.Tree)
	s.web = &http.Server{
		Handler:           s,
		ConnContext:       s.connections.accept,
		ConnState:         s.connections.state,
		ReadHeaderTimeout: 5 * time.Second, // H-17
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          quietLog(s.log),

		DisableGeneralOptionsHandler: true, // OPTIONS * is refused as all else is, with our header (H-04)
	}
	return s
}

// Serve answers pods that connect to l, until l is closed or Shutdown is called. It returns why it
// ended, never nil. It may be called for several listeners at once.
func (s *Server) Serve(l net.Listener) error { return s.web.Serve(s.bounded(l, false)) }

// Run writes the repeated audit lines until ctx is done.
func (s *Server) Run(ctx context.Context) error { return s.audit.run(ctx) }

// Activate puts next in force for the requests that begin, and for those that wait.
func (s *Server) Activate(next *Active) {
	s.metrics.expect(next.Tree)
	s.active.Store(next)
}

func (s *Server) limit() int        { return s.active.Load().ConnectionsPerPod }
func (s *Server) requestLimit() int { return s.active.Load().RequestsPerPod }

// look has a new connection's other end looked at; without a configuration nobody gets anything
// that depends on it.
func (s *Server) look(p *attest.Peer) {
	if a := s.active.Load().Attestor; a != nil {
		a.Look(p)
	}
}

// vouched reports whether a new connection's client is more than an address that anybody can make
// up.
func (s *Server) vouched(p *attest.Peer) bool {
	a := s.active.Load().Attestor
	return a != nil && a.Vouched(p)
}

// bounded returns the listener with what its connections may hold bounded. Where that cannot be
// had, pods are served all the same. plain leaves net/http's own refusals as they are.
func (s *Server) bounded(l net.Listener, plain bool) net.Listener {
	c := clientListener{l, plain, s.draining}
	if err := c.bounded(); err != nil {
		s.log.WithError(err).Warnf("the buffers of connections to %s cannot be bounded: "+
			"clients that do not read can hold several MB each", l.Addr())
	}
	return c
}

// Connections says how many connections of pods there are.
type Connections struct {
	Open      int
	Idle      int // of Open: between two requests
	Answering int // of Open: with a request that is being answered
}

// Connections returns the numbers of now.
func (s *Server) Connections() Connections {
	x := s.connections
	return Connections{Open: x.open(), Idle: int(x.idle.Load()), Answering: int(x.answering.Load())}
}

// Requests returns how many requests of pods there were for anything but `/`, and how many of them
// came by IPv6.
func (s *Server) Requests() (all, ipv6 uint64) { return s.metrics.asked(), s.metrics.ipv6.Load() }

// SkippedHostPods returns how many requests for another cloud's metadata were refused, by the
// ServiceAccount of the pod on the host network that sent them.
func (s *Server) SkippedHostPods() map[workload.ServiceAccount]uint64 { return s.skipped.all() }

// Drain begins the end: from now on answers say Connection: close, long polls are released,
// and clients that do not read are given little time. It may be called once.
func (s *Server) Drain() {
	close(s.draining)
	s.connections.each(true, func(c *connection) { _ = c.conn.SetWriteDeadline(time.Now().Add(hastyTimeout)) })
}

// Draining reports whether Drain was called.
func (s *Server) Draining() bool {
	select {
	case <-s.draining:
		return true
	default:
		return false
	}
}

// Shutdown ends Serve without losing a request. It is to be called after Drain, when nothing
// is accepted any more. What was accepted is answered before net/http knows of the end: it throws
// away the requests that it reads from then on. Nobody is waited for who does not read an answer,
// or does not send a whole request. When ctx is done, answers are broken off.
func (s *Server) Shutdown(ctx context.Context) {
	x := s.connections
	for end := time.Now().Add(hastyTimeout); ; {
		asking := time.Now().Before(end) && (x.busy() > 0 || x.unread())
		if x.answering.Load() == 0 && !asking || !sleep(ctx, 2*time.Millisecond) {
			break
		}
	}
	x.each(false, func(c *connection) { reset(c.conn) })
	if err := s.web.Shutdown(ctx); err != nil {
		s.log.Warnf("stopping: %d connections are closed without an answer: the time limit is reached",
			x.answering.Load())
		_ = s.web.Close()
	}
}

// request is one request on its way through the server.
type request struct {
	*http.Request
	*connection
	place     metadata.Match
	open      bool // may be answered without knowing who asks
	hostCheck bool
	foreign   bool            // it is for another cloud's metadata server, and maybe a host pod's
	passed    *passed         // what that one answered
	caller    workload.Caller // once attested
	started   time.Time
}

// ServeHTTP is the story of a request; doc.go tells it in words.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	req := &request{Request: r, connection: connectionOf(r.Context()), started: time.Now()}
	if r.ContentLength != 0 { // nobody waits longer for a body
		req.body.Store(true)
		_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(2 * cloudTimeout))
	}
	a, err := s.answer(req)
	if err != nil && r.Context().Err() != nil {
		s.record(req, statusGone, a, err)
		panic(http.ErrAbortHandler) // what returns without writing answers 200 with nothing in it
	}
	s.record(req, s.write(w, req, a, err), a, err)
}

// statusGone is what the log and the metrics say of an asker that left before the answer was there.
const statusGone = 499

// answer finds what the request gets: an Answer, or an error that refusalOf knows.
func (s *Server) answer(req *request) (metadata.Answer, error) {
	err := s.pace(req, nil)
	active := s.active.Load()
	req.place = active.Tree.Find(req.URL.Path)
	if err != nil {
		return metadata.Answer{}, err
	}
	req.open, req.hostCheck = req.place.Open, active.HostCheck
	req.foreign = req.peer.MaybeHostPod() && foreign(req.Method, req.place.Path, req.Header)
	if err := refusedBy(req); err != nil {
		return metadata.Answer{}, err
	}
	if err := s.connections.overLimit(req.connection); err != nil {
		return metadata.Answer{}, err
	}
	if req.foreign {
		return s.passThrough(req.Context(), req)
	}
	var q metadata.Query
	if strings.Count(req.URL.RawQuery, "&") >= maxParameters {
		return metadata.Answer{}, metadata.BadQuery("more than %d parameters", maxParameters)
	}
	if req.URL.RawQuery != "" {
		q.Values = metadata.ParseQuery(req.URL.RawQuery)
	}
	if req.open {
		return req.place.Answer(req.Context(), q)
	}
	if active.Broken != nil {
		return metadata.Answer{}, active.Broken
	}
	return s.answerCaller(req.Context(), active, req, q)
}

// answerCaller finds out who asks, answers, and looks at the evidence again before the answer may
// be written. A request that wants to be told of a change is answered when there was one (H-12): a
// waiter costs its goroutine and its connection, of which a pod has limits.connectionsPerPod.
func (s *Server) answerCaller(
	ctx context.Context, active *Active, req *request, q metadata.Query,
) (metadata.Answer, error) {
	var wait metadata.Wait
	var timeout <-chan struct{}
	if q.Values != nil {
		var err error
		if wait, err = metadata.ParseWait(q.Values); err != nil {
			return metadata.Answer{}, err
		}
		if wait.Timeout > 0 {
			end, cancel := context.WithTimeout(context.Background(), wait.Timeout)
			defer cancel()
			timeout = end.Done()
		}
	}
	// The first look is at the configuration in which req.place was found. If another one has replaced
	// it meanwhile, the wait ends.
	for first := true; ; first, active = false, s.active.Load() {
		place := req.place
		if !first { // another configuration may have another tree
			place = active.Tree.Find(req.URL.Path)
		}
		if active.Broken != nil {
			return metadata.Answer{}, active.Broken
		}
		var changed <-chan struct{}
		if wait.ForChange {
			changed = active.Changes() // before the look, so that no change falls between the two
		}
		var err error
		if req.caller, err = active.Attestor.Attest(ctx, req.peer); errors.Is(err, attest.ErrReplaced) {
			continue // its backend is no more: the next one knows
		} else if err != nil {
			return metadata.Answer{}, err
		}
		s.connections.vouch(req.connection)
		q.Caller = req.caller
		a, err := place.Answer(ctx, q)
		if err == nil {
			err = s.recheck(ctx, req.peer)
		}
		if err != nil || wait.Over(a.ETag) || isClosed(timeout) { // even if changes come without end
			return a, err
		}
		select {
		case <-changed:
			if err := s.pace(req, timeout); err != nil {
				return metadata.Answer{}, err
			}
			continue
		case <-active.Superseded:
			continue
		case <-timeout:
		case <-req.ended: // or the client left
		case <-s.draining:
		case <-ctx.Done():
			return metadata.Answer{}, ctx.Err()
		}
		return a, s.recheck(ctx, req.peer) // the answer was made before the wait
	}
}

// isClosed says whether c is closed. One that is nil never is.
func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// recheck looks at the evidence again, by the configuration in force now: the backend that attested
// may be no more.
func (s *Server) recheck(ctx context.Context, p *attest.Peer) error {
	for {
		active := s.active.Load()
		if active.Broken != nil {
			return active.Broken
		}
		if err := active.Attestor.Check(ctx, p); !errors.Is(err, attest.ErrReplaced) {
			return err
		}
	}
}

// Headers that every response has. The keys are canonical, and the values are shared: nobody writes
// to them.
var (
	flavor     = []string{"Google"}              // H-04
	serverName = []string{"GKE Metadata Server"} // H-05
	noXSS      = []string{"0"}                   // H-07
	sameOrigin = []string{"SAMEORIGIN"}
	textType   = []string{metadata.Text} // H-05
	jsonType   = []string{metadata.JSON}
	retryAfter = []string{"1"}
	closing    = []string{"close"}
)

// write turns an answer or an error into bytes and returns the status. Nothing else in the service
// does.
func (s *Server) write(w http.ResponseWriter, req *request, a metadata.Answer, err error) int {
	if req.passed != nil && err == nil {
		return s.writePassed(w, req)
	}
	h, status, values := w.Header(), http.StatusOK, make([]string, 2)
	h["Metadata-Flavor"], h["Server"], h["X-Xss-Protection"], h["X-Frame-Options"] = flavor, serverName, noXSS, sameOrigin
	switch {
	case err != nil:
		r := refusalOf(err)
		status, a = r.Status, metadata.Answer{Body: []byte(r.Text + "\n"), ContentType: metadata.Text}
		if r.Retry {
			h["Retry-After"] = retryAfter
		}
		if r.Allow != "" {
			h["Allow"] = []string{r.Allow}
		}
		if r.Close {
			h["Connection"] = closing
		}
	case a.Redirect != "": // H-08
		status = http.StatusMovedPermanently
		h["Location"] = []string{location(req, a.Redirect)}
		a.ContentType = metadata.Text
	default:
		values[0] = a.ETag
		h["Etag"] = values[0:1:1]
	}
	values[1] = strconv.Itoa(len(a.Body))
	h["Content-Type"], h["Content-Length"] = textType, values[1:2:2]
	if a.ContentType == metadata.JSON {
		h["Content-Type"] = jsonType
	}
	select {
	case <-s.draining:
		h["Connection"] = closing
	default:
	}
	// net/http would read a body that nobody wants before it answers, for as long as it takes to
	// come
	if req.ContentLength != 0 {
		_ = http.NewResponseController(w).SetReadDeadline(time.Now())
		h["Connection"] = closing
	}
	w.WriteHeader(status)
	if req.Method != http.MethodHead {
		_, _ = w.Write(a.Body) // a client that left is no news
	}
	return status
}

// writePassed writes what the cloud's own server answered, with no header of ours.
func (s *Server) writePassed(w http.ResponseWriter, req *request) int {
	req.theirs = true
	h, a := w.Header(), req.passed
	maps.Copy(h, a.header)
	if h["Content-Type"] == nil {
		h["Content-Type"] = nil // and no guess of net/http's
	}
	if len(a.body) > 0 {
		h["Content-Length"] = []string{strconv.Itoa(len(a.body))}
	}
	select {
	case <-s.draining:
		h["Connection"] = closing
	default:
	}
	w.WriteHeader(a.status)
	_, _ = w.Write(a.body) // a client that left is no news
	return a.status
}

// location is absolute, on the Host as sent and with the query as sent: never our own port (H-08).
func location(req *request, path string) string {
	host := req.Host
	if host == "" { // HTTP/1.0
		host = req.peer.Original.Addr().String()
	}
	return (&url.URL{Scheme: "http", Host: host, Path: path, RawQuery: req.URL.RawQuery}).String()
}

// record writes the one log line and the one metric of a request: the audit line of a token that
// was issued; a refusal, at a bounded rate for each pod; all else where somebody debugs.
func (s *Server) record(req *request, status int, a metadata.Answer, err error) {
	s.metrics.served(req.place.Node, status, time.Since(req.started))
	if err != nil && status != statusGone {
		s.metrics.refused.WithLabelValues(reasonOf(req, err)).Inc()
	}
	if errors.Is(err, attest.ErrNotPod) {
		s.metrics.strangers.Add(1)
	} else if req.place.Node != "/" && req.peer.Server.Addr().Is6() {
		s.metrics.ipv6.Add(1)
	}
	token, isToken := a.Issued.(issued)
	switch {
	case err == nil && isToken:
		// Else this connection got the same token a moment ago.
		if req.audited == nil || req.issued != token || req.audited.over.Load() {
			by, _ := req.asker()
			req.audited, req.issued = s.audit.issue(by, token), token
		} else {
			req.audited.again.Add(1)
		}
	case err == nil && req.passed != nil:
		if suppressed, ok := s.passed.allow(rateLimitKey(req)); ok {
			messageid.PassedOn.In(s.log).WithFields(s.fields(req, status)).WithField("suppressed",
				suppressed).Info("passed to the cloud's metadata server")
		}
	case err != nil && status != statusGone && !errors.Is(err, metadata.ErrNotFound):
		if suppressed, ok := s.refused.allow(rateLimitKey(req)); ok {
			messageid.Refused.In(s.log).WithFields(s.fields(req, status)).WithField("suppressed",
				suppressed).Warn("refused: " + err.Error())
		}
	case debugging(s.log):
		s.log.WithFields(s.fields(req, status)).Debug("served")
	}
}
