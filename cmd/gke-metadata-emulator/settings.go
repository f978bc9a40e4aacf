package main

import (
	"errors"
	"strings"

	"github.com/spf13/cobra"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
)

// settings gives a command a flag for every key of the configuration. load reads file and flags,
// each time again.
func settings(cmd *cobra.Command) (load func() (config.Config, error)) {
	flags := cmd.Flags()
	flags.SortFlags = false // the order of the reference configuration
	values := map[string]*setting{}
	for _, k := range config.Keys() {
		v := &setting{key: k}
		values[k.Path] = v
		f := flags.VarPF(v, k.Flag(), "", usage(k))
		if k.Type() == "boolean" {
			f.NoOptDefVal = "true"
		}
		if k.Values != nil {
			// fails only for an unknown flag
			_ = cmd.RegisterFlagCompletionFunc(k.Flag(), cobra.FixedCompletions(k.Values, cobra.ShellCompDirectiveNoFileComp))
		}
	}
	return func() (config.Config, error) {
		given := map[string]string{}
		for path, v := range values {
			if v.given {
				given[path] = v.text
			}
		}
		c, err := config.Load(configFile(cmd), given)
		if err != nil {
			return c, withVersion(err)
		}
		return c, service.Validate(c, configFile(cmd))
	}
}

// withVersion adds the remedy for a downgrade to faults about keys that this version does not have.
func withVersion(err error) error {
	var broken *config.Error
	if !errors.As(err, &broken) {
		return err
	}
	for i := range broken.Faults {
		f := &broken.Faults[i]
		if !f.Unknown {
			continue
		}
		f.Problem += " in version " + buildVersion()
		f.Remedy += ". If a newer version wrote it: upgrade to that, or remove the key"
	}
	return err
}

func configFile(cmd *cobra.Command) string { return cmd.Flag("config").Value.String() }

// usage is a key's line in --help, with its default, since pflag omits defaults that it takes for
// zero values.
func usage(k config.Key) string {
	text := strings.ReplaceAll(k.Usage, "`", "'") // pflag takes backquotes for the name of the value
	if k.Values != nil {
		text += ": " + strings.Join(k.Values, ", ")
	}
	if k.Default != "" {
		text += " (default " + k.Default + ")"
	}
	return text
}

// setting is a flag's text. Package config checks it, so file and flags have one grammar, and all
// faults are reported at once.
type setting struct {
	key   config.Key
	text  string
	given bool
}

func (s *setting) String() string { return s.text }

func (s *setting) Set(text string) error {
	s.text, s.given = text, true
	return nil
}

func (s *setting) Type() string {
	switch t := s.key.Type(); t {
	case "boolean":
		return "bool" // pflag's type of a flag that needs no value
	case "list", "addresses":
		return "a,b"
	case "map":
		return "path=value,..."
	case "identities":
		return "unit:UNIT=NAMESPACE/NAME,..."
	default:
		return t
	}
}
