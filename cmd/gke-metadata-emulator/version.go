package main

import (
	"cmp"
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// version and commit are set in builds of a release by -ldflags "-X main.version=1.2.3 -X
// main.commit=…".
var version, commit string

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

// buildCommit is the commit that the program was built from; "" where nobody said.
func buildCommit() string {
	if b, ok := debug.ReadBuildInfo(); ok && commit == "" {
		for _, s := range b.Settings {
			if s.Key == "vcs.revision" {
				return s.Value
			}
		}
	}
	return commit
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
