package service

import (
	"context"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// audit writes the line of each token that is handed out: who got which for how long, known by what, and never the token. The
// same token handed to the same asker again is no other token: it is counted, and told once a minute, so that a pod that
// asks ten thousand times a second does not write as many lines into the node's journal.
type audit struct {
	log logrus.FieldLogger

	mu   sync.Mutex
	told map[handout]*telling
}

// handout is a token that somebody got. It is comparable.
type handout struct {
	asker
	request token.Request
}

// asker is who asks, and what says so. It is comparable.
type asker struct {
	caller              workload.Caller
	evidence, container string // as attest.Peer has them
}

// telling is what was told of a handout, and what is still to be told.
type telling struct {
	expires time.Time
	again   atomic.Int64
}

const tellEvery = time.Minute

func newAudit(log logrus.FieldLogger) *audit {
	return &audit{log: log, told: map[handout]*telling{}}
}

// handedOut notes that the asker gets a token. What it returns counts the same token to the same asker again.
func (a *audit) handedOut(by asker, r token.Request, expires time.Time) *telling {
	h := handout{by, r}
	a.mu.Lock()
	before := a.told[h]
	if before != nil && before.expires.Equal(expires) {
		a.mu.Unlock()
		before.again.Add(1)
		return before
	}
	now := &telling{expires: expires}
	a.told[h] = now
	a.mu.Unlock()
	if before != nil {
		a.tellAgain(h, before)
	}
	a.line(h, expires).Info("token handed out")
	return now
}

// run tells of repetitions, and forgets tokens that have expired.
func (a *audit) run(ctx context.Context) error {
	for alive := true; alive; {
		alive = sleep(ctx, tellEvery)
		a.mu.Lock()
		due := maps.Clone(a.told)
		maps.DeleteFunc(a.told, func(_ handout, k *telling) bool { return time.Now().After(k.expires) })
		a.mu.Unlock()
		for h, k := range due {
			a.tellAgain(h, k)
		}
	}
	return nil
}

func (a *audit) tellAgain(h handout, k *telling) {
	if times := k.again.Swap(0); times > 0 {
		a.line(h, k.expires).WithField("times", times).Info("the same token handed out again")
	}
}

func (a *audit) line(h handout, expires time.Time) *logrus.Entry {
	f := h.fields()
	f["expires"] = expires.UTC().Format(time.RFC3339)
	if h.request.Account.Linked() {
		f["google_service_account"] = h.request.Account.GoogleEmail
	}
	if h.request.Audience != "" {
		f["audience"] = bounded(h.request.Audience)
	} else {
		f["scopes"] = bounded(h.request.Scopes)
	}
	return a.log.WithFields(f)
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
func (s *server) fields(req *request, status int) logrus.Fields {
	f := logrus.Fields{}
	if by, known := req.asker(); known {
		f = by.fields()
	}
	f["place"], f["client"], f["status"] = req.place.Node, req.peer.Client.Addr().String(), status
	return f
}

// whose says whose refusals are counted together: the caller's where it is known, else those of the pod, the unit or the address.
func whose(req *request) string {
	if id := req.caller.ID(); id != "" {
		return id
	}
	return req.party.String()
}
