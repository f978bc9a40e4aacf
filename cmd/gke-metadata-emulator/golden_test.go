package main

import (
	"errors"
	"io/fs"
	"os"
	"testing"
)

// golden holds a file of the tree to be what the code makes. `make golden` writes it anew, for a
// person to look at.
func golden(t *testing.T, name, got string) {
	t.Helper()
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(name, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	if string(want) != got {
		t.Errorf("%s is stale: make golden writes it anew", name)
	}
}
