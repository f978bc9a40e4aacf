package main

import (
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service"
)

// credentialCopy is where root puts the copy of a kubeconfig that the service's user may not read. It is on a tmpfs.
func credentialCopy() string { return filepath.Join(runDir(), "credential", "kubeconfig") }

// credentialCommand is what gke-metadata-emulator-credential.service runs, and nobody by hand.
func credentialCommand() *cobra.Command {
	cmd := group("credential", "Hand kubelet's credential to the service's user", credentialCopyCommand())
	cmd.Hidden = true
	return cmd
}

func credentialCopyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "copy",
		Short: "Copy the kubeconfig, with what the files hold that it names, for this process's group",
		Long: `Copy the kubeconfig, with what the files hold that it names, for this process's group to read.
Without a kubeconfig, or with a configuration that does not say which, there is nothing to copy: that is said on
standard error and is no failure.`,
		Args: arguments,
	}
	load := settings(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := load()
		if err != nil {
			say(cmd, "nothing is copied: %s", explain(err))
			return nil
		}
		from, err := service.CopyCredential(c.Kubeconfig, credentialCopy())
		if err != nil {
			return err
		}
		if from == "" {
			say(cmd, "nothing is copied: there is no kubeconfig yet")
			return nil
		}
		fmt.Fprintf(cmd.OutOrStdout(), "copied %s\n", from)
		return nil
	}
	return cmd
}
