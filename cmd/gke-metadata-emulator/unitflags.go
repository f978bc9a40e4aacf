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

// unitFlagFiles are where the units read flags from, and the generator: the last one that has some counts.
var unitFlagFiles = []string{"/etc/default/" + program, "/etc/sysconfig/" + program}

// readUnitFlags returns the flags that the units run with, and the file that has them; "" where none has.
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

// addUnitFlags gives a command the flags that the units run with, so that it judges what they do. Flags of the
// command line win. It returns the file that the flags came from.
func addUnitFlags(cmd *cobra.Command, files []string) (file string, err error) {
	flags, file, err := readUnitFlags(files)
	if err != nil || file == "" {
		return "", err
	}
	given := map[*pflag.Flag]string{}
	cmd.Flags().Visit(func(f *pflag.Flag) { given[f] = f.Value.String() })
	if err := cmd.Flags().Parse(flags); err != nil {
		return file, fmt.Errorf("%s: %w: correct GKE_METADATA_EMULATOR_FLAGS there: the service does not start with it", file, err)
	}
	for f, value := range given {
		if err := f.Value.Set(value); err != nil {
			return file, err // it was set before
		}
	}
	return file, nil
}
