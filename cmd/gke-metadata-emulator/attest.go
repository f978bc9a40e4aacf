package main

import (
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service"
)

// attestCommand is what gke-metadata-emulator-attest.service runs.
func attestCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "attest",
		Short: "Let the service ask the kernel which pod or container asks, until SIGTERM",
		Long: `Let the service ask the kernel which pod or container asks, until SIGTERM.
The kernel tells of a socket only who stands in its network namespace, and the service may enter none. This finds those of
the node's processes, opens a socket in each that can ask and do nothing else, and hands it to the service. It needs
CAP_SYS_ADMIN and CAP_SYS_PTRACE. While it is away the service knows the pods that it knew; new ones wait for it.`,
		Example: `  sudo gke-metadata-emulator attest`,
		Args:    arguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
			defer stop()
			if err := keepMemoryPrivate(); err != nil {
				return err
			}
			return service.HandOverNamespaces(ctx, service.Options{RunDir: runDir(), Stderr: cmd.ErrOrStderr()})
		},
	}
}
