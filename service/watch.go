package service

import (
	"context"
	"os"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/sirupsen/logrus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
)

// WatchRouting keeps the rules standing until ctx is done. It says READY=1 when they were looked at
// for the first time, whatever was found: giving up would leave nobody to look again. plan makes of
// the configuration, or of the reason why there is none, what is to stand.
func WatchRouting(ctx context.Context, o Options, plan func(config.Config, error) routing.Plan) error {
	if o.Stderr == nil {
		o.Stderr = os.Stderr
	}
	log := logrus.New()
	configureLog(log, config.Default().Log, o.Stderr)
	ready := false
	return routing.Watch{
		Load: func() routing.Plan {
			c, err := o.Load()
			if err == nil {
				configureLog(log, c.Log, o.Stderr)
			} else {
				// The service logs the faults, once; this unit comes before it at a boot.
				log.Info("routing: there is no valid configuration: installed rules stay: without any, pods are sent to the " +
					"service, which answers 503 with the reason: `gke-metadata-emulator config check` prints the faults")
			}
			p := plan(c, err)
			if p.Reason != "" {
				log.WithField("mode", p.Mode).Info("routing.mode auto: " + p.Reason)
			}
			return p
		},
		Reload: o.Reload,
		Report: func(text string) {
			state := "STATUS=" + text
			if !ready {
				ready = true
				state = daemon.SdNotifyReady + "\n" + state
			}
			notify(log, state)
		},
		Alive:  alive(log),
		RunDir: o.RunDir,
		Log:    log,
	}.Run(ctx)
}

// alive tells systemd's watchdog, at most as often as it wants to hear it.
func alive(log logrus.FieldLogger) func() {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		log.WithError(err).Error("WATCHDOG_USEC of systemd is invalid: the watchdog is not used")
	}
	var reported time.Time
	return func() {
		if now := time.Now(); interval > 0 && now.Sub(reported) > interval/4 {
			reported = now
			notify(log, daemon.SdNotifyWatchdog)
		}
	}
}
