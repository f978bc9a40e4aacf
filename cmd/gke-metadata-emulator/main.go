// Command gke-metadata-emulator gives every pod of a Linux node Google credentials, as GKE's metadata server would.
//
// Flags come in here and become a config.Config; what happens then is told in package service.
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

// Exit codes. A script can tell what it did wrong from what went wrong.
const (
	exitFailure = 1
	exitUsage   = 2
	exitConfig  = 78 // EX_CONFIG of sysexits.h
)

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

// run is the one place that prints an error and makes an exit code of it.
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
		Version: buildVersion(), // for --version; a template of our own would link text/template and a megabyte with it
		Short:   "Google credentials for every pod of this node",
		Long: `On any Linux node, every Google client library works with no key and no per-pod setting:
what pods send to 169.254.169.254:80 is answered as GKE's own metadata server would.`,
		Args:              arguments,
		RunE:              func(cmd *cobra.Command, _ []string) error { return missingCommand(cmd) },
		SilenceErrors:     true, // run prints them
		SilenceUsage:      true, // a failure is no reason to explain the flags
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
	}
	root.PersistentFlags().String("config", config.DefaultFile, "the configuration file")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return &usageError{fmt.Sprintf("%v; see %s --help", err, cmd.CommandPath())}
	})
	root.AddCommand(serveCommand(), attestCommand(), doctorCommand(unitFlagFiles), routingCommand(), configCommand(), statusCommand(), credentialCommand(), versionCommand())
	return root
}

// usageError is a mistake on the command line.
type usageError struct{ text string }

func (e *usageError) Error() string { return e.text }

// arguments refuses whatever is left after the flags: no command takes any.
func arguments(cmd *cobra.Command, args []string) error {
	switch {
	case len(args) == 0:
		return nil
	case !cmd.HasAvailableSubCommands():
		return &usageError{fmt.Sprintf("%s takes no argument, and there is %q", cmd.CommandPath(), args[0])}
	}
	cmd.SuggestionsMinimumDistance = 2
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		return &usageError{fmt.Sprintf("there is no command %q: did you mean %s?", args[0], strings.Join(near, " or "))}
	}
	return &usageError{fmt.Sprintf("there is no command %q; see %s --help", args[0], cmd.CommandPath())}
}

func missingCommand(cmd *cobra.Command) error {
	var names []string
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() && c.Name() != "help" {
			names = append(names, c.Name())
		}
	}
	if !cmd.HasParent() {
		return &usageError{"a command is needed: " + strings.Join(names, ", ")}
	}
	return &usageError{fmt.Sprintf("%s needs one of its own commands: %s", cmd.Name(), strings.Join(names, ", "))}
}

// group is a command that only holds others.
func group(name, short string, commands ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: name, Short: short, Args: arguments,
		RunE: func(cmd *cobra.Command, _ []string) error { return missingCommand(cmd) }}
	cmd.AddCommand(commands...)
	return cmd
}

// explain is an error for a person: one fault of a configuration goes on the line of the program's name, more go below it.
func explain(err error) string {
	var broken *config.Error
	if errors.As(err, &broken) && len(broken.Faults) > 1 {
		return fmt.Sprintf("the configuration has %d faults:\n%v", len(broken.Faults), err)
	}
	return err.Error()
}
