package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// manual dates the pages, which `make golden` made of the program's commands and of the
// configuration's keys, and has the program write its completions.
func (r release) manual(pages, binary, dir string) error {
	files, err := filepath.Glob(filepath.Join(pages, program+"*"))
	if err != nil || len(files) == 0 {
		return fmt.Errorf("no manual pages in %s: %w", pages, err)
	}
	dated := strings.NewReplacer("@DATE@", r.date.Format("2006-01-02"), "@VERSION@", r.version)
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			return err
		}
		if err := writeGzip(dir, filepath.Base(f), []byte(dated.Replace(string(text)))); err != nil {
			return err
		}
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		out, err := exec.Command(binary, "completion", shell).Output()
		if err != nil {
			return fmt.Errorf("completion %s: %w", shell, err)
		}
		if err := write(dir, "completion."+shell, out); err != nil {
			return err
		}
	}
	return nil
}
