package main

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/spf13/cobra"
)

func configCommand() *cobra.Command {
	return group("config", "Check or show the configuration", configCheckCommand(), configShowCommand())
}

func configCheckCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Print every fault of the configuration",
		Long: `Print every fault of the configuration, with file, line and remedy, and exit with status 78. Without a fault
print ok. Warnings, on standard error, are about settings that are valid but rarely intended.`,
		Example: `  gke-metadata-emulator config check
  gke-metadata-emulator config check --config ./config.yaml --routing-mode nftables`,
		Args: arguments,
	}
	load := settings(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := load()
		if err != nil {
			return err
		}
		for _, w := range append(c.Warnings, c.NodeWarnings(localAddresses(), planOf(c, false).Makes)...) {
			fmt.Fprintf(cmd.ErrOrStderr(), "%s: warning: %s\n", program, w)
		}
		fmt.Fprintln(cmd.OutOrStdout(), "ok")
		return nil
	}
	return cmd
}

// localAddresses are the addresses of this node's interfaces.
func localAddresses() (all []netip.Addr) {
	addrs, _ := net.InterfaceAddrs() // without them there are more warnings, and no fault
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			all = append(all, p.Addr())
		}
	}
	return all
}

func configShowCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "show",
		Short:   "Print the configuration as YAML, with all defaults and flags",
		Example: `  gke-metadata-emulator config show`,
		Args:    arguments,
	}
	load := settings(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := load()
		if err != nil {
			return err
		}
		fmt.Fprint(cmd.OutOrStdout(), c.YAML())
		return nil
	}
	return cmd
}
