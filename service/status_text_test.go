package service

import (
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
)

// What continues a line stands below that line.
func TestRulesText(t *testing.T) {
	now := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	s := Status{Routing: &routing.State{Desired: routing.Installed, Mode: routing.ModeIPTables, Listen: "169.254.169.252:988", Reason: "it fits",
		Since: now.Add(-time.Hour), HostNetwork: "left alone", Standing: routing.Standing{Time: now.Add(-time.Second), Faults: []string{"missing: a"}}}}
	var text strings.Builder
	if err := s.Text(&text, now); err != nil {
		t.Fatal(err)
	}
	want := `(?m)^rules +mode iptables to 169\.254\.169\.252:988, installed 1h0m0s ago
 +auto: it fits
 +read back 1s ago: NOT as they should be
 +missing: a
host pods +left alone$`
	if !regexp.MustCompile(want).MatchString(text.String()) {
		t.Errorf("no\n%s\nin\n%s", want, &text)
	}
}
