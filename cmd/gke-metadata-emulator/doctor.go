package main

import (
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/doctor"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
)

func doctorCommand(flagFiles []string) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check every step from a pod's request to its token on this node, with remedies",
		Long: `Check every step from a pod's request to its token on this node, with remedies.

It prints one line for each check: ok; warn, with a state to review; fail, with the remedy; skip, with the reason why
the check could not run. The exit status is 1 if a check failed. The checks cover the configuration, the listener, the
rules and the rules of other programs, the credential and its rights at the API server, Google's services, clocks and
DNS. The running service is asked for its state.

As root it connects from a temporary network namespace as a pod would, by IPv6 too where listen6 is set, and names the
chain that drops the connection, if one does. A connection that arrives is identified as a pod's would be.
It uses the service's settings: the configuration file, and the flags of /etc/default/gke-metadata-emulator or
/etc/sysconfig/gke-metadata-emulator. Flags on its own command line take precedence.
It requests and exchanges one token of one pod of this node, and discards it: no token is printed.`,
		Example: `  sudo gke-metadata-emulator doctor
  sudo gke-metadata-emulator doctor --output json | jq '.checks[] | select(.verdict == "fail")'`,
		Args: arguments,
	}
	cmd.Flags().StringVar(&output, "output", "text", "text for a person, json for a program")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"},
		cobra.ShellCompDirectiveNoFileComp))
	load := settings(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if output != "text" && output != "json" {
			return &usageError{fmt.Sprintf("--output is text or json, not %q", output)}
		}
		flagFile, flagErr := addUnitFlags(cmd, flagFiles)
		read := func() (config.Config, error) {
			if flagErr != nil {
				return config.Config{}, flagErr
			}
			return load()
		}
		r := doctor.Run(cmd.Context(), doctor.Options{
			Load: read, File: configFile(cmd), FlagFile: flagFile, RunDir: runDir(), StatusSocket: statusSocket(),
			CredentialCopy: credentialCopy(), Version: buildVersion(),
			Unit: service.AskUnit,
			Plan: func(c config.Config, err error) routing.Plan { return planOf(c, err != nil).AsInstalled(cmd.Context()) },
		})
		var err error
		if output == "json" {
			e := json.NewEncoder(cmd.OutOrStdout())
			e.SetEscapeHTML(false)
			e.SetIndent("", "  ")
			err = e.Encode(r)
		} else {
			err = r.Text(cmd.OutOrStdout())
		}
		if failed := r.Failed(); err == nil && failed > 0 {
			return fmt.Errorf("%d of %d checks failed", failed, len(r.Checks))
		}
		return err
	}
	return cmd
}
