package service

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
)

// process starts the service as systemd would: as a process of its own, with the listener and with
// what is held.
func (b *testNode) process(t *testing.T, k *keeper) *exec.Cmd {
	t.Helper()
	listener, err := b.listener.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	files, names := []*os.File{listener}, []string{"gke-metadata-emulator.socket"}
	for _, f := range k.holding(t) {
		files, names = append(files, f), append(names, f.Name())
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self)
	cmd.Env = append(os.Environ(), benchServer+"="+filepath.Join(b.dir, "config.yaml"), "NOTIFY_SOCKET="+k.socket,
		fmt.Sprintf("LISTEN_FDS=%d", len(files)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	cmd.ExtraFiles, cmd.Stderr = files, b.log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		_ = f.Close()
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	return cmd
}

// answer asks until there is one: the pods of a new process are not known at once.
func (b *testNode) answerTo(t *testing.T, from, path string) string {
	t.Helper()
	var body string
	b.eventually(t, path+" is answered", func() bool {
		res := b.ask(t, from, "GET", path, "")
		body = res.body
		return res.StatusCode == 200
	})
	return body
}

// traffic counts the requests to Google, and those for ServiceAccount tokens.
func (b *testNode) traffic() (n int) {
	for _, m := range googletest.Methods {
		n += b.google.Calls(m)
	}
	return n + b.kube.Calls("create", "serviceaccounts/token")
}

// what a process minted before a SIGKILL, the next one hands out, and asks nobody for.
func TestR16TokensSurviveSIGKILL(t *testing.T) {
	b := newWorld(t)
	for _, name := range []string{"principal", "hostile", "denied", "missing"} {
		b.kube.DeletePod("default", name)
	}
	b.configure(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	b.Service = &Service{listener: l}
	k := newKeeper(t, filepath.Join(b.dir, "notify"))

	kill := b.process(t, k)
	want := map[string]string{}
	for _, pod := range []string{linked, unlinked} {
		want[pod] = tokenIn(t, b.answerTo(t, pod, accts+"default/token"))
	}
	id := b.answerTo(t, linked, accts+"default/identity?audience=https://service.example.com")
	for _, value := range []string{want[linked], want[unlinked], id} {
		b.eventually(t, "all tokens are left", func() bool { return k.holds(t, value) })
	}
	before := b.traffic()
	if err := kill.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = kill.Wait()

	stop := b.process(t, k)
	for pod, value := range want {
		if got := tokenIn(t, b.answerTo(t, pod, accts+"default/token")); got != value {
			t.Errorf("%s: another token than before the SIGKILL", pod)
		}
	}
	if b.answerTo(t, linked, accts+"default/identity?audience=https://service.example.com") != id {
		t.Error("another ID token than before the SIGKILL")
	}
	if n := b.traffic() - before; n != 0 {
		t.Errorf("%d calls to Google and Kubernetes for tokens that were there", n)
	}

	// SIGTERM: what came a moment ago is left too, before systemd hears that we stop.
	last := tokenIn(t, b.answerTo(t, linked, accts+"default/token?scopes=https://www.googleapis.com/auth/last"))
	if err := stop.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := stop.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
	b.eventually(t, "the last token is left", func() bool { return k.holds(t, last) })
	said := k.heardSoFar()
	if at := slices.Index(said, "STOPPING=1"); at < 0 ||
		!slices.ContainsFunc(said[max(0, at-2):at], func(s string) bool { return strings.HasPrefix(s, "FDSTORE=1 ") }) {
		t.Errorf("no snapshot right before STOPPING=1: %q", said)
	}
	storeBeforeRemove(t, said)

	// Another lifetime of tokens is another configuration.
	b.replace(t, "config.yaml", "caFile: ca.pem}", "caFile: ca.pem, tokenLifetime: 30m}")
	before = b.traffic()
	other := b.process(t, k)
	fresh := tokenIn(t, b.answerTo(t, linked, accts+"default/token"))
	if fresh == want[linked] || b.traffic() == before {
		t.Error("another configuration got the token of the one before")
	}
	b.eventually(t, "its token has taken the place of the others",
		func() bool { return k.holds(t, fresh) && !k.holds(t, last) })
	if err := other.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = other.Wait()
	for _, secret := range append(b.google.Secrets(), b.kube.IssuedTokens()...) {
		if strings.Contains(b.log.String(), secret) {
			t.Error("a secret is in the log")
		}
	}
	if t.Failed() {
		t.Logf("the service said:\n%s", b.log)
	}
}

// storeBeforeRemove looks that nothing was removed before something newer was stored.
func storeBeforeRemove(t *testing.T, said []string) {
	t.Helper()
	stored := 0
	for _, s := range said {
		switch {
		case strings.HasPrefix(s, "FDSTORE=1 "):
			stored++
		case strings.HasPrefix(s, "FDSTOREREMOVE=1 "):
			if stored--; stored < 1 {
				t.Fatalf("the last one was removed: %q", said)
			}
		}
	}
}

const (
	handedOver = "handed-over" // a name

	somebodyElses = -1 // in the place of seals: a sealed memfd of another user's
)

// memfd holds b with the seals.
func memfd(t *testing.T, b []byte, seals int) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), handedOver)
	if _, err := f.Write(b); err != nil {
		t.Fatal(err)
	}
	if seals == somebodyElses {
		if err := f.Chown(65534, 65534); err != nil {
			t.Fatal(err)
		}
		seals = allSeals
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		t.Fatal(err)
	}
	return f
}

func renamed(t *testing.T, f *os.File) *os.File {
	t.Helper()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	return os.NewFile(uintptr(fd), handedOver)
}

// What lies in systemd's hands is believed only if a process of ours sealed it for this
// configuration.
func TestR16WhatIsHandedOverIsChecked(t *testing.T) {
	b := newWorld(t)
	b.configure(t, "prefetch: none")
	k := newKeeper(t, filepath.Join(b.dir, "notify"))
	t.Setenv("NOTIFY_SOCKET", k.socket)
	b.start(t)
	value := tokenIn(t, b.answerTo(t, linked, accts+"default/token"))
	b.eventually(t, "the token is left", func() bool { return k.holds(t, value) })
	b.end(t)
	good := k.contents(t)[0]
	edit := func(at int, with ...byte) []byte {
		return append(append(slices.Clone(good[:at]), with...), good[at+len(with):]...)
	}
	written := binary.BigEndian.Uint64(good[headerLength-8:])
	stamped := func(b []byte, written uint64) []byte {
		b = slices.Clone(b)
		binary.BigEndian.PutUint64(b[headerLength-8:], written)
		return b
	}
	sealed := func(b ...[]byte) func(*testing.T) []*os.File {
		return func(t *testing.T) (files []*os.File) {
			for _, b := range b {
				files = append(files, memfd(t, b, allSeals))
			}
			return files
		}
	}
	with := func(seals int) func(*testing.T) []*os.File {
		return func(t *testing.T) []*os.File { return []*os.File{memfd(t, good, seals)} }
	}
	empty := good[:headerLength+len("gke-metadata-emulator tokens 1\n")]
	for _, tt := range []struct {
		name  string
		files func(*testing.T) []*os.File
		warm  bool
		says  string // in the log
	}{
		{"as it was left", sealed(good), true, "tokens of the previous process are used"},
		{"with an older one after it", sealed(good, stamped(empty, written-1)), true,
			"tokens of the previous process are used"},
		{"with an older one before it", sealed(stamped(empty, written-1), good), true,
			"tokens of the previous process are used"},
		{"with a newer one after it", sealed(good, stamped(empty, written+1)), false, ""},
		{"with a newer one of another configuration", sealed(good, stamped(edit(len(snapshotForm), 'x'), written+1)), true,
			"tokens of the previous process are used"},
		{"with three that are not ours", func(t *testing.T) []*os.File {
			return []*os.File{memfd(t, []byte("x"), allSeals), memfd(t, nil, allSeals), memfd(t, good, allSeals),
				memfd(t, good, 0)}
		}, true, "tokens of the previous process are used"},
		{"another configuration", sealed(edit(len(snapshotForm), good[len(snapshotForm)]^1)), false, ""},
		{"not sealed", with(0), false, "not sealed"},
		{"can be written to", with(allSeals &^ unix.F_SEAL_WRITE), false, "not sealed"},
		{"can grow", with(allSeals &^ unix.F_SEAL_GROW), false, "not sealed"},
		{"can shrink", with(allSeals &^ unix.F_SEAL_SHRINK), false, "not sealed"},
		{"can be sealed further", with(allSeals &^ unix.F_SEAL_SEAL), false, "not sealed"},
		{"another user's", with(somebodyElses), false, "not by this user"},
		{"a file", func(t *testing.T) []*os.File {
			b.write(t, "snapshot", string(good))
			f, err := os.Open(filepath.Join(b.dir, "snapshot"))
			if err != nil {
				t.Fatal(err)
			}
			return []*os.File{renamed(t, f)}
		}, false, "not sealed"},
		{"a pipe", func(t *testing.T) []*os.File {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = w.Close() })
			return []*os.File{renamed(t, r)}
		}, false, "not a regular file"},
		{"a directory", func(t *testing.T) []*os.File {
			f, err := os.Open(b.dir)
			if err != nil {
				t.Fatal(err)
			}
			return []*os.File{renamed(t, f)}
		}, false, "not a regular file"},
		{"empty", sealed(nil), false, "not a token snapshot"},
		{"another form", sealed(edit(len(snapshotForm)-2, '2')), false, "not a token snapshot"},
		{"without tokens' form", sealed(good[:headerLength]), false, "tokens of the previous process are discarded"},
		{"cut short", sealed(good[:len(good)-1]), false, "tokens of the previous process are discarded"},
		{"a byte more", sealed(append(slices.Clone(good), 0)), false, "tokens of the previous process are discarded"},
		{"tampered with", sealed(edit(len(empty), 0x80)), false, "tokens of the previous process are discarded"},
		{"too long", sealed(append(slices.Clone(good), make([]byte, token.LongestSnapshot)...)), false,
			"more than a snapshot has"},
		{"from the future", sealed(stamped(good, 1<<62)), false, "later than now"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if strings.HasPrefix(tt.name, "another user") && os.Geteuid() != 0 {
				t.Skip("a file can be given to another user by root only")
			}
			b.log.take()
			k.hold(t, tt.files(t))
			b.left = k.holding(t)
			b.start(t)
			defer b.end(t)
			before := b.traffic()
			got := tokenIn(t, b.answerTo(t, linked, accts+"default/token"))
			if warm := b.traffic() == before; warm != tt.warm || (got == value) != tt.warm {
				t.Errorf("warm is %v, the same token %v; want %v", warm, got == value, tt.warm)
			}
			if !strings.Contains(b.log.String(), tt.says) {
				t.Errorf("the log does not say %q:\n%s", tt.says, b.log)
			}
			b.eventually(t, "what was left is removed", func() bool {
				return !slices.ContainsFunc(k.names(), func(name string) bool { return name == handedOver })
			})
		})
	}
}

// The tokens of the process before answer nobody until the pods of this node are known anew.
func TestR16NoAnswerBeforeTheFirstSync(t *testing.T) {
	b := newWorld(t)
	b.configure(t, "prefetch: none")
	k := newKeeper(t, filepath.Join(b.dir, "notify"))
	t.Setenv("NOTIFY_SOCKET", k.socket)
	b.start(t)
	path := accts + "default/token"
	value, other := tokenIn(t, b.answerTo(t, linked, path)), tokenIn(t, b.answerTo(t, unlinked, path))
	b.eventually(t, "both tokens are left", func() bool { return k.holds(t, value) && k.holds(t, other) })
	b.end(t)

	b.kube.Refuse()
	b.kube.DeletePod("default", "plain")
	b.kube.SetPod(kubetest.Pod{Namespace: "default", Name: "other", ServiceAccount: "reader", Node: node,
		Addresses: []string{unlinked}})
	b.left = k.holding(t)
	before := b.traffic()
	b.start(t)
	if n := len(b.Status().Tokens); n < 2 {
		t.Errorf("%d tokens were taken over", n)
	}
	for _, pod := range []string{linked, unlinked} {
		if res := b.ask(t, pod, "GET", path, ""); res.StatusCode == 200 {
			t.Errorf("%s, while no pod is known: %d", pod, res.StatusCode)
		}
	}
	b.kube.Accept()
	if got := tokenIn(t, b.answerTo(t, linked, path)); got != value {
		t.Error("another token than before")
	}
	if got := tokenIn(t, b.answerTo(t, unlinked, path)); got != value {
		t.Error("the address has another owner now, who got another token than its ServiceAccount's")
	}
	if n := b.traffic() - before; n != 0 {
		t.Errorf("%d calls to Google and Kubernetes for tokens that were there", n)
	}
	b.eventually(t, "K-04: the token that no pod uses is gone",
		func() bool { return k.holds(t, value) && !k.holds(t, other) })
}

// while the configuration is broken, what was left stays; the mended one takes it over.
func TestR16BrokenConfiguration(t *testing.T) {
	b := newWorld(t)
	b.configure(t, "prefetch: none")
	k := newKeeper(t, filepath.Join(b.dir, "notify"))
	t.Setenv("NOTIFY_SOCKET", k.socket)
	b.start(t)
	value := tokenIn(t, b.answerTo(t, linked, accts+"default/token"))
	b.eventually(t, "the token is left", func() bool { return k.holds(t, value) })
	b.end(t)
	b.configure(t, "prefetch: none", "prefetch: sometimes")
	b.left = k.holding(t)
	b.start(t)
	if b.active().Broken == nil || !k.holds(t, value) {
		t.Fatal("it is not broken, or nothing is left")
	}
	before := b.traffic()
	b.configure(t, "prefetch: none")
	if got := tokenIn(t, b.answerTo(t, linked, accts+"default/token")); got != value || b.traffic() != before {
		t.Error("the mended configuration has not got the token")
	}
}

// A reload takes the tokens along where they are still the right ones, and leaves none behind where
// they are not.
func TestR16Reload(t *testing.T) {
	b := newWorld(t)
	b.configure(t, "prefetch: none")
	k := newKeeper(t, filepath.Join(b.dir, "notify"))
	t.Setenv("NOTIFY_SOCKET", k.socket)
	b.start(t)
	value := tokenIn(t, b.answerTo(t, linked, accts+"default/token"))
	before, old := b.traffic(), b.active().backend
	b.configure(t, "prefetch: none", "limits: {mintsPerPod: 3}")
	b.hangUp()
	b.eventually(t, "other limits are another backend", func() bool { return b.active().backend != old })
	if got := tokenIn(t, b.answerTo(t, linked, accts+"default/token")); got != value || b.traffic() != before {
		t.Error("other limits cost the tokens")
	}
	b.eventually(t, "the token is left", func() bool { return k.holds(t, value) })

	b.replace(t, "config.yaml", "caFile: ca.pem}", "caFile: ca.pem, tokenLifetime: 30m}")
	b.hangUp()
	b.eventually(t, "the tokens of the configuration before are removed", func() bool {
		return len(k.contents(t)) == 1 &&
			!k.holds(t, value)
	})
	if got := tokenIn(t, b.answerTo(t, linked, accts+"default/token")); got == value {
		t.Error("the token of the configuration before was issued")
	}
}

// Many changes make one snapshot a second at most.
func TestR16OneSnapshotASecond(t *testing.T) {
	b := newWorld(t)
	b.configure(t, "prefetch: none")
	k := newKeeper(t, filepath.Join(b.dir, "notify"))
	t.Setenv("NOTIFY_SOCKET", k.socket)
	b.start(t)
	var last string
	for round := range 3 {
		stored := len(k.heardSoFar())
		for i := range 5 {
			last = tokenIn(t, b.answerTo(t, linked,
				fmt.Sprintf("%sdefault/token?scopes=https://www.googleapis.com/auth/s%d.%d", accts, round, i)))
		}
		b.eventually(t, "another snapshot is left", func() bool { return len(k.heardSoFar()) > stored })
	}
	b.eventually(t, "the last one is left", func() bool { return k.holds(t, last) })
	said := k.heardSoFar()
	storeBeforeRemove(t, said)
	var at []int64
	for _, s := range said {
		var n int64
		if _, err := fmt.Sscanf(s, "FDSTORE=1 tokens-%d", &n); err == nil {
			at = append(at, n)
		}
	}
	for i := 1; i < len(at); i++ {
		if apart := time.Duration(at[i] - at[i-1]); apart < time.Second {
			t.Errorf("two snapshots %v apart", apart)
		}
	}
}
