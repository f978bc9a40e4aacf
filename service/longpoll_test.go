package service

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestWaitMeetsReload: a request that waits for a change (H-12) and arrives while another
// configuration comes into force hears of it, whichever of the two its beginning saw.
func TestWaitMeetsReload(t *testing.T) {
	b := newTestNode(t)
	b.ready(t)
	const path, clients = v1 + "instance/machine-type", 8
	rounds := 300
	if testing.Short() {
		rounds = 30
	}
	value := func(i int) string { return fmt.Sprintf("machineTypes/e2-%d", i) }
	b.replace(t, "config.yaml", "machineTypes/n2-standard-4", value(0))
	b.hangUp()
	b.eventually(t, "the first value", func() bool {
		return strings.HasSuffix(b.ask(t, linked, "GET", path, "").body, value(0))
	})
	etag := b.ask(t, linked, "GET", path, "").Header.Get("ETag")
	for i := range rounds {
		heard := make(chan response, clients)
		for client := range clients {
			wait := path + "?wait_for_change=true&last_etag=" + etag
			go func() {
				<-time.After(time.Duration(client) * time.Millisecond) // reading the configuration takes about as long
				heard <- b.ask(t, linked, "GET", wait, "")
			}()
		}
		b.replace(t, "config.yaml", value(i), value(i+1))
		b.hangUp()
		for range clients {
			r := receive(t, heard)
			if etag = r.Header.Get("ETag"); !strings.HasSuffix(r.body, value(i+1)) {
				t.Fatalf("%d %s, want %s", r.StatusCode, r.body, value(i+1))
			}
		}
	}
}
