package service

import (
	"context"
	"errors"
	"testing"

	"github.com/coreos/go-systemd/v22/dbus"
	godbus "github.com/godbus/dbus/v5"
)

// manager is a systemd that says what a test lets it say.
type manager struct {
	jobs  []dbus.JobStatus
	state string
	err   error
}

func (m manager) ListJobsContext(context.Context) ([]dbus.JobStatus, error) { return m.jobs, m.err }

func (m manager) SystemStateContext(context.Context) (*dbus.Property, error) {
	return &dbus.Property{Name: "SystemState", Value: godbus.MakeVariant(m.state)}, m.err
}

func TestStoppedForGood(t *testing.T) {
	job := func(unit, kind string) []dbus.JobStatus {
		return []dbus.JobStatus{{Unit: "other.service", JobType: "stop"}, {Unit: unit, JobType: kind}}
	}
	for name, tt := range map[string]struct {
		manager manager
		want    bool
	}{
		"R-02: stop":                    {manager{jobs: job(unit, "stop"), state: "running"}, true},
		"R-02: stop of a degraded node": {manager{jobs: job(unit, "stop"), state: "degraded"}, true},
		"R-02: restart":                 {manager{jobs: job(unit, "restart"), state: "running"}, false},
		"R-02: start after a crash":     {manager{jobs: job(unit, "start"), state: "running"}, false},
		"R-02: crash, no job":           {manager{state: "running"}, false},
		"R-01: poweroff":                {manager{jobs: job(unit, "stop"), state: "stopping"}, false},
		"another unit's stop":           {manager{jobs: job("kubelet.service", "stop"), state: "running"}, false},
		"R-01: no answer":               {manager{err: errors.New("no bus")}, false},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := stoppedForGood(t.Context(), tt.manager)
			if got != tt.want || !errors.Is(err, tt.manager.err) {
				t.Errorf("= %v, %v; want %v, %v", got, err, tt.want, tt.manager.err)
			}
		})
	}
}

// What systemd's properties say of a unit is shown as `systemctl status` does.
func TestReportOf(t *testing.T) {
	for want, properties := range map[string]map[string]any{
		"": {},
		"systemd: activating (auto-restart), last result exit-code, exit status 78, 23 restarts": {
			"ActiveState": "activating", "SubState": "auto-restart", "Result": "exit-code",
			"ExecMainStatus": int32(78), "NRestarts": uint32(23), "StatusText": "",
		},
	} {
		if got := reportOf(properties).String(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
