package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// doctor judges what the units run with, unless it is told otherwise.
func TestDoctorReadsUnitFlags(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("GKE_METADATA_EMULATOR_RUN", dir)
	config := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(config, []byte("projectID: my-project\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	flags := filepath.Join(dir, "default")
	for name, tt := range map[string]struct {
		file string
		args []string
		want string
	}{
		"none": {"# GKE_METADATA_EMULATOR_FLAGS=--config=/x\n", nil, "there is no such file"},
		"the units'": {"GKE_METADATA_EMULATOR_FLAGS=\"--config=" + config + " --listen=127.0.0.1:70000\"\n", nil,
			"--listen: "},
		"own flags win": {"GKE_METADATA_EMULATOR_FLAGS=--config=/x --routing-mode=bad\n",
			[]string{"--config", config, "--routing-mode=none"}, config + ": workloadIdentityProvider"},
		"a flag unknown": {"GKE_METADATA_EMULATOR_FLAGS=--lisen=1\n", nil, flags +
			": unknown flag: --lisen: the service does not start: correct GKE_METADATA_EMULATOR_FLAGS in"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(flags, []byte(tt.file), 0o600); err != nil {
				t.Fatal(err)
			}
			root := rootCommand()
			for _, c := range root.Commands() {
				if c.Name() == "doctor" {
					root.RemoveCommand(c)
				}
			}
			root.AddCommand(doctorCommand([]string{filepath.Join(dir, "absent"), flags}))
			var out bytes.Buffer
			root.SetOut(&out)
			args := append([]string{"doctor"}, tt.args...)
			if name == "none" {
				args = append(args, "--config", filepath.Join(dir, "absent.yaml"))
			}
			root.SetArgs(args)
			if err := root.ExecuteContext(t.Context()); err == nil {
				t.Error("no check failed")
			}
			line, _, _ := strings.Cut(out.String(), "\n")
			if !strings.Contains(line, tt.want) || strings.Contains(line, "--routing-mode") {
				t.Errorf("%q, want %q", line, tt.want)
			}
		})
	}
}
