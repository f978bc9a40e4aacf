package kube

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// copyLine is the first line of a copy. It names the original file and the setting kubeconfig.
const copyLine = "# The copy of %q that gke-metadata-emulator reads, for kubeconfig: %q\n"

// Copy returns a self-contained kubeconfig: the current context alone, with the contents of the
// files that it names. The source is the given file, or with "" the first of Places that exists.
// Root makes the copy for the service's unprivileged user (R-27, copy of the credential). Where no
// kubeconfig exists yet, text is nil and err is nil. Where it is not complete, err is an
// ErrIncomplete.
func Copy(kubeconfig string) (text []byte, path string, err error) {
	return copyOf(kubeconfig, Places())
}

func copyOf(kubeconfig string, places []string) (text []byte, path string, err error) {
	k, err := locate(kubeconfig, places)
	switch {
	case errors.Is(err, errNowhere), errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errReferenced):
		return nil, "", nil
	case err != nil:
		return nil, "", err
	}
	if _, err := k.credential(); err != nil { // such as a certificate whose key is not written yet
		return nil, k.path, err
	}
	if err := clientcmdapi.MinifyConfig(k.config); err != nil {
		return nil, k.path, unusable(k.path, err)
	}
	body, err := clientcmd.Write(*k.config)
	if err != nil {
		return nil, k.path, unusable(k.path, errors.New("cannot be written as a kubeconfig"))
	}
	return append(fmt.Appendf(nil, copyLine, k.path, kubeconfig), body...), k.path, nil
}

// loadCopy loads the copy at path if it was made for this setting. Otherwise it returns need, the
// error that made the copy necessary.
func loadCopy(path, kubeconfig string, need error) (*contents, error) {
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, need
	}
	if err != nil {
		return nil, unusable(path, err)
	}
	var of, asked string
	if n, err := fmt.Fscanf(bytes.NewReader(raw), copyLine, &of, &asked); n != 2 || err != nil || asked != kubeconfig {
		return nil, need // made for another configuration; root makes the right one soon
	}
	k, err := clientcmd.Load(raw)
	if err != nil {
		return nil, unusable(path, errors.New("not a kubeconfig (YAML or JSON of kind Config)"))
	}
	if err := inline(k, func(name string) ([]byte, error) {
		return nil, fmt.Errorf("not a copy that this service made: it names the file %s", name)
	}); err != nil {
		return nil, unusable(path, err)
	}
	return &contents{path: of + " (read from its copy " + path + ")", config: k, digest: sha256.Sum256(raw)}, nil
}
