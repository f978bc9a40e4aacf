package service

import (
	"context"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/sirupsen/logrus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/messageid"
)

// notify tells systemd something; where there is no systemd, nobody listens.
func notify(log logrus.FieldLogger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.WithError(err).Warn("systemd cannot be notified")
	}
}

// notifySystemd says READY=1 once our own listener answered a real request, and WATCHDOG=1 as often
// as systemd wants to hear it and only after another one was answered. READY waits neither for the
// API server nor for Google: on a first boot kubelet has no credentials yet, and it starts after
// us.
func (s *Service) notifySystemd(ctx context.Context) error {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		s.log.WithError(err).Error("WATCHDOG_USEC of systemd is invalid: the watchdog is not used")
	}
	for logged := false; ; logged = true {
		err := s.server.Alive(ctx)
		if err == nil {
			break
		}
		if !logged && ctx.Err() == nil {
			messageid.ListenerSilent.In(s.log).WithError(err).Error("the service's own listener does not answer yet: " +
				"trying again: `gke-metadata-emulator routing check` says whether its address is missing")
		}
		if !sleep(ctx, 100*time.Millisecond) {
			return nil
		}
	}
	messageid.Ready.In(s.log).WithFields(logrus.Fields{"listen": s.listener.Addr().String(),
		"after": time.Since(s.started).Round(time.Millisecond).String()}).Info("ready: the listener answers requests")
	close(s.ready)
	notify(s.log, daemon.SdNotifyReady+"\nSTATUS="+s.summary())
	tick := interval / 3
	if tick <= 0 {
		tick = 10 * time.Second
	}
	for reported := s.summary(); sleep(ctx, tick); {
		if err := s.server.Alive(ctx); err != nil {
			if ctx.Err() == nil {
				messageid.ListenerSilent.In(s.log).WithError(err).Error("the service's own listener does not answer: " +
					"find the cause with `gke-metadata-emulator doctor`")
			}
			continue
		}
		if interval > 0 {
			notify(s.log, daemon.SdNotifyWatchdog)
		}
		if now := s.summary(); now != reported {
			reported = now
			notify(s.log, "STATUS="+now)
		}
	}
	return nil
}

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
