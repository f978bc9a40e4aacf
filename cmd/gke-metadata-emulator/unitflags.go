package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// unitFlagFiles are the files that the units and the generator read flags from. The last file with
// flags counts.
var unitFlagFiles = []string{"/etc/default/" + program, "/etc/sysconfig/" + program}

// readUnitFlags returns the units' flags and their file; "" without any.
func readUnitFlags(files []string) (flags []string, file string, err error) {
	for _, name := range files {
		text, err := os.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, "", fmt.Errorf("flags of the unit: %w", err)
		}
		for line := range strings.Lines(string(text)) {
			if value, ok := strings.CutPrefix(strings.TrimSpace(line), "GKE_METADATA_EMULATOR_FLAGS="); ok {
				flags, file = strings.Fields(strings.Trim(value, `"'`)), name
			}
		}
	}
	if len(flags) == 0 {
		return nil, "", nil
	}
	return flags, file, nil
}

// addUnitFlags gives a command the units' flags, so that it checks what the units run. Flags of the
// command line take precedence. It returns the file of the flags.
func addUnitFlags(cmd *cobra.Command, files []string) (file string, err error) {
	flags, file, err := readUnitFlags(files)
	if err != nil || file == "" {
		return "", err
	}
	given := map[*pflag.Flag]string{}
	cmd.Flags().Visit(func(f *pflag.Flag) { given[f] = f.Value.String() })
	if err := cmd.Flags().Parse(flags); err != nil {
		return file, fmt.Errorf("%s: %w: the service does not start: correct GKE_METADATA_EMULATOR_FLAGS in this file", file,
			err)
	}
	for f, value := range given {
		if err := f.Value.Set(value); err != nil {
			return file, err // it was set before
		}
	}
	return file, nil
}
