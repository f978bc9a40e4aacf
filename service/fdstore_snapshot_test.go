package service

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// systemd's queue is short, and everybody's: a full one is an error that passes, and never a wait.
func TestFDStoreDoesNotWaitForSystemd(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	f := newFDStore(socket, logrus.New())
	nothing := func() []byte { return nil }
	for i := 0; ; i++ {
		if err = f.put([32]byte{}, nothing); err != nil {
			break
		}
		if i == 100_000 {
			t.Fatal("nobody reads, and all goes through")
		}
	}
	if !errors.Is(err, unix.EAGAIN) {
		t.Errorf("%v, want EAGAIN", err)
	}
	go func() { _, _ = io.Copy(io.Discard, c) }()
	for deadline := time.Now().Add(testTimeout); f.put([32]byte{}, nothing) != nil; {
		if time.Now().After(deadline) {
			t.Fatal("systemd reads again, and nothing goes through")
		}
	}
	if len(f.names) != 1 {
		t.Errorf("%d are held", len(f.names))
	}
}

func TestFDStoreSockets(t *testing.T) {
	abstract := fmt.Sprintf("@gke-metadata-emulator-test-%d", os.Getpid())
	k := newKeeper(t, abstract)
	for socket, want := range map[string]int{"": 0, "vsock:2:1": 0, "relative": 0, abstract: 1} {
		f := newFDStore(socket, logrus.New())
		if err := f.put([32]byte{}, func() []byte { return []byte("tokens") }); err != nil {
			t.Errorf("%q: %v", socket, err)
		}
		if len(f.names) != want {
			t.Errorf("%q: %d are held", socket, len(f.names))
		}
	}
	for deadline := time.Now().Add(testTimeout); !k.holds(t, "tokens"); {
		if time.Now().After(deadline) {
			t.Fatal("nothing came")
		}
	}
	if err := newFDStore("/nowhere/notify", logrus.New()).put([32]byte{}, func() []byte { return nil }); !errors.Is(err,
		unix.ENOENT) {
		t.Errorf("a socket that is not there: %v", err)
	}
}

// No child gets the tokens, and nobody changes them.
func TestSealedMemfd(t *testing.T) {
	f, err := seal([]byte("tokens"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("children inherit it: %#x, %v", flags, err)
	}
	if _, err := f.WriteAt([]byte("x"), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("written to: %v", err)
	}
	if err := f.Truncate(0); !errors.Is(err, unix.EPERM) {
		t.Errorf("cut: %v", err)
	}
	if string(contentOf(t, f)) != "tokens" {
		t.Error("it holds something else")
	}
}

// What tokens depend on is in the digest, and how many there are is not.
func TestDigest(t *testing.T) {
	base := needs{audience: "a"}
	for name, change := range map[string]func(*needs){
		"kubeconfig": func(n *needs) { n.kubeconfig = "/x" },
		"audience":   func(n *needs) { n.audience = "b" },
		"unlinked":   func(n *needs) { n.unlinked = "x@y" },
		"provider":   func(n *needs) { n.identity.Audience = "x" },
		"pool":       func(n *needs) { n.identity.Pool = "x" },
		"STS":        func(n *needs) { n.google.STSURL = "x" },
		"IAM":        func(n *needs) { n.google.IAMCredentialsURL = "x" },
		"lifetime":   func(n *needs) { n.google.TokenLifetime = time.Minute },
		"quota":      func(n *needs) { n.google.QuotaProject = "x" },
		"universe":   func(n *needs) { n.google.UniverseDomain = "x" },
		"CA":         func(n *needs) { n.ca[0] = 1 },
	} {
		if n := base; func() bool { change(&n); return n.digest() == base.digest() }() {
			t.Errorf("another %s is the same digest", name)
		}
	}
	n := base
	n.nodeName, n.prefetch, n.keysPerPod = "x", "all", 1
	if n.digest() != base.digest() {
		t.Error("node name, prefetch and limits change no token")
	}
}

// BenchmarkPut is what a snapshot costs on its way: memfd, seals, and the datagram. 100 and 500
// tokens of 1 KB are 121 and 607 KB.
func BenchmarkPut(b *testing.B) {
	k := newKeeper(b, filepath.Join(b.TempDir(), "notify"))
	for _, size := range []int{121_000, 607_000} {
		tokens := bytes.Repeat([]byte("x"), size)
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			f := newFDStore(k.socket, logrus.New())
			for b.Loop() {
				for f.put([32]byte{}, func() []byte { return tokens }) != nil {
					b.StopTimer()
					k.catchUp(b) // its queue was full
					b.StartTimer()
				}
			}
		})
	}
}
