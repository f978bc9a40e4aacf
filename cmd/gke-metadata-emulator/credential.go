package main

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service"
)

// credentialCopy is the path of root's copy of a kubeconfig that the service's user may not read.
// It is on a tmpfs.
func credentialCopy() string { return filepath.Join(runDir(), "credential", "kubeconfig") }

// credentialCommand is the command of gke-metadata-emulator-credential.service. Nobody runs it by
// hand.
func credentialCommand() *cobra.Command {
	cmd := group("credential", "Copy kubelet's credential for the service's user", credentialCopyCommand())
	cmd.Hidden = true
	return cmd
}

func credentialCopyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "copy",
		Short: "Copy the kubeconfig and the files that it names, readable for this process's group",
		Long: `Copy the kubeconfig and the contents of the files that it names, readable for this process's group.
Without a complete kubeconfig or a valid configuration there is nothing to copy. This is reported on standard error
and is not a failure.`,
		Args: arguments,
	}
	load := settings(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := load()
		if err != nil {
			say(cmd, "no credential copied: there is no valid configuration") // the service logs the faults
			return nil
		}
		from, err := service.CopyCredential(c.Kubeconfig, credentialCopy())
		if errors.Is(err, service.ErrIncomplete) {
			say(cmd, "no credential copied: %v: the next change of these files starts this unit again", err)
			return nil
		}
		if err != nil {
			return err
		}
		if from == "" {
			say(cmd, "no credential copied: there is no kubeconfig yet")
			return nil
		}
		fmt.Fprintf(cmd.OutOrStdout(), "copied %s\n", from)
		return nil
	}
	return cmd
}
