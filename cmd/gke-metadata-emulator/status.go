package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service"
)

// runDir is root's: the state of the rules and the lock lie there, and outlive the service. It is not what systemd says in
// $RUNTIME_DIRECTORY, which belongs to the service's unprivileged user and is told to the unit's privileged steps too.
func runDir() string {
	if dir := os.Getenv("GKE_METADATA_EMULATOR_RUN"); dir != "" { // the tests' and the demo's
		return dir
	}
	return "/run/" + program
}

// statusSocket is in the unit's RuntimeDirectory=, the one place that the service's user may write to.
func statusSocket() string { return filepath.Join(runDir(), "serve", "status.sock") }

func statusCommand() *cobra.Command {
	var socket, output string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Say what the running service does: listener, rules, pods, tokens (never their values), errors",
		Args:  arguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return &usageError{fmt.Sprintf("--output is text or json, not %q", output)}
			}
			if socket == "" {
				socket = statusSocket()
			}
			text, err := fetchStatus(cmd.Context(), socket)
			if err != nil {
				return err
			}
			if output == "json" {
				_, err = cmd.OutOrStdout().Write(text)
				return err
			}
			var s service.Status
			if err := json.Unmarshal(text, &s); err != nil {
				return fmt.Errorf("reading the answer of %s: %w", socket, err)
			}
			return s.Text(cmd.OutOrStdout(), time.Now())
		},
	}
	cmd.Flags().StringVar(&output, "output", "text", "text for a person, json for a program")
	cmd.Flags().StringVar(&socket, "socket", "", "the service's socket (default /run/"+program+"/serve/status.sock)")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// fetchStatus asks the service over its Unix socket.
func fetchStatus(ctx context.Context, socket string) ([]byte, error) {
	const most = 64 << 20 // thousands of pods and their tokens' ages
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://service/status", nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("the service is not running: there is no %s: systemctl start %s", socket, program)
	case errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("the service is not running: nobody answers at %s: systemctl start %s", socket, program)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%s is for root and the service's group: %w", socket, fs.ErrPermission)
	case err != nil:
		return nil, fmt.Errorf("asking the service at %s: %w", socket, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, most))
	if err != nil {
		return nil, fmt.Errorf("asking the service at %s: %w", socket, err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("asking the service at %s: %s", socket, resp.Status)
	}
	return text, nil
}
