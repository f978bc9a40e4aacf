package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// tarred are the files of the tarball: a folder in it, and patterns of what lies there. BUILD
// stands for the first argument of gen tar, ARCH for the second.
var tarred = []struct {
	folder string
	files  []string
}{
	{"", []string{"BUILD/ARCH/" + program, "BUILD/copyright", "LICENSE", "README.md", "SECURITY.md", "CHANGELOG.md",
		"packaging/config.yaml", "service/kube/rbac*.yaml"}},
	{"completions", []string{"BUILD/completion.*"}},
	{"examples", []string{"packaging/examples/*"}},
	{"man", []string{"BUILD/*.[58].gz"}},
	{"systemd", []string{"systemd/*"}},
}

// tar writes the tarball of one architecture. Owners, modes and times are the same wherever it is
// made.
func (r release) tar(build, arch, out string) error {
	name := fmt.Sprintf("%s_%s_linux_%s", program, r.version, arch)
	place := strings.NewReplacer("BUILD", build, "ARCH", arch)
	var b bytes.Buffer
	z, err := gzip.NewWriterLevel(&b, gzip.BestCompression)
	if err != nil {
		return err
	}
	t := tar.NewWriter(z)
	for _, part := range tarred {
		for _, pattern := range part.files {
			files, err := filepath.Glob(place.Replace(pattern))
			if err != nil || len(files) == 0 {
				return fmt.Errorf("tar: no file is %s: %w", pattern, err)
			}
			slices.Sort(files)
			for _, f := range files {
				if err := r.add(t, path.Join(name, part.folder, filepath.Base(f)), f); err != nil {
					return err
				}
			}
		}
	}
	if err := t.Close(); err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	return write(out, name+".tar.gz", b.Bytes())
}

func (r release) add(t *tar.Writer, name, file string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	mode := int64(0o644)
	if bytes.HasPrefix(text, []byte("#!")) || bytes.HasPrefix(text, []byte("\x7fELF")) {
		mode = 0o755
	}
	h := &tar.Header{Name: name, Mode: mode, Size: int64(len(text)), ModTime: r.date, Uname: "root", Gname: "root"}
	if err := t.WriteHeader(h); err != nil {
		return err
	}
	_, err = t.Write(text)
	return err
}
