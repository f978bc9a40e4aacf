package main

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/spf13/cobra"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
)

// socketCommand is the command of the socket units. Nobody runs it by hand.
func socketCommand() *cobra.Command {
	cmd := group("socket", "Check the addresses that the socket units listen on", socketCheckCommand())
	cmd.Hidden = true
	return cmd
}

func socketCheckCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Print the process that holds an address of the configuration",
		Long: `Print the process that holds an address of the configuration (listen, listen6), with its unit. systemd says only
that the address is in use.`,
		Args: arguments,
	}
	load := settings(cmd)
	queries := cmd.Flags().Bool("udp", false, "of gke-metadata-emulator-dns.socket, which listens on UDP with dns: answer")
	cmd.RunE = func(*cobra.Command, []string) error {
		c, err := load()
		if err != nil { // the socket unit listens there then, and the service says what the fault is
			c = config.Default()
		}
		unit, network, find := program+".socket", "", routing.Listener
		if *queries {
			unit, network, find = program+"-dns.socket", "UDP ", routing.QueryListener
			if c.DNS != "answer" {
				return nil
			}
		}
		var all []error
		for _, key := range []struct {
			name string
			at   netip.AddrPort
		}{{"listen", c.Listen}, {"listen6", c.Listen6}} {
			if text := held(key.name, network, key.at, find(key.at)); text != "" && !service.LogHeld(text, unit) {
				all = append(all, errors.New(text))
			}
		}
		return errors.Join(all...)
	}
	return cmd
}

// held says who holds an address that this service is about to listen on, and what to do; "" if
// nobody does. A service that was started by hand holds it too.
func held(key, network string, at netip.AddrPort, by routing.ListenedBy) string {
	if !by.At.IsValid() {
		return ""
	}
	who := by.String()
	if by.PID == "1" {
		who = "another socket unit (systemctl list-sockets)"
	}
	return fmt.Sprintf("%s address %s%s is held by %s at %s: stop it or change %[1]s, then run systemctl "+
		"daemon-reload && systemctl restart gke-metadata-emulator", key, network, at, who, by.At)
}
