package kube

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
)

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path+".new", data, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func must(t *testing.T) func([]byte, error) []byte {
	return func(b []byte, err error) []byte {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
}

// On a first boot kubelet has no credential yet: that is a state, its text names the places, and it
// ends by itself.
func TestKubeconfigAppearsLate(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	var late string
	b := run(t, s, func(b *testNode, o *Options) {
		late = filepath.Join(b.dir, "usual", "kubelet.conf")
		o.Kubeconfig, o.Places = "", []string{filepath.Join(b.dir, "absent"), late}
	})
	until(t, "the state", func() bool {
		_, _, err := b.At(netip.MustParseAddr("10.1.0.11"))
		return errors.Is(err, ErrNotConfigured)
	})
	_, changed, err := b.At(netip.MustParseAddr("10.1.0.11"))
	if !strings.Contains(err.Error(), late) || !strings.Contains(err.Error(), "set kubeconfig") {
		t.Errorf("the error names neither place nor remedy: %v", err)
	}
	if _, err := b.Token(t.Context(), ksa); !errors.Is(err, ErrNotConfigured) {
		t.Errorf("Token: %v", err)
	}
	if _, err := b.Account(t.Context(), ksa, -1); !errors.Is(err, ErrNotConfigured) {
		t.Errorf("Account: %v", err)
	}
	if p := b.Status().Problem; !strings.Contains(p, "no usable kubeconfig") {
		t.Errorf("status says %q", p)
	}
	// As it happens: first a file that is not finished, then a certificate that is not there, then all
	// of it.
	if err := os.MkdirAll(filepath.Dir(late), 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, late, []byte("apiVersion: v1\nkind: Config\nclus"))
	until(t, "a broken file to be said", func() bool { return strings.Contains(b.Status().Problem, "not a kubeconfig") })
	if _, err := s.WriteKubelet(filepath.Dir(late), "node1"); err != nil {
		t.Fatal(err)
	}
	<-changed
	b.at(t, "10.1.0.11", "p1")
	if st := b.Status(); st.Kubeconfig != late || st.NodeName != "node1" || st.User != "system:node:node1" ||
		st.Credential != "client certificate" || st.Problem != "" || !st.Synced {
		t.Errorf("status %+v", st)
	}
}

// At a TLS bootstrap kubelet's kubeconfig is there before its certificate, and root's copy after
// it. Until then the service's user may not read the one and finds no other, which is no fault of a
// unit.
func TestCopyIsAwaited(t *testing.T) {
	file := filepath.Join(t.TempDir(), "kubelet.conf")
	write(t, file, []byte("apiVersion: v1\nkind: Config\n"))
	if err := os.Chmod(file, 0); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread()      // never unlocked: the thread ends, and its user with it
		_ = syscall.Setfsuid(65534) // without CAP_DAC_OVERRIDE where this is root
		_, err := load(file)
		done <- err
	}()
	err := <-done
	if !errors.Is(err, ErrNotConfigured) || !errors.Is(err, fs.ErrPermission) {
		t.Fatalf("got %v", err)
	}
	want := "no usable kubeconfig: " + file + ": permission denied: waiting for the copy that " +
		"gke-metadata-emulator-credential.service makes once kubelet has its certificate: " +
		"systemctl status gke-metadata-emulator-credential.service"
	if err.Error() != want {
		t.Errorf("got  %s\nwant %s", err, want)
	}
}

// The service starts without an API server and picks it up.
func TestAPIServerAppearsLate(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	s.Refuse()
	b := run(t, s, nil)
	var away *AwayError
	until(t, "the state", func() bool {
		_, _, err := b.At(netip.MustParseAddr("10.1.0.11"))
		return errors.As(err, &away) && !errors.Is(err, errNotListed)
	})
	s.Accept()
	b.at(t, "10.1.0.11", "p1")
}

func TestUnusableKubeconfigs(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	conf := func(user string) string {
		return `{"apiVersion":"v1","kind":"Config","current-context":"c","clusters":[{"name":"c",` +
			`"cluster":{"server":"https://192.0.2.1:6443"}}],` +
			`"contexts":[{"name":"c","context":{"cluster":"c","user":"u"}}],"users":[{"name":"u","user":` + user + `}]}`
	}
	write(t, at("empty.pem"), []byte("\n"))
	for name, c := range map[string]struct{ text, says string }{
		"empty":      {"", "not complete yet: the file is empty"},
		"garbage":    {"\x00\x01 secret: hunter2", "not a kubeconfig"},
		"no-context": {`{"apiVersion":"v1","kind":"Config","current-context":"x"}`, `current-context "x" does not exist`},
		"no-cert":    {conf(`{"client-certificate":"absent.pem","client-key":"absent.pem"}`), at("absent.pem")},
		"empty-cert": {conf(`{"client-certificate":"empty.pem","client-key":"empty.pem"}`), "is empty"},
		"no-token":   {conf(`{"tokenFile":"absent.token"}`), "absent.token"},
		"two-methods": {conf(`{"exec":{"apiVersion":"client.authentication.k8s.io/v1","command":"x"},"token":"hunter2"}`),
			"exec"},
	} {
		t.Run(name, func(t *testing.T) {
			write(t, at(name), []byte(c.text))
			k, err := load(at(name))
			if err == nil {
				_, err = k.credential()
			}
			if !errors.Is(err, ErrNotConfigured) || !strings.Contains(err.Error(), c.says) ||
				!strings.Contains(err.Error(), at(name)) {
				t.Errorf("got %v", err)
			}
			if err != nil && strings.ContainsAny(err.Error(), "\n") {
				t.Errorf("more than a line: %v", err)
			}
			if err != nil && strings.Contains(err.Error(), "hunter2") {
				t.Error("it quotes a secret")
			}
		})
	}
	// A place that exists but cannot be used is not passed over: another one may be another cluster's.
	c := New(Options{Places: []string{at("absent"), at("no-cert"), at("garbage")}})
	if _, err := c.find(); err == nil || !strings.Contains(err.Error(), "no-cert") {
		t.Errorf("find: %v", err)
	}
}

// A certificate whose key is not written yet: the old credential goes on, and the state says why
// when there is none.
func TestCertificateWithoutItsKey(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	b := run(t, s, nil)
	b.at(t, "10.1.0.11", "p1")
	pem := filepath.Join(b.dir, "pki", "kubelet-client-current.pem")
	whole, err := os.ReadFile(pem)
	if err != nil {
		t.Fatal(err)
	}
	cut, _, _ := strings.Cut(string(whole), "-----BEGIN PRIVATE KEY")
	write(t, pem, []byte(cut))
	until(t, "a log line", func() bool { return strings.Contains(b.logs.String(), "cannot be used") })
	b.at(t, "10.1.0.11", "p1")
	s.GrantAudience(provider)
	if _, err := b.Token(t.Context(), ksa); err != nil {
		t.Errorf("with the old credential: %v", err)
	}
}

// Kubelet's certificate rotates: the new one is used at once, and nothing that was known is
// forgotten meanwhile.
func TestCertificateRotates(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	s.GrantAudience(provider)
	for _, poll := range []time.Duration{10 * time.Millisecond, time.Hour} {
		t.Run(fmt.Sprint("poll ", poll), func(t *testing.T) {
			b := run(t, s, func(_ *testNode, o *Options) { o.Poll = poll })
			b.at(t, "10.1.0.11", "p1")
			if _, err := s.RotateNodeCert("node1"); err != nil {
				t.Fatal(err)
			}
			if _, err := s.WriteKubelet(b.dir, "node1"); err != nil {
				t.Fatal(err)
			}
			// With an hour between polls only the 401 can have brought the new one in.
			until(t, "a token with the new certificate", func() bool {
				b.at(t, "10.1.0.11", "p1")
				_, err := b.Token(t.Context(), ksa)
				return err == nil
			})
			s.SetPod(kubetest.Pod{Namespace: "ns1", Name: "after", Node: "node1", ServiceAccount: "ksa",
				Addresses: []string{"10.1.0.77"}})
			s.DropWatches() // the old certificate's streams live on at the server
			b.at(t, "10.1.0.77", "after")
			s.DeletePod("ns1", "after")
			b.at(t, "10.1.0.77")
		})
	}
}

// The credential expires and nobody renews it: a state with a reason, until somebody does.
func TestCredentialNotAccepted(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	b := run(t, s, nil)
	b.at(t, "10.1.0.11", "p1")
	if _, err := s.RotateNodeCert("node1"); err != nil {
		t.Fatal(err)
	}
	var away *AwayError
	until(t, "a refusal", func() bool {
		_, err := b.Token(t.Context(), ksa)
		return errors.As(err, &away) && strings.Contains(err.Error(), "does not accept the credential")
	})
	if _, err := s.WriteKubelet(b.dir, "node1"); err != nil {
		t.Fatal(err)
	}
	s.GrantAudience(provider)
	until(t, "a token", func() bool { _, err := b.Token(t.Context(), ksa); return err == nil })
}

// A token file is read anew too; the node's name then comes from SelfSubjectReview.
func TestTokenFileRotates(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	s.AddToken("first-secret", "system:node:node1", "system:nodes")
	b := run(t, s, func(b *testNode, o *Options) {
		o.Kubeconfig = filepath.Join(b.dir, "conf")
		conf := must(t)(s.TokenKubeconfig("REPLACED"))
		write(t, o.Kubeconfig, []byte(strings.Replace(string(conf), `"token": "REPLACED"`, `"tokenFile": "node.token"`, 1)))
		write(t, filepath.Join(b.dir, "node.token"), []byte("first-secret\n"))
	})
	b.at(t, "10.1.0.11", "p1")
	if c := b.Status().Credential; c != "bearer token" {
		t.Errorf("status says %q", c)
	}
	if n := b.Status().NodeName; n != "node1" || s.Calls("create", "selfsubjectreviews") == 0 {
		t.Errorf("node %q", n)
	}
	s.AddToken("second-secret", "system:node:node1", "system:nodes")
	write(t, filepath.Join(b.dir, "node.token"), []byte("second-secret\n"))
	s.RevokeToken("first-secret")
	s.DropWatches()
	s.SetPod(kubetest.Pod{Namespace: "ns1", Name: "p2", Node: "node1", ServiceAccount: "ksa",
		Addresses: []string{"10.1.0.12"}})
	b.at(t, "10.1.0.12", "p2")
}

// EKS: an exec plugin gives the token, and is asked again when it is refused.
func TestExecPlugin(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	s.AddToken("exec-secret-1", "system:node:node1", "system:nodes")
	b := run(t, s, func(b *testNode, o *Options) {
		plugin := filepath.Join(b.dir, "plugin")
		write(t, filepath.Join(b.dir, "exec.token"), []byte("exec-secret-1"))
		write(t, plugin, []byte("#!/bin/sh\nprintf "+
			"'{\"apiVersion\":\"client.authentication.k8s.io/v1\",\"kind\":\"ExecCredential\",\"status\":{\"token\":\"%s\"}}' "+
			"\"$(cat \"$1\")\"\n"))
		o.Kubeconfig = filepath.Join(b.dir, "conf")
		write(t, o.Kubeconfig, must(t)(s.ExecKubeconfig(plugin, filepath.Join(b.dir, "exec.token"))))
	})
	b.at(t, "10.1.0.11", "p1")
	s.AddToken("exec-secret-2", "system:node:node1", "system:nodes")
	write(t, filepath.Join(b.dir, "exec.token"), []byte("exec-secret-2"))
	s.RevokeToken("exec-secret-1")
	s.GrantAudience(provider)
	until(t, "a token after the plugin was asked again", func() bool {
		_,
			err := b.Token(t.Context(), ksa)
		return err == nil
	})
	if st := b.Status(); st.Credential != "plugin "+filepath.Join(b.dir, "plugin") || st.User != "system:node:node1" {
		t.Errorf("status says %q of %q", st.Credential, st.User)
	}
}

// The node's name: configured, else the certificate's, else SelfSubjectReview's, else the host's. A
// mismatch is one error line.
func TestNodeName(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	t.Run("mismatch", func(t *testing.T) {
		b := run(t, s, func(_ *testNode, o *Options) { o.NodeName = "node7" })
		until(t, "the refusal", func() bool {
			var f *ForbiddenError
			_, _, err := b.At(netip.MustParseAddr("10.1.0.11"))
			return errors.As(err, &f) && strings.Contains(err.Error(), "set nodeName to the node of this credential") &&
				f.Manifest() == ""
		})
		if n := strings.Count(b.logs.String(),
			`nodeName is \"node7\", but the credential belongs to node \"node1\"`); n != 1 {
			t.Errorf("%d lines", n)
		}
		if st := b.Status(); st.NodeName != "node7" || !strings.Contains(st.NodeNameProblem, "node1") {
			t.Errorf("status %+v", st)
		}
	})
	t.Run("configured", func(t *testing.T) {
		b := run(t, s, func(_ *testNode, o *Options) { o.NodeName = "node1" })
		b.at(t, "10.1.0.11", "p1")
		if st := b.Status(); st.NodeNameProblem != "" {
			t.Errorf("status %+v", st)
		}
	})
	t.Run("host name", func(t *testing.T) {
		s.AddUser("gke-metadata-emulator", "dedicated-secret")
		host, err := os.Hostname()
		if err != nil {
			t.Fatal(err)
		}
		s.SetPod(kubetest.Pod{Namespace: "ns1", Name: "here", Node: strings.ToLower(host), ServiceAccount: "ksa",
			Addresses: []string{"10.3.0.1"}})
		b := run(t, s, func(b *testNode, o *Options) {
			o.Kubeconfig = filepath.Join(b.dir, "conf")
			write(t, o.Kubeconfig, must(t)(s.TokenKubeconfig("dedicated-secret")))
			write(t, filepath.Join(b.dir, "x.token"), []byte("dedicated-secret"))
		})
		b.at(t, "10.3.0.1", "here")
	})
}

// Another cluster's kubeconfig: nothing of the old one's is believed.
func TestClusterChanges(t *testing.T) {
	one, two := newServer(t, kubetest.Options{}), newServer(t, kubetest.Options{})
	two.SetPod(kubetest.Pod{Namespace: "ns1", Name: "other", Node: "node1", ServiceAccount: "ksa",
		Addresses: []string{"10.1.0.11"}})
	two.DeletePod("ns1", "p1")
	two.SetServiceAccount("ns1", "ksa", map[string]string{AnnotationEmail: "two@p.iam.gserviceaccount.com"})
	b := run(t, one, nil)
	b.at(t, "10.1.0.11", "p1")
	if _, err := b.Account(t.Context(), ksa, -1); err != nil {
		t.Fatal(err)
	}
	if _, err := two.WriteKubelet(b.dir, "node1"); err != nil {
		t.Fatal(err)
	}
	b.at(t, "10.1.0.11", "other")
	until(t, "the other cluster's account", func() bool {
		a, err := b.Account(t.Context(), ksa, -1)
		return err == nil && a.GoogleEmail == "two@p.iam.gserviceaccount.com"
	})
}

// Run leaves nothing behind, whatever state it is stopped in.
func TestNoGoroutineIsLeft(t *testing.T) {
	s := newServer(t, kubetest.Options{})
	for name, prepare := range map[string]func(*testing.T, *testNode){
		"synced": func(t *testing.T, b *testNode) { b.at(t, "10.1.0.11", "p1") },
		"away":   func(_ *testing.T, b *testNode) { s.Refuse() },
		"held": func(t *testing.T, b *testNode) {
			b.at(t, "10.1.0.11", "p1")
			t.Cleanup(s.Inject(kubetest.Fault{Verb: "get", Hold: make(chan struct{})}))
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if _, err := b.Account(ctx, ksa, 0); !errors.Is(err, context.Canceled) {
				t.Errorf("Account: %v", err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			defer s.Accept()
			b := run(t, s, nil)
			prepare(t, b)
			b.stop()
			until(t, "goroutines to end", func() bool {
				buf := make([]byte, 1<<20)
				for _, g := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
					if strings.Contains(g, "testing.tRunner") || strings.Contains(g, "kubetest.") {
						continue // the test itself; the server
					}
					if strings.Contains(g, "service/kube.") || strings.Contains(g, "k8s.io/client-go/") ||
						strings.Contains(g, "http2clientConn") || strings.Contains(g, "http2ClientConn).readLoop") {
						return false
					}
				}
				return true
			})
		})
	}
}
