package main

import (
	"cmp"
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// version is set in builds of a release by -ldflags "-X main.version=1.2.3".
var version string

// buildVersion is the release's version, or else the module's.
func buildVersion() string {
	if version != "" {
		return version
	}
	if b, ok := debug.ReadBuildInfo(); ok {
		return cmp.Or(b.Main.Version, "(devel)")
	}
	return "(unknown)"
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Example: `  gke-metadata-emulator version
  gke-metadata-emulator --version`,
		Args: arguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			fmt.Fprintf(cmd.OutOrStdout(), "%s %s %s %s/%s\n", program, buildVersion(), runtime.Version(), runtime.GOOS,
				runtime.GOARCH)
			return nil
		},
	}
}
