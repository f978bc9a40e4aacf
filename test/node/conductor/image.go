package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
)

// writeImage writes an image of one layer with one program, in the format of `docker save`.
func writeImage(file string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	asker, err := os.ReadFile(filepath.Join(filepath.Dir(self), "asker"))
	if err != nil {
		return err
	}
	layer, err := archive(entry{"asker", asker, 0o755})
	if err != nil {
		return err
	}
	image, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux", "created": "2026-01-01T00:00:00Z",
		"config": map[string]any{"Entrypoint": []string{"/asker"}, "Cmd": []string{"pause"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{fmt.Sprintf("sha256:%x", sha256.Sum256(layer))}},
	})
	if err != nil {
		return err
	}
	name := fmt.Sprintf("%x.json", sha256.Sum256(image))
	manifest, err := json.Marshal([]any{
		map[string]any{"Config": name, "RepoTags": []string{podImage}, "Layers": []string{"layer.tar"}},
	})
	if err != nil {
		return err
	}
	all, err := archive(
		entry{name, image, 0o644}, entry{"layer.tar", layer, 0o644}, entry{"manifest.json", manifest, 0o644})
	if err != nil {
		return err
	}
	return os.WriteFile(file, all, 0o644)
}

type entry struct {
	name string
	data []byte
	mode int64
}

func archive(entries ...entry) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	var errs []error
	for _, e := range entries {
		header := &tar.Header{Name: e.name, Mode: e.mode, Size: int64(len(e.data)), Typeflag: tar.TypeReg}
		errs = append(errs, w.WriteHeader(header))
		_, err := w.Write(e.data)
		errs = append(errs, err)
	}
	err := errors.Join(append(errs, w.Close())...)
	return b.Bytes(), err
}
