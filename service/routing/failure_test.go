package routing

import (
	"errors"
	"testing"
	"time"
)

// A failure that lasts is tried again less and less often: 23 times in 10 s without a delay of our
// own.
func TestInstallFailure(t *testing.T) {
	dir := t.TempDir()
	var waited time.Duration
	tries := 0
	for ; waited < time.Minute; tries++ {
		f := NoteInstall(dir, errors.New("no space left"))
		if f.Times != tries+1 || f.Delay() > 15*time.Second {
			t.Fatalf("%+v, delay %s", f, f.Delay())
		}
		waited += f.Delay()
	}
	if tries > 10 {
		t.Errorf("%d tries in a minute", tries)
	}
	f, err := ReadFailure(dir)
	if err != nil || f.Times != tries || f.Error != "no space left" || f.Since.After(f.Last) {
		t.Errorf("%+v, %v", f, err)
	}
	f.Times = 1 << 30
	if f.Delay() != 15*time.Second {
		t.Errorf("after very many: %s", f.Delay())
	}
	if NoteInstall(dir, nil) != nil {
		t.Error("a success is no failure")
	}
	if f, err := ReadFailure(dir); f != nil || err != nil {
		t.Errorf("%+v, %v", f, err)
	}
}
