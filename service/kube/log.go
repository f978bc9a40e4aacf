package kube

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/go-logr/logr"
	"github.com/sirupsen/logrus"
	"k8s.io/klog/v2"
)

// RouteKlog sends client-go's log to log, at level debug. This package logs every failure that
// matters itself. Client-go logs to a global, so this setting is global: a program calls it once,
// before the first New.
func RouteKlog(log logrus.FieldLogger) { klog.SetLogger(logr.New(sink{log: log})) }

// withLogger does the same for everything that runs under ctx.
func withLogger(ctx context.Context, log logrus.FieldLogger) context.Context {
	return klog.NewContext(ctx, logr.New(sink{log: log}))
}

func quiet() logrus.FieldLogger {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return l
}

// sink is a logr.LogSink. Client-go's finer levels hold request bodies and headers, so sink passes
// the coarsest level only.
type sink struct {
	log  logrus.FieldLogger
	name string
}

func (s sink) Init(logr.RuntimeInfo)  {}
func (s sink) Enabled(level int) bool { return level <= 0 }

func (s sink) Info(_ int, msg string, kv ...any) { s.fields(kv).Debug(s.name + sanitize(msg)) }

func (s sink) Error(err error, msg string, kv ...any) {
	s.fields(kv).WithError(brief(err)).Debug(s.name + msg)
}

func (s sink) WithValues(kv ...any) logr.LogSink { return sink{s.fields(kv), s.name} }
func (s sink) WithName(name string) logr.LogSink {
	return sink{s.log, strings.TrimSuffix(s.name, ": ") + name + ": "}
}

func (s sink) fields(kv []any) logrus.FieldLogger {
	f := logrus.Fields{}
	for i := 0; i+1 < len(kv); i += 2 {
		f[fmt.Sprint(kv[i])] = sanitize(fmt.Sprint(kv[i+1]))
	}
	return s.log.WithFields(f)
}
