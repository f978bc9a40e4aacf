package service

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
)

// ErrIncomplete is returned by CopyCredential while kubelet has not written all files of its
// kubeconfig.
var ErrIncomplete = kube.ErrIncomplete

// CopyCredential puts a copy of the kubeconfig that is asked for ("" = kubelet's) at path, readable
// by the group of this process, and returns where it was found: "" when there is none, and then
// there is no copy either. One that cannot be used leaves the copy of the one before: kubelet may
// be about to write the rest of it.
func CopyCredential(kubeconfig, path string) (from string, err error) {
	text, from, err := kube.Copy(kubeconfig)
	if err != nil {
		return from, err
	}
	if text == nil {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
		return "", nil
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return from, err
	}
	// Complete, and the group's, before it has its name: a reader sees the old copy or the new one.
	f, err := os.CreateTemp(dir, ".copy-*")
	if err != nil {
		return from, err
	}
	_, err = f.Write(text)
	if err = errors.Join(err, f.Chmod(0o640), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return from, errors.Join(fmt.Errorf("copy %s: %w", from, err), os.Remove(f.Name()))
	}
	return from, nil
}
