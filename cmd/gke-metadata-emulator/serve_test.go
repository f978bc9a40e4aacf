package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// with a listener of systemd's a missing configuration is a state. READY, STATUS says what is
// wrong, pods get 503 with the reason, and the file ends it; SIGTERM says STOPPING=1 and exits with
// 0.
func TestServeWithSystemdsListener(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	file, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	url := "http://" + l.Addr().String()
	l.Close() // the descriptor goes on listening, as systemd's does

	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notify.Close()
	config := filepath.Join(dir, "config.yaml")
	cmd := exec.CommandContext(t.Context(), "sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, program, "serve", "--config",
		config)
	cmd.Env = append(os.Environ(), "LISTEN_FDS=1", "NOTIFY_SOCKET="+filepath.Join(dir, "notify"), "WATCHDOG_USEC=300000",
		"GKE_METADATA_EMULATOR_RUN="+dir)
	cmd.ExtraFiles = []*os.File{file}
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	defer func() { _ = cmd.Process.Kill() }()

	expect := func(want string) {
		t.Helper()
		_ = notify.SetReadDeadline(time.Now().Add(10 * time.Second))
		for buf := make([]byte, 4096); ; {
			n, err := notify.Read(buf)
			if err != nil {
				t.Fatalf("no %q: %v", want, err)
			}
			if strings.Contains(string(buf[:n]), want) {
				return
			}
		}
	}
	get := func(path string) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Metadata-Flavor", "Google")
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		body, _ := io.ReadAll(res.Body)
		return res.StatusCode, string(body)
	}
	expect("STATUS=not configured: ")
	if status, body := get("/computeMetadata/v1/project/project-id"); status != 503 || !strings.Contains(body, config) ||
		!strings.Contains(body, "no such file") {
		t.Errorf("not configured: %d %s", status, body)
	}
	expect("WATCHDOG=1")

	text := fmt.Sprintf("workloadIdentityProvider: %s\nprojectID: my-project\nkubeconfig: /absent\nrouting: {mode: "+
		"none}\nattestation: {mode: source-ip}\nhealthListen: 127.0.0.1:0\n", testProvider)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	expect("STATUS=serving")
	// Without a cluster nobody is known.
	if status, body := get("/computeMetadata/v1/project/project-id"); status != 503 ||
		!strings.Contains(body, "no usable kubeconfig: /absent") {
		t.Errorf("configured: %d %s", status, body)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	expect("STOPPING=1")
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("after SIGTERM: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("SIGTERM does not end it")
	}
	if t.Failed() {
		t.Log(log.String())
	}
}

// TestServeWithTwoListeners: what systemd hands over for listen6 is served as well, in whatever
// order it comes (H-24).
func TestServeWithTwoListeners(t *testing.T) {
	dir := t.TempDir()
	var files []*os.File
	var urls []string
	for _, at := range []string{"[::1]:0", "127.0.0.1:0"} {
		l, err := net.Listen("tcp", at)
		if err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatal(err)
			}
			t.Skip(err)
		}
		file, err := l.(*net.TCPListener).File()
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		files, urls = append(files, file), append(urls, "http://"+l.Addr().String()+"/computeMetadata/v1/project/project-id")
		l.Close()
	}
	cmd := exec.CommandContext(t.Context(), "sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, program, "serve", "--config",
		filepath.Join(dir, "absent.yaml"))
	cmd.Env = append(os.Environ(), "LISTEN_FDS=2", "GKE_METADATA_EMULATOR_RUN="+dir)
	cmd.ExtraFiles = files
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("after SIGTERM: %v\n%s", err, &log)
		}
	}()
	client := http.Client{Timeout: 20 * time.Second} // the descriptors listen already
	for _, url := range urls {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Metadata-Flavor", "Google")
		res, err := client.Do(req)
		if err != nil {
			t.Fatalf("%s: %v", url, err)
		}
		defer res.Body.Close()
		if body, _ := io.ReadAll(res.Body); res.StatusCode != 503 || !strings.Contains(string(body), "not configured") {
			t.Errorf("%s: %d %s", url, res.StatusCode, body)
		}
	}
}
