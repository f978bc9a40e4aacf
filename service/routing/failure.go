package routing

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// Failure is the file routing-failure.json in the run directory: why the last `routing install`
// failed. The first one that succeeds removes it.
type Failure struct {
	Error string    `json:"error"`
	Since time.Time `json:"since"` // of the first of them
	Last  time.Time `json:"last"`
	Times int       `json:"times"` // in a row
}

const failureName = "routing-failure.json"

// NoteInstall writes down what an install came to, and returns the failure if it is one. That the
// file cannot be written is no failure of its own: a file from before may stay.
func NoteInstall(runDir string, err error) *Failure {
	if err == nil {
		_ = os.Remove(filepath.Join(runDir, failureName))
		return nil
	}
	now := time.Now()
	f := Failure{Since: now}
	if before, e := ReadFailure(runDir); e == nil && before != nil {
		f = *before
	}
	f.Error, f.Last, f.Times = err.Error(), now, f.Times+1
	if b, err := json.MarshalIndent(f, "", "\t"); err == nil {
		_ = replaceFile(runDir, failureName, b)
	}
	return &f
}

// ReadFailure returns nil where the last install succeeded, or there was none.
func ReadFailure(runDir string) (*Failure, error) {
	b, err := os.ReadFile(filepath.Join(runDir, failureName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	f := new(Failure)
	if err == nil {
		err = json.Unmarshal(b, f)
	}
	if err != nil {
		return nil, fmt.Errorf("read why the last install failed: %w", err)
	}
	return f, nil
}

// Delay is how long to wait before the next try: it doubles with each failure. The unit's
// TimeoutStartSec= is longer than an install and the longest delay.
func (f *Failure) Delay() time.Duration {
	const first, most = 250 * time.Millisecond, 15 * time.Second
	return min(first<<min(f.Times-1, 10), most)
}
