// Command gke-metadata-emulator gives every pod of a Linux node Google credentials, as GKE's
// metadata server does.
//
// This package turns flags into a config.Config. Package service does the rest.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
)

const program = "gke-metadata-emulator"

// Exit codes separate wrong usage and a broken configuration from other failures.
const (
	exitFailure = 1
	exitUsage   = 2
	exitConfig  = 78 // EX_CONFIG of sysexits.h
)

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

// run is the only place that prints an error and chooses the exit code.
func run(args []string, stdout, stderr io.Writer) int {
	root := rootCommand()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(context.Background())

	var usage *usageError
	var broken *config.Error
	switch {
	case err == nil:
		return 0
	case errors.As(err, &usage):
		fmt.Fprintf(stderr, "%s: %v\n", program, err)
		return exitUsage
	case errors.As(err, &broken):
		fmt.Fprintf(stderr, "%s: %s\n", program, explain(err))
		return exitConfig
	}
	fmt.Fprintf(stderr, "%s: %v\n", program, err)
	return exitFailure
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:     program,
		Version: buildVersion(), // for --version; a template would link text/template, a megabyte
		Short:   "Google credentials for every pod of this node",
		Long: `On any Linux node, every Google client library works with no key and no per-pod setting:
it answers pods' requests to 169.254.169.254:80 as GKE's own metadata server does.`,
		Args:              arguments,
		RunE:              func(cmd *cobra.Command, _ []string) error { return missingCommand(cmd) },
		SilenceErrors:     true, // run prints them
		SilenceUsage:      true, // a failure does not print the flags
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
	}
	root.PersistentFlags().String("config", config.DefaultFile, "the configuration file")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return &usageError{fmt.Sprintf("%v; see %s --help", err, cmd.CommandPath())}
	})
	root.AddCommand(serveCommand(), attestCommand(), doctorCommand(unitFlagFiles), routingCommand(), configCommand(),
		statusCommand(), credentialCommand(), socketCommand(), versionCommand())
	return root
}

// usageError is an error of the command line.
type usageError struct{ text string }

func (e *usageError) Error() string { return e.text }

// arguments refuses arguments besides flags, since no command takes any.
func arguments(cmd *cobra.Command, args []string) error {
	switch {
	case len(args) == 0:
		return nil
	case !cmd.HasAvailableSubCommands():
		return &usageError{fmt.Sprintf("unexpected argument %q: %s takes none", args[0], cmd.CommandPath())}
	}
	cmd.SuggestionsMinimumDistance = 2
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		return &usageError{fmt.Sprintf("there is no command %q: write %s", args[0], strings.Join(near, " or "))}
	}
	return &usageError{fmt.Sprintf("there is no command %q: see %s --help", args[0], cmd.CommandPath())}
}

func missingCommand(cmd *cobra.Command) error {
	var names []string
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() && c.Name() != "help" {
			names = append(names, c.Name())
		}
	}
	if !cmd.HasParent() {
		return &usageError{"no command given: write one of " + strings.Join(names, ", ")}
	}
	return &usageError{fmt.Sprintf("no command of %s given: write one of %s", cmd.Name(), strings.Join(names, ", "))}
}

// group is a command that only holds other commands.
func group(name, short string, commands ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: name, Short: short, Args: arguments,
		RunE: func(cmd *cobra.Command, _ []string) error { return missingCommand(cmd) }}
	cmd.AddCommand(commands...)
	return cmd
}

// explain returns an error's text. Several faults of a configuration are written on lines of their
// own.
func explain(err error) string {
	var broken *config.Error
	if errors.As(err, &broken) && len(broken.Faults) > 1 {
		return fmt.Sprintf("the configuration has %d faults:\n%v", len(broken.Faults), err)
	}
	return err.Error()
}
