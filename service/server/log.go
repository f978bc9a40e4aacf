package server

import (
	"bytes"
	"context"
	stdlog "log"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/time/rate"
)

// logLimits bounds what is logged because of one pod: 5 lines, then one in 10 s.
type logLimits struct {
	mu     sync.Mutex
	limits map[string]*logLimit
}

type logLimit struct {
	*rate.Limiter
	suppressed int
}

// maxLogLimits bounds logLimits. When it is full it starts anew: a few lines more are logged, and
// nothing is lost.
const maxLogLimits = 1024

// allow reports whether a line about the key is to be logged, and how many were not since the last
// that was.
func (l *logLimits) allow(key string) (suppressed int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := l.limits[key]
	if r == nil {
		if l.limits == nil || len(l.limits) >= maxLogLimits {
			l.limits = map[string]*logLimit{}
		}
		r = &logLimit{Limiter: rate.NewLimiter(rate.Every(10*time.Second), 5)}
		l.limits[key] = r
	}
	if !r.Allow() {
		r.suppressed++
		return 0, false
	}
	suppressed, r.suppressed = r.suppressed, 0
	return suppressed, true
}

// quietLog takes what net/http has to say of clients that break off, which is of interest only to
// those who debug one; but a panic of ours is an error.
func quietLog(l *logrus.Logger) *stdlog.Logger { return stdlog.New(httpLog{l}, "", 0) }

type httpLog struct{ *logrus.Logger }

func (l httpLog) Write(b []byte) (int, error) {
	if bytes.Contains(b, []byte("panic")) {
		l.Error(string(b))
	} else if debugging(l.Logger) {
		l.Debug(string(b))
	}
	return len(b), nil
}

const maxLogged = 256 // bytes

// sanitized is a text of a pod's, cut to maxLogged.
func sanitized(s string) string {
	if len(s) > maxLogged {
		return strings.ToValidUTF8(s[:maxLogged], "") + "…"
	}
	return s
}

func debugging(l *logrus.Logger) bool { return l.IsLevelEnabled(logrus.DebugLevel) }

// sleep returns false when ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
