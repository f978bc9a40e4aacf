package service

import (
	"context"
	"sync"
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
	again   int
}

const tellEvery = time.Minute

func newAudit(log logrus.FieldLogger) *audit {
	return &audit{log: log, told: map[handout]*telling{}}
}

// handedOut notes that the caller gets t.
func (a *audit) handedOut(c workload.Caller, r token.Request, expires time.Time) {
	h := handout{c.PodUID, r}
	a.mu.Lock()
	if k := a.told[h]; k != nil && k.expires.Equal(expires) {
		k.again++
		a.mu.Unlock()
		return
	}
	var before telling
	if k := a.told[h]; k != nil {
		before = *k
	}
	a.told[h] = &telling{caller: c, expires: expires}
	a.mu.Unlock()
	a.tellAgain(h, before)
	a.line(h, c, expires).Info("token handed out")
}

// run tells of repetitions, and forgets tokens that have expired.
func (a *audit) run(ctx context.Context) error {
	for alive := true; alive; {
		alive = sleep(ctx, tellEvery)
		due := map[handout]telling{}
		a.mu.Lock()
		for h, k := range a.told {
			if k.again > 0 {
				due[h] = *k
				k.again = 0
			}
			if time.Now().After(k.expires) {
				delete(a.told, h)
			}
		}
		a.mu.Unlock()
		for h, k := range due {
			a.tellAgain(h, k)
		}
	}
	return nil
}

func (a *audit) tellAgain(h handout, k telling) {
	if k.again > 0 {
		a.line(h, k.caller, k.expires).WithField("times", k.again).Info("the same token handed out again")
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
