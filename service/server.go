package service

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"net/url"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/metadata"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// server answers pods. It is the only place that sees a ResponseWriter.
type server struct {
	site        atomic.Pointer[site] // what the configuration in force leads to; never nil once serving
	connections *connections
	draining    chan struct{} // closed when the service stops: connections end after their answer, long polls at once
	metrics     *metrics
	log         *logrus.Logger
	audit       *audit
	refused     askerLog // refusals that are logged, for each pod
	cloud       *cloud   // the metadata server of the cloud we run in,
	passed      askerLog // what was passed to it,
	unnamed     unnamed  // and who was not let through
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
	handed    handed          // the token in the answer, if it holds one
	started   time.Time
}

// handed is the token in an answer.
type handed struct {
	request token.Request
	expires time.Time
}

// noteHandedOut notes on the request that its answer holds t.
func noteHandedOut(q metadata.Query, r token.Request, t token.Token) {
	if req, ok := q.For.(*request); ok {
		req.handed = handed{r, t.Expires}
	}
}

// ServeHTTP is the story of a request; doc.go tells it in words.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	req := &request{Request: r, connection: connectionOf(r.Context()), started: time.Now()}
	if r.ContentLength != 0 { // nobody waits longer for a body
		req.body.Store(true)
		_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(2 * cloudPatience))
	}
	a, err := s.answer(req)
	if err != nil && r.Context().Err() != nil {
		s.tell(req, statusGone, err)
		panic(http.ErrAbortHandler) // what returns without writing answers 200 with nothing in it
	}
	s.tell(req, s.write(w, req, a, err), err)
}

// statusGone is what the log and the metrics say of an asker that left before the answer was there.
const statusGone = 499

// answer finds what the request gets: an Answer, or an error that refusalOf knows.
func (s *server) answer(req *request) (metadata.Answer, error) {
	site := s.site.Load()
	req.place = site.tree.Find(req.URL.Path)
	req.open, req.hostCheck = req.place.Open, site.config.HostCheck
	req.foreign = req.peer.MaybeHostPod() && foreign(req.Method, req.place.Path, req.Header)
	if err := refusedBy(req); err != nil {
		return metadata.Answer{}, err
	}
	if err := s.connections.check(req.connection); err != nil {
		return metadata.Answer{}, err
	}
	if req.foreign {
		return s.passThrough(req.Context(), req)
	}
	var q metadata.Query
	if req.URL.RawQuery != "" {
		q.Values = metadata.ParseQuery(req.URL.RawQuery)
	}
	if req.open {
		return req.place.Answer(req.Context(), q)
	}
	if site.broken != nil {
		return metadata.Answer{}, site.broken
	}
	q.For = req
	return s.answerCaller(req.Context(), site, req, q)
}

// answerCaller finds out who asks, answers, and looks at the evidence again before the answer may be written. A request
// that wants to be told of a change is answered when there was one (H-12): a waiter costs its goroutine and its
// connection, of which a pod has limits.connectionsPerPod.
func (s *server) answerCaller(ctx context.Context, site *site, req *request, q metadata.Query) (metadata.Answer, error) {
	var wait metadata.Wait
	var timeout <-chan time.Time
	if q.Values != nil {
		var err error
		if wait, err = metadata.ParseWait(q.Values); err != nil {
			return metadata.Answer{}, err
		}
		if wait.Timeout > 0 {
			t := time.NewTimer(wait.Timeout)
			defer t.Stop()
			timeout = t.C
		}
	}
	// The first look is at the configuration in which req.place was found: one that has replaced it meanwhile ends the wait.
	for first := true; ; first, site = false, s.site.Load() {
		place := req.place
		if !first { // another configuration may have another tree
			place = site.tree.Find(req.URL.Path)
		}
		if site.broken != nil {
			return metadata.Answer{}, site.broken
		}
		var changed <-chan struct{}
		if wait.ForChange {
			changed = site.cluster.Changes() // before the look, so that no change falls between the two
		}
		var err error
		if req.caller, err = site.attestor.Attest(ctx, req.peer); errors.Is(err, attest.ErrReplaced) {
			continue // its backend is no more: the next one knows
		} else if err != nil {
			return metadata.Answer{}, err
		}
		s.connections.know(req.connection)
		q.Caller = req.caller
		a, err := place.Answer(ctx, q)
		if err == nil {
			err = s.check(ctx, req.peer)
		}
		if err != nil || wait.Over(a.ETag) {
			return a, err
		}
		select {
		case <-changed:
		case <-site.superseded:
		case <-timeout:
			return a, nil
		case <-req.ended: // or the client left
			return a, nil
		case <-s.draining:
			return a, nil
		case <-ctx.Done():
			return metadata.Answer{}, ctx.Err()
		}
	}
}

// check looks at the evidence again, by the configuration in force now: the backend that attested may be no more.
func (s *server) check(ctx context.Context, p *attest.Peer) error {
	for {
		site := s.site.Load()
		if site.broken != nil {
			return site.broken
		}
		if err := site.attestor.Check(ctx, p); !errors.Is(err, attest.ErrReplaced) {
			return err
		}
	}
}

// Headers that every response has. The keys are canonical, and the values are shared: nobody writes to them.
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

// write turns an answer or an error into bytes and returns the status. Nothing else in the service does.
func (s *server) write(w http.ResponseWriter, req *request, a metadata.Answer, err error) int {
	if req.passed != nil && err == nil {
		return s.writePassed(w, req)
	}
	h, status, values := w.Header(), http.StatusOK, make([]string, 2)
	h["Metadata-Flavor"], h["Server"], h["X-Xss-Protection"], h["X-Frame-Options"] = flavor, serverName, noXSS, sameOrigin
	switch {
	case err != nil:
		r := refusalOf(err)
		status, a = r.Status, metadata.Answer{Body: []byte(r.Reason + "\n"), ContentType: metadata.Text}
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
	if req.ContentLength != 0 { // net/http would read a body that nobody wants before it answers, for as long as it takes to come
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
func (s *server) writePassed(w http.ResponseWriter, req *request) int {
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

// tell writes the one log line and the one metric of a request: the audit line of a token that was handed out; a refusal,
// at a bounded rate for each asker; all else where somebody debugs.
func (s *server) tell(req *request, status int, err error) {
	s.metrics.served(req.place.Node, status, time.Since(req.started))
	if errors.Is(err, attest.ErrNotPod) {
		s.metrics.strangers.Add(1)
	} else if req.place.Node != "/" && req.peer.Server.Addr().Is6() {
		s.metrics.six.Add(1)
	}
	switch {
	case err == nil && !req.handed.expires.IsZero():
		if req.told == nil || req.toldOf != req.handed { // else this connection got the same token a moment ago
			by, _ := req.asker()
			req.told, req.toldOf = s.audit.handedOut(by, req.handed.request, req.handed.expires), req.handed
		} else {
			req.told.again.Add(1)
		}
	case err == nil && req.passed != nil:
		if suppressed, ok := s.passed.allow(whose(req)); ok {
			s.log.WithFields(s.fields(req, status)).WithField("suppressed", suppressed).Info("passed to the cloud's metadata server")
		}
	case err != nil && status != statusGone && !errors.Is(err, metadata.ErrNotFound):
		if suppressed, ok := s.refused.allow(whose(req)); ok {
			s.log.WithFields(s.fields(req, status)).WithField("suppressed", suppressed).Warn("refused: " + err.Error())
		}
	case debugging(s.log):
		s.log.WithFields(s.fields(req, status)).Debug("served")
	}
}
