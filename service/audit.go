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

// audit writes the line of each token that is handed out: which pod got which for how long, and never the token. The
// same token handed to the same pod again is no other token: it is counted, and told once a minute, so that a pod that
// asks ten thousand times a second does not write as many lines into the node's journal.
type audit struct {
	log logrus.FieldLogger

	mu   sync.Mutex
	told map[handout]*telling
}

// handout is a token that a pod got. It is comparable.
type handout struct {
	podUID  string
	request token.Request
}

// telling is what was told of a handout, and what is still to be told.
type telling struct {
	caller  workload.Caller
	expires time.Time
	again   atomic.Int64
}

const tellEvery = time.Minute

func newAudit(log logrus.FieldLogger) *audit {
	return &audit{log: log, told: map[handout]*telling{}}
}

// handedOut notes that the caller gets a token. What it returns counts the same token to the same pod again.
func (a *audit) handedOut(c workload.Caller, r token.Request, expires time.Time) *telling {
	h := handout{c.PodUID, r}
	a.mu.Lock()
	before := a.told[h]
	if before != nil && before.expires.Equal(expires) {
		a.mu.Unlock()
		before.again.Add(1)
		return before
	}
	now := &telling{caller: c, expires: expires}
	a.told[h] = now
	a.mu.Unlock()
	if before != nil {
		a.tellAgain(h, before)
	}
	a.line(h, c, expires).Info("token handed out")
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
		a.line(h, k.caller, k.expires).WithField("times", times).Info("the same token handed out again")
	}
}

func (a *audit) line(h handout, c workload.Caller, expires time.Time) *logrus.Entry {
	f := callerFields(c)
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

func callerFields(c workload.Caller) logrus.Fields {
	return logrus.Fields{"pod": c.String(), "pod_uid": c.PodUID, "service_account": c.ServiceAccount.String()}
}

// fields tell of a request what the log may hold: never its path or query, which a pod writes.
func (s *server) fields(req *request, status int) logrus.Fields {
	f := logrus.Fields{}
	if req.caller.PodUID != "" {
		f = callerFields(req.caller)
	}
	f["place"], f["client"], f["status"] = req.place.Node, req.peer.Client.Addr().String(), status
	return f
}

// asker is whose refusals are counted together: the pod's where it is known, else the address's.
func asker(req *request) string {
	if req.caller.PodUID != "" {
		return req.caller.PodUID
	}
	return req.peer.Client.Addr().String()
}
