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
		Short: "Try the whole way from a pod's request to its token on this node, and say what to do where it breaks",
		Long: `Try the whole way from a pod's request to its token on this node, and say what to do where it breaks.

One line for each check: ok; warn, where somebody should look; fail, with what to do; skip, where it could not be tried, and why. The
exit status is 1 if a check failed. Configuration, listener, rules and what others have put beside them, the credential and what the
API server grants it, Google's services, clocks and DNS are looked at; the running service is asked for what it knows.

As root it connects from a throw-away network namespace as a pod would, by IPv6 too where listen6 is set, and names the chain that drops
the connection, if one does. Where the connection arrives it is attested as a pod's is.
It judges what the service runs with: the configuration file, and the flags of /etc/default/gke-metadata-emulator or
/etc/sysconfig/gke-metadata-emulator. Flags given to it win.
One token of one pod of this node is requested and exchanged at Google, and thrown away: no token is printed.`,
		Example: `  sudo gke-metadata-emulator doctor
  sudo gke-metadata-emulator doctor --output json | jq '.checks[] | select(.verdict == "fail")'`,
		Args: arguments,
	}
	cmd.Flags().StringVar(&output, "output", "text", "text for a person, json for a program")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
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
			Load: read, File: configFile(cmd), FlagFile: flagFile, RunDir: runDir(), StatusSocket: statusSocket(), CredentialCopy: credentialCopy(), Version: buildVersion(),
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
