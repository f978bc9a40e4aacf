package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/status"
)

// runDir is root's directory for the state of the rules and the lock, which stay when the service
// ends. It is not $RUNTIME_DIRECTORY, which belongs to the service's unprivileged user and which
// systemd also sets for the unit's privileged steps.
func runDir() string {
	if dir := os.Getenv("GKE_METADATA_EMULATOR_RUN"); dir != "" { // for tests and the demo
		return dir
	}
	return "/run/" + program
}

// statusSocket is in the unit's RuntimeDirectory=, the only directory that the service's user may
// write to.
func statusSocket() string { return filepath.Join(runDir(), "serve", "status.sock") }

// healthListen is where a service with the configuration on disk answers /readyz.
func healthListen(cmd *cobra.Command) netip.AddrPort {
	c, err := config.Load(configFile(cmd), nil)
	if err != nil {
		c = config.Default()
	}
	return c.HealthListen
}

func statusCommand() *cobra.Command {
	var socket, output string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Print the state of the running service: listener, rules, pods, tokens without values, errors",
		Example: `  sudo gke-metadata-emulator status
  sudo gke-metadata-emulator status --output json | jq .cluster.pods`,
		Args: arguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return &usageError{fmt.Sprintf("--output is text or json, not %q", output)}
			}
			if socket == "" {
				socket = statusSocket()
			}
			text, err := status.Fetch(cmd.Context(), socket)
			if errors.Is(err, status.ErrNotRunning) {
				if failed, e := routing.ReadFailure(runDir()); e == nil && failed != nil {
					return fmt.Errorf("%w; %s", err, status.FailureText(failed, time.Now()))
				}
			}
			if errors.Is(err, fs.ErrPermission) {
				return status.Denied(cmd.Context(), err, healthListen(cmd))
			}
			if err != nil {
				return err
			}
			if output == "json" {
				_, err = cmd.OutOrStdout().Write(text)
				return err
			}
			var s status.Status
			if err := json.Unmarshal(text, &s); err != nil {
				return fmt.Errorf("the answer of %s cannot be read: %w: restart the service if it has another version", socket, err)
			}
			return s.Text(cmd.OutOrStdout(), time.Now())
		},
	}
	cmd.Flags().StringVar(&output, "output", "text", "text for a person, json for a program")
	cmd.Flags().StringVar(&socket, "socket", "", "the service's socket (default /run/"+program+"/serve/status.sock)")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"},
		cobra.ShellCompDirectiveNoFileComp))
	return cmd
}
