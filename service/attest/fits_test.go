package attest

import (
	"testing"
	"time"
)

// TestLive: who closed his own direction is a client still, and whose other end closed is
// none.
func TestLive(t *testing.T) {
	for state := range uint8(14) {
		if got, want := (socketFound{state: state}).live(), state == 1 || state == 4 || state == 5; got != want {
			t.Errorf("state %d: live = %v", state, got)
		}
	}
}

// TestFits: the socket at the other end fits, however long it was idle and whatever was said; one
// of an earlier connection does not.
func TestFits(t *testing.T) {
	s := ownSocket(t)
	client, server := pair(t, "tcp4", "127.0.0.1:0")
	look := func() socketFound {
		t.Helper()
		f, ok, err := s.socket(addrPort(client.LocalAddr()), addrPort(client.RemoteAddr()), 0)
		if err != nil || !ok || !f.counted {
			t.Fatalf("%+v, %v, %v", f, ok, err)
		}
		return f
	}
	ours := accepted(server).end
	fits := func(what string) {
		t.Helper()
		if f := look(); !ours.fits(f) {
			t.Errorf("%s: %+v does not fit", what, f)
		}
	}
	fits("at accept")
	for deadline := time.Now().Add(10 * time.Second); look().
		acknowledged < fitSlack+200; <-time.After(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%+v is not idle", look())
		}
		fits("idle")
	}
	other, theirs := pair(t, "tcp4", "127.0.0.1:0")
	defer other.Close()
	if f := look(); accepted(theirs).end.fits(f) {
		t.Errorf("%+v fits a connection that is younger", f)
	}
	if _, err := client.Write([]byte("a request after a while")); err != nil {
		t.Fatal(err)
	}
	fits("asking after a while")
	if _, err := server.Write([]byte("answer")); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Read(make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	fits("answered")
	f := look()
	if f.received != 6 {
		t.Errorf("%+v, which received 6 bytes", f)
	}
	if f.received++; ours.fits(f) {
		t.Errorf("%+v received more than was sent, and fits", f)
	}
	if f.counted = false; !ours.fits(f) {
		t.Errorf("a kernel that does not count lets nobody in")
	}
	f = look()
	server.Close()
	if ours.fits(f) {
		t.Error("the client of a closed connection fits")
	}
	if !(end{}).fits(f) {
		t.Error("without a socket there is nothing that it could not fit")
	}
}
