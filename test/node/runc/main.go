// Command runc runs runc without resource limits, for a cgroup v2 hierarchy that has no
// controllers. The paths of cgroups, by which processes are attested, are the real ones.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

const original = "/usr/sbin/runc"

func main() {
	if err := run(os.Args); err != nil {
		fmt.Fprintln(os.Stderr, "runc without limits:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if slices.Contains(args, "create") {
		if err := unlimit(filepath.Join(bundle(args), "config.json")); err != nil {
			return err
		}
	}
	return syscall.Exec(original, args, os.Environ())
}

func bundle(args []string) string {
	for i, a := range args {
		if v, is := strings.CutPrefix(a, "--bundle="); is {
			return v
		}
		if (a == "--bundle" || a == "-b") && i+1 < len(args) {
			return args[i+1]
		}
	}
	return "."
}

// unlimit removes the limits from a container's specification, and keeps the rules for devices.
func unlimit(file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var spec map[string]any
	if err := json.Unmarshal(b, &spec); err != nil {
		return err
	}
	if linux, is := spec["linux"].(map[string]any); is {
		if r, is := linux["resources"].(map[string]any); is {
			linux["resources"] = map[string]any{"devices": r["devices"]}
		}
	}
	if b, err = json.Marshal(spec); err != nil {
		return err
	}
	return os.WriteFile(file, b, 0o600)
}
