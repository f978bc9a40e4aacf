package main

import (
	"errors"
	"fmt"
	"os"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// probe is a load from the start of the pods until this process ends. It writes the outcomes of
// each second to a file, which can be read after a reboot of the machine. Each second with an
// outcome has a line:
//
//	boot=2f1c… up=12.503 answered=240 cloud=0 refused=2 # 10:15:03.127 refused: connection refused
//
// boot is the kernel's boot_id, up its uptime in seconds at the end of that second, cloud the
// number of requests at the cloud's metadata server. The text after # is an example of an error.
// The last line has the word "ended"; without that word the end of the load was not recorded.
type probe struct {
	world *world
	load  loaded
	file  *os.File
	boot  string
	stop  chan struct{}
	done  chan struct{}

	counted map[string]int // the sums of the lines so far
	err     error
}

func (w *world) beginProbe(path string) (*probe, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, err
	}
	// Lines of earlier boots stay. A line is in the page cache once it is written, and on the disk
	// after the shutdown.
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	load, err := beginLoads(metadataAddr, w.reader, w.writer)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	p := &probe{world: w, load: load, file: f, boot: strings.TrimSpace(string(id)),
		stop: make(chan struct{}), done: make(chan struct{}), counted: map[string]int{}}
	go p.write()
	return p, nil
}

func (p *probe) write() {
	defer close(p.done)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			p.line(p.load.counts())
		case <-p.stop:
			return
		}
	}
}

// line writes the outcomes since the last line.
func (p *probe) line(c Counts, err error, remarks ...string) {
	var up unix.Timespec
	err = errors.Join(err, unix.ClockGettime(unix.CLOCK_BOOTTIME, &up))
	now := c.Of
	now["cloud"] = int(p.world.cloudAsked.Load())
	var words []string
	for what, n := range now {
		if n != p.counted[what] || what == "cloud" {
			words = append(words, fmt.Sprintf("%s=%d", what, n-p.counted[what]))
		}
	}
	sort.Strings(words)
	words = append(words, remarks...)
	if len(c.Examples) > 0 {
		words = append(words, "#", c.Examples[0])
	}
	p.counted = now
	_, wrote := fmt.Fprintf(p.file, "boot=%s up=%.3f %s\n", p.boot, float64(up.Nano())/1e9, strings.Join(words, " "))
	p.err = errors.Join(p.err, err, wrote)
}

// end waits for requests in flight, and writes the last line.
func (p *probe) end() error {
	c, err := p.load.end()
	close(p.stop)
	<-p.done
	p.line(c, err, "ended")
	return errors.Join(p.err, p.file.Close())
}
