package main

import (
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service"
)

// attestCommand is the command of gke-metadata-emulator-attest.service.
func attestCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "attest",
		Short: "Open sockets that identify the pod behind a connection, until SIGTERM",
		Long: `Open sockets that identify the pod behind a connection, until SIGTERM.
The kernel gives information on a socket only within its network namespace, and the service may not enter any.
This command finds the network namespaces of the node's processes, opens in each a socket that can query the
kernel and do nothing else, and passes these sockets to the service. It needs CAP_SYS_ADMIN and CAP_SYS_PTRACE.
While it does not run, the service answers pods that it knows already; new pods wait.`,
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
