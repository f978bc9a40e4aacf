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

// emulator runs the real binary inside the node, in systemd's place.
type emulator struct {
	binary string
	world  *world

	serve      *exec.Cmd
	notify     *net.UnixConn
	log        syncBuffer
	readyAfter time.Duration
}

// in returns a command of the binary inside the node, with what systemd would give it.
func (e *emulator) in(ctx context.Context, args ...string) *exec.Cmd {
	cmd := e.world.node.Command(ctx, e.binary, append(args, "--config", filepath.Join(e.world.dir, "config.yaml"))...)
	cmd.Env = append(os.Environ(), "GKE_METADATA_EMULATOR_RUN="+e.world.dir)
	return cmd
}

func (e *emulator) command(ctx context.Context, args ...string) error {
	return e.commandTo(ctx, io.Discard, args...)
}

func (e *emulator) commandTo(ctx context.Context, stdout io.Writer, args ...string) error {
	cmd := e.in(ctx, args...)
	var stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = stdout, &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("gke-metadata-emulator %s: %w: %s", strings.Join(args, " "), err, &stderr)
	}
	return nil
}

// start runs serve and waits for READY=1, as systemd does for Type=notify.
func (e *emulator) start(ctx context.Context) error {
	path := filepath.Join(e.world.dir, "notify.sock")
	var err error
	if e.notify, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"}); err != nil {
		return err
	}
	e.serve = e.in(context.WithoutCancel(ctx), "serve")
	e.serve.Env = append(e.serve.Env, "NOTIFY_SOCKET="+path)
	e.serve.Stdout, e.serve.Stderr = &e.log, &e.log
	began := time.Now()
	if err := e.serve.Start(); err != nil {
		return err
	}
	if err := e.notify.SetReadDeadline(began.Add(10 * time.Second)); err != nil {
		return err
	}
	for buf := make([]byte, 4096); ; {
		n, err := e.notify.Read(buf)
		if err != nil {
			return errors.Join(fmt.Errorf("no READY=1: %w; it says:\n%s", err, e.log.String()), e.stop())
		}
		if strings.Contains("\n"+string(buf[:n]), "\nREADY=1") {
			e.readyAfter = time.Since(began)
			return nil
		}
	}
}

// stop ends serve as systemd does.
func (e *emulator) stop() error {
	if e.serve == nil || e.serve.Process == nil {
		return nil
	}
	defer e.notify.Close()
	if err := e.serve.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	kill := time.AfterFunc(10*time.Second, func() { _ = e.serve.Process.Kill() })
	defer kill.Stop()
	if err := e.serve.Wait(); err != nil {
		return fmt.Errorf("gke-metadata-emulator serve: %w; it says:\n%s", err, e.log.String())
	}
	return nil
}

// syncBuffer is a bytes.Buffer for a process that writes while it is read.
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
