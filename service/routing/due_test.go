package routing

import (
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/watch"
)

// TestDue: a flush is looked at whatever pods' interfaces do; looks at these alone leave time for
// others.
func TestDue(t *testing.T) {
	bucket, rest := time.Unix(1, 0), time.Unix(2, 0)
	for _, c := range []struct {
		pending watch.Causes
		want    time.Time
	}{
		{watch.Link, rest}, {watch.Link | watch.Address | watch.Route, rest}, {watch.Link | watch.NFTables, bucket},
		{watch.Rule, bucket}, {watch.Sweep | watch.Link, bucket},
	} {
		w := &watcher{pending: c.pending, notBefore: bucket, rest: rest}
		if got := w.due(); got != c.want {
			t.Errorf("%b: %v, want %v", c.pending, got, c.want)
		}
	}
}
