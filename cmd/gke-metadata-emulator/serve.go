package main

import (
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service"
)

func serveCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Answer pods' requests until SIGTERM",
		Long: `Answer pods' requests until SIGTERM. SIGHUP reads the configuration again.
With a listener from systemd, a missing or broken configuration does not end the service: pods get 503 with the reason
until the configuration is corrected.`,
		Example: `  sudo gke-metadata-emulator routing install && sudo gke-metadata-emulator serve --log-level debug`,
		Args:    arguments,
	}
	load := settings(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
		defer stop()
		signal.Ignore(syscall.SIGPIPE) // the reader of the log may end before this process
		reload := make(chan os.Signal, 1)
		signal.Notify(reload, syscall.SIGHUP)
		defer signal.Stop(reload)
		if err := keepMemoryPrivate(); err != nil {
			return err
		}
		return service.Run(ctx, service.Options{
			Load: load, File: configFile(cmd), Reload: reload, RunDir: runDir(), StatusSocket: statusSocket(),
			CredentialCopy: credentialCopy(), Version: buildVersion(), Commit: buildCommit(),
		})
	}
	return cmd
}
