package routing

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/watch"
)

// What the last Install or Remove wanted.
const (
	Installed = "installed"
	Removed   = "removed"
)

// State is the file routing.json in the run directory. Whoever repairs rules obeys Desired;
// whoever may not read the rules shows Standing.
type State struct {
	Desired string `json:"desired"` // Installed or Removed; "" when nobody ever installed
	Closed  bool   `json:"closed,omitempty"`
	Mode    string `json:"mode,omitempty"`
	Reason  string `json:"reason,omitempty"`  // why mode auto came to it
	Command string `json:"command,omitempty"` // the iptables command that was used
	Listen  string `json:"listen,omitempty"`  // address:port
	// as configured, whether or not IPv6 says why it is not served
	Listen6           string           `json:"listen6,omitempty"`
	DNS               bool             `json:"dns,omitempty"`
	Uplinks           []string         `json:"uplinks,omitempty"` // as configured; none: found out
	ExcludeInterfaces []string         `json:"excludeInterfaces,omitempty"`
	HostPods          string           `json:"interceptHostPods,omitempty"`
	Link              string           `json:"link,omitempty"` // mode loopback's
	Force             bool             `json:"force,omitempty"`
	Guard             []netip.AddrPort `json:"guard,omitempty"`

	CloudServer CloudServer `json:"cloudMetadataServer,omitzero"` // where HostPods is auto: what was found out
	// what becomes of pods on the host network, and why, for people
	HostNetwork string `json:"hostNetworkPods,omitempty"`

	IPv6 string `json:"ipv6,omitempty"` // why requests by IPv6 are not redirected though Listen6 is set
	// why DNS queries for the metadata server's name are not, though DNS is set
	DNSRefused string `json:"dnsRefused,omitempty"`

	// of mode observe, as of Standing.Time; no more than publishedAtMost
	Observed []Observation `json:"observed,omitempty"`

	Since    time.Time `json:"since"`              // of Desired
	Installs int       `json:"installs,omitempty"` // since the node booted, for metrics
	// those of them that found something of an earlier one gone, for metrics
	Repairs  Repairs  `json:"repairs,omitempty"`
	Standing Standing `json:"standing"`
}

// Repairs counts what was found missing and put back: by layer, then by the cause that had somebody
// look. Both are words of this package's, so the map is bounded.
type Repairs map[string]map[string]int

// Total is the sum over all layers and causes.
func (r Repairs) Total() (n int) {
	for _, causes := range r {
		for _, times := range causes {
			n += times
		}
	}
	return n
}

// Each calls f with every layer and cause: 0 times for what was not counted, so that a rate over
// time sees the first repair.
func (r Repairs) Each(f func(layer, cause string, times int)) {
	for _, layer := range fault.All {
		for _, cause := range watch.Names {
			f(layer, cause, r[layer][cause])
		}
	}
}

// repair is an Install of the watcher's, or what a plain one found gone.
type repair struct {
	of     State        // what was desired when it was found
	why    watch.Causes // why somebody looked
	faults []error      // what was missing, and after an Install all that was missing when that began
	node   *node        // where it was found; may be nil
	mode   bool         // the mode's part may be among it
	found  string       // no repair at all: this was found out of the cloud's metadata server
	// layers in which nothing had gone: the node's interfaces or cgroups are others
	follows []string
}

// light says whether the mode's part is known to be as it should be.
func (r *repair) light() bool { return r != nil && r.node != nil && !r.mode }

// add adds what was found after the look that brought the repair, so that it is reported, too.
func (r *repair) add(faults ...error) {
	if r == nil || len(r.faults) == 0 {
		return
	}
	for _, err := range faults {
		if f, ok := err.(*fault.Fault); ok && !slices.Contains(texts(r.faults), f.Text) {
			r.faults = append(r.faults, f)
		}
	}
}

// causes are why somebody looked, by the layer in which something had gone. None had where the
// rules only follow the node's interfaces and cgroups.
func (r *repair) causes() map[string]string {
	causes := map[string]string{}
	for _, layer := range fault.Layers(r.faults) {
		if !slices.Contains(r.follows, layer) || layer == fault.Address || layer == fault.Route {
			causes[layer] = r.why.Behind(layer)
		}
	}
	return causes
}

func (s *State) count(r *repair) {
	if r == nil || len(r.causes()) == 0 {
		return
	}
	counted := Repairs{} // the old one is somebody else's too
	for layer, causes := range s.Repairs {
		counted[layer] = maps.Clone(causes)
	}
	for layer, cause := range r.causes() {
		if counted[layer] == nil {
			counted[layer] = map[string]int{}
		}
		counted[layer][cause]++
	}
	s.Repairs = counted
}

// sameDesired reports whether s and o desire the same.
func (s State) sameDesired(o State) bool {
	return s.Desired == o.Desired && s.Closed == o.Closed && s.Mode == o.Mode && s.Listen == o.Listen &&
		s.Listen6 == o.Listen6 && s.DNS == o.DNS && s.HostPods == o.HostPods && s.Link == o.Link && s.Force == o.Force &&
		slices.Equal(s.Uplinks, o.Uplinks) && slices.Equal(s.ExcludeInterfaces, o.ExcludeInterfaces) &&
		slices.Equal(s.Guard, o.Guard)
}

// Standing is what was read back from the kernel.
type Standing struct {
	Time   time.Time `json:"time"`
	Good   bool      `json:"good"`             // all that is desired stands, or after a removal: nothing of ours does
	Faults []string  `json:"faults,omitempty"` // what Check named, one a line
}

func statePath(runDir string) string {
	if runDir == "" {
		runDir = DefaultRunDir
	}
	return filepath.Join(runDir, "routing.json")
}

// ReadState reads what the last Install or Remove left in the run directory. Without one it returns
// the zero State.
func ReadState(runDir string) (State, error) {
	var s State
	b, err := os.ReadFile(statePath(runDir))
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	if err != nil {
		return State{}, fmt.Errorf("read routing state %s: %w", statePath(runDir), err)
	}
	return s, nil
}

// writeState replaces the file at once, so that a reader sees the old or the new one. The directory
// may belong to the unprivileged service: no link that leads out of it is followed.
func writeState(runDir string, s State) error {
	b, err := json.MarshalIndent(s, "", "\t")
	if err != nil {
		return err
	}
	err = replaceFile(runDir, "routing.json", b)
	if errors.Is(err, unix.ENOSPC) && overwrite(runDir, s) == nil {
		return nil
	}
	if err != nil {
		return fmt.Errorf("write routing state: %w", full(runDir, err))
	}
	return nil
}

// replaceFile replaces a file of the run directory at once.
func replaceFile(runDir, name string, b []byte) error {
	dir, err := os.OpenRoot(runDir)
	if err != nil {
		return err
	}
	defer dir.Close()
	temp := name + ".new" // under the lock there is one writer
	if err := dir.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := dir.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	if err = errors.Join(err, f.Chmod(0o644), f.Close()); err != nil { // whatever the umask
		return err
	}
	return dir.Rename(temp, name)
}

// overwrite writes the state over the file that is there, which takes no space. Blanks fill up what
// the text is shorter; what people read beside is left out where it is longer.
func overwrite(runDir string, s State) error {
	dir, err := os.OpenRoot(runDir)
	if err != nil {
		return err
	}
	defer dir.Close()
	f, err := dir.OpenFile("routing.json", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	short := s
	short.Repairs, short.Observed, short.Standing.Faults, short.Reason, short.HostNetwork = nil, nil, nil, "", ""
	for _, s := range []State{s, short} {
		b, err := json.Marshal(s)
		if err != nil {
			return err
		}
		if missing := int(info.Size()) - len(b); missing >= 0 {
			_, err = f.WriteAt(append(b, bytes.Repeat([]byte(" "), missing)...), 0)
			return err
		}
	}
	return unix.ENOSPC
}

// errFull is wrapped by errors that a full file system brings.
var errFull = errors.New("free space, or files, on the file system of the run directory and repeat this")

// full says what to do where the file system is full.
func full(runDir string, err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: %w (df %s; df -i %s)", err, errFull, runDir, runDir)
	}
	return err
}

// lock waits until no other Install or Remove runs on this node, at most as long as ctx lives, and
// returns what ends the lock. Readers (how is LOCK_SH) need no lock where nobody ever installed.
func lock(ctx context.Context, runDir string, how int) (unlock func(), err error) {
	path := filepath.Join(runDir, "routing.lock")
	flags := os.O_RDONLY | unix.O_CLOEXEC | unix.O_NOFOLLOW
	if how == unix.LOCK_EX {
		if err := os.MkdirAll(runDir, 0o755); err != nil {
			return nil, fmt.Errorf("make the run directory: %w", full(filepath.Dir(runDir), err))
		}
		flags = os.O_RDWR | os.O_CREATE | unix.O_CLOEXEC | unix.O_NOFOLLOW
	}
	f, err := os.OpenFile(path, flags, 0o600) // who could read it could hold it
	if how == unix.LOCK_SH && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission)) {
		return func() {}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open the routing lock: %w", full(runDir, fault.Permission(err)))
	}
	for {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		switch {
		case err == nil:
			return func() { _ = f.Close() }, nil
		case errors.Is(err, unix.EINTR):
			continue
		case !errors.Is(err, unix.EWOULDBLOCK):
			_ = f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if err := pause(ctx, 10*time.Millisecond); err != nil {
			_ = f.Close()
			return nil, fmt.Errorf("another routing command holds %s: %w", path, err)
		}
	}
}

// pause waits for d, or for the end of ctx with its cause.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
