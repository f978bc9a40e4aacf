package token

import (
	"strings"
	"testing"
	"time"
)

// The monotonic clock stands still while the machine is suspended. What a token's life is compared
// by has no reading of it: time.Time compares by that where both have one.
func TestSuspendCounts(t *testing.T) {
	made, err := newToken("STS", "ya29.x", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	e := &entry{request: Request{}}
	e.setToken(made, time.Now())
	for what, at := range map[string]time.Time{"Minted": made.Minted, "Expires": made.Expires,
		"fresh until": e.freshUntil, "usable until": e.usableUntil, "due": e.due} {
		if at.IsZero() || strings.Contains(at.String(), " m=") {
			t.Errorf("%s is by the monotonic clock: %s", what, at)
		}
	}
}
