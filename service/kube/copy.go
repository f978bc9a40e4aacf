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

// A copy begins with a line that says of what it is one, and for which setting.
const copyLine = "# The copy of %q that gke-metadata-emulator reads, for kubeconfig: %q\n"

// Copy returns the kubeconfig that is asked for, or with "" that of the first of Places that exists, with what its files
// hold instead of their names, and nothing but the current context. Root hands it to the service's unprivileged user.
// Where there is no kubeconfig (yet), the text is nil and there is no error.
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
	if _, err := k.credential(); err != nil { // for example a certificate whose key is not written yet
		return nil, k.path, err
	}
	if err := clientcmdapi.MinifyConfig(k.config); err != nil {
		return nil, k.path, unusable(k.path, err)
	}
	body, err := clientcmd.Write(*k.config)
	if err != nil {
		return nil, k.path, unusable(k.path, errors.New("it cannot be written as a kubeconfig"))
	}
	return append(fmt.Appendf(nil, copyLine, k.path, kubeconfig), body...), k.path, nil
}

// loadCopy loads the copy at path if it is one for the setting; else the error is why there is need of it.
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
		return nil, need // of another configuration: the right one is on its way
	}
	k, err := clientcmd.Load(raw)
	if err != nil {
		return nil, unusable(path, errors.New("not a kubeconfig (YAML or JSON of kind Config)"))
	}
	if err := inline(k, func(name string) ([]byte, error) {
		return nil, fmt.Errorf("a copy names no file, and this one names %s", name)
	}); err != nil {
		return nil, unusable(path, err)
	}
	return &contents{path: of + ", by its copy " + path, config: k, digest: sha256.Sum256(raw)}, nil
}
