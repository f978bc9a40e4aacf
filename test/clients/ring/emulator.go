package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// emulator runs the real binary on the node as systemd does: it keeps the listener over
// restarts, as the socket unit does.
type emulator struct {
	world    *world
	binary   string
	listener net.Listener
	file     *os.File // the listener's
	log      *os.File
	serve    *exec.Cmd
	notify   *net.UnixConn
	rules    bool
}

func (e *emulator) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := e.world.node.Command(ctx, name, args...)
	cmd.Env = append(os.Environ(), "GKE_METADATA_EMULATOR_RUN="+e.world.dir)
	return cmd
}

func (e *emulator) configuration() string {
	return "--config=" + filepath.Join(e.world.dir, "config.yaml")
}

// routing runs `routing install` or `routing remove`.
func (e *emulator) routing(ctx context.Context, verb string) error {
	out, err := e.command(ctx, e.binary, "routing", verb, e.configuration()).CombinedOutput()
	if err != nil {
		return fmt.Errorf("routing %s: %w: %s", verb, err, out)
	}
	e.rules = verb == "install"
	return nil
}

// start starts the service and waits for READY=1.
func (e *emulator) start(ctx context.Context) (err error) {
	if e.listener == nil {
		if e.listener, err = e.world.node.Listen("tcp4", listen); err != nil {
			return err
		}
		if e.file, err = e.listener.(*net.TCPListener).File(); err != nil {
			return err
		}
		e.log, err = os.OpenFile(filepath.Join(e.world.dir, "service.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
	}
	path := filepath.Join(e.world.dir, "notify.sock")
	_ = os.Remove(path) // of the process before
	if e.notify, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"}); err != nil {
		return err
	}
	e.serve = e.command(context.WithoutCancel(ctx), "sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" "$@"`,
		e.binary, "serve", e.configuration())
	e.serve.Env = append(e.serve.Env, "NOTIFY_SOCKET="+path)
	e.serve.ExtraFiles = []*os.File{e.file}
	e.serve.Stdout, e.serve.Stderr = e.log, e.log
	if err := e.serve.Start(); err != nil {
		e.serve = nil
		return err
	}
	if err := e.notify.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return err
	}
	for buf := make([]byte, 4096); ; {
		n, err := e.notify.Read(buf)
		if err != nil {
			return fmt.Errorf("gke-metadata-emulator serve: no READY=1 within 30 s: %w: see service.log", err)
		}
		if strings.Contains("\n"+string(buf[:n]), "\nREADY=1") {
			_ = e.notify.SetReadDeadline(time.Time{})
			go func(c io.Reader) { _, _ = io.Copy(io.Discard, c) }(e.notify) // or the service would block on a full socket
			return nil
		}
	}
}

// stop ends the service as systemd does. The listener stays.
func (e *emulator) stop() error {
	if e.serve == nil {
		return nil
	}
	cmd := e.serve
	e.serve = nil
	defer func() { _ = e.notify.Close() }()
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	kill := time.AfterFunc(15*time.Second, func() { _ = cmd.Process.Kill() })
	defer kill.Stop()
	return cmd.Wait()
}

// close ends the service, and removes the rules and the listener.
func (e *emulator) close() error {
	err := e.stop()
	if e.rules {
		err = errors.Join(err, e.routing(context.Background(), "remove"))
	}
	if e.listener != nil {
		err = errors.Join(err, e.listener.Close(), e.file.Close(), e.log.Close())
		e.listener = nil
	}
	return err
}
