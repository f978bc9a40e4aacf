package service

import (
	"bufio"
	"strings"
	"testing"
	"time"
)

// TestWaitOutlivesNobody: a request that waits for a change (H-12) while its pod dies is not
// answered when its time is over, though Kubernetes says that the pod lives: whoever holds the
// connection now is another.
func TestWaitOutlivesNobody(t *testing.T) {
	k := newKernelNode(t, "prefetch: none")
	ns, err := k.node.AddPod("waiter")
	if err != nil {
		t.Fatal(err)
	}
	p := k.newPod("waiter", ns)
	if err := p.start(); err != nil {
		t.Fatal(err)
	}
	p.tell()
	const path = accts + "default/email"
	etag := p.served(t, path).Header.Get("ETag")
	if a, err := p.ask("kept", path); err != nil || a.Status != 200 {
		t.Fatalf("%+v %v", a, err)
	}
	kept, err := p.pass()
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()
	heard := make(chan said, 1)
	go func() {
		heard <- exchangeOn(kept, bufio.NewReader(kept), path+"?wait_for_change=true&timeout_sec=3&last_etag="+etag)
	}()
	<-time.After(200 * time.Millisecond) // it waits by now; where it does not, it is refused all the same
	p.die()
	if a := receive(t, heard); a.Status != 503 || !strings.Contains(a.Body, "process or pod has ended") {
		t.Errorf("%+v", a)
	}
}
