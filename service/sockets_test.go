package service

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/status"
)

// ends returns what run returned, and fails the test if it goes on.
func ends(t *testing.T, run func(context.Context) error) error {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	over := make(chan error, 1)
	go func() { over <- run(ctx) }()
	select {
	case err := <-over:
		return err
	case <-time.After(testTimeout):
		stop()
		<-over
		t.Error("it runs beside the first one")
		return nil
	}
}

// A second `serve` by hand ends, names the process of the first, and leaves the first one's status
// socket.
func TestSecondServe(t *testing.T) {
	b := newTestNode(t)
	err := ends(t, func(ctx context.Context) error {
		return Run(ctx, Options{Load: b.read, RunDir: b.dir, Version: "second", Stderr: io.Discard})
	})
	if want := fmt.Sprintf("process %d (", os.Getpid()); err == nil || !strings.Contains(err.Error(), want) ||
		!strings.Contains(err.Error(), "systemctl stop") {
		t.Errorf("%v, want %q", err, want)
	}
	if text, err := status.Fetch(t.Context(), filepath.Join(b.dir, "status.sock")); err != nil ||
		!strings.Contains(string(text), `"version": "test"`) {
		t.Errorf("status of the first: %v %s", err, text)
	}
}

// A second `attest` by hand ends too, and the service still reaches the first.
func TestSecondAttest(t *testing.T) {
	dir := t.TempDir()
	socket := namespaceSocket(dir)
	helper := func(ctx context.Context) error {
		return HandOverNamespaces(ctx, Options{RunDir: dir, Stderr: io.Discard})
	}
	ctx, stop := context.WithCancel(t.Context())
	first := make(chan error, 1)
	go func() { first <- helper(ctx) }()
	var before os.FileInfo
	(&testNode{}).eventually(t, "the first one listens", func() (there bool) {
		var err error
		before, err = os.Lstat(socket)
		return err == nil
	})
	err := ends(t, helper)
	if want := fmt.Sprintf("process %d (", os.Getpid()); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%v, want %q", err, want)
	}
	if after, err := os.Lstat(socket); err != nil || !os.SameFile(before, after) {
		t.Errorf("the first one's socket is gone, or another one: %v", err)
	}
	stop()
	if err := <-first; err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it left its socket behind: %v", err)
	}
}

func TestListenUnix(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.sock")
	listen := func() (*unixListener, error) { return listenUnix(t.Context(), "unix", path, "x.service") }

	// Of many that start at once one listens; it takes the place of a socket whose process is dead.
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	_ = dead.Close()
	var mu sync.Mutex
	var all []*unixListener
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			l, err := listen()
			if err != nil && !errors.Is(err, errSocketInUse) {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				all = append(all, l)
			}
		})
	}
	wg.Wait()
	if len(all) != 1 {
		t.Fatalf("%d listen", len(all))
	}
	if s, err := os.Lstat(path); err != nil || s.Mode().Perm() != 0o660 {
		t.Errorf("%v %v", s, err)
	}

	// Whoever had the path before does not remove what another process made there.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	second, err := listen()
	if err != nil {
		t.Fatal(err)
	}
	if err := all[0].Close(); err != nil {
		t.Error(err)
	}
	if _, err := listen(); !errors.Is(err, errSocketInUse) {
		t.Errorf("the second one's socket is gone: %v", err)
	}
	if err := second.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it left its socket behind: %v", err)
	}
}

// A TCP address in use: the error names the process, for every address that we listen on.
func TestAddressInUse(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	want := fmt.Sprintf("(process %d) listens on %s", os.Getpid(), l.Addr())
	_, err = listen(t.Context(), "listen", addrPortOf(l))
	if !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(err.Error(), want) {
		t.Errorf("%v, want %q", err, want)
	}
	log := new(syncBuffer)
	s := newService(Options{Load: func() (config.Config, error) { return config.Config{}, nil }, RunDir: t.TempDir(),
		Stderr: log})
	if err := s.serveHealth(t.Context(), addrPortOf(l)); err != nil || !strings.Contains(log.String(), want) {
		t.Errorf("%v, %s, want %q", err, log, want)
	}
	// A connection holds its port as well, and is no listener.
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, err = listen(t.Context(), "listen", c.LocalAddr().(*net.TCPAddr).AddrPort())
	if err == nil || !strings.Contains(err.Error(), "ss -tanp") {
		t.Errorf("%v", err)
	}
}
