package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// emulator runs the real binary on the node, as systemd does.
type emulator struct {
	binary string
	world  *world

	serve  *daemon
	helper *daemon // nil: there are no cgroups
}

// in returns a command of the binary on the node, with the environment and the cgroups that systemd
// would give it.
func (e *emulator) in(ctx context.Context, args ...string) *exec.Cmd {
	line := append([]string{e.binary}, args...)
	if g := e.world.cgroups; g != nil && g.Mount != nil {
		line = append([]string{"unshare", "--mount", "--propagation=private", "sh", "-c",
			`mount -t cgroup2 cgroup2 ` + cgroupRoot + ` && exec "$0" "$@"`}, line...)
	}
	cmd := e.world.node.Command(ctx, line[0], line[1:]...)
	cmd.Env = append(os.Environ(), "GKE_METADATA_EMULATOR_RUN="+e.world.dir)
	return cmd
}

func (e *emulator) command(ctx context.Context, args ...string) error {
	return e.commandTo(ctx, io.Discard, args...)
}

// commandTo runs a command that reads the configuration, and waits for its end.
func (e *emulator) commandTo(ctx context.Context, stdout io.Writer, args ...string) error {
	cmd := e.in(ctx, append(args, e.configuration())...)
	var stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = stdout, &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("gke-metadata-emulator %s: %w: %s", strings.Join(args, " "), err, &stderr)
	}
	return nil
}

func (e *emulator) configuration() string {
	return "--config=" + filepath.Join(e.world.dir, "config.yaml")
}

// start starts the helper and the service.
func (e *emulator) start(ctx context.Context) (err error) {
	if e.world.cgroups != nil {
		if e.helper, err = e.daemon(ctx, "attest"); err != nil {
			return err
		}
	}
	if e.serve, err = e.daemon(ctx, "serve", e.configuration()); err != nil {
		return errors.Join(err, e.stop())
	}
	return nil
}

func (e *emulator) stop() error { return errors.Join(e.serve.stop(), e.helper.stop()) }

// said returns the logs of both.
func (e *emulator) said() string { return e.serve.said() + e.helper.said() }

// daemon is a running process of the emulator.
type daemon struct {
	*exec.Cmd
	notify     *net.UnixConn
	log        syncBuffer
	readyAfter time.Duration
}

// daemon starts a process and waits for READY=1, as systemd does for Type=notify.
func (e *emulator) daemon(ctx context.Context, args ...string) (*daemon, error) {
	path := filepath.Join(e.world.dir, args[0]+"-notify.sock")
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	d := &daemon{Cmd: e.in(context.WithoutCancel(ctx), args...), notify: notify}
	d.Env = append(d.Env, "NOTIFY_SOCKET="+path)
	d.Stdout, d.Stderr = &d.log, &d.log
	began := time.Now()
	// In system.slice, as a unit of the node: the emulator finds the node's root cgroup by it.
	if g := e.world.cgroups; g != nil {
		err = g.Start(e.world.node.NS, "system.slice/gke-metadata-emulator.service", d.Cmd)
	} else {
		err = d.Start()
	}
	if err != nil {
		return nil, errors.Join(err, notify.Close())
	}
	if err := notify.SetReadDeadline(began.Add(10 * time.Second)); err != nil {
		return nil, errors.Join(err, d.stop())
	}
	for buf := make([]byte, 4096); ; {
		n, err := notify.Read(buf)
		if err != nil {
			err = fmt.Errorf("gke-metadata-emulator %s: no READY=1: %w; its log:\n%s", args[0], err, d.said())
			return nil, errors.Join(err, d.stop())
		}
		if strings.Contains("\n"+string(buf[:n]), "\nREADY=1") {
			d.readyAfter = time.Since(began)
			_ = notify.SetReadDeadline(time.Time{})
			go func() { _, _ = io.Copy(io.Discard, notify) }() // or it would block on a full socket
			return d, nil
		}
	}
}

// stop ends the process as systemd does.
func (d *daemon) stop() error {
	if d == nil {
		return nil
	}
	defer func() { _ = d.notify.Close() }()
	if err := d.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	kill := time.AfterFunc(10*time.Second, func() { _ = d.Process.Kill() })
	defer kill.Stop()
	if err := d.Wait(); err != nil {
		return fmt.Errorf("gke-metadata-emulator: %w; its log:\n%s", err, d.said())
	}
	return nil
}

func (d *daemon) said() string {
	if d == nil {
		return ""
	}
	return d.log.String()
}

// syncBuffer is a bytes.Buffer that may be read while a process writes to it.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}
