package service

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/status"
)

// What the packages call us.
const (
	unit   = "gke-metadata-emulator.service"
	socket = "gke-metadata-emulator.socket"
)

// systemd is what of its D-Bus API tells a stop from a restart.
type systemd interface {
	ListJobsContext(ctx context.Context) ([]dbus.JobStatus, error)
	SystemStateContext(ctx context.Context) (*dbus.Property, error)
}

// StoppedForGood reports whether our unit is being stopped by somebody who wants it stopped: not
// restarted, not after a crash, and not since the machine goes down, when pods still run and must
// not reach the cloud's own metadata server. An error means that systemd could not be
// asked: then it must count as no.
func StoppedForGood(ctx context.Context) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, systemdTimeout)
	defer cancel()
	c, err := connectToSystemd(ctx)
	if err != nil {
		return false, fmt.Errorf("ask systemd why the service stops: %w", err)
	}
	defer c.Close()
	return stoppedForGood(ctx, c)
}

// StopListening has the socket unit stopped too, which comes after us, and does not wait for it. A
// connection of the last moment that waits there for somebody to answer would start us again
// otherwise, and the rules with us.
func StopListening(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, systemdTimeout)
	defer cancel()
	c, err := connectToSystemd(ctx)
	if err == nil {
		defer c.Close()
		_, err = c.StopUnitContext(ctx, socket, "replace", nil)
	}
	if err != nil {
		return fmt.Errorf("ask systemd to stop %s: %w", socket, err)
	}
	return nil
}

const systemdTimeout = 4 * time.Second // for each of two questions; TimeoutStopSec= of the unit is 10 s

func connectToSystemd(ctx context.Context) (*dbus.Conn, error) {
	c, err := dbus.NewSystemdConnectionContext(ctx) // its private socket: also where D-Bus is not up yet, or down already
	if err != nil {
		c, err = dbus.NewSystemConnectionContext(ctx)
	}
	return c, err
}

func stoppedForGood(ctx context.Context, s systemd) (bool, error) {
	jobs, err := s.ListJobsContext(ctx)
	if err != nil {
		return false, fmt.Errorf("ask systemd for its jobs: %w", err)
	}
	state, err := s.SystemStateContext(ctx)
	if err != nil {
		return false, fmt.Errorf("ask systemd for its state: %w", err)
	}
	stop := slices.ContainsFunc(jobs, func(j dbus.JobStatus) bool { return j.Unit == unit && j.JobType == "stop" })
	return stop && state.Value.Value() != "stopping", nil
}

// AskUnit asks systemd how the unit is. It returns the zero Unit where systemd does not answer
// within 2 s.
func AskUnit(ctx context.Context, name string) (r status.Unit) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	c, err := dbus.NewSystemConnectionContext(ctx)
	if err != nil {
		return r
	}
	defer c.Close()
	all, err := c.GetAllPropertiesContext(ctx, name)
	if err != nil {
		return r
	}
	return reportOf(all)
}

func reportOf(p map[string]any) (r status.Unit) {
	r.Active, _ = p["ActiveState"].(string)
	r.Sub, _ = p["SubState"].(string)
	r.Result, _ = p["Result"].(string)
	r.Code, _ = p["ExecMainStatus"].(int32)
	r.Status, _ = p["StatusText"].(string)
	r.Restarts, _ = p["NRestarts"].(uint32) // systemd 235
	return r
}
