package attest

import (
	"net"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A helper that is short of descriptors, or that its own user floods, goes on: it serves those who
// are connected, and others when it can again.
func TestHelperIsFlooded(t *testing.T) {
	b := newTestNode(t)
	c := b.client(containerPath(1, 1), b.pod("one"))
	b.startHelper()
	b.mustBe(c, dial, podUID(1), containerIDOf(1))
	pid := b.helper.Process.Pid
	connect := func() *net.UnixConn {
		t.Helper()
		conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: b.socket, Net: "unixpacket"})
		if err != nil {
			t.Fatalf("the helper is not there: %v", err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	var before unix.Rlimit
	low := unix.Rlimit{Cur: uint64(openFiles(t, strconv.Itoa(pid))), Max: 1024}
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &low, &before); err != nil {
		t.Fatal(err)
	}
	waits := connect() // is not accepted
	eventually(t, "those who are connected are served meanwhile", func() bool {
		search := b.kernel.Search()
		signal(b.kernel.scan)
		eventually(t, "a search ends", func() bool { return b.kernel.Searched(search) })
		return true
	})
	before.Cur = min(before.Cur, 1024)
	low.Cur = 1024
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &low, nil); err != nil {
		t.Fatal(err)
	}
	_ = waits.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := waits.Read(make([]byte, maxMessage)); n == 0 || err != nil {
		t.Fatalf("whoever waited gets %d bytes, %v", n, err)
	}

	descriptors := openFiles(t, strconv.Itoa(pid))
	for range 300 {
		connect()
	}
	if n := openFiles(t, strconv.Itoa(pid)); n > descriptors+3*maxServers+10 {
		t.Errorf("the helper has %d descriptors open, and had %d before the flood", n, descriptors)
	}
	b.mustBe(b.client(containerPath(2, 2), b.pod("two")), dial, podUID(2), containerIDOf(2))
}
