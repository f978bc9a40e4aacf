package kube

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
)

// root's copy is what kubelet's files are, for a user who may not read them.
func TestCopy(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	dir := t.TempDir()
	conf, err := s.WriteKubelet(dir, "node1")
	if err != nil {
		t.Fatal(err)
	}
	places := []string{filepath.Join(dir, "absent"), conf}
	need := unusable(conf, fs.ErrPermission)
	to := filepath.Join(dir, "copy")
	for _, asked := range []string{"", conf} {
		text, path, err := copyOf(asked, places)
		if err != nil || path != conf {
			t.Fatalf("%q, %v", path, err)
		}
		write(t, to, text)
		k, err := loadCopy(to, asked, need)
		if err != nil {
			t.Fatal(err)
		}
		cred, err := k.credential()
		if err != nil {
			t.Fatal(err)
		}
		origin, err := load(conf)
		if err != nil {
			t.Fatal(err)
		}
		want, err := origin.credential()
		if err != nil {
			t.Fatal(err)
		}
		if cred.server != want.server || cred.user != "system:node:node1" ||
			string(cred.config.CertData) != string(want.config.CertData) ||
			string(cred.config.KeyData) != string(want.config.KeyData) ||
			string(cred.config.CAData) != string(want.config.CAData) {
			t.Error("the copy is another credential than the original")
		}
		if !strings.Contains(cred.path, conf) || !strings.Contains(cred.path, to) {
			t.Errorf("status would not say which is in use: %s", cred.path)
		}
		before := k.digest
		if _, err := s.RotateNodeCert("node1"); err != nil {
			t.Fatal(err)
		}
		if _, err := s.WriteKubelet(dir, "node1"); err != nil {
			t.Fatal(err)
		}
		if text, _, err = copyOf(asked, places); err != nil {
			t.Fatal(err)
		}
		write(t, to, text)
		if k, err = loadCopy(to, asked, need); err != nil || k.digest == before {
			t.Errorf("after a rotation the copy is the same: %v", err)
		}
	}
}

func TestCopyOfWhatIsNotThere(t *testing.T) {
	dir := t.TempDir()
	absent := filepath.Join(dir, "absent")
	for _, asked := range []string{"", absent} {
		if text, path, err := copyOf(asked, []string{absent}); text != nil || path != "" || err != nil {
			t.Errorf("kubeconfig %q: %q, %q, %v", asked, text, path, err)
		}
	}
	write(t, filepath.Join(dir, "kubelet.conf"),
		[]byte(`{"apiVersion":"v1","kind":"Config","current-context":"c","clusters":[{"name":"c",`+
			`"cluster":{"server":"https://192.0.2.1:6443"}}],`+
			`"contexts":[{"name":"c","context":{"cluster":"c","user":"u"}}],"users":[{"name":"u",`+
			`"user":{"client-certificate":"absent.pem","client-key":"absent.pem"}}]}`))
	incomplete := func(what string) {
		t.Helper()
		if text, _, err := copyOf(filepath.Join(dir, "kubelet.conf"), nil); !errors.Is(err, ErrIncomplete) {
			t.Errorf("%s: %q, %v", what, text, err)
		}
	}
	incomplete("a certificate that is missing")
	write(t, filepath.Join(dir, "absent.pem"), nil)
	incomplete("a certificate that is empty")
	write(t, filepath.Join(dir, "kubelet.conf"), []byte("\n"))
	incomplete("a kubeconfig that is empty")
}

// Only what the current context needs is handed over, and a credential plugin stays one.
func TestCopyIsMinimal(t *testing.T) {
	dir := t.TempDir()
	conf := filepath.Join(dir, "admin.conf")
	write(
		t,
		conf,
		[]byte(
			`{"apiVersion":"v1","kind":"Config","current-context":"c","clusters":[{"name":"c","cluster":{"server":"https://192.0.2.1:6443"}}],
"contexts":[{"name":"c","context":{"cluster":"c","user":"u"}},{"name":"d","context":{"cluster":"c","user":"admin"}}],
"users":[{"name":"admin","user":{"token":"hunter2"}},{"name":"u","user":{"exec":{"apiVersion":"client.authentication.k8s.io/v1","command":"aws-iam-authenticator","interactiveMode":"Never"}}}]}`,
		),
	)
	text, _, err := copyOf(conf, nil)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text), "hunter2") {
		t.Error("another user's token was handed over")
	}
	if !strings.Contains(string(text), "aws-iam-authenticator") {
		t.Error("the credential plugin is gone")
	}
}

// A copy for another setting, a file that is none, and one that names files are not used.
func TestCopyThatIsNone(t *testing.T) {
	dir := t.TempDir()
	to := filepath.Join(dir, "copy")
	need := unusable("/etc/kubernetes/kubelet.conf", fs.ErrPermission)
	if _, err := loadCopy(to, "", need); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("without a copy: %v", err)
	}
	const head = `# The copy of "/etc/kubernetes/kubelet.conf" that gke-metadata-emulator reads, for kubeconfig: ""` + "\n"
	conf := func(user string) string {
		return `{"apiVersion":"v1","kind":"Config","current-context":"c","clusters":[{"name":"c",` +
			`"cluster":{"server":"https://192.0.2.1:6443"}}],` +
			`"contexts":[{"name":"c","context":{"cluster":"c","user":"u"}}],"users":[{"name":"u","user":` + user + `}]}`
	}
	for name, c := range map[string]struct{ text, asked, says string }{
		"another setting": {head + conf(`{"token":"t"}`), "/etc/other.conf", "permission"},
		"no copy":         {conf(`{"token":"t"}`), "", "permission"},
		"garbage":         {head + "\x00", "", "not a kubeconfig"},
		"names a file":    {head + conf(`{"tokenFile":"/etc/shadow"}`), "", "it names the file /etc/shadow"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(to, []byte(c.text), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := loadCopy(to, c.asked, need); !errors.Is(err, ErrNotConfigured) ||
				!strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v", err)
			}
		})
	}
}
