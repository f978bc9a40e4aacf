package server

import (
	"context"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/messageid"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// audit writes the line of each token that is issued: who got which for how long, known by what,
// and never the token. The same token for the same asker again is no other token: it is counted,
// and logged once a minute, so that a pod that asks ten thousand times a second does not write as
// many lines into the node's journal.
type audit struct {
	log logrus.FieldLogger

	mu      sync.Mutex
	audited map[issuance]*auditEntry
}

// issued is the token in an answer. It is comparable.
type issued struct {
	request token.Request
	expires time.Time
}

// issuance is a token that somebody got. It is comparable.
type issuance struct {
	asker
	request token.Request
}

// asker is who asks, and what says so. It is comparable.
type asker struct {
	caller              workload.Caller
	evidence, container string // as attest.Peer has them
}

// auditEntry is what was logged of an issuance, and what is still to be logged.
type auditEntry struct {
	expires time.Time
	again   atomic.Int64 // how often since the last line
	over    atomic.Bool  // it is remembered no more: a connection that has it asks for another
}

const (
	auditInterval = time.Minute
	// maxAudited bounds what is remembered, since a pod may make up audiences and scopes without
	// end. When it is full it starts anew: some tokens get a line more, and none is lost.
	maxAudited = 4096
)

func newAudit(log logrus.FieldLogger) *audit {
	return &audit{log: log, audited: map[issuance]*auditEntry{}}
}

// issue notes that the asker gets a token. What it returns counts the same token for the same asker
// again.
func (a *audit) issue(by asker, t issued) *auditEntry {
	i := issuance{by, t.request}
	a.mu.Lock()
	before := a.audited[i]
	if before != nil && before.expires.Equal(t.expires) {
		a.mu.Unlock()
		before.again.Add(1)
		return before
	}
	now := &auditEntry{expires: t.expires}
	var due map[issuance]*auditEntry
	switch {
	case before != nil:
		due = map[issuance]*auditEntry{i: before}
	case len(a.audited) >= maxAudited:
		due, a.audited = a.audited, map[issuance]*auditEntry{}
	}
	a.audited[i] = now
	a.mu.Unlock()
	for i, e := range due {
		e.over.Store(true)
		a.logAgain(i, e)
	}
	a.line(i, t.expires).Info("token issued")
	return now
}

// run logs repetitions, and forgets tokens that have expired.
func (a *audit) run(ctx context.Context) error {
	for alive := true; alive; {
		alive = sleep(ctx, auditInterval)
		a.mu.Lock()
		due := maps.Clone(a.audited)
		maps.DeleteFunc(a.audited, func(_ issuance, e *auditEntry) bool { return time.Now().After(e.expires) })
		a.mu.Unlock()
		for i, e := range due {
			a.logAgain(i, e)
		}
	}
	return nil
}

func (a *audit) logAgain(i issuance, e *auditEntry) {
	if times := e.again.Swap(0); times > 0 {
		a.line(i, e.expires).WithField("times", times).Info("the same token issued again")
	}
}

func (a *audit) line(i issuance, expires time.Time) *logrus.Entry {
	f := i.fields()
	f["expires"] = expires.UTC().Format(time.RFC3339)
	if i.request.Account.Linked() {
		f["google_service_account"] = i.request.Account.GoogleEmail
	}
	if i.request.Audience != "" {
		f["audience"] = sanitized(i.request.Audience)
	} else {
		f["scopes"] = sanitized(i.request.Scopes)
	}
	return messageid.TokenIssued.In(a.log).WithFields(f)
}

func (a asker) fields() logrus.Fields {
	f := logrus.Fields{"service_account": a.caller.ServiceAccount.String(), "evidence": a.evidence}
	if a.caller.PodUID != "" {
		f["pod"], f["pod_uid"] = a.caller.String(), a.caller.PodUID
	} else {
		f["unit"] = a.caller.Unit
	}
	if a.container != "" {
		f["container"] = a.container
	}
	return f
}

// asker says who asks, as far as that was found out.
func (r *request) asker() (a asker, known bool) {
	a.caller = r.caller
	a.evidence, a.container = r.peer.Evidence()
	return a, r.caller.ID() != ""
}

// fields tell of a request what the log may hold: never its path or query, which a pod writes.
func (s *Server) fields(req *request, status int) logrus.Fields {
	f := logrus.Fields{}
	if by, known := req.asker(); known {
		f = by.fields()
	}
	f["place"], f["client"], f["status"] = req.place.Node, req.peer.Client.Addr().String(), status
	return f
}

// rateLimitKey says whose log lines are limited together: the caller's where it is known, else
// those of the pod, the unit or the address.
func rateLimitKey(req *request) string {
	if id := req.caller.ID(); id != "" {
		return id
	}
	return req.party.String()
}
