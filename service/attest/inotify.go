package attest

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// inotifyEvent is a struct inotify_event.
type inotifyEvent struct {
	watch  int32
	mask   uint32
	padded []byte // the name, and zeros up to the next event
}

// parseInotify reads the first event of b, which holds one.
func parseInotify(b []byte) inotifyEvent {
	e := inotifyEvent{watch: int32(binary.NativeEndian.Uint32(b)), mask: binary.NativeEndian.Uint32(b[4:])}
	rest := b[unix.SizeofInotifyEvent:]
	e.padded = rest[:min(uint64(binary.NativeEndian.Uint32(b[12:])), uint64(len(rest)))]
	return e
}

func (e inotifyEvent) name() string {
	name, _, _ := bytes.Cut(e.padded, []byte{0})
	return string(name)
}

// subdirectories returns the inodes of a directory's directories by name. os.ReadDir leaves them
// out, and asks for each again.
func subdirectories(path string) (map[string]uint64, error) {
	var s unix.Stat_t
	// itself and its name above: no directory below, as in every second cgroup
	if err := unix.Stat(path, &s); err == nil && s.Nlink == 2 {
		return nil, nil
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	defer func() { _ = unix.Close(fd) }()
	var found map[string]uint64
	buffer := make([]byte, 8<<10)
	for {
		n, err := unix.Getdents(fd, buffer)
		if err != nil || n == 0 {
			return found, err
		}
		for b := buffer[:n]; len(b) > 19; b = b[binary.NativeEndian.Uint16(b[16:]):] { // struct linux_dirent64
			if b[18] != unix.DT_DIR {
				continue
			}
			name, _, _ := bytes.Cut(b[19:binary.NativeEndian.Uint16(b[16:])], []byte{0})
			if string(name) == "." || string(name) == ".." {
				continue
			}
			if found == nil {
				found = map[string]uint64{}
			}
			found[string(name)] = binary.NativeEndian.Uint64(b)
		}
	}
}
